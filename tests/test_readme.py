"""README and docs: every command in them runs in a folder with small stand-ins, or NOT_HERE says why not.

In both, indented lines are commands and comments, fenced blocks are output, and fenced Python is a configuration.
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
from conftest import ROOT, call_program

import model
from curriculum import Curriculum
from settings import KEYS, load_config

README, DOCS = (ROOT / "README.md").read_text(), (ROOT / "docs/running.md").read_text()
OWN = "config/mine.py"  # the worked example

NOT_HERE = {
    r"make \w+": "runs this test, or trains for minutes", r"python3 -m venv .*|\. \S+activate": "makes the environment",
    r"pip install .*|hf download .*|curl .*|.* --sample .*": "needs the network",
    r"python prepare_wiki.py .* --out data/wiki": "reads all of Wikipedia",
    r"(until python|python|torchrun .*) train.py config/(curriculum9|fixed2048).py .*": "trains for hours",
    r"python llama.cpp/.*": "is a program of llama.cpp", r"export .*": "is for the shell that runs torchrun"}
PRINTED_ELSEWHERE = "The history of"  # a text by the demo's model


def commands(text: str) -> list[str]:
    """Return Markdown's indented lines outside its fences, without comments; a backslash joins a line to the next."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = re.findall("^    (.*)$", re.sub(r"\\\n +", "", text), re.MULTILINE)
    return [line for line in lines if not line.startswith("#")]


def fenced(kind: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README + DOCS, re.MULTILINE | re.DOTALL)
    return [block for found, block in blocks if found == kind]


def forms(text: str) -> list[str]:
    """Return the lines with # for each number and one space between columns."""
    return [re.sub(r"[+-]?[\d.,]*\d", "#", " ".join(line.split())) for line in text.splitlines()]


RUN = [command for command in commands(README + DOCS) if not any(re.fullmatch(kind, command) for kind in NOT_HERE)]
NOT_RUN = [command for command in commands(README + DOCS) if command not in RUN]


def run(command: str) -> subprocess.CompletedProcess:
    """Run a command offline. `python PROGRAM ...` runs in this process, which saves importing torch."""
    if re.fullmatch(r"python \S+\.py [^|]*", command):
        return call_program(*shlex.split(command)[1:])
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, shell=True, env=env, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Make a folder whose articles are pieces of these texts. Its demo and OWN train a tiny model for a step."""
    monkeypatch.chdir(tmp_path)
    on_machine = model.on_machine
    monkeypatch.setattr(model, "on_machine", lambda *args, **_: on_machine(*args[:3], compile=False))
    shutil.copytree(ROOT / "config", "config")
    Path("sample.py").symlink_to(ROOT / "sample.py")
    text = 2 * (README + DOCS)  # both splits need windows of 2,048 tokens
    articles = [{"title": f"From {i}", "text": text[i : i + 1000]} for i in range(0, len(text), 1000)]
    Path("articles.jsonl").write_text("".join(json.dumps(article) + "\n" for article in articles))
    Path("texts").mkdir()
    for number in range(60):
        Path(f"texts/{number}.txt").write_text(DOCS[number * 50 :][:2000])
    for name in ("sample", "wiki"):
        made = run(f"python {ROOT}/prepare_wiki.py articles.jsonl --val_fraction 0.5 --out data/{name} | cat")
        assert Path(f"data/{name}/meta.json").exists(), made.stderr
    Path(OWN).write_text(fenced("python")[0])
    for name in (OWN, "config/demo.py"):
        with open(name, "a") as file:
            file.write("\nn_layer, n_head, n_embd, max_steps, log_interval, eval_tokens = 1, 2, 32, 1, 1, 64\n")
            file.write("stages = tuple((row[0], min(row[1], 1_024), *row[2:]) for row in stages)\n")
            file.write("micro_batch_tokens = 1_024\n")
    return tmp_path


def test_every_command_that_can_run_here_does_and_prints_what_the_readme_shows(folder):
    runs = ["python train.py config/demo.py", *(f"cp -r out/demo out/{name}" for name in ("curriculum9", "fixed2048"))]
    printed = set()
    for command in runs + RUN:
        done = run(command)
        assert done.returncode == 0, (command, done.stderr)
        printed |= set(forms(done.stdout))
    assert len(RUN) >= 12 and all("python " in command for command in RUN)
    assert Path("out/curriculum9/loss.png").exists() and Path("loss.png").exists()
    shown = [block for block in fenced("") if not block.startswith(PRINTED_ELSEWHERE)]
    assert len(shown) >= 4
    for first, *lines in map(forms, shown):
        assert {first, *(line for line in lines if "#" not in line)} <= printed  # headers of tables


@pytest.mark.parametrize("command", [command for command in NOT_RUN if re.search(r" (bench/)?\w+\.py", command)])
def test_a_command_that_cannot_run_here_names_a_program_and_keys_that_exist(command, monkeypatch):
    program, *arguments = re.search(r"(\S+\.py[^|]*)", command)[1].split()
    if program == "train.py":
        monkeypatch.chdir(ROOT)
        assert load_config(arguments).stages
    else:
        source = (ROOT / program).read_text()
        assert all(word.partition("=")[0] in source for word in arguments if word.startswith("--"))


def test_fences_hold_no_commands_and_no_pattern_is_stale():
    assert set(re.findall(r"^```(\w*)$", README + DOCS, re.MULTILINE)) == {"", "python"}  # no commands in fences
    assert all(any(re.fullmatch(kind, command) for command in NOT_RUN) for kind in NOT_HERE)


def test_the_configurations_of_the_readme_and_the_repository_reach_their_last_stage(tmp_path):
    (tmp_path / "mine.py").write_text(fenced("python")[0])
    for path in (tmp_path / "mine.py", *(ROOT / "config").glob("[a-z]*.py")):
        config = load_config([str(path)])
        run = Curriculum(config.stages, config.max_steps)
        assert len(run.stages) == len(config.stages), path
        if path.stem in ("curriculum9", "fixed2048"):  # the baseline has the same budget, to a step
            assert run.tokens_before(config.max_steps) == pytest.approx(1_626_624_000, abs=2_048 * 8)


def test_the_readme_s_files_installed_versions_and_options_exist():
    named = [line.split("`")[1] for line in README.splitlines() if line.startswith("| `")]
    named += re.findall(r"\]\(([\w/.]+)\)", README + DOCS) + re.findall(r"`(bench/[\w.]+)`", README + DOCS)
    programs = {name for name in re.findall(r"`(?:python )?([\w/]+\.py)`", README + DOCS) if name != OWN}
    assert len(named) >= 18 and all((ROOT / name).exists() for name in named)
    assert all((ROOT / name).exists() or (ROOT / "config" / name).exists() for name in programs)
    pins = set(re.findall(r"[\w-]+==[\d.]+", " ".join(commands(README + DOCS))))
    tested = "".join(path.read_text() for path in ROOT.glob("requirements*.txt")).split()
    assert len(pins) >= 5 and pins <= set(tested)
    sources = "".join(path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("bench/*.py")])
    options = set(re.findall(r"`--(\w+)", README + DOCS)) - {"max_restarts"}  # torchrun's
    assert len(options) >= 8 and all(option in KEYS or re.search(rf'"--{option}\b', sources) for option in options)
