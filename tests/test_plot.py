"""bench/plot.py: positions against closed forms, what is in the picture by its pixels, the comparison, its failures."""

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import Image

from bench import plot
from checkpoint import save_checkpoint
from model import GPT, GPTConfig
from settings import Config, user_errors

# Two stages: 10 steps of 4 windows of 64, then 10 of 3 windows of 128.
STAGES = ((0, 64, 4, 1.0), (10, 128, 3, 0.5))
FIRST, SECOND = 4 * 64, 3 * 128


def falling(tokens: float) -> float:
    return 9 - tokens / 2000


def make_run(out_dir: Path, loss: Callable = falling, seconds: tuple = (1, 3), steps=20, plan=False, **keys) -> Path:
    """A run whose loss after n tokens is loss(n), logged at every fifth step. A step takes `seconds` by its stage."""
    config = Config(**{"n_layer": 1, "n_head": 2, "n_embd": 32, "stages": STAGES, "out_dir": str(out_dir)} | keys)
    records = []
    for step in range(steps + 1):
        before, after = min(step, 10), max(0, step - 10)
        stage, tokens = 1 + (after > 0), FIRST * before + SECOND * after
        time_s = seconds[0] * before + seconds[1] * after
        common = {"step": step, "stage": stage, "seq_len": 64 * stage, "time_s": time_s}
        if step and step % 5 == 0:
            more = {"batch_size": 5 - stage, "lr": 1e-3 / stage, "loss": 9 - step / 5, "tokens": tokens}
            more |= {"tokens_per_s": 250.0, "grad_norm": 1.0, "mfu": None}
            records.append({"event": "train"} | common | more)
        if step in (0, 7, 10, 12, 20):
            more = {"val_loss": loss(tokens) - 0.5, "last_len_loss": loss(tokens), "gap": 0.01 * step, "is_best": True}
            more["plan_ppl"] = 3000.0 / step if plan and step > 5 else None
            records.append({"event": "eval"} | common | more)
    records += [{"event": "skip", "step": steps, "loss": math.nan}, {"event": "final", "step": steps, "val_loss": 5.0}]
    out_dir.mkdir(exist_ok=True)
    (out_dir / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    save_checkpoint(out_dir / "best.pt", {"config": dataclasses.asdict(config), "step": steps, "model": {}})
    return out_dir


def price(n_layer: int, seq_len: int) -> int:
    """FLOPs of a token: PaLM's appendix B, from the weights that a model has."""
    weights = sum(weight.numel() for weight in GPT(GPTConfig(n_layer, 2, 32), 64).parameters() if weight.ndim == 2)
    return 6 * weights + 12 * n_layer * 32 * seq_len


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs `python bench/plot.py ARGS...` in tmp_path; gives its exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["plot.py", *args])
        with pytest.raises(SystemExit) as end, user_errors():
            plot.main()
            sys.exit(0)
        plt.close("all")
        return end.value.code, *capsys.readouterr()

    return run


def picture(done: tuple[int, str, str]) -> np.ndarray:
    """The pixels (height, width, 3) of what the program, which must have succeeded, drew and named."""
    assert (done[0], done[2]) == (0, "")
    return np.asarray(Image.open(done[1].splitlines()[0]).convert("RGB"))


def count(pixels: np.ndarray, colour: str) -> int:
    return int((pixels == np.array(list(bytes.fromhex(colour)))).all(-1).sum())


def test_positions_are_the_closed_form(tmp_path):
    out_dir = make_run(tmp_path / "a")
    run, steps = plot.read_run(out_dir), np.array([0, 3, 7, 10, 12, 20])
    before, after = np.minimum(steps, 10), np.maximum(0, steps - 10)
    assert plot.x_at(run, steps, "step").tolist() == steps.tolist()
    assert plot.x_at(run, steps, "seconds").tolist() == (before + 3 * after).tolist()
    assert plot.x_at(run, steps, "hours") == pytest.approx((before + 3 * after) / 3600)
    assert plot.x_at(run, steps, "tokens").tolist() == (FIRST * before + SECOND * after).tolist()
    flops = FIRST * price(1, 64) * before + SECOND * price(1, 128) * after
    assert plot.x_at(run, steps, "flops") == pytest.approx(flops, rel=1e-12)
    assert plot.stage_bands(run) == [(0, 10, 64), (10, 20, 128)]


def test_an_evaluation_after_the_last_training_record_is_behind_it(tmp_path):
    log = make_run(tmp_path / "a") / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(line for line in lines if '"step": 20' not in line or "eval" in line))
    run = plot.read_run(tmp_path / "a")
    assert run.train["step"].tolist() == [5, 10, 15]
    assert plot.x_at(run, run.evals["step"], "tokens")[-1] == 10 * FIRST + 10 * SECOND


def test_smoothing():
    values = np.arange(50.0) ** 2
    for reach in (0, 1, 7):
        inside = np.arange(50)[reach : 50 - reach]  # the mean of (i - r)^2 ... (i + r)^2 is i^2 + r (r + 1) / 3
        assert plot.smooth(values, reach)[inside] == pytest.approx(inside**2 + reach * (reach + 1) / 3)
    assert plot.smooth(values, 7)[:3] == pytest.approx([0, 1 + 2 / 3, 4 + 2])


def test_curves_and_axes(tmp_path):
    plot.draw([plot.read_run(make_run(tmp_path / "a", plan=True))], "tokens", tmp_path / "a.png")
    loss, *_, perplexity = plt.gcf().axes
    curves = {line.get_label(): line for line in loss.lines}
    steps = np.array([0, 7, 10, 12, 20])
    tokens = FIRST * np.minimum(steps, 10) + SECOND * np.maximum(0, steps - 10)
    for name, values in (
        ("validation, stage's length", 8.5 - tokens / 2000),
        ("validation, last length", 9 - tokens / 2000),
        ("validation, planned", [math.nan, *(math.log(3000 / step) for step in (7, 10, 12, 20))]),
    ):
        assert curves[name].get_xdata().tolist() == tokens.tolist()
        assert curves[name].get_ydata() == pytest.approx(np.array(values), nan_ok=True)
    assert curves["training, smoothed"].get_ydata().tolist() == [8, 7, 6, 5]
    assert perplexity.get_ylim() == pytest.approx(np.exp(loss.get_ylim()))
    assert {text.get_text() for text in loss.texts} == {"64", "128", "window\nlength"}
    plt.close()


@pytest.mark.parametrize("x", ["tokens", "time", "flops", "step"])
def test_the_second_stage_takes_its_share_of_the_x_axis(tmp_path, run, x):
    """The picture itself: its grey band against the share that follows from the log's two stages."""
    make_run(tmp_path / "a")
    pixels = picture(run("a", f"--x={x}"))
    assert (tmp_path / "a" / "loss.png").exists()
    parts = {"tokens": (FIRST, SECOND), "time": (1, 3), "step": (1, 1)}
    parts["flops"] = (FIRST * price(1, 64), SECOND * price(1, 128))
    grey = (pixels == 0xE6).all(-1).sum(axis=1).max()  # in a row that no curve and no text crosses
    assert grey / (0.7 * 1500) == pytest.approx(parts[x][1] / sum(parts[x]), abs=0.02)


def test_a_plan_is_drawn_and_half_a_record_is_not(tmp_path, run):
    log = make_run(tmp_path / "a", plan=True) / "log.jsonl"
    planned = picture(run("a"))
    assert count(planned, "006040") > 100
    log.write_text(log.read_text() + log.read_text().splitlines()[3][:70])  # a record that is being written
    assert (picture(run("a")) == planned).all()
    make_run(tmp_path / "a", plan=False)
    assert count(picture(run("a")), "006040") == 0


def losses(output: str) -> list[list[float]]:
    """The losses and differences in each row of the table of losses."""
    rows = [line.split() for line in output.partition("difference\n")[2].splitlines()]
    return [[float(word) for word in row[2:]] for row in rows if row[0] in ("tokens", "flops", "seconds")]


def test_losses_after_the_same_tokens_flops_and_time(tmp_path, run):
    """Losses fall linearly in the tokens, so those between two evaluations are known. b is larger and has made only the
    first stage, in steps of three seconds; c is a with a loss that is half a nat higher."""
    make_run(tmp_path / "a", seconds=(1, 1))
    make_run(tmp_path / "b", lambda tokens: 2 * falling(tokens), (3, 3), steps=10, n_layer=40)
    make_run(tmp_path / "c", lambda tokens: falling(tokens) + 0.5, (1, 1))
    _, output, _ = run("a", "b", "c")
    expected = [(falling(tokens), 2 * falling(tokens)) for tokens in (640, 1280, 1920, 2560)]
    for quarter in (0.25, 0.5, 0.75, 1):
        flops, first_stage = quarter * 2560 * price(40, 64), 2560 * price(1, 64)
        tokens = flops / price(1, 64) if flops < first_stage else 2560 + (flops - first_stage) / price(1, 128)
        expected.append((falling(tokens), 2 * falling(quarter * 2560)))
    assert 2560 < tokens < 6400  # a was in its second stage when it had done b's FLOPs
    for seconds in (5, 10, 15, 20):  # b's 30 seconds are more than the others' 20
        tokens = FIRST * min(seconds, 10) + SECOND * max(0, seconds - 10)
        expected.append((falling(tokens), 2 * falling(FIRST * seconds / 3)))
    for row, (of_a, of_b) in zip(losses(output), expected, strict=True):
        assert row == pytest.approx([of_a, of_b, of_b - of_a, of_a + 0.5, 0.5], abs=0.0011)
    assert {"0.6k", "2.6k", f"{2560 * price(40, 64):.2e}", "5.0", "20.0"} <= set(output.split())
    assert "windows of 128 tokens" in output


def test_the_keys_that_differ_and_no_others(tmp_path, run):
    """A table row by row; where a run was written is no difference."""
    other = ((0, 64, 4, 1.0), (10, 96, 3, 0.5), (15, 128, 1, 0.25))
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", stages=other, learning_rate=0.5, optimizer="adamw", data_dir="data/other")
    _, output, _ = run("a", "b")
    assert [" ".join(line.split()) for line in output.split("\n\n")[1].splitlines()] == [
        "a b", "data_dir data/wiki data/other", "learning_rate 0.0006 0.5", "optimizer muon adamw",
        "stages (0, 64, 4, 1.0) (0, 64, 4, 1.0)", "(10, 128, 3, 0.5) (10, 96, 3, 0.5)", "(15, 128, 1, 0.25)",
    ]  # fmt: skip
    assert "data_dir differs, so the losses may be of different windows" in output
    _, same, _ = run("a", "a")
    assert "configurations are the same" in same and "different windows" not in same
    assert len(losses(same)) == 12 and all(row[2] == 0 for row in losses(same))


def test_runs_are_drawn_over_each_other(tmp_path, run):
    """The third run's blue is in the picture of three runs and not in that of two; both are loss.png right here."""
    for worse, name in enumerate("abc"):
        make_run(tmp_path / name, lambda tokens, worse=worse: falling(tokens) + worse / 2)
    two, three = (picture(run(*names)) for names in ("ab", "abc"))
    assert count(two, "d55e00") > 1000 and count(three, "d55e00") > 1000
    assert count(two, "0072b2") == 0 and count(three, "0072b2") > 1000
    assert run(*"ab", "--to=c/two.png")[1].startswith("c/two.png\n")


@pytest.mark.parametrize("args, words", [
    ("", "OUT_DIR"),
    ("none", "none/log.jsonl"),
    ("new", "no records of training"),
    ("a --x=epochs", "epochs"),
    ("bare --x=flops", "no last.pt or best.pt"),
    ("a --to=none/a.png", "cannot write"),
    ("a", "pip install matplotlib"),
    ("a bare", "no last.pt or best.pt"),
    ("a begun", "no evaluation after its start"),
    ("a short", "different lengths, [64, 128]"),
])  # fmt: skip
def test_mistakes_are_one_line(tmp_path, run, monkeypatch, args, words):
    for name, steps, rows in (("a", 20, 2), ("short", 20, 1), ("begun", 6, 2), ("new", 4, 2), ("bare", 20, 2)):
        make_run(tmp_path / name, steps=steps, stages=STAGES[:rows])
    (tmp_path / "bare" / "best.pt").unlink()
    if "pip" in words:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, output, errors = run(*args.split())
    assert status == 2 and losses(output) == []
    assert errors.count("\n") == 1 and words in errors
