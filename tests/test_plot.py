"""bench/plot.py: positions against closed forms, what is in the picture by its pixels, its failures."""

import dataclasses
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import Image

import train
from bench import plot
from checkpoint import save_checkpoint
from config import Config
from model import GPT, GPTConfig

ROOT = Path(train.__file__).parent
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32}
# Two stages: 10 steps of 4 windows of 64, then 10 of 3 windows of 128. Training is logged at every fifth step, and a
# step takes one second in the first stage and three in the second.
FIRST, SECOND = 4 * 64, 3 * 128


def make_log(out_dir: Path, worse: float = 0.0, plan: bool = False) -> Path:
    records = []
    for step in range(0, 21):
        stage = 1 if step <= 10 else 2
        common = {"step": step, "stage": stage, "seq_len": 64 * stage, "time_s": step + 2.0 * max(0, step - 10)}
        tokens = FIRST * min(step, 10) + SECOND * max(0, step - 10)
        if step and step % 5 == 0:
            more = {"event": "train", "batch_size": 5 - stage, "lr": 1e-3 / stage, "loss": 9 - step / 5}
            records.append(common | more | {"tokens": tokens, "tokens_per_s": 250.0, "grad_norm": 1.0, "mfu": None})
        if step in (0, 7, 10, 12, 20):
            ppl = 3000.0 / step if plan and step > 5 else None
            more = {"event": "eval", "val_loss": 9 - step / 6 + worse, "last_len_loss": 9.5 - step / 6}
            records.append(common | more | {"gap": 0.01 * step, "plan_ppl": ppl, "is_best": True})
    out_dir.mkdir(exist_ok=True)
    (out_dir / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return out_dir


def save_model(out_dir: Path, name: str) -> None:
    save_checkpoint(out_dir / name, {"config": dataclasses.asdict(Config(**SHAPE)), "step": 20, "model": {}})


def flops_per_token(seq_len: int) -> int:
    """PaLM's appendix B, from the weights that a model has."""
    weights = sum(weight.numel() for weight in GPT(GPTConfig(**SHAPE), 64).parameters() if weight.ndim == 2)
    return 6 * weights + 12 * SHAPE["n_layer"] * SHAPE["n_embd"] * seq_len


def run(*args, cwd: Path | None = None, env: dict | None = None) -> subprocess.CompletedProcess:
    words = [sys.executable, str(ROOT / "bench" / "plot.py"), *map(str, args)]
    return subprocess.run(words, check=False, capture_output=True, text=True, timeout=120, cwd=cwd, env=env)


def picture(*args, cwd: Path | None = None) -> np.ndarray:
    """The pixels (height, width, 3) of what the program, which must succeed, draws and names."""
    done = run(*args, cwd=cwd)
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    content = ((cwd or Path()) / line).read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def count(pixels: np.ndarray, colour: str) -> int:
    return int((pixels == np.array(list(bytes.fromhex(colour)))).all(-1).sum())


def test_positions_are_the_closed_form(tmp_path):
    out_dir = make_log(tmp_path / "a")
    save_model(out_dir, "last.pt")
    run = plot.read_run(out_dir)
    steps = np.array([0, 3, 7, 10, 12, 20])
    before, after = np.minimum(steps, 10), np.maximum(0, steps - 10)
    assert plot.x_at(run, steps, "step").tolist() == steps.tolist()
    assert plot.x_at(run, steps, "time").tolist() == (before + 3 * after).tolist()
    assert plot.x_at(run, steps, "tokens").tolist() == (FIRST * before + SECOND * after).tolist()
    run = run._replace(flops_per_token=plot.flops_per_token(plot.run_config(out_dir)))
    flops = FIRST * flops_per_token(64) * before + SECOND * flops_per_token(128) * after
    assert plot.x_at(run, steps, "flops") == pytest.approx(flops, rel=1e-12)


def test_an_evaluation_after_the_last_training_record_lies_behind_it(tmp_path):
    out_dir = make_log(tmp_path / "a")
    lines = (out_dir / "log.jsonl").read_text().splitlines(keepends=True)
    (out_dir / "log.jsonl").write_text("".join(line for line in lines if '"step": 20' not in line or "eval" in line))
    run = plot.read_run(out_dir)
    assert run.train["step"].tolist() == [5, 10, 15]
    assert plot.x_at(run, run.evals["step"], "tokens")[-1] == 10 * FIRST + 10 * SECOND


def test_bands_and_their_labels(tmp_path):
    assert plot.stage_bands(plot.read_run(make_log(tmp_path / "a"))) == [(0, 10, 64), (10, 20, 128)]
    bands = [(0, 1, 64), (1, 2, 128), (2, 4, 256), (4, 20, 2048), (20, 30, 2048), (30, 31, 4096)]
    labels = [(0, 2, "64\u2013128"), (2, 4, "256"), (4, 20, "2,048"), (20, 30, "2,048")]
    assert plot.band_labels(bands, 2) == labels
    assert plot.band_labels(bands, 0.5)[-1] == (30, 31, "4,096")


def test_smoothing():
    values = np.random.default_rng(0).normal(size=50)
    for reach in (0, 1, 7):
        windows = [values[i - min(reach, i) : i + min(reach, i) + 1] for i in range(50)]
        assert plot.smooth(values, reach) == pytest.approx([window.mean() for window in windows])


def test_curves_and_axes(tmp_path):
    plot.draw([plot.read_run(make_log(tmp_path / "a", plan=True))], "tokens", tmp_path / "a.png")
    loss, *_, perplexity = plt.gcf().axes
    curves = {line.get_label(): line for line in loss.lines}
    steps = np.array([0, 7, 10, 12, 20])
    tokens = FIRST * np.minimum(steps, 10) + SECOND * np.maximum(0, steps - 10)
    for name, values in (
        ("validation at the stage's length", 9 - steps / 6),
        ("validation at the last length", 9.5 - steps / 6),
        ("validation as planned", [math.nan, *(math.log(3000 / step) for step in (7, 10, 12, 20))]),
    ):
        assert curves[name].get_xdata().tolist() == tokens.tolist()
        assert curves[name].get_ydata() == pytest.approx(np.array(values), nan_ok=True)
    assert curves["training, smoothed"].get_ydata().tolist() == [8, 7, 6, 5]
    assert perplexity.get_ylim() == pytest.approx(np.exp(loss.get_ylim()))
    assert {text.get_text() for text in loss.texts} == {"64", "128", "window\nlength"}
    plt.close()


@pytest.mark.parametrize("x", ["tokens", "time", "flops", "step"])
def test_the_second_stage_takes_its_share_of_the_x_axis(tmp_path, x):
    """The picture itself: its grey band against the share that follows from the log's two stages."""
    out_dir = make_log(tmp_path / "a")
    save_model(out_dir, "best.pt")
    pixels = picture(out_dir, f"--x={x}")
    assert (out_dir / "loss.png").exists() and pixels.shape == (1800, 1500, 3)
    parts = {"tokens": (FIRST, SECOND), "time": (1, 3), "step": (1, 1)}
    parts["flops"] = (FIRST * flops_per_token(64), SECOND * flops_per_token(128))
    grey = (pixels == 0xE6).all(-1).sum(axis=1).max()  # in a row that no curve and no text crosses
    axis_width = 0.7 * 1500
    assert grey / axis_width == pytest.approx(parts[x][1] / sum(parts[x]), abs=0.02)


def test_the_plan_is_drawn_where_there_is_one(tmp_path):
    assert count(picture(make_log(tmp_path / "a", plan=True)), "006040") > 100
    assert count(picture(make_log(tmp_path / "a", plan=False)), "006040") == 0


def test_a_line_that_is_being_written_changes_nothing(tmp_path):
    log = make_log(tmp_path / "a") / "log.jsonl"
    whole = picture(tmp_path / "a")
    content = log.read_text()
    log.write_text(content + content.splitlines()[3][:70])
    assert (picture(tmp_path / "a") == whole).all()
    log.write_text(content.rstrip("\n"))  # the line is there, its end not yet
    assert plot.read_run(tmp_path / "a").evals["step"][-1] == 20


def test_runs_over_each_other(tmp_path):
    """The third run's blue is in the picture of three runs and not in that of two; both are loss.png right here."""
    names = ["a", "b", "c"]
    for worse, name in enumerate(names):
        make_log(tmp_path / name, worse=worse / 2)
    pictures = [picture(*names[:n], cwd=tmp_path) for n in (2, 3)]
    assert [count(pixels, "d55e00") > 1000 for pixels in pictures] == [True, True]
    assert [count(pixels, "0072b2") > 1000 for pixels in pictures] == [False, True]
    assert (tmp_path / "loss.png").exists()
    assert run(*names, "--to=c/three.png", cwd=tmp_path).stdout == "c/three.png\n"


def test_mistakes_are_one_line(tmp_path):
    out_dir = make_log(tmp_path / "a")
    evaluations, empty, broken = tmp_path / "evaluations", tmp_path / "empty", tmp_path / "broken"
    lines = (out_dir / "log.jsonl").read_text().splitlines(keepends=True)
    for path, content in ((evaluations, lines[:1]), (empty, []), (broken, [*lines[:2], "{}\n", *lines[2:]])):
        path.mkdir()
        (path / "log.jsonl").write_text("".join(content))
    hidden = tmp_path / "hidden"  # a matplotlib that cannot be imported
    hidden.mkdir()
    (hidden / "matplotlib.py").write_text("raise ImportError\n")
    for args, env, words in (
        ([], None, "OUT_DIR"),
        ([tmp_path / "none"], None, "log.jsonl does not exist"),
        ([evaluations], None, "no records of training"),
        ([empty], None, "no records of training"),
        ([broken], None, "line 3"),
        ([out_dir, "--x=epochs"], None, "epochs"),
        ([out_dir, "--x=flops"], None, "best.pt"),
        ([out_dir, f"--to={tmp_path}/none/a.png"], None, "cannot write"),
        ([out_dir], {"PYTHONPATH": str(hidden)}, "pip install matplotlib"),
    ):
        done = run(*args, env=env and os.environ | env)
        assert (done.returncode, done.stdout) == (2, ""), args
        assert done.stderr.count("\n") == 1 and words in done.stderr, done.stderr
    assert not (out_dir / "loss.png").exists()
