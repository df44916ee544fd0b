"""What a user may get wrong: one line on stderr, exit status 2, nothing written."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import FEW, ROOT, SMALL

from config import Config
from train import train

TRAIN = {
    "no configuration": ("", [], "config file first"),
    "no such configuration": ("nowhere.py", [], "nowhere.py"),
    "configuration that does not run": ("broken.py", [], "NameError"),
    "unknown key": ("small.py", ["--learning_rat=1"], "'learning_rate'"),
    "no key": ("small.py", ["max_steps"], "--key=value"),
    "type": ("small.py", ["--max_steps=ten"], "max_steps"),
    "negative": ("small.py", ["--weight_decay=-1"], "weight_decay"),
    "no steps": ("small.py", ["--max_steps=0"], "max_steps"),
    "interval of 0": ("small.py", ["--eval_interval=0"], "eval_interval"),
    "optimizer": ("small.py", ["--optimizer=sgd"], "sgd"),
    "no table": ("small.py", ["--stages=()"], "stages is empty"),
    "table that starts late": ("small.py", ["--stages=[(5,16,8,1.0)]"], "step 0"),
    "table that goes back": ("small.py", ["--stages=[(0,16,8,1.0),(0,16,8,1.0)]"], "row 2"),
    "row of three": ("small.py", ["--stages=[(0,16,8)]"], "row 1"),
    "batch of 0": ("small.py", ["--stages=[(0,16,0,1.0)]"], "positive"),
    "heads": ("small.py", ["--n_head=5"], "n_head"),
    "micro-batch": ("small.py", ["--micro_batch_tokens=32"], "micro_batch_tokens"),
    "window": ("small.py", ["--stages=[(0,99999,1,1.0)]", "--micro_batch_tokens=99999"], "no train shard"),
    "device that is not there": ("small.py", ["--device=cuda:7"], "cuda:7"),
    "device that is none": ("small.py", ["--device=gpu"], "gpu"),
    "device without memory": ("small.py", ["--device=meta"], "meta"),
    "dtype": ("small.py", ["--dtype=int8"], "int8"),
    "no dataset": ("small.py", ["--data_dir=nowhere"], "not a dataset"),
    "damaged meta.json": ("small.py", ["--data_dir=meta"], "is damaged"),
    "missing shard": ("small.py", ["--data_dir=missing"], "train_00000.bin"),
    "short shard": ("small.py", ["--data_dir=short"], "bytes"),
    "vocabulary": ("small.py", ["--data_dir=vocabulary"], "vocabulary of 60,000"),
    "out_dir under a file": ("small.py", ["--out_dir=small.py/x"], "out_dir"),
    "out_dir in use": ("small.py", ["--out_dir=used"], "holds a run"),
    "another run": ("small.py", ["--out_dir=used", "--resume=True", "--seed=3"], "seed was 1337 and is 3"),
    "a run that is further": ("small.py", ["--out_dir=used", "--resume=True", "--max_steps=1"], "step 2, which"),
    "seed": ("small.py", [f"--seed={10**20}"], "seed"),
    "another file": ("small.py", ["--out_dir=foreign", "--resume=True"], "is not a readable checkpoint"),
    "a model alone": ("small.py", ["--out_dir=model", "--resume=True"], "has no best, optimizers"),
    "evaluating no model": ("small.py", ["--out_dir=nowhere", "--eval_only=True"], "nowhere/best.pt does not exist"),
    "evaluating a damaged model": ("small.py", ["--out_dir=foreign", "--eval_only=True"], "foreign/best.pt is not"),
    "evaluating another model": ("small.py", ["--out_dir=used", "--eval_only=True", "--n_embd=64"], "n_embd was 32"),
    "evaluating without a dataset": ("small.py", ["--out_dir=used", "--eval_only=True", "--data_dir=nowhere"],
                                     "not a dataset"),
    "a model larger than memory": ("small.py", ["--n_embd=4000000"], "out of memory"),
}
OTHERS = {
    "prompt": ("sample.py", ["--out_dir=used", "--prompt=" + "word " * 70], "prompt"),
    "temperature": ("sample.py", ["--out_dir=used", "--temperature=-1"], "temperature"),
    "no model": ("sample.py", ["--out_dir=nowhere"], "nowhere/best.pt"),
    "damaged model": ("sample.py", ["--out_dir=foreign"], "foreign/best.pt"),
    "speed": ("curriculum.py", ["small.py", "--speed=fast"], "fast"),
    "plan without a dataset": ("curriculum.py", ["small.py", "--data_dir=nowhere"], "not a dataset"),
    "picture of nothing": ("bench/plot.py", ["nowhere"], "nowhere"),
}
CASES = {name: ("train.py", [file] * bool(file) + more, word) for name, (file, more, word) in TRAIN.items()} | OTHERS


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_dir):
    """What the mistakes need: configurations, damaged datasets, a run and files that are none. Made once."""
    folder = tmp_path_factory.mktemp("mistakes")
    keys = SMALL | {"stages": FEW, "eval_tokens": 512, "max_steps": 2, "data_dir": str(small_dir)}
    (folder / "small.py").write_text("".join(f"{k} = {v!r}\n" for k, v in keys.items()) + "out_dir = 'run'\n")
    (folder / "broken.py").write_text("max_steps = stepz\n")
    for name in ("meta", "missing", "short", "vocabulary"):
        shutil.copytree(small_dir, folder / name)
    (folder / "meta" / "meta.json").write_text("{")
    (folder / "missing" / "train_00000.bin").unlink()
    (folder / "short" / "val_00000.bin").write_bytes(b"\0" * 10)
    meta = json.loads((small_dir / "meta.json").read_text())
    meta["tokenizer"]["vocab_size"] = 60_000
    (folder / "vocabulary" / "meta.json").write_text(json.dumps(meta))
    np.save(folder / "vocabulary" / "token_bytes.npy", np.ones(60_000, np.uint8))
    train(Config(**keys, out_dir=str(folder / "used")))
    for name in ("foreign", "model"):
        (folder / name).mkdir()
    for name in ("last.pt", "best.pt"):
        (folder / "foreign" / name).write_text("no checkpoint")
    shutil.copy(folder / "used" / "best.pt", folder / "model" / "last.pt")
    return folder


def contents(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_one_line_and_status_2_and_nothing_is_written(folder, run_program, case):
    program, arguments, word = CASES[case]
    before = contents(folder)
    done = run_program(ROOT / program, *arguments, cwd=folder)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and word in line
    assert contents(folder) == before


def test_a_run_that_is_started_twice_is_refused_the_second_time(folder, tmp_path, small_dir, run_program):
    """While the first one's log is open, as this process holds it."""
    from checkpoint import Log

    log = Log(tmp_path / "log.jsonl")
    done = run_program(ROOT / "train.py", "small.py", f"--out_dir={tmp_path}", "--resume=True", cwd=folder)
    assert done.returncode == 2 and "another run" in done.stderr and len(done.stderr.splitlines()) == 1
    del log
    assert torch.load(folder / "used" / "last.pt", weights_only=True)["step"] == 2
