# The two commands: `make demo` trains a small GPT through the nine stages on real articles, `make test` checks it all.

PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: demo test

demo: .venv/installed-demo
	python prepare_wiki.py --sample --out data/sample
	python curriculum.py config/demo.py --data_dir=data/sample --speed=4000
	python train.py config/demo.py --resume=True
	python sample.py --out_dir=out/demo --prompt="The history of"
	python bench/plot.py out/demo

test: .venv/installed-test
	ruff check .
	OMP_NUM_THREADS=1 python -m pytest -q -n 2 --dist worksteal  # two tests at a time, each on a core: most wait for one process

.venv/installed-%: requirements-%.txt requirements.txt requirements-demo.txt
	test -d .venv || $(PYTHON) -m venv .venv
	python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@
