"""Settings as a user gives them: how they are read, which one wins, and which mistakes are refused in one line."""

import dataclasses
import os

import pytest
from conftest import FEW, ROOT, SMALL, call_program, release_logs

from config import curriculum9
from parallel import Team
from settings import Config, UserError, load_config, user_errors
from train import train

HOME = os.path.expanduser("~")


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a config file and returns its path."""

    def write(text: str, name: str = "mine.py") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8", errors="surrogateescape")
        return f"{tmp_path}/{name}"
    return write


def refusal(*argv: str) -> str:
    with pytest.raises(UserError) as error:
        load_config(list(argv))
    return str(error.value)


def test_the_last_of_default_file_and_arguments_wins(write):
    path = write("seed = 5\nmax_steps = 70\nlearning_rate = 0.5\nmax_steps = 80\n")
    config = load_config([path, "--seed=6", "--n_layer=3", "--seed=7"])
    changed = {"seed": 7, "max_steps": 80, "learning_rate": 0.5, "n_layer": 3}
    assert dataclasses.asdict(config) == dataclasses.asdict(Config()) | changed


@pytest.mark.parametrize("argument, value", [
    ("seed=42", 42), ("seed=9007199254740993", 2**53 + 1), ("max_steps=1e5", 100_000), ("max_steps=100_000", 100_000),
    ("learning_rate=3e-4", 0.0003), ("learning_rate=2", 2.0), ("device=cuda:1", "cuda:1"), ("plan_ppl=()", ()),
    ("resume=True", True), ("resume=1", True), ("compile=false", False), ("compile=0", False),
    ("out_dir=20261126", "20261126"), ("out_dir=out/run 7", "out/run 7"), ("out_dir='7'", "'7'"),
    ("out_dir=a=--b", "a=--b"), ("out_dir=~/run", f"{HOME}/run"), ("data_dir=~", HOME), ("device=~", "~"),
    ("stages=[[0, 64, 8, 1], (5, 128, 4, 0.5)]", ((0, 64, 8, 1), (5, 128, 4, 0.5)))])  # fmt: skip
def test_a_value_is_converted_to_its_keys_type(write, argument, value):
    key = argument.partition("=")[0]
    for argv in ([write(""), f"--{argument}"], [write(f"{key} = {value!r}\n")]):  # from an argument, and from a file
        read = getattr(load_config(argv), key)
        assert (read, type(read)) == (value, type(value))


KINDS = {"seed": "a whole number", "max_steps": "a whole number", "learning_rate": "a number", "out_dir": "a text",
         "resume": "true or false", "compile": "true or false", "device": "a text", "stages": "a table"}  # fmt: skip


@pytest.mark.parametrize("text", [
    "seed=1.5", "seed=True", "max_steps=ten", "max_steps=nan", "learning_rate=fast", "learning_rate=False",
    "resume=yes", "compile=2", "stages=5", "stages=((0, 64", "stages=" + 5_000 * "9", "stages=" + 500 * "(",
    "seed = 1.5", "seed = True", "seed = None", "learning_rate = True", "out_dir = 7", "stages = 5",
    "device = ['cuda']", "compile = None"])  # fmt: skip
def test_a_value_of_another_type_is_refused_with_its_key(write, text):
    key = text.partition("=")[0].strip()
    if " = " in text:  # a line of a file
        assert refusal(path := write(text)) == f"{key} in {path}: not {KINDS[key]}"
    else:
        assert refusal(write(""), f"--{text}") == f"--{text}: not {KINDS[key]}"


@pytest.mark.parametrize("typed, meant", [
    ("lerning_rate", "learning_rate"), ("learning-rate", "learning_rate"), ("max_iters", "max_steps"), ("Seed", "seed"),
])  # fmt: skip
def test_an_unknown_key_is_refused_with_the_nearest_known_one(write, typed, meant):
    said = refusal(write(""), f"--{typed}=1")
    assert said == f"unknown key {typed!r}; the nearest known one is {meant!r}"
    assert not typed.isidentifier() or refusal(write(f"{typed} = 1\n")) == said


def test_imported_keys_count_and_other_names_that_a_file_imports_or_defines_do_not(write):
    write("half = 2\n", "helper_beside_the_config.py")
    path = write(
        "\ufefffrom __future__ import annotations\n"  # with a byte order mark
        "import json, math, os.path\nfrom math import log\nfrom pathlib import Path\nfrom typing import NamedTuple\n"
        "import math as seed\n"  # a module, even under the name of a key
        "from config.curriculum9 import stages as _nine\n"
        "from helper_beside_the_config import half as _half\n"
        "class Row(NamedTuple):\n    step: int\n    seq_len: int\n    batch_size: int\n    lr_scale: float\n"
        "shorter = lambda rows: [Row(step // _half, *row) for step, *row in rows]\n"
        "def double(x):\n    return 2 * x\n"
        "stages = shorter(_nine)\nn_head: int = double(3)\n"
        "out_dir = os.path.join('out', Path(__file__).stem)\n")  # fmt: skip
    expected = tuple((row[0] // 2, *row[1:]) for row in curriculum9.stages)
    assert load_config([path]) == Config(stages=expected, n_head=6, out_dir="out/mine")
    assert {type(row) for row in load_config([path]).stages} == {tuple}  # a checkpoint loads no class of a config
    said = refusal(write("import numpy\nplan_ppl = ((1, numpy.float64(9)),)\n"))  # nor a number of numpy's
    assert said.startswith("plan_ppl: (1, np.float64(9.0)) is not (step, perplexity)")
    demo = load_config([f"{ROOT}/config/demo.py"])
    assert load_config([write("from config.demo import *\nseed = 3\n")]) == dataclasses.replace(demo, seed=3)


@pytest.mark.parametrize("text, said", [
    ("seed = 1\nmax_steps = = 5\n", "SyntaxError.*line 2"), ("seed = sede + 1\n", "NameError.*sede"),
    ("import no_such_module\n", "ModuleNotFoundError.*no_such_module"), ("seed = 1\0\n", "null byte"),
    ("out_dir = '\udcfc'\n", "UnicodeDecodeError"),  # a byte that is not UTF-8
    ("open('no_such.txt')\n", "No such file"), ("exit()\n", "SystemExit"), (None, "FileNotFoundError")])  # fmt: skip
def test_a_file_that_does_not_run_is_refused_with_its_error(write, tmp_path, text, said):
    path = write(text) if text else f"{tmp_path}/none.py"
    with pytest.raises(UserError, match=f"config file {path}: .*{said}"):
        load_config([path])


@pytest.mark.parametrize("error, status, line", [
    (KeyboardInterrupt(), 130, ""),  # as shells expect
    (UserError("over\n  several\tlines\n\n"), 2, "error: over several lines\n"),
    (MemoryError(), 2, "error: out of memory: take less\n"),
    (RuntimeError("CUDA out of memory. Tried ..."), 2, "error: out of memory: take less\n"),
    (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), 2, "error: out of memory: take less\n")])  # fmt: skip
def test_a_users_error_is_one_line(capsys, error, status, line):
    with pytest.raises(SystemExit) as stop, user_errors("take less"):
        raise error
    assert (stop.value.code, *capsys.readouterr()) == (status, "", line)


@pytest.mark.parametrize("kind", [ValueError, KeyError, OSError, RuntimeError, AssertionError])
def test_no_bug_is_taken_for_a_users_error(kind):
    with pytest.raises(kind), user_errors():
        raise kind("a bug")


# What a user types after `train.py small.py`, or with another program, and a part of the line that is printed
MISTAKES = {
    "--seed": "--seed=: not a whole number", "--weight_decay=-1": "weight_decay=-1",
    "seed=3": "one config file and --key=value arguments, not small.py seed=3",
    "--optimizer=sgd": "optimizer='sgd' is none of adamw, muon", "--device=cuda:98": "device='cuda:98' is not usable",
    "--n_head=32": "n_head=32",  # rotary positions need an even head_dim, not 1
    "--micro_batch_tokens=32": "micro_batch_tokens=32 is less than a window of 64",
    "--stages=[(0,99999,1,1.0)] --micro_batch_tokens=99999": "no train shard",
    "--data_dir=nowhere": "no dataset in nowhere", "--out_dir=small.py/x": "out_dir",
    "curriculum.py small.py --speed=4090_at_15": "not a whole number of tokens/s",
    "curriculum.py small.py --plan_ppl=[(2,9),(2,8)]": "plan_ppl: ",
    "curriculum.py small.py --phases=('a',10)": "phases: ", "evaluate.py": "cannot use out/run/best.pt: No such file",
    "evaluate.py --out_dir=foreign": "foreign/best.pt is damaged", "evaluate.py --out_dir=used --dtype=bf16": "bf16",
    "evaluate.py --out_dir=used --data_dir=no": "no dataset", "evaluate.py --out_dir=used --device=cuda:98": "cuda:98",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_dir):
    """Make a folder with what the mistakes need: a config, a run, and a file that is not a checkpoint."""
    folder = tmp_path_factory.mktemp("mistakes")
    keys = SMALL | {"stages": FEW, "eval_tokens": 512, "max_steps": 2, "data_dir": str(small_dir)}
    (folder / "small.py").write_text("".join(f"{k} = {v!r}\n" for k, v in keys.items()) + "out_dir = 'run'\n")
    assert train(Config(**keys, out_dir=str(folder / "used")), Team()) == 0
    release_logs()
    (folder / "foreign").mkdir()
    (folder / "foreign" / "best.pt").write_text("no checkpoint")
    return folder


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_is_one_line_and_status_2_and_nothing_is_written(folder, monkeypatch, typed):
    arguments = (typed if typed.split()[0].endswith(".py") else f"train.py small.py {typed}").split()
    before = {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}
    monkeypatch.chdir(folder)
    done = call_program(*arguments)
    assert done.returncode == 2, done
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and MISTAKES[typed] in line
    assert {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")} == before


@pytest.mark.parametrize("program", ["train.py", "curriculum.py"])
def test_help_says_what_a_program_does_and_every_key(program):
    done = call_program(program, "--help")
    assert (done.returncode, done.stderr) == (0, "") and f"python {program} config/curriculum9.py" in done.stdout
    assert all(f"\n--{field.name}={field.default!r}\n" in done.stdout for field in dataclasses.fields(Config))
