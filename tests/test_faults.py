"""Kills, full disks, damaged files, too little memory: a run resumes bit for bit, or prints why it cannot.

Results are compared with `unbroken`, the same run without a fault: all tensors bit for bit, the log except for times.
"""

import fcntl
import os
import random
import shutil
import signal
from pathlib import Path
from signal import SIGKILL, SIGTERM

import numpy as np
import pytest
import torch
from children import VOCAB_SIZE, folder, run_train, write_learnable
from conftest import FEW, assert_same_run, read_log, release_logs

from checkpoint import Run, load_checkpoint, save_checkpoint
from parallel import Team
from settings import Config, UserError


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("unbroken") / "run"
    assert run_train(out_dir).returncode == 0
    return out_dir


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Return the out_dir of a run killed in step 13. Its prev.pt is from step 10, its last.pt from step 12."""
    out_dir = tmp_path_factory.mktemp("started") / "run"
    assert run_train(out_dir, fault="signal_in_step(13, SIGKILL)", resume=False).returncode == -SIGKILL
    return out_dir


@pytest.fixture
def halfway(started, tmp_path):
    return shutil.copytree(started, tmp_path / "run")


def files(out_dir) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out_dir.iterdir()}


@pytest.mark.parametrize("optimizer, compile", [("muon", False), ("adamw", False),
                                                pytest.param("muon", True, marks=pytest.mark.slow)])  # fmt: skip
def test_a_run_killed_at_any_moment_ends_bit_for_bit_like_an_unbroken_one(optimizer, compile, tmp_path):
    how = {"optimizer": optimizer, "compile": compile, "dtype": "float32"}
    assert run_train(tmp_path / "unbroken", **how).returncode == 0
    chance, statuses, moments = random.Random(0), [-SIGKILL], (60, 100) if compile else (1, 40)
    while statuses[-1] == -SIGKILL:
        statuses.append(run_train(tmp_path / "run", f"die_at({chance.randint(*moments)})", **how).returncode)
    assert statuses[-1] == 0 and len(statuses) > (3 if compile else 12)
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")


@pytest.mark.parametrize("name, best", [("best.pt", 10), ("last.pt", 16)])
def test_a_run_killed_between_an_evaluation_and_its_checkpoint_makes_both_again(name, best, tmp_path, unbroken):
    out_dir = tmp_path / "run"
    assert run_train(out_dir, fault=f"when_saving({name!r}, (16,), die)").returncode == -SIGKILL
    last = read_log(out_dir)[-1]
    assert (last["event"], last["step"]) == ("eval", 16) and load_checkpoint(out_dir / "last.pt")["step"] == 15
    assert load_checkpoint(out_dir / "best.pt")["step"] == best and run_train(out_dir).returncode == 0
    assert_same_run(out_dir, unbroken)


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("place, step, last", [("step", 15, "train"), ("evaluation", 16, "eval")])
def test_a_stop_signal_lets_the_step_or_evaluation_end_and_saves(number, place, step, last, tmp_path, unbroken):
    done = run_train(tmp_path, fault=f"signal_in_{place}({step}, {number})")
    step += place == "step"
    assert done.returncode == 128 + getattr(signal, number)
    assert f"stopped by {number} after step {step}" in done.stdout and done.stderr == ""
    assert load_checkpoint(tmp_path / "last.pt")["step"] == step and (record := read_log(tmp_path)[-1])["step"] == step
    assert record["event"] == last and run_train(tmp_path).returncode == 0
    assert_same_run(tmp_path, unbroken)
    assert (times := [record["time_s"] for record in read_log(tmp_path)]) == sorted(times)  # the clock continues


def test_nohup_keeps_a_run_from_sighup_and_a_second_signal_kills_it(halfway, unbroken):
    twice = "signal_in_step(20, SIGTERM); signal_in_step(20, SIGTERM)"
    assert run_train(halfway, fault=twice).returncode == -SIGTERM
    assert run_train(halfway, fault="signal(SIGHUP, SIG_IGN); signal_in_step(25, SIGHUP)").returncode == 0
    assert_same_run(halfway, unbroken)


def test_an_extended_run_equals_one_long_from_the_start_and_a_finished_one_stays(unbroken, tmp_path):
    for max_steps in (10, 20, 30, 30):
        assert run_train(tmp_path, max_steps=max_steps).returncode == 0 and read_log(tmp_path)[-1]["event"] == "final"
    assert_same_run(tmp_path, unbroken)


def test_some_keys_may_change_on_resume_and_the_same_shards_may_be_elsewhere(halfway, tmp_path):
    keys = {"max_steps": 16, "cooldown_steps": 2, "patience": 3, "plan_ppl": ((1, 9.0),), "phases": (("a", 9),)}
    keys |= {"eval_interval": 5, "checkpoint_interval": 7, "log_interval": 2, "micro_batch_tokens": 64}
    shutil.copytree(folder() / "data", tmp_path / "elsewhere")
    done = run_train(halfway, data_dir=tmp_path / "elsewhere", device="cpu:0", **keys)
    assert done.returncode == 0 and "resuming from step 12" in done.stdout, done.stderr
    evals = [record["step"] for record in read_log(halfway) if record["event"] == "eval"]
    assert evals == [0, 8, 10, 15, 16]


def test_another_run_is_refused_in_one_line_that_names_what_differs(halfway, tmp_path):
    write_learnable(tmp_path / "other", seed=1)
    before = files(halfway)
    others = {"seed": 7, "stages": FEW[:2], "n_layer": 2, "optimizer": "adamw", "learning_rate": 0.5, "eval_tokens": 7}
    said = {"data_dir": "other shards", "max_steps": "past max_steps=4"}
    for key, value in (others | {"data_dir": tmp_path / "other", "max_steps": 4}).items():
        done = run_train(halfway, **{key: value})
        (line,) = done.stderr.splitlines()
        assert done.returncode == 2 and said.get(key, f"{key} was ") in line
    done = run_train(halfway, resume=False)
    assert done.returncode == 2 and "holds a run (last.pt, prev.pt, best.pt, log.jsonl)" in done.stderr
    with open(halfway / "log.jsonl") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = run_train(halfway)
    assert done.returncode == 2 and "another run is writing" in done.stderr and files(halfway) == before
    os.truncate(halfway / "log.jsonl", 99)
    assert "restore it" in run_train(halfway).stderr and (halfway / "log.jsonl").stat().st_size == 99


def test_checkpoints_that_a_full_disk_refuses_cost_only_the_steps_since_the_last_one(halfway, unbroken):
    """The file-size limit is above the log's size and below a checkpoint's: the kernel stops each save halfway."""
    before = (halfway / "last.pt").read_bytes()
    done = run_train(halfway, "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))")
    *warnings, last = done.stderr.splitlines()
    assert done.returncode == 2 and "best.pt" in last and "--resume=True" in last
    assert [line.split()[0].rpartition("/")[2] for line in warnings] == ["last.pt", "best.pt"]  # once each
    assert read_log(halfway)[-1]["event"] == "final"  # the run continued
    assert (halfway / "last.pt").read_bytes() == before and not [*halfway.glob("*.tmp")]
    assert run_train(halfway).returncode == 0
    assert_same_run(halfway, unbroken)


@pytest.mark.parametrize("name, warnings", [("last.pt", 2), ("best.pt", 1)])  # last.pt was saved in between
def test_a_refused_save_before_the_last_one_is_only_a_warning(name, warnings, tmp_path, unbroken):
    done = run_train(tmp_path, fault=f"when_saving({name!r}, (8, 9, 10, 16), fill_disk)")
    assert done.returncode == 0
    assert done.stderr.count(f"{name} cannot be written: No space left on device; the run continues") == warnings
    assert_same_run(tmp_path, unbroken)


@pytest.mark.parametrize("steps, killed, best", [((8, 10), 14, 16), ((30,), 99, 30)])
def test_a_refused_best_costs_no_checkpoint_and_is_written_by_the_next_evaluation(steps, killed, best, tmp_path):
    fault = f"when_saving('best.pt', {steps}, fill_disk); signal_in_step({killed}, SIGKILL)"
    assert run_train(tmp_path, fault=fault).returncode == (2 if killed == 99 else -SIGKILL)
    assert load_checkpoint(tmp_path / "last.pt")["step"] == (30 if killed == 99 else 12)
    assert run_train(tmp_path, max_steps=best).returncode == 0 and load_checkpoint(tmp_path / "best.pt")["step"] == best


@pytest.mark.parametrize("fault, status, saved", [
    ("refuse_to_log(5, 12)", 0, 30), ("refuse_to_log(25, 99)", 2, 24),
    ("refuse_to_log(14, 99); signal_in_step(22, SIGKILL)", -9, 12)])  # fmt: skip
def test_a_log_that_a_full_disk_refuses_has_no_gap_and_no_repeat_afterwards(fault, status, saved, tmp_path, unbroken):
    done = run_train(tmp_path, fault=fault)
    assert done.returncode == status and done.stderr.count("log.jsonl cannot be written: No space left on device") == 1
    assert load_checkpoint(tmp_path / "last.pt")["step"] == saved  # no checkpoint is ahead of the log
    assert status == 0 or run_train(tmp_path).returncode == 0
    assert_same_run(tmp_path, unbroken)


def flipped(data: bytes) -> bytes:
    return data[: len(data) // 3] + bytes([data[len(data) // 3] ^ 4]) + data[len(data) // 3 + 1 :]


@pytest.mark.parametrize("damage", [flipped, lambda data: data[:-9], lambda data: b"", lambda data: b"text", None])
def test_prev_takes_the_place_of_a_last_checkpoint_that_is_damaged_or_missing(damage, halfway, unbroken):
    last = halfway / "last.pt"
    last.write_bytes(damage(last.read_bytes())) if damage else last.unlink()
    done = run_train(halfway, fault="signal_in_step(11, SIGTERM)")
    assert "resuming from step 10" in done.stdout and done.stderr.count("last.pt is damaged") == bool(damage)
    kept = [load_checkpoint(halfway / name)["step"] for name in ("prev.pt", "last.pt")]
    assert kept == [10, 12]  # the damaged last.pt did not become prev.pt
    assert run_train(halfway).returncode == 0
    assert_same_run(halfway, unbroken)


def test_two_damaged_checkpoints_one_of_another_version_or_none_end_with_status_2(halfway):
    for name in ("last.pt", "prev.pt"):
        (halfway / name).write_bytes(flipped((halfway / name).read_bytes()))
    before, done = files(halfway), run_train(halfway)
    assert done.returncode == 2 and "prev.pt is damaged" in done.stderr.splitlines()[-1] and files(halfway) == before
    old = {"config": {}, "step": 12, "model": {}, "optimizers": [], "best": (16, 5.0, 0), "unwritten": ""}
    torch.save(old, halfway / "last.pt")  # the format before `progress` and `log_length`
    done = run_train(halfway)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "last.pt is not a checkpoint of this version" in line
    for left in ("best.pt and log.jsonl", "best.pt", "log.jsonl"):
        kept, _ = {name: before[name] for name in left.split(" and ")}, [path.unlink() for path in halfway.iterdir()]
        _, done = [(halfway / name).write_bytes(kept[name]) for name in kept], run_train(halfway)
        assert done.returncode == 2 and f"has {left} but no last.pt" in done.stderr and files(halfway) == kept


def test_every_flipped_bit_and_every_cut_of_a_checkpoint_is_found(tmp_path, monkeypatch):
    path, chance, weight = tmp_path / "best.pt", np.random.default_rng(0), torch.arange(300.0)
    monkeypatch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")  # as if saved on a GPU
    save_checkpoint(path, {"config": {}, "step": 3, "model": {"weight": weight}})
    assert load_checkpoint(path)["model"]["weight"].equal(weight)
    data, contents = path.read_bytes(), []
    for place in [*chance.integers(len(data), size=300), *range(len(data) - 99, len(data))]:  # and all of the end
        contents.append(data[:place] + bytes([data[place] ^ 1 << chance.integers(8)]) + data[place + 1 :])
    for content in contents + [data[:place] for place in chance.integers(len(data), size=100)]:
        path.write_bytes(content)
        try:
            loaded = load_checkpoint(path)
        except UserError as error:
            assert str(path) in str(error)
        else:  # the bit was in the archive's padding, names or dates, which carry no data
            assert loaded["step"] == 3 and torch.equal(loaded["model"]["weight"], weight) and len(content) == len(data)
    path.write_bytes(data)
    monkeypatch.setattr("zipfile.ZipFile.testzip", lambda _: os.read(os.open("/proc/self/mem", os.O_RDONLY), 9))
    with pytest.raises(UserError, match="best.pt is damaged: .*Input/output error"):  # a sector of the disk
        load_checkpoint(path)


def test_log_and_checkpoint_are_on_the_disk_before_the_checkpoint_gets_its_name(tmp_path, monkeypatch):
    calls, run = [], Run(Config(out_dir=str(tmp_path / "run")), "text", Team())
    monkeypatch.setattr(fcntl, "flock", lambda *_: os.close(-1))  # fails, as on a network disk without locks
    run.start()
    monkeypatch.setattr(os, "fsync", lambda file: calls.append(os.readlink(f"/proc/self/fd/{file}").rpartition("/")[2]))
    monkeypatch.setattr(Path, "replace", lambda path, to: calls.append(f"> {to.name}") or os.rename(path, to))
    run.log("train", step=1)
    run.save("last.pt", step=1)
    assert calls == ["log.jsonl", "checkpoint.tmp", "> last.pt", "run"]
    release_logs()


class Attack:
    """An object that makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("attacked",)


@pytest.mark.parametrize("as_archive", [True, False])
def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(as_archive, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, state = tmp_path / "best.pt", {"config": {}, "step": 1, "model": Attack()}
    torch.save(state, path, _use_new_zipfile_serialization=as_archive)
    with pytest.raises(UserError, match="best.pt is damaged"):
        load_checkpoint(path)
    assert not (tmp_path / "attacked").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "attacked").exists()  # the attack is real: unsafe loading runs it


def test_out_of_memory_is_one_line_and_what_it_advises_helps(tmp_path):
    """With 200 MB to spare, a step on 32,768 tokens (67 MB of logits) fails, and one on 2,048 (4 MB) succeeds."""
    limit = "import resource; size = 200_000_000 + 4096 * int(open('/proc/self/statm').read().split()[0]);"
    limit += "resource.setrlimit(resource.RLIMIT_AS, (size, size))"
    keys = {"stages": ((0, 64, 512, 1.0),), "max_steps": 2}
    done = run_train(tmp_path, fault=limit, micro_batch_tokens=VOCAB_SIZE * 64, **keys)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: out of memory: halve --micro_batch_tokens")
    assert run_train(tmp_path, fault=limit, micro_batch_tokens=2_048, **keys).returncode == 0
