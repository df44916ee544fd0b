"""The configuration: every key with its default and what it is for, and the loader of `CONFIG.py --key=value ...`.

A config file is plain Python that assigns some of these keys; a later argument wins over it. What a config file
imports, and names that start with an underscore, are its own.
"""

import argparse
import ast
import dataclasses
import difflib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class UserError(Exception):
    """A mistake that the user can mend: reported as one line, exit status 2, no traceback."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Around a program's main(): turns UserError into one line on stderr and exit status 2."""
    try:
        yield
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


class CommandLine(argparse.ArgumentParser):
    """argparse whose errors are one line, like all others."""

    def error(self, message: str) -> None:
        raise UserError(message)


@dataclass(frozen=True)
class Config:
    # Where things are
    data_dir: str = "data/wiki"  # a dataset made by prepare_wiki.py
    out_dir: str = "out/run"  # checkpoints and the log
    resume: bool = False  # go on from out_dir's checkpoint if there is one; without it a used out_dir is refused
    seed: int = 1337  # of the initial weights and of every step's windows

    # The curriculum. No default for the table: it is what an experiment is about
    stages: tuple = ()  # rows (from step, seq_len, batch_size, lr_scale); batch_size counts windows per step
    max_steps: int = 100_000  # optimizer steps in all
    plan_ppl: tuple = ()  # (step, perplexity) that the plan expects of validation; () where nothing is expected
    phases: tuple = ()  # (name, last step), by which `python curriculum.py` sums up

    # Optimization
    learning_rate: float = 6e-4  # times the stage's lr_scale
    warmup_steps: int = 200  # linear, from 0
    optimizer: str = "muon"  # 'muon' (hidden matrices; AdamW for the rest) or 'adamw'
    weight_decay: float = 0.1  # of matrices; norms have none
    grad_clip: float = 1.0  # largest norm of the gradient; 0 for no limit
    micro_batch_tokens: int = 16_384  # most tokens in one forward pass of one process; the rest is accumulated

    # The model: GPT-2 size, 123.6M parameters
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768

    # The machine
    device: str = "auto"  # 'cpu', 'cuda', 'cuda:1', ...; 'auto' takes a GPU if there is one
    dtype: str = "auto"  # 'bfloat16' or 'float32'; 'auto' takes bfloat16 where the hardware multiplies it
    compile: bool = True  # the training step by torch.compile; False starts at once and runs slower

    # Validation, checkpoints, log; intervals in steps
    eval_interval: int = 2_000  # and before the first step, after every stage and at the end
    eval_tokens: int = 1_048_576  # held-out tokens that an evaluation scores; 0 for all
    patience: int = 10  # evaluations in a row without a new best of their length; one more stops the run
    checkpoint_interval: int = 1_000
    log_interval: int = 10


FIELDS = {field.name: field for field in dataclasses.fields(Config)}


def load_config(argv: list[str]) -> Config:
    """`CONFIG.py --key=value ...` as a Config.

    Raises UserError for an unknown key (with the nearest known one), a value of the wrong type, or a config file
    that is missing or does not run.
    """
    if not argv or argv[0].startswith("--"):
        raise UserError("give a config file first, as in: train.py config/curriculum9.py --key=value ...")
    values = read_config_file(argv[0])
    for argument in argv[1:]:
        key, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals:
            raise UserError(f"cannot read argument {argument!r}: it should be --key=value")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text  # a bare string
        values[key] = check_value(key, value, argument)
    return Config(**values)


def read_config_file(path: str) -> dict:
    """The keys that a config file assigns, checked."""
    try:
        with open(path, encoding="utf-8") as file:
            tree = ast.parse(file.read(), path)
        names = {"__file__": path, "__name__": "config_file"}
        exec(compile(tree, path, "exec"), names)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read config file {path}: {error.strerror}") from error
    except Exception as error:  # whatever the user's own code raises
        raise UserError(f"config file {path}: {type(error).__name__}: {error}") from error
    imports = (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))
    imported = {alias.asname or alias.name.split(".")[0] for node in imports for alias in node.names}
    return {
        key: check_value(key, value, f"{key} in {path}")
        for key, value in names.items()
        if not (key.startswith("_") or key in imported or isinstance(value, types.FunctionType | types.ModuleType))
    }


def check_value(key: str, value: object, where: str) -> object:
    """The value as its key's type (an int will do for a float, a list for a tuple)."""
    if key not in FIELDS:
        near = difflib.get_close_matches(key, FIELDS, n=1, cutoff=0.0)[0]
        raise UserError(f"unknown key {key!r}; the nearest known one is {near!r}")
    kind = FIELDS[key].type
    if kind is float and type(value) is int:
        return float(value)
    if kind is tuple and isinstance(value, list | tuple):
        return tuple(tuple(row) if isinstance(row, list | tuple) else row for row in value)
    if type(value) is not kind:
        raise UserError(f"{where}: {value!r} is not of type {kind.__name__}")
    return value
