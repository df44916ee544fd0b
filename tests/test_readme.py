"""The README: every command in it is run, in a copy with small stand-ins, or listed here with why it is not.

What the README indents are commands and their comments, a fenced block is what they print, and a fenced block of
Python is a configuration of one's own.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from config import FIELDS, load_config

README = (ROOT / "README.md").read_text()
OWN = "config/mine.py"  # the worked example

HOURS, MANY, INSTALL = "trains GPT-2 size for hours", "takes more machines than one", "takes a package index"
NOT_HERE = {
    "make demo": "makes an environment and trains for minutes",
    "make test": "runs this test",
    ". .venv/bin/activate": "is for the shell that runs the others",
    "python3 -m venv .venv && . .venv/bin/activate": "makes an environment",
    "pip install -r requirements.txt matplotlib==3.11.2 pyarrow==26.0.1": INSTALL,
    "pip install huggingface_hub": INSTALL,
    "pip install wikiextractor==3.1.0": INSTALL,
    "pip install transformers==5.23.0 safetensors==0.8.0": INSTALL,
    "pip install -r requirements-test.txt": INSTALL,
    'hf download wikimedia/wikipedia --repo-type dataset --include "20231101.en/*" --local-dir data/hub': "downloads",
    "curl -O https://dumps.wikimedia.org/enwiki/latest/enwiki-latest-pages-articles.xml.bz2": "downloads",
    "python prepare_wiki.py data/hub/20231101.en --min_tokens 1900 --max_articles 237758 --out data/wiki":
        "reads what was downloaded",
    "python prepare_wiki.py enwiki-latest-pages-articles.xml.bz2 --min_tokens 1900 --max_articles 237758 "
    "--out data/wiki": "reads what was downloaded",
    "python train.py config/curriculum9.py --data_dir=data/wiki --resume=True": HOURS,
    "python train.py config/curriculum9.py --data_dir=data/wiki --resume=True --max_steps=50_000 "
    "--cooldown_steps=5_000": HOURS,
    "python train.py config/fixed2048.py --data_dir=data/wiki --resume=True": HOURS,
    "torchrun --nproc_per_node=8 train.py config/curriculum9.py --data_dir=data/wiki --resume=True": HOURS,
    "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1": MANY,
    "torchrun --nnodes=2 --nproc_per_node=8 --max_restarts=100 --rdzv_backend=c10d --rdzv_id=curriculum9 "
    "--rdzv_endpoint=first-machine:29400 train.py config/curriculum9.py --data_dir=data/wiki --resume=True": MANY,
    "python bench/throughput.py --nanogpt=PATH --rounds 4": "trains beside a checkout of nanoGPT: half an hour",
    "python bench/kills.py": "kills forty runs: minutes",
    "python bench/processes.py": "compares steps of every shape: minutes",
}  # fmt: skip
PRINTED_ELSEWHERE = {
    "The history of": "what the demo's model wrote",
    "optimizer  ": "bench/kills.py",
    "shape  2 processes": "bench/processes.py",
}


def commands(text: str) -> list[str]:
    """The indented lines of Markdown outside its fences, without comments; a backslash joins a line to the next."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = re.findall("^    (.*)$", re.sub(r"\\\n +", "", text), re.MULTILINE)
    return [line for line in lines if not line.startswith("#")]


def fenced(kind: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [block for found, block in blocks if found == kind]


def forms(text: str) -> list[str]:
    """Its lines, however the columns are spaced and whatever the numbers are."""
    return [re.sub(r"[+-]?[\d.,]*\d", "#", " ".join(line.split())) for line in text.splitlines()]


RUN = [command for command in commands(README) if command not in NOT_HERE]


def shell(command: str, folder: Path) -> subprocess.CompletedProcess:
    """In the folder, offline, with this Python as `python`."""
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, shell=True, cwd=folder, env=env, capture_output=True, text=True, timeout=300,
                          stdin=subprocess.DEVNULL, check=False)  # fmt: skip


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The repository with the README's own configuration; it and the demo cut to two tiny steps; and for articles
    pieces of the README."""
    folder = tmp_path_factory.mktemp("readme") / "copy"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "__pycache__", "data", "out"))
    articles = [{"title": f"From {i}", "text": README[i : i + 1000]} for i in range(0, len(README), 1000)]
    (folder / "articles.jsonl").write_text("".join(json.dumps(article) + "\n" for article in articles))
    for name in ("sample", "wiki"):
        made = shell(f"python prepare_wiki.py articles.jsonl --val_fraction 0.4 --out data/{name}", folder)
        assert made.returncode == 0, made.stderr
    (folder / OWN).write_text(fenced("python")[0])
    for name in (OWN, "config/demo.py"):
        with open(folder / name, "a") as file:
            file.write("\nn_layer, n_head, n_embd, compile = 1, 2, 32, False\n"
                       "max_steps, log_interval, eval_tokens = 2, 1, 2_048\n")  # fmt: skip
    return folder


def test_every_command_that_can_run_here_does_and_prints_what_the_readme_shows(copy):
    made = shell("python train.py config/demo.py", copy)
    assert made.returncode == 0, made.stderr
    for name in ("curriculum9", "fixed2048"):
        shutil.copytree(copy / "out/demo", copy / "out" / name)
    printed = set(forms(made.stdout))
    for command in RUN:
        assert "python " in command, f"{command!r} is neither run nor in NOT_HERE"
        done = shell(command, copy)
        assert done.returncode == 0, (command, done.stderr)
        printed |= set(forms(done.stdout))
    assert len(RUN) >= 12 and (copy / "out/curriculum9/loss.png").exists()
    shown = [block for block in fenced("") if not block.strip().startswith(tuple(PRINTED_ELSEWHERE))]
    assert len(shown) >= 5
    for first, *lines in map(forms, shown):
        assert {first, *(line for line in lines if "#" not in line)} <= printed  # the headers of its tables


@pytest.mark.parametrize("command", [command for command in NOT_HERE if ".py" in command])
def test_a_command_that_cannot_run_here_names_a_program_and_keys_that_exist(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    program, arguments = words[at], words[at + 1 :]
    if program == "train.py":
        assert load_config(arguments).stages
    else:
        source = Path(program).read_text()
        assert all(f'"{word.partition("=")[0]}"' in source for word in arguments if word.startswith("--"))


def test_the_readme_has_every_command_that_is_listed_here():
    assert set(NOT_HERE) <= set(commands(README))


def test_a_new_command_does_not_go_unnoticed():
    text = "Text.\n\n    # no command\n    pip install spam\n    python a.py \\\n        --b=c\n\n```\n    out\n```\n"
    assert commands(text) == ["pip install spam", "python a.py --b=c"]
    assert set(re.findall(r"^```(\w*)$", README, re.MULTILINE)) == {"", "python"}  # no commands in fences


def test_the_configurations_in_the_readme_load(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    configs = fenced("python")
    assert len(configs) == 2
    for text in configs:
        (tmp_path / "mine.py").write_text(text)
        config = load_config([str(tmp_path / "mine.py")])
        assert config.max_steps > config.stages[-1][0]


def test_the_readme_s_files_exist():
    named = [line.split("`")[1] for line in README.splitlines() if line.startswith("| `")]
    assert len(named) >= 7 and all((ROOT / name).exists() for name in named)
    assert all((ROOT / name).exists() for name in re.findall(r"\]\(([\w/.]+)\)", README))
    programs = {name for name in re.findall(r"`(?:python )?([\w/]+\.py)`", README) if name != OWN}
    assert all((ROOT / name).exists() or (ROOT / "config" / name).exists() for name in programs)


def test_what_the_readme_installs_is_what_is_tested():
    pins = set(re.findall(r"[\w-]+==[\d.]+", " ".join(commands(README))))
    tested = "".join(path.read_text() for path in ROOT.glob("requirements*.txt")).split()
    assert len(pins) >= 5 and pins <= set(tested)


def test_the_readme_s_options_exist():
    sources = "".join(path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("bench/*.py")])
    options = set(re.findall(r"`--(\w+)", README)) - {"max_restarts"}  # torchrun's
    assert len(options) >= 8
    assert all(option in FIELDS or f'"--{option}"' in sources for option in options)
