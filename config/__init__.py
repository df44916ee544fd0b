"""The configuration: every key with its default and what it is for, and the loader of `CONFIG.py --key=value ...`.

A config file is plain Python that assigns some of these keys; a later argument wins over it. What a config file
imports, and names that start with an underscore, are its own.
"""

import ast
import dataclasses
import difflib
import math
import sys
from dataclasses import dataclass

from errors import UserError


@dataclass(frozen=True)
class Config:
    # Where things are
    data_dir: str = "data/wiki"  # a dataset made by prepare_wiki.py
    out_dir: str = "out/run"  # checkpoints and the log
    resume: bool = False  # go on from out_dir's checkpoint if there is one; if False, a used out_dir is refused
    eval_only: bool = False  # do not train: score out_dir's best.pt on all held-out articles, at every length
    seed: int = 1337  # of the initial weights and of every step's windows

    # The curriculum. No default for the table: it is what an experiment is about
    stages: tuple = ()  # rows (from step, seq_len, batch_size, lr_scale); batch_size counts windows per step
    max_steps: int = 100_000  # optimizer steps in all
    plan_ppl: tuple = ()  # (step, perplexity) that the plan expects of validation; () where nothing is expected
    phases: tuple = ()  # (name, last step), by which `python curriculum.py` sums up

    # Optimization
    learning_rate: float = 6e-4  # times the stage's lr_scale
    warmup_steps: int = 200  # linear, from 0
    cooldown_steps: int = 0  # at the end of max_steps: linear, to 0
    optimizer: str = "muon"  # 'muon' (hidden matrices; AdamW for the rest) or 'adamw'
    weight_decay: float = 0.1  # of matrices; norms have none
    grad_clip: float = 1.0  # largest norm of the gradient; 0 for no limit
    micro_batch_tokens: int = 16_384  # most tokens in one forward pass of one process; the rest is accumulated

    # The model: GPT-2 size, 123.6M parameters
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768

    # The machine
    device: str = "auto"  # 'cpu', 'cuda', 'cuda:1', ...; 'auto' takes a GPU if there is one (torchrun: one each)
    dtype: str = "auto"  # 'bfloat16', 'float16' or 'float32'; 'auto' takes what is fast here: train.pick_dtype
    compile: bool = True  # the training step by torch.compile; False starts at once and runs slower

    # Validation, checkpoints, log; intervals in steps
    eval_interval: int = 2_000  # and before the first step, after every stage and at the end
    eval_tokens: int = 1_048_576  # held-out tokens that an evaluation scores; 0 for all
    patience: int = 10  # evaluations in a row without a new best of their length that are borne; one more stops
    checkpoint_interval: int = 1_000
    log_interval: int = 10


FIELDS = {field.name: field for field in dataclasses.fields(Config)}


def load_config(argv: list[str]) -> Config:
    """`CONFIG.py --key=value ...` as a Config. --help prints the program's docstring and every key with its default.

    Raises UserError for an unknown key (with the nearest known one), a value of the wrong type, or a config file
    that is missing or does not run.
    """
    if {"-h", "--help"} & set(argv):
        keys = [f"--{key}={field.default!r}" for key, field in FIELDS.items()]
        print(sys.modules["__main__"].__doc__, *keys, sep="\n")
        sys.exit()
    if not argv or argv[0].startswith("--"):
        raise UserError("give a config file first, as in: train.py config/curriculum9.py --key=value ...")
    values = read_config_file(argv[0])
    for argument in argv[1:]:
        key, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals:
            raise UserError(f"cannot read argument {argument!r}: it should be --key=value")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = text  # a bare string
        values[key] = check_value(key, value, argument)
    config = Config(**values)
    check_ranges(config)
    return config


def read_config_file(path: str) -> dict:
    """The keys that a config file assigns, checked."""
    try:
        with open(path, encoding="utf-8") as file:
            source = file.read()
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot read config file {path}: {getattr(error, 'strerror', None) or error}") from error
    names = {"__file__": path, "__name__": "config_file"}
    try:
        tree = ast.parse(source, path)
        exec(compile(tree, path, "exec"), names)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's own code raises
        raise UserError(f"config file {path}: {type(error).__name__}: {error}") from error
    assigned = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    keys = [key for key in names if key in assigned and not key.startswith("_") and not callable(names[key])]
    return {key: check_value(key, names[key], f"{key} in {path}") for key in keys}


def check_value(key: str, value: object, where: str) -> object:
    """The value as its key's type (an int will do for a float, a list for a tuple)."""
    if key not in FIELDS:
        near = difflib.get_close_matches(key, FIELDS, n=1, cutoff=0.0)[0]
        raise UserError(f"unknown key {key!r}; the nearest known one is {near!r}")
    kind = FIELDS[key].type
    if kind is float and type(value) is int and abs(value) < 1e300:
        return float(value)
    if kind is tuple and isinstance(value, list | tuple):
        return tuple(tuple(row) if isinstance(row, list | tuple) else row for row in value)
    if type(value) is not kind:
        raise UserError(f"{where}: {value!r} is not of type {kind.__name__}")
    return value


def check_ranges(config: Config) -> None:
    """Raises UserError for a value that makes no sense, whatever the others are and whatever machine this is."""
    for key in ("eval_interval", "checkpoint_interval", "log_interval", "n_layer", "n_head", "n_embd"):
        if getattr(config, key) < 1:
            raise UserError(f"{key}={getattr(config, key)}: it must be at least 1")
    for key in ("seed", "warmup_steps", "cooldown_steps", "weight_decay", "grad_clip", "eval_tokens", "patience"):
        if not 0 <= getattr(config, key) < math.inf:
            raise UserError(f"{key}={getattr(config, key)}: it must not be negative")
    if config.seed >= 2**63:
        raise UserError(f"seed={config.seed}: it must be less than 2**63")
    if not 0 < config.learning_rate < math.inf:
        raise UserError(f"learning_rate={config.learning_rate}: it must be positive")
    if config.n_embd % (2 * config.n_head):
        raise UserError(f"n_embd={config.n_embd} is no even multiple of n_head={config.n_head}")
    if config.optimizer not in ("adamw", "muon"):
        raise UserError(f"optimizer={config.optimizer!r} is neither 'adamw' nor 'muon'")
    for key, kinds in (("plan_ppl", (int, (int, float))), ("phases", (str, int))):
        for row in getattr(config, key):
            if not (isinstance(row, tuple) and len(row) == 2 and all(map(isinstance, row, kinds))):
                raise UserError(f"{key}: {row!r} is not a pair of a {kinds[0].__name__} and a number")
    if any(step < 1 for _, step in config.phases):
        raise UserError("phases: a phase ends at step 1 or later")
    steps = [row[0] for row in config.plan_ppl]
    if steps != sorted(set(steps)) or any(step < 1 or ppl <= 0 for step, ppl in config.plan_ppl):
        raise UserError("plan_ppl: its steps must ascend from 1 or later, and its perplexities be positive")
