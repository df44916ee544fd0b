"""A run's files in out_dir: how it writes them, and how it resumes from them.

    last.pt    with the log, all that continuing needs   best.pt      the model with the best loss at its length
    prev.pt    the previous last.pt                      log.jsonl    one record per logged step and evaluation

A kill at any moment is harmless: the log reaches the disk before the checkpoint that stores its length, a checkpoint
gets its name only once all of it is on the disk, and resuming truncates the log to the stored length.
"""

import dataclasses
import errno
import fcntl
import json
import math
import os
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from curriculum import Curriculum
from model import GPT, GPTConfig
from parallel import Team
from settings import Config, UserError, one_line

# Keys that may change when a run resumes. Changing any other would make it another run.
MAY_CHANGE = ("data_dir out_dir resume max_steps cooldown_steps plan_ppl phases micro_batch_tokens device dtype "
              "compile eval_interval patience checkpoint_interval log_interval").split()


@dataclasses.dataclass
class Progress:
    """The state of a run besides its weights, optimizers and scaler."""

    step: int = 0  # steps done
    seconds: float = 0.0  # spent in training steps, not in evaluations and checkpoints
    evaluated: int = -1  # the step of the last evaluation
    best_len: int = 0  # the length of the last evaluation
    best_loss: float = math.inf  # the lowest validation loss at that length
    bad_evals: int = 0  # evaluations at that length since the lowest

    def record(self, seq_len: int, val_loss: float) -> bool:
        """Note an evaluation after the current step; return whether its loss is the best at its length."""
        self.evaluated = self.step
        if seq_len != self.best_len:  # losses at different lengths are not comparable
            self.best_len, self.best_loss, self.bad_evals = seq_len, math.inf, 0
        is_best = val_loss < self.best_loss
        self.best_loss, self.bad_evals = (val_loss, 0) if is_best else (self.best_loss, self.bad_evals + 1)
        return is_best


class Damaged(UserError):
    """A checkpoint with a wrong checksum or format."""


def save_checkpoint(path: Path, state: dict) -> None:
    """Write state to a temporary file and rename it; last.pt becomes prev.pt. An OSError leaves a whole checkpoint."""
    temporary = path.with_name("checkpoint.tmp")  # always this name: a save overwrites what a kill left
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if path.name == "last.pt" and path.exists():
            path.replace(path.with_name("prev.pt"))
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # a rename is on the disk only when its folder is
        os.close(folder)
    except RuntimeError as error:  # after a failed write, closing torch's archive fails and hides the disk's error
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)  # half a file would take room from the next save


def load_checkpoint(path: Path) -> dict:
    """Load a checkpoint onto the CPU. Raises Damaged, UserError for another kind of file, OSError if it is missing."""
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch.load does not look at checksums
                raise Damaged(f"{path} is damaged: {damaged} in it does not match its checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, pickle and torch each raise their own
        if one_line(error) and getattr(error, "errno", 0) not in (errno.EINVAL, errno.EIO):  # bad offset, bad disk
            raise  # a missing file, a lack of memory, or the Damaged above
        raise Damaged(f"{path} is damaged: {error or type(error).__name__}") from error
    expected = {"config", "step", "model", *(("progress", "log_length") if path.name != "best.pt" else ())}
    if not isinstance(state, dict) or not expected <= state.keys():
        raise UserError(f"{path} is not a checkpoint of this version: it lacks one of {', '.join(sorted(expected))}")
    return state


def load_model(path: Path, untrained_lengths: bool = False) -> tuple[GPT, dict]:
    """Return a model on the CPU and its checkpoint. max_seq_len is the longest trained on, or the table's longest."""
    state = load_checkpoint(path)
    config = state["config"]
    trained = Curriculum(config["stages"], 2**63 if untrained_lengths else max(1, state["step"])).stages
    model = GPT(GPTConfig(config["n_layer"], config["n_head"], config["n_embd"]), max(s.seq_len for s in trained))
    model.load_state_dict(state["model"])
    return model, state


def read_log(out_dir: Path) -> list[dict]:
    """Return the records of out_dir's log, without a last line that is cut off."""
    path = Path(out_dir) / "log.jsonl"
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


class Run:
    """The out_dir of a run: all processes read it, only process 0 writes. If the disk refuses a write, the run warns
    and continues. Refused records stay pending, and no checkpoint is saved before they are written."""

    def __init__(self, config: Config, fingerprint: str, team: Team):
        self.config, self.fingerprint, self.team = config, fingerprint, team
        self.out_dir, self.is_writer = Path(config.out_dir), team.rank == 0
        self.source = self.file = None  # name of the checkpoint that was read; descriptor of the locked log.jsonl
        self.length, self.pending = 0, b""  # bytes of the log that are safe on disk; records to add to them
        self.refused = set()  # files whose last write the disk refused

    def read(self) -> dict | None:
        """Return the checkpoint to resume, or None for a new run. Raises UserError if out_dir holds another run."""
        used = [name for name in ("last.pt", "prev.pt", "best.pt", "log.jsonl") if (self.out_dir / name).exists()]
        if used and not self.config.resume:
            raise UserError(f"{self.out_dir} holds a run ({', '.join(used)}): give --resume=True or another --out_dir")
        if "log.jsonl" in used and self.is_writer:
            self.lock()  # before reading: another run may still be writing its last checkpoint
        name = "last.pt" if "last.pt" in used else "prev.pt"  # a kill between two renames leaves only prev.pt
        try:
            state = load_checkpoint(self.out_dir / name) if name in used else None
        except Damaged as error:
            if name == "prev.pt" or "prev.pt" not in used:
                raise
            if self.is_writer:
                print(f"{error}; resuming from prev.pt", file=sys.stderr)
            name, state = "prev.pt", load_checkpoint(self.out_dir / "prev.pt")
        common = dataclasses.replace(self.config, data_dir="", out_dir="", device="")  # what processes must agree on
        told = [step := state["step"] if state else -1, zlib.crc32(f"{self.fingerprint} {common}".encode())]
        if self.team.sum(told) != [value * self.team.count for value in told]:
            raise UserError(f"the processes differ in step, keys or shards: do they all see the same {self.out_dir}?")
        if state is None:
            if used == ["best.pt"] or ("log.jsonl" in used and any(r["step"] for r in read_log(self.out_dir))):
                raise UserError(f"{self.out_dir} has {' and '.join(used)} but no last.pt: give another --out_dir")
            return None
        old, new = state["config"], dataclasses.asdict(self.config)
        changes = [f"{key} was {old.get(key)!r} and is {new[key]!r}"
                   for key in new if key not in MAY_CHANGE and old.get(key) != new[key]]  # fmt: skip
        if state["fingerprint"] != self.fingerprint:
            changes.append("the dataset has other shards")
        if changes:
            raise UserError(f"the checkpoint in {self.out_dir} is of another run: {', '.join(changes)}")
        if step > self.config.max_steps:
            raise UserError(f"{self.out_dir} is at step {step:,}, past max_steps={self.config.max_steps:,}")
        self.source, self.length = name, state["log_length"]
        return state

    def lock(self) -> None:
        """Make out_dir, and open and lock the log."""
        try:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            self.file = os.open(self.out_dir / "log.jsonl", os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a kill frees the lock
        except BlockingIOError as error:
            raise UserError(f"another run is writing in {self.out_dir}") from error
        except OSError as error:
            if self.file is None:  # else the file is open on a network file system without locks
                raise UserError(f"cannot write in out_dir {self.out_dir}: {error.strerror}") from error

    def start(self) -> None:
        """Truncate the log to the length stored in the checkpoint."""
        if not self.is_writer:
            return
        if self.file is None:
            self.lock()
        if not self.length <= os.fstat(self.file).st_size <= (math.inf if self.config.resume else 0):
            raise UserError(f"{self.out_dir}/log.jsonl is not as long as last.pt requires: restore it")
        os.truncate(self.file, self.length)
        if self.source == "prev.pt":  # else the next save would replace the good checkpoint by the damaged one
            (self.out_dir / "prev.pt").replace(self.out_dir / "last.pt")

    def log(self, event: str, **record: object) -> None:
        if self.is_writer:
            self.pending += json.dumps({"event": event, **record}).encode() + b"\n"
            self.flush()

    def flush(self, durably: bool = False) -> None:
        """Write the pending records at the end of the log. They stay pending until a durable write succeeds."""
        with self.attempt("log.jsonl"):
            written = 0
            while written < len(self.pending):  # a full disk may take only a part
                written += os.pwrite(self.file, self.pending[written:], self.length + written)
            if durably:
                os.fsync(self.file)
                self.length, self.pending = self.length + written, b""

    def save(self, name: str, **state: object) -> None:
        """Write the log to the disk, then a checkpoint of `state`."""
        if self.is_writer:
            self.flush(durably=True)
            state |= {"config": dataclasses.asdict(self.config), "fingerprint": self.fingerprint}
            with self.attempt(name):
                if "log.jsonl" in self.refused:
                    raise OSError(errno.EIO, "the log could not be written")
                save_checkpoint(self.out_dir / name, state | {"log_length": self.length})

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Wrap a write: if the disk refuses it, warn and remember the file."""
        try:
            yield
            self.refused.discard(name)
        except OSError as error:
            if name not in self.refused:
                print(f"{self.out_dir / name} cannot be written: {error.strerror}; the run continues", file=sys.stderr)
            self.refused.add(name)

    def finish(self) -> None:
        """Close the log. Raises UserError if the disk refused the last write of a file."""
        if self.is_writer:
            self.flush(durably=True)
            os.close(self.file)
            if self.refused:
                raise UserError(f"cannot write {', '.join(self.refused)} in {self.out_dir}: fix it, then --resume=True")
