# The two commands: `make demo` trains a small GPT through the nine stages on real articles, `make test` checks the code.
# `make test-all` adds what takes longer: kills of compiled runs, torchrun, compiled against eager, steps of the demo.

PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
PYTEST := OMP_NUM_THREADS=1 python -m pytest -q -n 2 --dist worksteal  # each test on one core: most wait for a process

.PHONY: demo test test-slow test-all

demo: .venv/installed-demo
	python prepare_wiki.py --sample --out data/sample
	python curriculum.py config/demo.py --data_dir=data/sample --speed=4000
	python train.py config/demo.py --resume=True
	python sample.py --out_dir=out/demo --prompt="The history of"
	python bench/plot.py out/demo

test: .venv/installed-test
	ruff check .
	$(PYTEST) -m "not slow"

test-slow: .venv/installed-test
	$(PYTEST) -m slow
	python prepare_wiki.py --sample --out data/sample
	rm -rf out/test && python train.py config/demo.py --out_dir=out/test --max_steps=4 --stages='[(0, 64, 64, 11.3), (2, 2048, 2, 0.3)]'

test-all: test test-slow

.venv/installed-%: requirements-%.txt requirements.txt requirements-demo.txt
	.venv/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@
