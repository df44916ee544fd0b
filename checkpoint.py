"""What a run leaves on disk, and how it finds it again: checkpoints and the log.

    last.pt    everything needed to go on exactly        best.pt      the model at the best validation of its length
    prev.pt    the last.pt before it                     log.jsonl    one record per logged step and evaluation

A kill, a power cut or a full disk at any moment leaves last.pt or prev.pt whole: a file gets its name only after all
of it is on the disk. The log is on the disk before the checkpoint that counts on it.
"""

import dataclasses
import fcntl
import io
import json
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from config import Config
from curriculum import Curriculum
from errors import UserError
from model import GPT, GPTConfig

# What may differ between a checkpoint and the run that goes on from it; anything else would make it another run.
MAY_CHANGE = set("data_dir out_dir resume eval_only max_steps cooldown_steps plan_ppl phases micro_batch_tokens "
                 "device dtype compile eval_interval eval_tokens patience checkpoint_interval "
                 "log_interval".split())

# What a checkpoint holds: best.pt the first three, last.pt and prev.pt all; besides, what the log could not write.
MODEL_KEYS = {"config", "step", "model"}
RUN_KEYS = MODEL_KEYS | {"optimizers", "scaler", "time_s", "best"}


def save_checkpoint(path: Path, state: dict) -> None:
    """Writes state beside path, makes it durable, and only then gives it the name; last.pt becomes prev.pt.

    Raises OSError where that fails: what path held is then still there, as path or as prev.pt.
    """
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if path.name == "last.pt" and path.exists():
            path.replace(path.with_name("prev.pt"))
        temporary.replace(path)
        sync_folder(path.parent)
    except RuntimeError as error:
        # Over a failed write torch still closes its archive; that fails too, and hides the disk's own error.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    finally:
        drop(temporary)  # on a full disk half a file only takes room from the next


def drop(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # a read-only disk, which the caller is about to report
        pass


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable: a renamed file is on the disk only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(path: Path, keys: set[str] = MODEL_KEYS) -> dict:
    """What save_checkpoint wrote, on the CPU. Raises UserError if it is missing, damaged or without one of the keys.

    torch.load does not look at the archive's checksums; weights_only keeps a foreign file from running code.
    """
    if not os.path.exists(path):  # Path.exists raises an error where it may not look
        raise UserError(f"{path} does not exist: train a model first, or give its --out_dir")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise UserError(f"{path} is damaged: {damaged} in it does not match its checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # zipfile, pickle and torch each have their own
        what = str(error).partition("\n")[0]
        raise UserError(f"{path} is not a readable checkpoint: {type(error).__name__}: {what}") from error
    if missing := keys - (state.keys() if isinstance(state, dict) else set()):
        raise UserError(f"{path} is no checkpoint of this program: it has no {', '.join(sorted(missing))}")
    return state


def load_model(path: Path) -> tuple[GPT, dict]:
    """The model of a checkpoint and all that is in it. Raises UserError if there is none.

    The model's max_seq_len is the longest window it was trained on: stages that the run had not reached do not count.
    """
    state = load_checkpoint(path)
    config = state["config"]
    trained = Curriculum(config["stages"], max(1, state["step"])).stages
    model = GPT(GPTConfig(config["n_layer"], config["n_head"], config["n_embd"]), max(s.seq_len for s in trained))
    model.load_state_dict(state["model"])
    return model.eval(), state


def find_checkpoint(out_dir: Path) -> tuple[dict | None, bool]:
    """last.pt, or prev.pt where that is missing or damaged (which is said); None if there is neither. And whether
    last.pt is damaged."""
    last, prev = out_dir / "last.pt", out_dir / "prev.pt"
    if os.path.exists(last) and os.path.exists(prev):
        try:
            return load_checkpoint(last, RUN_KEYS), False
        except UserError as error:
            print(f"{error}; trying the checkpoint before it", file=sys.stderr)
            return load_checkpoint(prev, RUN_KEYS), True
    return next((load_checkpoint(path, RUN_KEYS) for path in (last, prev) if os.path.exists(path)), None), False


def check_same_run(config: Config, state: dict) -> None:
    """Raises UserError with the keys that differ between this configuration and the checkpoint's."""
    old, new = state["config"], dataclasses.asdict(config)
    changes = [key for key in new if key not in MAY_CHANGE and old.get(key) != new[key]]
    if changes:
        listed = ", ".join(f"{key} was {old.get(key)!r} and is {new[key]!r}" for key in changes)
        raise UserError(f"the checkpoint in {config.out_dir} is of another run: {listed}")


def lock(file: io.FileIO) -> None:
    """Keeps a second run out of the folder: each would overwrite the other's checkpoints. A kill frees the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"another run is writing {file.name}") from error
    except OSError:  # some network file systems have no locks
        pass


def hold(path: Path) -> io.FileIO:
    file = open(path, "ab+")
    lock(file)
    return file


class Log:
    """log.jsonl, one JSON object a line, written out as it comes.

    Opened at a step, it forgets what a killed run logged after it. The evaluation at that very step, which comes after
    the checkpoint, is kept if keep_eval says so of it. What a full disk does not take is written later; `unwritten` is
    what a run had not come to write when it made its checkpoint. held is the file at path, if it is locked already.
    Raises UserError if it cannot be written at the start, or if another run is writing it.
    """

    def __init__(self, path: Path, step: int = 0, keep_eval: Callable = lambda record: False, unwritten: str = "",
                 held: io.FileIO | None = None):  # fmt: skip
        self.path, self.records, self.failed = path, [], False
        temporary = path.with_suffix(".tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with held or hold(path) as old:
                old.seek(0)
                lines = [*old.read().splitlines(), *unwritten.encode().splitlines()]
                for line in dict.fromkeys(lines):  # what a run could not write, it may have written after all
                    try:
                        record = json.loads(line)
                    except ValueError:
                        continue  # cut off in the middle by a kill
                    is_late = record["step"] == step and record["event"] == "eval" and not keep_eval(record)
                    if record["step"] <= step and not is_late:
                        self.records.append(record)
                self.unwritten = b"".join(json.dumps(record).encode() + b"\n" for record in self.records)
                self.file = open(temporary, "wb", buffering=0)
                lock(self.file)
                self.write_out(durably=True)
                temporary.replace(path)
            sync_folder(path.parent)
        except OSError as error:
            drop(temporary)
            raise UserError(f"cannot write in out_dir {path.parent}: {error.strerror}") from error

    def not_on_disk(self) -> str:
        """The last records, a line each, that the disk has not taken, or of which it may have a part."""
        missing = self.unwritten.count(b"\n")
        return "".join(json.dumps(record) + "\n" for record in self.records[len(self.records) - missing :])

    def evaluations(self) -> list[dict]:
        return [record for record in self.records if record["event"] == "eval"]

    def write(self, record: dict) -> None:
        self.records.append(record)
        self.unwritten += json.dumps(record).encode() + b"\n"
        self.flush()

    def flush(self, durably: bool = False) -> None:
        """Writes what is not written yet. That it fails is said once; the records stay for the next flush."""
        try:
            self.write_out(durably)
            self.failed = False
        except OSError as error:
            if not self.failed:
                print(f"{self.path} cannot be written: {error.strerror}; it is tried again", file=sys.stderr)
            self.failed = True

    def write_out(self, durably: bool) -> None:
        while self.unwritten:
            self.unwritten = self.unwritten[self.file.write(self.unwritten) :]  # a full disk may take a part
        if durably:
            os.fsync(self.file.fileno())


def open_best(config: Config) -> dict:
    """best.pt of the run that config describes. Raises UserError if there is none or out_dir holds another run's."""
    state = load_checkpoint(Path(config.out_dir) / "best.pt")
    check_same_run(config, state)
    return state


def open_run(config: Config) -> tuple[dict | None, Log]:
    """The checkpoint that the run goes on from (None for a new run) and its log. To the checkpoint belong `same`,
    whether it was made under this configuration; `is_best`, whether best.pt is of the same step; and `kept_eval`, the
    log's evaluation at that step, or None: it is kept if the configuration is the same and best.pt is as it says.

    Raises UserError if out_dir holds another run, one that resume does not ask for, or one that is past max_steps.
    """
    out_dir = Path(config.out_dir)
    used = [name for name in ("last.pt", "prev.pt", "best.pt", "log.jsonl") if os.path.exists(out_dir / name)]
    if used and not config.resume:
        raise UserError(f"{out_dir} holds a run ({', '.join(used)}): give --resume=True or another --out_dir")
    path, held = out_dir / "log.jsonl", None
    try:  # first of all: a run that is about to end may be writing its last checkpoint
        held = hold(path) if os.path.exists(path) else None
    except OSError as error:
        raise UserError(f"cannot write in out_dir {out_dir}: {error.strerror}") from error
    state, is_damaged = find_checkpoint(out_dir)
    if not state:
        return None, Log(path, held=held)
    check_same_run(config, state)
    step, last, best = state["step"], out_dir / "last.pt", out_dir / "best.pt"
    if step > config.max_steps:
        raise UserError(f"{out_dir} has come to step {step:,}, which is past max_steps={config.max_steps:,}")
    same = (state["config"] | {"resume": True}) == dataclasses.asdict(config)
    try:
        best_step = load_checkpoint(best)["step"]
    except UserError as error:  # the next best replaces it
        best_step = None
        if os.path.exists(best):
            print(error, file=sys.stderr)
    log = Log(path, step, lambda record: same and record["is_best"] == (best_step == step),
              state.get("unwritten", ""), held)  # fmt: skip
    if is_damaged:  # the next save would make it prev.pt, over the one that is whole
        try:
            last.replace(last.with_suffix(".damaged"))
        except OSError as error:
            raise UserError(f"cannot set {last} aside: {error.strerror}") from error
    kept = [record for record in log.evaluations() if record["step"] == step]
    return state | {"same": same, "is_best": best_step == step, "kept_eval": kept[0] if kept else None}, log
