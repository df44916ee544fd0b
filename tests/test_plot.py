"""bench/plot.py: curves against closed forms, the picture by its pixels, the comparison of runs, and failures."""

import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import call_program
from matplotlib import pyplot as plt

from bench import plot
from checkpoint import save_checkpoint
from model import GPTConfig
from settings import Config

# Two stages: 10 steps of 4 windows of 64, then 10 of 3 windows of 128.
STAGES = ((0, 64, 4, 1.0), (10, 128, 3, 0.5))
FIRST, SECOND = 4 * 64, 3 * 128
run = partial(call_program, "bench/plot.py")


def falling(tokens: float) -> float:
    return 9 - tokens / 2000


def price(n_layer: int, seq_len: int) -> int:
    return GPTConfig(n_layer, 2, 32).flops_per_token(seq_len)


def in_stages(steps: np.ndarray, first: float, second: float) -> np.ndarray:
    """Return the cost of `steps` steps, where `first` and `second` are what a step costs in each stage."""
    return first * np.minimum(steps, 10) + second * np.maximum(0, steps - 10)


def make_run(out_dir: Path, loss: Callable = falling, seconds: tuple = (1, 3), steps=20, plan=False, **keys) -> Path:
    """Write a run whose loss after n tokens is loss(n). A step takes its stage's seconds; every fifth is logged."""
    config = Config(**{"n_layer": 1, "n_head": 2, "n_embd": 32, "stages": STAGES, "out_dir": str(out_dir)} | keys)
    records = []
    for step in range(steps + 1):
        stage = 1 if step <= 10 else 2
        tokens, time_s = (int(in_stages(step, *costs)) for costs in ((FIRST, SECOND), seconds))
        common = {"step": step, "stage": stage, "seq_len": 64 * stage, "time_s": time_s}
        if step and step % 5 == 0:
            more = {"batch_size": 5 - stage, "lr": 1e-3 / stage, "loss": 9 - step / 5, "tokens": tokens}
            records.append({"event": "train"} | common | more | {"tokens_per_s": 250.0, "grad_norm": 1.0, "mfu": None})
        if step in (0, 7, 10, 12, 20):
            more = {"val_loss": loss(tokens) - 0.5, "last_len_loss": loss(tokens), "gap": 0.01 * step, "is_best": True}
            more["plan_ppl"] = 3000.0 / step if plan and step > 5 else None
            records.append({"event": "eval"} | common | more)
    records += [{"event": "skip", "step": steps, "loss": math.nan}, {"event": "final", "step": steps, "val_loss": 5.0}]
    out_dir.mkdir(exist_ok=True)
    (out_dir / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    save_checkpoint(out_dir / "best.pt", dict(config=vars(config), step=9, model={}, fingerprint=config.data_dir))
    return out_dir


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    plt.close("all")


def test_smoothing():
    inside = np.arange(7, 43)  # the mean of (i - r)^2 ... (i + r)^2 is i^2 + r (r + 1) / 3
    assert plot.smooth(np.arange(50.0) ** 2, 7)[inside] == pytest.approx(inside**2 + 7 * 8 / 3)


@pytest.mark.parametrize("x, first, second", [
    ("tokens", FIRST, SECOND), ("flops", FIRST * price(1, 64), SECOND * price(1, 128)), ("time", 1 / 60, 3 / 60),
    ("step", 1, 1)])  # fmt: skip
@pytest.mark.parametrize("last_logged", [20, 15])
def test_curves_stages_and_axes_also_after_the_last_training_record(tmp_path, x, first, second, last_logged):
    log = make_run(tmp_path / "a", plan=True) / "log.jsonl"
    records = map(json.loads, log.read_text().splitlines())
    kept = [record for record in records if record["event"] != "train" or record["step"] <= last_logged]
    log.write_text("".join(json.dumps(record) + "\n" for record in kept) + '{"event": "tr')  # a half-written record
    plot.draw([plot.read_run(tmp_path / "a")], x, tmp_path / "a.png")
    loss, *_, perplexity = plt.gcf().axes
    curves, steps = {line.get_label(): line for line in loss.lines}, np.array([0, 7, 10, 12, 20])
    expected = falling(in_stages(steps, FIRST, SECOND))
    for name, values in (
        ("validation, stage's length", expected - 0.5), ("validation, last length", expected),
        ("validation, planned", [math.nan, *np.log(3000 / steps[1:])])):  # fmt: skip
        assert curves[name].get_xdata() == pytest.approx(in_stages(steps, first, second))
        assert curves[name].get_ydata() == pytest.approx(np.array(values), nan_ok=True)
    assert curves["training, smoothed"].get_ydata().tolist() == [8, 7, 6, 5][: last_logged // 5]
    assert perplexity.get_ylim() == pytest.approx(np.exp(loss.get_ylim()))
    assert {text.get_text() for text in loss.texts} == {"64", "128", "window\nlength"}
    is_grey = ((plt.imread(tmp_path / "a.png")[:, :, :3] * 255).round() == 0xE6).all(-1)
    grey = is_grey.sum(axis=1).max()  # in a row that no curve and no text crosses
    assert grey / (0.7 * 1500) == pytest.approx(second / (first + second), abs=0.02)


def losses(output: str) -> list[list[float]]:
    """Return the losses and differences in each row of the table of losses."""
    rows = [line.split() for line in output.partition("difference\n")[2].splitlines()]
    return [[float(word) for word in row[2:]] for row in rows if row[0] in ("tokens", "flops", "seconds")]


def test_losses_after_the_same_tokens_flops_and_time(tmp_path):
    """Loss is linear in tokens, so interpolation is exact. b is larger and has only stage 1; c is a plus half a nat."""
    make_run(tmp_path / "a", seconds=(1, 1))
    make_run(tmp_path / "b", lambda tokens: 2 * falling(tokens), (3, 3), steps=10, n_layer=40)
    make_run(tmp_path / "c", lambda tokens: falling(tokens) + 0.5, (1, 1))
    output = run("a", "b", "c").stdout
    expected = [(falling(tokens), 2 * falling(tokens)) for tokens in (640, 1280, 1920, 2560)]
    for quarter in (0.25, 0.5, 0.75, 1):
        flops, first_stage = quarter * 2560 * price(40, 64), 2560 * price(1, 64)
        tokens = flops / price(1, 64) if flops < first_stage else 2560 + (flops - first_stage) / price(1, 128)
        expected.append((falling(tokens), 2 * falling(quarter * 2560)))
    assert 2560 < tokens < 6400  # a was in its second stage when it had done b's FLOPs
    for seconds in (5, 10, 15, 20):  # up to 20, the time of a and c; b took 30
        expected.append((falling(in_stages(seconds, FIRST, SECOND)), 2 * falling(FIRST * seconds / 3)))
    for row, (of_a, of_b) in zip(losses(output), expected, strict=True):
        assert row == pytest.approx([of_a, of_b, of_b - of_a, of_a + 0.5, 0.5], abs=0.0011)
    assert {"640", "2,560", f"{2560 * price(40, 64):.2e}", "5.0", "20.0"} <= set(output.split())


def test_the_keys_that_differ_and_no_others(tmp_path):
    other = ((0, 64, 4, 1.0), (10, 96, 3, 0.5), (15, 128, 1, 0.25))
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", stages=other, learning_rate=0.5, optimizer="adamw", data_dir="x")
    output = run("a", "b").stdout
    assert [" ".join(line.split()) for line in output.split("\n\n")[1].splitlines()] == [
        "a b", "data_dir data/wiki x", "learning_rate 0.0006 0.5", "optimizer muon adamw", "shards data/wik x",
        "stages (0, 64, 4, 1.0) (0, 64, 4, 1.0)", "(10, 128, 3, 0.5) (10, 96, 3, 0.5)", "(15, 128, 1, 0.25)"]
    assert "losses may be of different windows: see shards above" in output
    same = run("a", "a").stdout
    assert "configurations are the same" in same and "different windows" not in same
    assert len(losses(same)) == 12 and all(row[2] == 0 for row in losses(same))


@pytest.mark.parametrize("args, words", [
    ("none", "none/log.jsonl"), ("new", "no 'train' record yet"), ("bare --x=flops", "no last.pt or best.pt"),
    ("a --to=a.docx", "docx"), ("a --to=none/a.png", "cannot write"),
    ("a", "pip install matplotlib"), ("a bare", "no last.pt or best.pt"), ("a begun", "no evaluation after its start"),
    ("a short", "different lengths, [64, 128]")])  # fmt: skip
def test_a_mistake_is_one_line_and_status_2(tmp_path, monkeypatch, args, words):
    for name, steps, rows in (("a", 20, 2), ("short", 20, 1), ("begun", 6, 2), ("new", 4, 2), ("bare", 20, 2)):
        make_run(tmp_path / name, steps=steps, stages=STAGES[:rows])
    (tmp_path / "bare" / "best.pt").unlink()
    if "pip" in words:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run(*args.split())
    assert done.returncode == 2 and losses(done.stdout) == [] and done.stderr.count("\n") == 1 and words in done.stderr
