"""Every setting with its default and its reason, and the parser of `CONFIG.py --key=value ...`.

A config file is plain Python that assigns or imports some of the keys below. Arguments override the file. Modules,
functions, classes and names with a leading underscore are ignored. Any other name is an error.
"""

import ast
import dataclasses
import difflib
import io
import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress


@dataclasses.dataclass(frozen=True)
class Config:
    # Where things are
    data_dir: str = "data/wiki"  # a dataset made by prepare_wiki.py
    out_dir: str = "out/run"  # checkpoints and the log
    resume: bool = False  # continue from out_dir's checkpoint if there is one; if False, a used out_dir is refused
    seed: int = 1337  # for the initial weights and for every step's windows

    # The curriculum. The table has no default: every experiment brings its own
    stages: tuple = ()  # rows (from step, seq_len, batch_size, lr_scale); batch_size counts windows per step
    max_steps: int = 100_000  # optimizer steps in all
    plan_ppl: tuple = ()  # (step, validation perplexity) pairs that the plan expects; () for no plan
    phases: tuple = ()  # (name, step) pairs: `python curriculum.py` totals all steps before that step

    # Optimization
    learning_rate: float = 6e-4  # times the stage's lr_scale
    warmup_steps: int = 200  # linear, from 0
    cooldown_steps: int = 0  # linear, to 0 at max_steps
    optimizer: str = "muon"  # 'muon' for the blocks' matrices and AdamW for the rest, or 'adamw' for all
    weight_decay: float = 0.1  # for matrices; norms have none
    grad_clip: float = 1.0  # clip the gradient to this norm; 0 for no limit
    micro_batch_tokens: int = 16_384  # most tokens per forward pass and process; larger batches accumulate

    # The model: GPT-2 size, 123.6M parameters
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768

    # The machine: `on_machine` in model.py decides what 'auto' means
    device: str = "auto"  # 'cpu', 'cuda', 'cuda:1', ...; 'auto' is a GPU if there is one, under torchrun one each
    dtype: str = "auto"  # for matrix products: 'bfloat16', 'float16' or 'float32'; 'auto' picks a fast one
    compile: bool = True  # torch.compile layers and loss; False starts at once and runs slower

    # Validation, checkpoints, log; intervals in steps
    eval_interval: int = 2_000  # also before the first step, after every stage and at the end
    eval_tokens: int = 1_048_576  # held-out tokens that an evaluation scores; 0 for all
    patience: int = 10  # stop when more evaluations in a row than this set no new best at their length
    checkpoint_interval: int = 1_000
    log_interval: int = 10


KEYS = {field.name: field.type for field in dataclasses.fields(Config)}
MAY_BE_0 = ("seed", "warmup_steps", "cooldown_steps", "weight_decay", "grad_clip", "eval_tokens", "patience")
ONE_OF = {"optimizer": ("adamw", "muon"), "dtype": ("auto", "bfloat16", "float16", "float32")}


class UserError(Exception):
    """A mistake that the user can fix: printed as one line, exit status 2, no traceback."""


def one_line(error: BaseException, memory_advice: str = "") -> str | None:
    """Return what to tell the user about an error; None if the error is a bug, which deserves its traceback."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return f"cannot use {error.filename or 'a file'}: {error.strerror}"
    texts = ("out of memory", "can't allocate memory", "ALLOC_FAILED")  # from CUDA, a CPU, cuBLAS
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(t in str(error) for t in texts)):
        return f"out of memory: {memory_advice}"
    return None


class Console(io.TextIOWrapper):
    """A console that never ends the program: it escapes what it cannot encode and drops what it cannot write."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)


def guard_console() -> None:
    """Replace stdout and stderr by Consoles, unless a test or a notebook has replaced them."""
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is None:  # closed
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors="replace"))
        elif stream is getattr(sys, f"__{name}__"):
            raw = open(stream.fileno(), "wb", buffering=0, closefd=False)
            setattr(sys, name, Console(raw, stream.encoding, "backslashreplace", write_through=True))


@contextmanager
def user_errors(memory_advice: str = "this machine has too little") -> Iterator[None]:
    """Wrap a program's main(): a user's mistake or a lack of memory becomes one line and exit status 2."""
    guard_console()
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if (line := one_line(error, memory_advice)) is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)


def load_config(argv: list[str]) -> Config:
    """Return the Config of `CONFIG.py --key=value ...`. Raises UserError for any mistake in it."""
    paths = [argument for argument in argv if not argument.startswith("-")]
    given = read_arguments([argument for argument in argv if argument not in paths])
    if len(paths) != 1:
        raise UserError(f"give one config file and --key=value arguments, not {' '.join(argv) or 'nothing'}")
    config = Config(**read_config_file(paths[0]) | given)
    check_ranges(config)
    return config


def read_arguments(argv: list[str], keys: Iterable[str] = KEYS) -> dict[str, object]:
    """Return the values of --key=value arguments by key; for --help print the program's docstring and its keys."""
    if {"-h", "--help"} & set(argv):
        print(sys.modules["__main__"].__doc__, *(f"--{key}={getattr(Config, key)!r}" for key in keys), sep="\n")
        sys.exit()
    pairs = [argument.removeprefix("--").partition("=")[::2] for argument in argv]
    return {key: as_key_type(key, text, f"--{key}={text}", keys) for key, text in pairs}


def read_config_file(path: str) -> dict[str, object]:
    """Run a config file and return the keys that it assigns or imports."""
    sys.path.append(os.path.dirname(os.path.abspath(path)))  # last: a file next to the config hides no module
    names = {"__file__": path, "__name__": "config_file"}
    try:
        with open(path, encoding="utf-8-sig") as file:
            exec(compile(file.read(), path, "exec"), names)
    except (Exception, SystemExit) as error:  # anything that the user's own code raises
        own = f"config file {path}: {type(error).__name__}: " * (not isinstance(error, UserError))
        raise UserError(f"{own}{error}") from error
    keys = [key for key, value in names.items()
            if not (key[0] == "_" or callable(value) or type(value).__name__ in ("module", "_Feature"))]
    return {key: as_key_type(key, names[key], f"{key} in {path}") for key in keys}


def as_key_type(key: str, value: object, where: str, keys: Iterable[str] = KEYS) -> object:
    """Convert a value, or its text on the command line, to its key's type: 1e5 to an int, a list to a tuple."""
    if key not in keys:
        near = difflib.get_close_matches(key, keys, n=1, cutoff=0.0)[0]
        raise UserError(f"unknown key {key!r}; the nearest known one is {near!r}")
    kind = KEYS[key]
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[str(value).lower()]
        if kind is str and value:
            return "" + (os.path.expanduser(value) if key.endswith("_dir") else value)
        value = ast.literal_eval(value) if isinstance(value, str) else value
        if kind is tuple:
            return tuple(tuple(row) if isinstance(row, list | tuple) else row for row in value)
        if isinstance(value, bool) or kind(value) != value:
            raise ValueError
        return kind(value)
    except (ValueError, TypeError, KeyError, SyntaxError, MemoryError, RecursionError, OverflowError):
        names = {bool: "true or false", tuple: "a table", str: "a text", float: "a number", int: "a whole number"}
        raise UserError(f"{where}: not {names[kind]}") from None


def check_ranges(config: Config) -> None:
    """Raise UserError for a value that is wrong on every machine. Curriculum checks the stage table."""
    for key, kind in KEYS.items():
        value = getattr(config, key)
        if kind in (int, float) and not (0 < value < 2**63 or (value == 0 and key in MAY_BE_0)):
            raise UserError(f"{key}={value} is out of range: it must be positive{' or 0' * (key in MAY_BE_0)}")
        if value not in ONE_OF.get(key, (value,)):
            raise UserError(f"{key}={value!r} is none of {', '.join(ONE_OF[key])}")
    if config.n_embd % (2 * config.n_head):
        raise UserError(f"n_embd={config.n_embd} is not an even multiple of n_head={config.n_head}")
    for key, kinds in (("plan_ppl", ([int, int], [int, float])), ("phases", ([str, int],))):
        for row in getattr(config, key):
            if not (isinstance(row, tuple) and list(map(type, row)) in kinds and row[1] > 0):
                raise UserError(f"{key}: {row!r} is not (step, perplexity) or (name, last step), positive")
    if any(row[0] >= later[0] for row, later in itertools.pairwise([(0,), *config.plan_ppl])):
        raise UserError("plan_ppl: its steps must ascend from above 0")
