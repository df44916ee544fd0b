"""Full disks, damaged and hostile files, numbers that are not finite, too little memory: what a run does about each."""

import ctypes
import dataclasses
import errno
import itertools
import json
import math
import os
import pickle
import resource
import shutil
import signal
import stat
import zipfile

import numpy as np
import pytest
import torch
from conftest import SMALL, assert_same_run, read_log

import train
from checkpoint import Log, load_checkpoint, save_checkpoint
from config import Config
from errors import UserError
from model import GPT, GPTConfig
from parallel import Processes
from validate import Score

TABLE = ((0, 16, 8, 1.0), (6, 32, 4, 0.5))
KEYS = SMALL | {"stages": TABLE, "max_steps": 12, "eval_interval": 100, "checkpoint_interval": 3, "eval_tokens": 256}


@pytest.fixture
def program(small_dir, run_program, tmp_path):
    """Runs train.py on KEYS in out_dir, resuming, with more arguments."""
    path = tmp_path / "faults.py"
    path.write_text("".join(f"{key} = {value!r}\n" for key, value in KEYS.items()))

    def run(out_dir, *arguments: str, **kwargs: object):
        return run_program("train.py", path, f"--data_dir={small_dir}", f"--out_dir={out_dir}", "--resume=True",
                           *arguments, **kwargs)  # fmt: skip

    return run


@pytest.fixture(scope="module")
def unbroken(small_dir, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("unbroken")
    assert train.train(run_config(small_dir, out_dir)) == 0
    return out_dir


@pytest.fixture
def halfway(small_dir, tmp_path, started):
    """The out_dir of a run that has made 5 of its 12 steps."""
    return shutil.copytree(started, tmp_path / "halfway")


@pytest.fixture(scope="module")
def started(small_dir, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("started")
    assert train.train(run_config(small_dir, out_dir, max_steps=5)) == 0
    return out_dir


def run_config(small_dir, out_dir, **keys) -> Config:
    return Config(**KEYS | {"data_dir": str(small_dir), "out_dir": str(out_dir), "resume": True} | keys)


# --------------------------------------------------------------------------------------------------------------------
# Disks


def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_is_finished_once_there_is_room(unbroken, program, halfway):
    """A size limit that the log keeps and a checkpoint does not: each save fails in the middle of its file."""
    out_dir = halfway
    before = (out_dir / "last.pt").read_bytes()

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    done = program(out_dir, preexec_fn=limit)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert any("step 6: " in line and "last.pt cannot be written: File too large" in line for line in lines)
    assert "--resume=True makes it again" in lines[-1] and not any("Traceback" in line for line in lines)
    assert (out_dir / "last.pt").read_bytes() == before and not (out_dir / "last.tmp").exists()
    assert read_log(out_dir)[-1]["step"] == 12  # it went on
    assert program(out_dir).returncode == 0
    assert_same_run(out_dir, unbroken)


def as_an_ordinary_user() -> None:
    for capability in (1, 2):  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: root minds permissions, too
        ctypes.CDLL(None).prctl(24, capability)


def test_a_read_only_folder_is_refused_and_left_as_it_is(unbroken, program, halfway):
    out_dir = halfway
    before = {path.name: path.read_bytes() for path in out_dir.iterdir()}
    out_dir.chmod(stat.S_IRUSR | stat.S_IXUSR)

    done = program(out_dir, preexec_fn=as_an_ordinary_user)
    out_dir.chmod(stat.S_IRWXU)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "cannot write in out_dir" in done.stderr
    assert {path.name: path.read_bytes() for path in out_dir.iterdir()} == before
    assert program(out_dir).returncode == 0
    assert_same_run(out_dir, unbroken)


def test_what_lies_in_a_folder_that_may_not_be_looked_into_is_one_line(program, halfway, run_program):
    closed = halfway.parent / "closed"
    closed.mkdir()
    shutil.copytree(halfway, closed / "run")
    closed.chmod(0)
    for arguments in ([closed / "run"], [halfway, f"--data_dir={closed}/data"]):
        done = program(*arguments, preexec_fn=as_an_ordinary_user)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "closed/" in done.stderr, done.stderr
    done = run_program("sample.py", f"--out_dir={closed}/run", preexec_fn=as_an_ordinary_user)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "closed/" in done.stderr, done.stderr
    closed.chmod(stat.S_IRWXU)


def fail_to_save(monkeypatch, names_and_steps) -> None:
    """The disk is full whenever a checkpoint of one of these names and steps is saved."""

    def save(path, state):
        if (path.name, state["step"]) in names_and_steps:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_checkpoint(path, state)

    monkeypatch.setattr(train, "save_checkpoint", save)


def test_a_best_model_that_was_not_saved_is_told_and_made_again(unbroken, small_dir, tmp_path, monkeypatch):
    fail_to_save(monkeypatch, {("best.pt", 12)})
    with pytest.raises(UserError, match="best.pt is not the best model, that of step 12"):
        train.train(run_config(small_dir, tmp_path))
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 0
    monkeypatch.undo()
    assert train.train(run_config(small_dir, tmp_path)) == 0
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 12
    assert_same_run(tmp_path, unbroken)


def stopping(monkeypatch, step: int) -> Processes:
    """A process to which SIGTERM comes in its step of this number, counted from where it starts."""
    team, train_step = Processes(), train.train_step
    calls = itertools.count(1)

    def stopped(*arguments):
        team.seen += [signal.SIGTERM] * (next(calls) == step)
        return train_step(*arguments)

    monkeypatch.setattr(train, "train_step", stopped)
    return team


def evaluations(out_dir) -> dict[int, bool]:
    """Whether each was the best, by step."""
    return {record["step"]: record["is_best"] for record in read_log(out_dir) if record["event"] == "eval"}


def test_a_run_that_is_stopped_before_it_reaches_its_best_again_says_that_it_was_stopped(
    unbroken, small_dir, tmp_path, monkeypatch
):
    """Going on from prev.pt, of step 9, when best.pt is of step 12."""
    shutil.copytree(unbroken, tmp_path / "run")
    (tmp_path / "run" / "last.pt").write_bytes(b"damaged")
    config = run_config(small_dir, tmp_path / "run")
    assert train.train(config, stopping(monkeypatch, 1)) == signal.SIGTERM
    assert evaluations(tmp_path / "run") == {0: True, 6: False}
    monkeypatch.undo()
    assert train.train(config) == 0
    assert_same_run(tmp_path / "run", unbroken)


def test_other_evaluations_than_before_do_not_make_a_run_fail(unbroken, small_dir, tmp_path):
    shutil.copytree(unbroken, tmp_path / "run")
    for eval_tokens in (64, 1_024):
        assert train.train(run_config(small_dir, tmp_path / "run", eval_tokens=eval_tokens)) == 0


def test_a_loss_of_other_windows_is_not_what_early_stopping_goes_by(started, small_dir, tmp_path):
    """A best of 0.0 stays it as long as as much is scored as before."""
    for eval_tokens, is_best in ((KEYS["eval_tokens"], False), (128, True)):
        out_dir = shutil.copytree(started, tmp_path / str(eval_tokens))
        state = load_checkpoint(out_dir / "last.pt")
        save_checkpoint(out_dir / "last.pt", state | {"best": (TABLE[0][1], 0.0, 0)})
        config = run_config(small_dir, out_dir, max_steps=6, eval_tokens=eval_tokens)
        assert train.train(config) == 0
        assert evaluations(out_dir)[6] == is_best
        assert (load_checkpoint(out_dir / "best.pt")["step"] == 6) == is_best


def test_ten_skipped_steps_name_the_checkpoint_that_a_resumed_run_has(started, small_dir, tmp_path, monkeypatch):
    """Resumed with another key, between two checkpoints: last.pt is of step 5, as it was."""
    assert not evaluations(started)[5]  # else there would be one more to make at that step, and a checkpoint before it
    out_dir = shutil.copytree(started, tmp_path / "run")
    monkeypatch.setattr(train, "train_step", lambda *arguments: (math.nan, math.nan))
    with pytest.raises(UserError, match="keeps its checkpoint of step 5$"):
        train.train(run_config(small_dir, out_dir, max_steps=100, log_interval=7, checkpoint_interval=1000))


def test_a_lack_of_memory_for_a_checkpoint_s_moments_is_said(started, small_dir, tmp_path, monkeypatch):
    def lack(optimizer, state):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", lack)
    with pytest.raises(UserError, match="out of memory: the model and its optimizers do not fit"):
        train.train(run_config(small_dir, shutil.copytree(started, tmp_path / "run")))


def test_a_checkpoint_that_is_saved_late_does_not_count_on_its_evaluation(small_dir, tmp_path, monkeypatch):
    """The disk has room for last.pt of step 12 only after the evaluation there. Then the run is made longer."""
    full = [("last.pt", 12)]

    def save(path, state):
        if (path.name, state["step"]) in full:
            full.clear()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_checkpoint(path, state)

    monkeypatch.setattr(train, "save_checkpoint", save)
    assert train.train(run_config(small_dir, tmp_path)) == 0 and not full
    assert train.train(run_config(small_dir, tmp_path, max_steps=14)) == 0
    assert evaluations(tmp_path)[12]


def test_a_run_that_goes_back_to_an_earlier_configuration_leaves_out_no_evaluation(small_dir, tmp_path, monkeypatch):
    config = run_config(small_dir, tmp_path, max_steps=8, eval_interval=7)
    assert train.train(config, stopping(monkeypatch, 5)) == signal.SIGTERM
    monkeypatch.undo()
    assert train.train(dataclasses.replace(config, max_steps=5)) == 0
    assert train.train(config) == 0
    assert {0, 6, 7, 8} <= evaluations(tmp_path).keys()


def test_a_best_model_that_was_not_saved_does_not_matter_once_there_is_a_better_one(small_dir, tmp_path, monkeypatch):
    fail_to_save(monkeypatch, {("best.pt", 0)})
    assert train.train(run_config(small_dir, tmp_path)) == 0
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 12


def test_a_log_that_cannot_be_written_any_more_loses_nothing(unbroken, small_dir, tmp_path, monkeypatch):
    """From step 5 on, as on a network's disk that has forgotten the file; checkpoints are saved."""

    def write_out(log, durably):
        if log.records and log.records[-1]["step"] >= 5:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        write(log, durably)

    write = Log.write_out
    monkeypatch.setattr(Log, "write_out", write_out)
    with pytest.raises(UserError, match="lacks the end of the run"):
        train.train(run_config(small_dir, tmp_path))
    assert read_log(tmp_path)[-1]["step"] == 4 and load_checkpoint(tmp_path / "last.pt")["step"] == 12
    monkeypatch.undo()
    assert train.train(run_config(small_dir, tmp_path)) == 0
    assert_same_run(tmp_path, unbroken)


def test_a_log_that_wrote_half_a_line_before_a_checkpoint_and_the_rest_after_it_has_each_once(tmp_path):
    lines = [json.dumps({"event": "train", "step": step}) + "\n" for step in range(1, 6)]
    log = Log(tmp_path / "log.jsonl")
    log.write(json.loads(lines[0]))
    log.records += map(json.loads, lines[1:3])
    log.unwritten = (lines[1][9:] + lines[2]).encode()
    not_on_disk = log.not_on_disk()
    assert not_on_disk == lines[1] + lines[2]
    log.file.close()
    for more in ("", lines[1][9:15], lines[1][9:], lines[1][9:] + "".join(lines[2:])):  # what came to the disk after it
        (tmp_path / "log.jsonl").write_text(lines[0] + lines[1][:9] + more)
        log = Log(tmp_path / "log.jsonl", 3, unwritten=not_on_disk)
        assert [record["step"] for record in log.records] == [1, 2, 3]
        log.file.close()


def test_a_damaged_checkpoint_stays_where_it_is_when_the_command_is_refused(program, halfway):
    damaged = bytearray((halfway / "last.pt").read_bytes())
    damaged[len(damaged) // 3] ^= 4
    (halfway / "last.pt").write_bytes(damaged)
    done = program(halfway, "--seed=3")
    assert done.returncode == 2 and "seed was 1337 and is 3" in done.stderr
    assert (halfway / "last.pt").read_bytes() == damaged and not (halfway / "last.damaged").exists()


def test_a_log_keeps_what_a_full_disk_does_not_take_and_writes_it_later(tmp_path, capsys):
    records = [{"event": "train", "step": step} for step in range(1, 6)]
    log = Log(tmp_path / "log.jsonl")
    log.write(records[0])
    disk = log.file
    log.file = open("/dev/full", "wb", buffering=0)  # the kernel's own ENOSPC
    log.write(records[1])
    log.write(records[2])
    assert capsys.readouterr().err.count("No space left on device") == 1
    assert read_log(tmp_path) == records[:1]
    log.file = disk
    log.write(records[3])
    assert read_log(tmp_path) == records[:4]
    # What a kill cut off, and what came after the checkpoint, is forgotten.
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write(json.dumps(records[4]) + '\n{"event": "train", "st')
    log.file.close()
    assert Log(tmp_path / "log.jsonl", 3).records == records[:3] == read_log(tmp_path)


@pytest.mark.parametrize("fault", ["flipped", "truncated", "empty", "missing"])
def test_a_damaged_last_checkpoint_is_named_and_never_replaces_the_one_before(fault, program, halfway):
    out_dir = halfway
    last, data = out_dir / "last.pt", bytearray((out_dir / "last.pt").read_bytes())
    data[len(data) // 3] ^= 4
    whole = {"flipped": bytes(data), "truncated": bytes(data[: len(data) // 2]), "empty": b""}
    last.unlink() if fault == "missing" else last.write_bytes(whole[fault])
    done = program(out_dir, "--max_steps=7")
    assert done.returncode == 0 and "going on from step 3" in done.stdout
    assert ("last.pt is" in done.stderr) == (fault != "missing")
    assert (out_dir / "last.damaged").exists() == (fault != "missing")
    # Two saves followed, at steps 6 and 7; the first of them did not turn the damaged file into prev.pt.
    assert [load_checkpoint(out_dir / name)["step"] for name in ("prev.pt", "last.pt")] == [6, 7]


def weights(path) -> dict:
    return {name: weight.numpy().tobytes() for name, weight in torch.load(path, weights_only=True)["model"].items()}


def test_every_flipped_bit_and_every_cut_of_a_checkpoint_is_found(tmp_path):
    path = tmp_path / "last.pt"
    state = {"config": {}, "step": 3, "model": {"weight": torch.arange(300.0)}}
    save_checkpoint(path, state)
    data = path.read_bytes()
    chance = np.random.default_rng(0)
    for place in chance.integers(len(data), size=300):
        damaged = bytearray(data)
        damaged[place] ^= 1 << chance.integers(8)
        path.write_bytes(damaged)
        try:
            loaded = load_checkpoint(path)
        except UserError as error:
            assert str(path) in str(error)
        else:  # a bit of the archive's padding, names or dates, which carry nothing
            assert loaded["step"] == 3 and torch.equal(loaded["model"]["weight"], state["model"]["weight"])
    for place in chance.integers(len(data), size=100):
        path.write_bytes(data[:place])
        with pytest.raises(UserError, match="last.pt"):
            load_checkpoint(path)


class Attack:
    """Unpickled, it would make a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("form", ["archive", "legacy", "pickle"])
@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_a_checkpoint_that_would_run_code_is_refused_and_does_not(name, form, program, run_program, tmp_path):
    out_dir, target = tmp_path / "hostile", tmp_path / "attacked"
    out_dir.mkdir()
    state = {"config": {}, "step": 1, "model": Attack(target)}
    if form == "pickle":
        (out_dir / name).write_bytes(pickle.dumps(state))
    else:
        torch.save(state, out_dir / name, _use_new_zipfile_serialization=form == "archive")
    assert zipfile.is_zipfile(out_dir / name) == (form == "archive")
    done = program(out_dir) if name == "last.pt" else run_program("sample.py", f"--out_dir={out_dir}")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and name in done.stderr
    assert not target.exists()
    if form == "archive":  # the attack is real: the unsafe way of loading falls for it
        torch.load(out_dir / name, weights_only=False)
        assert target.exists()


# --------------------------------------------------------------------------------------------------------------------
# Numbers


def small_step(scaler=None, **keys):
    """A model, its optimizers and a function that makes one step with them."""
    config = Config(**SMALL | keys, stages=TABLE)
    model = GPT(GPTConfig(1, 2, 32), 64)
    model.init_weights(0)
    optimizers = train.make_optimizers(model, config)
    windows = np.random.default_rng(0).integers(50257, size=(4, 65))

    def step(loss_of=model.loss):
        return train.train_step(loss_of, model, optimizers, windows, 0.01, config, scaler)

    return model, optimizers, step


def frozen(model, optimizers) -> bytes:
    state = [model.state_dict(), [optimizer.state_dict()["state"] for optimizer in optimizers]]
    return pickle.dumps(torch.utils._pytree.tree_map(lambda x: x.numpy().tobytes(), state))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_neither_weights_nor_moments(optimizer, bad):
    model, optimizers, step = small_step(optimizer=optimizer)
    step()
    before = frozen(model, optimizers)
    loss, norm = step(lambda windows: model.loss(windows) * bad)
    assert not math.isfinite(loss) and frozen(model, optimizers) == before
    # The loss is finite, its gradient is not.
    loss, norm = step(lambda windows: model.loss(windows) + torch.sqrt(model.norm.weight.sum() * 0))
    assert math.isfinite(loss) and not math.isfinite(norm) and frozen(model, optimizers) == before
    step()
    assert frozen(model, optimizers) != before


def poison(monkeypatch, bad_calls) -> None:
    """The losses of these calls of the training function, counted from 1, become NaN."""
    set_up = train.set_up

    def poisoned(*args):
        model, optimizers, loss_of, score_of = set_up(*args)
        calls = iter(range(1, 10_000))
        return model, optimizers, lambda w: loss_of(w) * (math.nan if next(calls) in bad_calls else 1), score_of

    monkeypatch.setattr(train, "set_up", poisoned)


def test_skipped_steps_are_logged_and_a_few_do_not_end_the_run(monkeypatch, tmp_path, small_dir):
    poison(monkeypatch, {4, 8, 9})
    assert train.train(run_config(small_dir, tmp_path)) == 0
    records = read_log(tmp_path)
    skips = [(r["step"], r["in_a_row"]) for r in records if r["event"] == "skip"]
    assert skips == [(4, 1), (8, 1), (9, 2)]
    assert [r["step"] for r in records if r["event"] != "eval"] == list(range(1, 13))


def test_steps_skipped_in_a_row_stop_the_run_and_keep_the_checkpoint_before_them(monkeypatch, tmp_path, small_dir):
    poison(monkeypatch, range(8, 100))
    with pytest.raises(UserError, match=r"10 steps in a row .* step 17 at learning rate 0.005; .* of step 6$"):
        train.train(run_config(small_dir, tmp_path, max_steps=30))
    # Those at 9, 12 and 15 would have been of weights without a loss.
    assert [load_checkpoint(tmp_path / name)["step"] for name in ("prev.pt", "last.pt")] == [3, 6]


def test_a_learning_rate_that_is_far_too_large_is_one_line_and_status_2(program, tmp_path):
    done = program(tmp_path / "run", "--learning_rate=1e30", "--max_steps=30")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "learning rate 5e+29" in line and "step 11" in line
    kept = weights(tmp_path / "run" / "last.pt").values()
    assert all(np.isfinite(np.frombuffer(weight, np.float32)).all() for weight in kept)


def test_float16_s_gradients_are_those_of_float32_and_an_overflow_halves_the_scale():
    grads = {}
    for dtype in (torch.float32, torch.float16):
        scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
        model, optimizers, step = small_step(scaler=scaler, optimizer="adamw", grad_clip=0.0)
        optimizers[0].step = lambda: grads.update({dtype: [w.grad.clone() for w in model.parameters()]})  # noqa: B023
        loss, norm = step(torch.autocast("cpu", dtype, enabled=dtype == torch.float16)(model.loss))
        assert math.isfinite(loss)
    for half, single in zip(grads[torch.float16], grads[torch.float32]):
        assert torch.nn.functional.cosine_similarity(half.flatten(), single.flatten(), dim=0) > 0.999
        assert half.norm() == pytest.approx(single.norm().item(), rel=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    model, optimizers, step = small_step(scaler=scaler)
    before = frozen(model, optimizers)
    loss, norm = step(torch.autocast("cpu", torch.float16)(model.loss))
    assert math.isfinite(loss) and not math.isfinite(norm) and scaler.get_scale() == 2.0**39
    assert frozen(model, optimizers) == before


def test_a_float16_run_finds_its_scale_and_goes_on_with_it(small_dir, tmp_path):
    """Both runs start from the same checkpoint, whose scale is far too large; one of them is broken off at step 6."""
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"

    def run(out_dir, max_steps: int) -> None:
        assert train.train(run_config(small_dir, out_dir, dtype="float16", max_steps=max_steps)) == 0

    run(unbroken, 2)
    state = load_checkpoint(unbroken / "last.pt")
    assert state["scaler"]["scale"] == 2.0**16
    state["scaler"]["scale"] = 2.0**22
    save_checkpoint(unbroken / "last.pt", state)
    shutil.copytree(unbroken, resumed)
    run(unbroken, 12)
    run(resumed, 6)
    run(resumed, 12)
    assert_same_run(resumed, unbroken)
    scales = [load_checkpoint(out_dir / "last.pt")["scaler"] for out_dir in (resumed, unbroken)]
    skips = sum(record["event"] == "skip" for record in read_log(unbroken))
    assert scales[0] == scales[1] and 1 <= skips < 6 and scales[0]["scale"] == 2.0 ** (22 - skips)


# --------------------------------------------------------------------------------------------------------------------
# Memory


# train.py with 1.8 GB of address space besides what importing torch takes: 0.7 GB or, of a CUDA build, 3.3.
WITH_LITTLE_MEMORY = """
import resource, runpy, sys, torch
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 1_800_000_000, used + 1_800_000_000))
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="looks at its memory in /proc")
def test_too_little_memory_is_one_line_with_the_micro_batch_to_try_and_that_one_fits(small_dir, run_program, tmp_path):
    """The loss of 1,024 tokens fits into the address space, and that of 8,192 does not: 0.2 and 1.6 GB."""
    path = tmp_path / "faults.py"
    keys = KEYS | {"stages": ((0, 64, 128, 1.0),), "max_steps": 1, "data_dir": str(small_dir)}
    path.write_text("".join(f"{key} = {value!r}\n" for key, value in keys.items()))
    arguments = ["-c", WITH_LITTLE_MEMORY, path, f"--out_dir={tmp_path / 'run'}", "--resume=True"]
    done = run_program(*arguments, "--micro_batch_tokens=8192")
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: out of memory: 128 windows of 64") and "--micro_batch_tokens=4096" in line
    done = run_program(*arguments, "--micro_batch_tokens=1024")
    assert done.returncode == 0, done.stderr


def test_a_gpu_s_lack_of_memory_is_said_the_same_way_and_other_errors_are_not_taken_for_it():
    def lack(windows):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.14 GiB")

    def other(windows):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    for scaler in (None, torch.amp.GradScaler("cpu")):  # float16's, which has nothing to unscale yet
        _, _, step = small_step(scaler)
        with pytest.raises(UserError, match=r"out of memory: 4 windows of 64 .* --micro_batch_tokens=128$"):
            step(lack)
    with pytest.raises(RuntimeError, match="mat1"):
        step(other)


# --------------------------------------------------------------------------------------------------------------------
# Early stopping

# Validation losses at the evaluations of a run with patience 3: at (seq_len, loss) each.
SPIKE = [(16, 5.0), (16, 4.0), (16, 4.1), (16, 4.2), (32, 9.0), (32, 8.9), (32, 8.8), (32, 8.7), (32, 8.6)]
CURVES = {
    "spike at a stage change": (SPIKE, None, 8),
    "plateau that ends": ([(16, 5.0), (16, 5.0), (16, 5.1), (16, 5.0), (16, 4.9), *[(32, 5.0)] * 4], None, 5),
    "true plateau": ([(16, 6.0), (16, 5.0), *[(16, 5.0)] * 4, (16, 1.0), (16, 1.0), (16, 1.0)], 5, 1),
    "plateau across stages of one length": ([(16, 6.0), *[(16, 5.0)] * 4, *[(16, 5.5)] * 4], 5, 1),
}


@pytest.mark.parametrize("all_differ", [-2.0, 2.0])
@pytest.mark.parametrize("curve", CURVES)
def test_early_stopping_on_made_up_curves(curve, all_differ, monkeypatch, tmp_path, small_dir):
    """One evaluation a step: losses[s] after s steps; it stops after step `end` or not at all; best.pt is of `best`."""
    losses, end, best = CURVES[curve]
    val = iter(losses)

    def made_up(score_of, split, seq_len, n, token_bytes, config, team):
        if n > 100:  # all held-out windows, at the end of the run: no loss to compare with those of fewer
            all_scored.append(seq_len)
            return Score(made_up.loss + all_differ, 0.0, 0.0, n, 0.0, [])
        calls.append(seq_len)
        if len(calls) % 3 == 1:  # validation; training and the last length follow
            expected, made_up.loss = next(val)
            assert seq_len == expected
        return Score(made_up.loss, 0.0, 0.0, n, 0.0, [])

    calls, all_scored = [], []
    monkeypatch.setattr(train, "score_windows", made_up)
    rows = ((0, 16, 2, 1.0), (3, 16, 2, 0.5))
    change = next((step for step, (length, _) in enumerate(losses) if length == 32), None)
    if change:  # the evaluation that closes a stage is at its own length
        rows = ((0, 16, 2, 1.0), (change - 1, 32, 2, 1.0))
    config = run_config(small_dir, tmp_path, stages=rows, max_steps=8, eval_interval=1, patience=3)
    train.train(config)
    evals = [record for record in read_log(tmp_path) if record["event"] == "eval"]
    assert evals[-1]["step"] == (end or 8)
    assert torch.load(tmp_path / "best.pt", weights_only=True)["step"] == best
    assert len(all_scored) == 1 and evals[-1]["val_loss"] == losses[end or 8][1] + all_differ
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    train.train(config)  # started again, it has ended already
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before and len(all_scored) == 1
