"""bench/compare.py: its table against curves whose values after any work are known, and what it refuses."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import train
from config import Config
from model import GPT, GPTConfig

ROOT = Path(train.__file__).parent
STAGES = ((0, 64, 4, 1.0), (10, 128, 3, 0.5))


def make_run(out_dir: Path, loss: Callable[[int], float], seconds_per_step: float, steps: int = 20, **keys) -> Path:
    """A run that is evaluated at every fifth step, and whose loss after n tokens is loss(n)."""
    config = Config(**{"n_layer": 1, "n_head": 2, "n_embd": 32, "stages": STAGES, "out_dir": str(out_dir)} | keys)
    out_dir.mkdir()
    records, tokens = [], 0
    for step in range(steps + 1):
        reached = [row for row in config.stages if row[0] <= max(0, step - 1)]
        _, seq_len, batch_size, _ = reached[-1]
        common = {"step": step, "stage": len(reached), "seq_len": seq_len, "time_s": step * seconds_per_step}
        if step:
            tokens += seq_len * batch_size
            records.append(common | {"event": "train", "batch_size": batch_size, "lr": 1.0, "loss": 9.0,
                                     "tokens": tokens, "tokens_per_s": 1.0})  # fmt: skip
        if step % 5 == 0:
            records.append(common | {"event": "eval", "val_loss": 1.0, "gap": 0.0, "last_len_loss": loss(tokens),
                                     "plan_ppl": None})  # fmt: skip
    (out_dir / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    train.save_checkpoint(out_dir / "best.pt", {"config": dataclasses.asdict(config), "step": steps, "model": {}})
    return out_dir


def compare(*out_dirs: Path) -> subprocess.CompletedProcess:
    words = [sys.executable, str(ROOT / "bench" / "compare.py"), *map(str, out_dirs)]
    return subprocess.run(words, check=False, capture_output=True, text=True, timeout=120)


def losses(output: str) -> list[list[float]]:
    """The two losses and their difference, of each row of the table of losses."""
    rows = [line.split() for line in output.partition("difference")[2].splitlines()]
    return [[float(word) for word in row[-3:]] for row in rows if row]


def price(n_layer: int, seq_len: int) -> int:
    """FLOPs of a token: PaLM's appendix B, from the weights that a model has."""
    weights = sum(weight.numel() for weight in GPT(GPTConfig(n_layer, 2, 32), 64).parameters() if weight.ndim == 2)
    return 6 * weights + 12 * n_layer * 32 * seq_len


def test_losses_after_the_same_tokens_flops_and_time(tmp_path):
    """Both losses fall linearly in the tokens, so those between two evaluations are known. a makes 20 steps of a second
    through both stages, b 10 steps of three seconds, with a larger model, through the first."""

    def loss_of_a(tokens: float) -> float:
        return 10 - tokens / 1000

    def loss_of_b(tokens: float) -> float:
        return 9 - tokens / 2000

    a = make_run(tmp_path / "a", loss_of_a, 1.0)
    b = make_run(tmp_path / "b", loss_of_b, 3.0, steps=10, n_layer=40)
    done = compare(a, b)
    assert (done.returncode, done.stderr) == (0, "")

    expected = [(loss_of_a(tokens), loss_of_b(tokens)) for tokens in (640, 1280, 1920, 2560)]
    for quarter in (1, 2, 3, 4):
        flops = quarter / 4 * 2560 * price(40, 64)
        first_stage = 2560 * price(1, 64)
        tokens = flops / price(1, 64) if flops < first_stage else 2560 + (flops - first_stage) / price(1, 128)
        expected.append((loss_of_a(tokens), loss_of_b(quarter / 4 * 2560)))
    assert 2560 < tokens < 6400  # a was in its second stage when it had done b's FLOPs
    for seconds in (5, 10, 15, 20):
        tokens = 256 * min(seconds, 10) + 384 * max(0, seconds - 10)
        expected.append((loss_of_a(tokens), loss_of_b(256 * seconds / 3)))
    for row, (of_a, of_b) in zip(losses(done.stdout), expected, strict=True):
        assert row == pytest.approx([of_a, of_b, of_b - of_a], abs=0.0006)
    words = done.stdout.split()
    assert all(word in words for word in ("0.6k", "2.6k", f"{2560 * price(40, 64):.2e}", "5.0", "20.0"))
    assert "windows of 128 tokens" in done.stdout


def test_the_keys_that_differ_and_no_others(tmp_path):
    """A table row by row; where a run was written is no difference."""
    other = ((0, 64, 4, 1.0), (10, 96, 3, 0.5), (15, 128, 1, 0.25))
    a = make_run(tmp_path / "a", float, 1.0)
    b = make_run(tmp_path / "b", float, 1.0, stages=other, learning_rate=0.5, optimizer="adamw")
    lines = compare(a, b).stdout.partition("\n\n")[0].splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        f"{a} {b}",
        "learning_rate 0.0006 0.5",
        "optimizer muon adamw",
        "stages (0, 64, 4, 1.0) (0, 64, 4, 1.0)",
        "(10, 128, 3, 0.5) (10, 96, 3, 0.5)",
        "(15, 128, 1, 0.25)",
    ]


def test_a_run_compared_with_its_equal(tmp_path):
    a, b = (make_run(tmp_path / name, lambda tokens: 9 - tokens / 1000, 1.0) for name in "ab")
    done = compare(a, b)
    assert "configurations are the same" in done.stdout and "may be of different windows" not in done.stdout
    assert len(losses(done.stdout)) == 12 and all(row[2] == 0 for row in losses(done.stdout))
    c = make_run(tmp_path / "c", float, 1.0, data_dir="data/other")
    assert "data_dir differs, so the losses may be of different windows" in compare(a, c).stdout


def test_mistakes_are_one_line(tmp_path):
    a = make_run(tmp_path / "a", float, 1.0)
    short = make_run(tmp_path / "short", float, 1.0, stages=STAGES[:1])
    begun = make_run(tmp_path / "begun", float, 1.0, steps=3)
    logless = make_run(tmp_path / "logless", float, 1.0)
    (logless / "log.jsonl").unlink()
    modelless = make_run(tmp_path / "modelless", float, 1.0)
    (modelless / "best.pt").unlink()
    for out_dirs, words in (
        ([a], "OUT_DIR"),
        ([a, tmp_path / "none"], "none"),
        ([a, logless], "log.jsonl does not exist"),
        ([a, modelless], "no last.pt or best.pt"),
        ([a, begun], "no evaluation after its start"),
        ([a, short], "lengths 128 and 64"),
    ):
        done = compare(*out_dirs)
        assert done.returncode == 2 and len(losses(done.stdout)) == 0, out_dirs
        assert done.stderr.count("\n") == 1 and words in done.stderr, done.stderr
