"""Run programs in processes of their own without waiting for imports. From `before` on: the faults to inject there.

A server imports torch once, in 5 s, and forks a process for each program. The server itself computes nothing: a process
that has used several threads or a GPU cannot be forked. Vocabulary and data are small, so a step takes milliseconds.
"""

import atexit
import errno
import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from signal import SIG_IGN, SIGHUP, SIGINT, SIGKILL, SIGTERM, signal  # noqa: F401, for the faults

import numpy as np
import torch
from conftest import FEW, ROOT, SMALL, write_dataset

import checkpoint
import curriculum
import evaluate
import model

VOCAB_SIZE = 512
KEYS = SMALL | {"stages": FEW, "max_steps": 30, "eval_interval": 8, "eval_tokens": 1_024, "checkpoint_interval": 3}
SERVER = """
import functools, json, os, runpy, signal, sys, traceback, model
model.GPTConfig = functools.partial(model.GPTConfig, vocab_size=512)
import children, train
for line in sys.stdin:
    job = json.loads(line)
    if "pid" in job:
        print(os.waitstatus_to_exitcode(os.waitpid(job["pid"], 0)[1]), flush=True)
    elif pid := os.fork():
        print(pid, flush=True)
    else:
        signal.alarm(300)
        for number, name in enumerate((os.devnull, job["out"], job["err"])):
            os.dup2(os.open(name, os.O_RDWR), number)
        os.environ.update(job["env"])
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup this process would ignore SIGHUP
        sys.argv, status = job["argv"], 1
        exec(job["fault"], vars(children))
        try:
            status = runpy.run_path(sys.argv[0], run_name="__main__") and 0
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)  # a normal exit takes a second with torch
"""


@functools.cache
def server() -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SERVER]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(process.communicate)  # closes its stdin, which ends the server
    return process


def ask_server(**job: object) -> int:
    print(json.dumps(job), file=server().stdin, flush=True)
    return int(server().stdout.readline())


@functools.cache
def folder() -> Path:
    """Make the session's folder once and return it: a dataset `data`, and config.py, which trains on it with KEYS."""
    path = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, path)
    write_learnable(path / "data", seed=0)
    keys = KEYS | {"data_dir": str(path / "data"), "resume": True}
    (path / "config.py").write_text("".join(f"{key} = {value!r}\n" for key, value in keys.items()))
    return path


def write_learnable(path: Path, seed: int) -> None:
    """Write tokens that a model can learn: each is 1 to 3 above the one before it."""
    path.mkdir()
    random = np.random.default_rng(seed)
    train, val = (np.cumsum(random.integers(1, 4, size=size)) % VOCAB_SIZE for size in (20_000, 2_100))
    write_dataset(path, train=[train], val=[val])


class Child:
    """A program in a process of its own, where the code `fault` runs first."""

    def __init__(self, program: str, *args: object, fault: str = "", **env: str):
        self.out, self.err = (tempfile.mkstemp(dir=folder())[1] for _ in range(2))
        self.pid = ask_server(argv=[program, *map(str, args)], fault=fault, env=env, out=self.out, err=self.err)

    def wait(self) -> subprocess.CompletedProcess:
        """Wait for the program to end. Return its exit status, and its output as text."""
        status = ask_server(pid=self.pid)
        return subprocess.CompletedProcess([], status, Path(self.out).read_text(), Path(self.err).read_text())


def run_train(out_dir: Path, fault: str = "", **keys: object) -> subprocess.CompletedProcess:
    """Run train.py on config.py with these keys changed. It resumes if out_dir holds a checkpoint."""
    arguments = [f"--{key}={value}" for key, value in keys.items()]
    return Child("train.py", folder() / "config.py", f"--out_dir={out_dir}", *arguments, fault=fault).wait()


def before(module: object, name: str, action) -> None:
    """Patch module.name so that each call first calls action with the same arguments."""
    function = getattr(module, name)
    setattr(module, name, lambda *args, **kwargs: (action(*args), function(*args, **kwargs))[1])


def die() -> None:
    os.kill(os.getpid(), SIGKILL)


def die_at(moment: int) -> None:
    """Kill this process right before its `moment`-th call, counted from 1, that starts a step, writes, or renames."""
    calls = itertools.count(1)
    for module, name in [(os, "pwrite"), (os, "fsync"), (os, "truncate"), (Path, "replace"), (torch, "save"),
                         (curriculum, "learning_rate")]:  # fmt: skip
        before(module, name, lambda *_: next(calls) == moment and die())


def signal_in_step(step: int, number: int) -> None:
    before(curriculum, "learning_rate", lambda *args: args[2] == step and os.kill(os.getpid(), number))


def signal_in_evaluation(step: int, number: int) -> None:
    before(evaluate, "evaluate", lambda *args: args[3] == step and os.kill(os.getpid(), number))


def fill_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def when_saving(name: str, steps: tuple[int, ...], action) -> None:
    """Call action right before the checkpoint `name` is saved at any of these steps."""
    before(checkpoint, "save_checkpoint",
           lambda path, state: path.name == name and state["step"] in steps and action())  # fmt: skip


def refuse_to_log(first: int, last: int) -> None:
    """Make the disk full from step `first` to step `last`. Only half of the first record is still written."""
    pwrite, steps, halves = os.pwrite, [0], [1]
    before(curriculum, "learning_rate", lambda config, stage, step: steps.append(step + 1))
    def pwrite_if_room(file, data, offset):
        is_full = first <= steps[-1] <= last
        return pwrite(file, data[: len(data) // 2 if is_full and halves.pop() else None], offset)
    os.pwrite = pwrite_if_room
    before(os, "pwrite", lambda *_: first <= steps[-1] <= last and not halves and fill_disk())


def poison(first: int, last: int) -> None:
    """Make the training loss NaN in calls `first` to `last` of GPT.loss, counted from 1."""
    loss, calls = model.GPT.loss, itertools.count(1)
    model.GPT.loss = lambda self, windows: loss(self, windows) * (float("nan") if first <= next(calls) <= last else 1)


def make_up_losses(losses: list[float]) -> None:
    """Make an evaluation after s steps return the validation loss losses[s]."""
    really = evaluate.evaluate
    evaluate.evaluate = lambda *args: really(*args) | {"val_loss": losses[args[3]]}
