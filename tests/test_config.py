"""The configuration as a user gives it: what is read, what wins, and what is refused in one line."""

import dataclasses

import pytest
from conftest import ROOT

from config import Config, curriculum9, load_config
from errors import UserError, user_errors


@pytest.fixture
def write(tmp_path):
    """Writes a config file; gives its path."""

    def write(text: str) -> str:
        path = tmp_path / "mine.py"
        path.write_text(text)
        return str(path)

    return write


def refusal(*argv: str) -> str:
    with pytest.raises(UserError) as error:
        load_config(list(argv))
    return str(error.value)


# --------------------------------------------------------------------------------------------------------------------
# What wins


def test_defaults_then_the_file_then_the_arguments_in_their_order(write):
    path = write("seed = 5\nmax_steps = 70\nlearning_rate = 0.5\nmax_steps = 80\n")
    config = load_config([path, "--seed=6", "--n_layer=3", "--seed=7"])
    changed = {"seed": 7, "max_steps": 80, "learning_rate": 0.5, "n_layer": 3}
    assert dataclasses.asdict(config) == dataclasses.asdict(Config()) | changed


def test_an_empty_file_gives_the_defaults(write):
    assert load_config([write("")]) == Config()


def test_nothing_is_remembered_from_one_load_to_the_next(write):
    load_config([write("seed = 5\n_mine = 1\n"), "--max_steps=3"])
    assert load_config([write("out_dir = '_mine' if '_mine' in globals() else 'new'\n")]) == Config(out_dir="new")


# --------------------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize(
    "argument, value",
    [
        ("--seed=42", 42),
        ("--seed=0x10", 16),
        ("--max_steps=100_000", 100_000),
        ("--learning_rate=3e-4", 0.0003),
        ("--learning_rate=2", 2.0),
        ("--learning_rate=.5", 0.5),
        ("--resume=True", True),
        ("--compile=False", False),
        ("--out_dir=out/run 7", "out/run 7"),
        ("--out_dir=2024-01-01", "2024-01-01"),
        ("--out_dir='7'", "7"),
        ("--out_dir=a=b", "a=b"),
        ("--out_dir=", ""),
        ("--out_dir=--seed=3", "--seed=3"),
        ("--out_dir=/tmp/ü.d", "/tmp/ü.d"),
        ("--device=cuda:1", "cuda:1"),
        ("--optimizer=adamw", "adamw"),
        ("--stages=((0, 64, 8, 1.5),)", ((0, 64, 8, 1.5),)),
        ("--stages=[[0, 64, 8, 1], (5, 128, 4, 0.5)]", ((0, 64, 8, 1), (5, 128, 4, 0.5))),
        ("--stages=()", ()),
    ],
)
def test_an_argument_is_a_literal_or_a_bare_string(write, argument, value):
    key = argument[2:].partition("=")[0]
    read = getattr(load_config([write("")] + [argument]), key)
    assert (read, type(read)) == (value, type(value))
    # Written out in a file, the same value is the same.
    assert getattr(load_config([write(f"{key} = {value!r}\n")]), key) == value


@pytest.mark.parametrize(
    "key, text",
    [
        ("seed", "1.5"),
        ("seed", "True"),
        ("seed", "'7'"),
        ("max_steps", "1e5"),
        ("learning_rate", "'fast'"),
        ("learning_rate", "True"),
        ("learning_rate", "None"),
        ("resume", "1"),
        ("compile", "'yes'"),
        ("out_dir", "7"),
        ("out_dir", "None"),
        ("device", "['cuda']"),
        ("stages", "5"),
        ("stages", "{0: (64, 8, 1.0)}"),
        ("stages", "'(0, 64'"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_key_value_and_type(write, key, text):
    kind = {"seed": "int", "max_steps": "int", "learning_rate": "float", "resume": "bool", "compile": "bool"}
    kind |= {"out_dir": "str", "device": "str", "stages": "tuple"}
    path = write(f"{key} = {text}\n")
    for said in (refusal(path), refusal(write(""), f"--{key}={text}")):
        assert key in said and str(eval(text)) in said and f"not of type {kind[key]}" in said
    assert path in refusal(write(f"{key} = {text}\n"))


@pytest.mark.parametrize(
    "typed, meant",
    [
        ("lerning_rate", "learning_rate"),
        ("learning-rate", "learning_rate"),
        ("max_iters", "max_steps"),
        ("stage", "stages"),
        ("n_heads", "n_head"),
        ("Seed", "seed"),
        ("datadir", "data_dir"),
        ("micro_batch", "micro_batch_tokens"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(write, typed, meant):
    said = refusal(write(""), f"--{typed}=1")
    assert f"unknown key {typed!r}" in said and repr(meant) in said
    if typed.isidentifier():
        assert refusal(write(f"{typed} = 1\n")) == said


@pytest.mark.parametrize("argument", ["seed=3", "--seed", "-seed=3", "3", "--", ""])
def test_an_argument_of_another_form_is_refused_as_it_was_typed(write, argument):
    said = refusal(write(""), "--seed=1", argument)
    assert repr(argument) in said and "--key=value" in said


@pytest.mark.parametrize("argument", ["--out_dir={{}}", "--learning_rate=1" + 400 * "0"])
def test_an_unusual_argument_is_refused_or_read_but_raises_nothing_else(write, argument):
    try:
        load_config([write(""), argument])
    except UserError:
        pass


@pytest.mark.parametrize("argv", [[], ["--seed=3"], ["--seed=3", "config/curriculum9.py"]])
def test_the_config_file_comes_first(argv):
    assert "config file first" in refusal(*argv)


# --------------------------------------------------------------------------------------------------------------------
# The file is Python


def test_what_a_file_imports_defines_and_hides_is_its_own(write):
    path = write(
        "import json, math, os.path\n"
        "import math as seed\n"  # even under the name of a key
        "from pathlib import Path\n"
        "from config.curriculum9 import plan_ppl, stages as nine\n"
        "_half = 2\n"
        "def shorter(rows):\n"
        "    return tuple((step // _half, *row) for step, *row in rows)\n"
        "double = lambda x: 2 * x\n"
        "stages = shorter(nine)\n"
        "n_head = double(3)\n"
        "out_dir = os.path.join('out', Path(__file__).stem)\n"
    )
    config = load_config([path])
    assert [row[0] for row in config.stages] == [row[0] / 2 for row in curriculum9.stages]
    assert [row[1:] for row in config.stages] == [row[1:] for row in curriculum9.stages]
    assert (config.n_head, config.out_dir) == (6, "out/mine")
    assert (config.plan_ppl, config.seed) == (Config().plan_ppl, Config().seed)


def test_a_file_can_build_on_another(write):
    path = write("from config import curriculum9\nstages = curriculum9.stages[:2]\nmax_steps = stages[1][0] + 1\n")
    config = load_config([path])
    assert (config.stages, config.max_steps) == (curriculum9.stages[:2], 2_001)
    assert (config.out_dir, config.plan_ppl) == (Config().out_dir, ())  # what is not asked for does not come along


def test_a_file_can_change_what_it_imports(write):
    path = write("from config.curriculum9 import stages\nstages = stages[:2]\n")
    assert load_config([path]).stages == curriculum9.stages[:2]


@pytest.mark.parametrize("name", ["curriculum9", "demo", "fixed2048"])
def test_the_files_that_come_with_it_load(name):
    config = load_config([f"{ROOT}/config/{name}.py"])
    assert [row[3] for row in config.stages] == [11.3, 7.0, 3.5, 1.5, 1.0, 0.7, 0.5, 0.4, 0.3]
    assert config.max_steps > config.stages[-1][0]


@pytest.mark.parametrize(
    "text, said",
    [
        ("seed = 1\nmax_steps = = 5\n", ("SyntaxError", "line 2")),
        ("seed = 1\n  max_steps = 5\n", ("IndentationError", "line 2")),
        ("seed = 1 / 0\n", ("ZeroDivisionError",)),
        ("seed = sede + 1\n", ("NameError", "sede")),
        ("import no_such_module\n", ("ModuleNotFoundError", "no_such_module")),
        ("from config import no_such_file\n", ("ImportError", "no_such_file")),
        ("stages = ((0, 64, 8, 1.0),\n", ("SyntaxError", "line 1")),
        ("assert False, 'not like this'\n", ("AssertionError", "not like this")),
        ("seed = 1\0\n", ("null byte",)),
        ("open('no_such.txt')\n", ("no_such.txt",)),
        ("raise OSError('a disk')\n", ("a disk",)),
    ],
)
def test_a_file_that_does_not_run_is_refused_with_its_error(write, text, said):
    path = write(text)
    message = refusal(path)
    assert path in message
    for words in said:
        assert words in message


def test_a_missing_or_unreadable_file_is_refused(tmp_path):
    assert refusal(f"{tmp_path}/none.py") == f"cannot read config file {tmp_path}/none.py: No such file or directory"
    assert str(tmp_path) in refusal(str(tmp_path)) and "directory" in refusal(str(tmp_path))
    (tmp_path / "latin1.py").write_bytes("out_dir = 'für'\n".encode("latin-1"))
    assert "latin1.py" in refusal(str(tmp_path / "latin1.py"))


# --------------------------------------------------------------------------------------------------------------------
# One line, exit status 2


def test_a_users_error_is_one_line_and_status_2(capsys):
    with pytest.raises(SystemExit) as stop, user_errors():
        raise UserError("over\n  several\tlines\n\n")
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", "error: over several lines\n")


def test_no_other_error_is_taken_for_the_users():
    for error in (ValueError, KeyError, OSError):
        with pytest.raises(error), user_errors():
            raise error("ours")


def test_ctrl_c_ends_with_the_status_that_shells_expect():
    with pytest.raises(SystemExit) as ended, user_errors():
        raise KeyboardInterrupt
    assert ended.value.code == 130


@pytest.mark.parametrize(
    "command, said",
    [
        (["train.py"], "config file first"),
        (["train.py", "config/curriculum9.py", "--lerning_rate=3e-4"], "'learning_rate'"),
        (["train.py", "config/curriculum9.py", "--stages=((0, 64, 4, 1.0), (0, 64, 4, 1.0))"], "stages, row 2"),
        (["train.py", "config/curriculum9.py", "--out_dir=out/none", "--data_dir=no/such"], "no/such is not a dataset"),
        (["curriculum.py", "config/none.py"], "config/none.py: No such file"),
        (["curriculum.py", "config/curriculum9.py", "--stages=()"], "stages is empty"),
        (["curriculum.py", "config/curriculum9.py", "--data_dir=no/such"], "no/such is not a dataset"),
        (["curriculum.py", "config/curriculum9.py", "--speed=RTX 4090 at 15"], "RTX 4090"),
        (["curriculum.py", "config/curriculum9.py", "--plan_ppl=(2000, 5000)"], "plan_ppl"),
        (["curriculum.py", "config/curriculum9.py", "--phases=('a', 10)"], "phases"),
        (["curriculum.py", "config/curriculum9.py", "--phases=[('a', 0)]"], "a phase ends at step 1 or later"),
        (["curriculum.py", "config/curriculum9.py", "--n_head=0"], "n_head"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_programs_say_a_mistake_in_one_line_with_status_2(run_program, command, said):
    done = run_program(*command)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and said in line


def test_help_says_what_a_program_does_and_every_key(run_program):
    for program in ("train.py", "curriculum.py"):
        done = run_program(program, "--help")
        assert (done.returncode, done.stderr) == (0, "") and f"python {program} config/curriculum9.py" in done.stdout
        assert all(f"\n--{field.name}={field.default!r}\n" in done.stdout for field in dataclasses.fields(Config))
