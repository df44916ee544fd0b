"""A model's scores in float32 against those of transformers and numpy, computed from the shards alone."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, as_qwen3, call_program, read_log

import model
from checkpoint import load_model
from curriculum import Curriculum
from data import open_dataset
from evaluate import evaluate, summary
from parallel import Team
from settings import Config
from train import train

TABLE = ((0, 64, 4, 1.0), (6, 200, 2, 0.5))


@pytest.fixture(scope="module")
def run(small_dir, tmp_path_factory) -> Config:
    """Return the config of a finished run on TABLE whose last evaluation is its best."""
    out_dir = tmp_path_factory.mktemp("evaluate") / "run"
    config = Config(**SMALL, data_dir=str(small_dir), out_dir=str(out_dir), stages=TABLE, max_steps=12)
    assert train(config, Team()) == 0
    return config


@pytest.fixture
def scored(run, small_dir):
    """Return a function that gives transformers' losses and hits (windows, positions) and the bytes of n windows."""
    qwen3 = as_qwen3(torch.load(f"{run.out_dir}/best.pt", weights_only=True))
    token_bytes = np.load(small_dir / "token_bytes.npy")
    def scored(split: str, length: int, n: int | None = None) -> tuple[np.ndarray, np.ndarray, int]:
        shard = np.fromfile(small_dir / f"{split}_00000.bin", "<u2").astype(np.int64)
        W = (len(shard) - 1) // length
        losses, hits, n_bytes = [], [], 0
        for start in [math.floor(j * W / (n or W)) * length for j in range(n or W)]:
            tokens = torch.from_numpy(shard[start : start + length + 1])
            with torch.no_grad():
                logits = qwen3(input_ids=tokens[None, :-1]).logits[0]
            losses.append(torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none").double().numpy())
            hits.append((logits.argmax(-1) == tokens[1:]).numpy())
            n_bytes += token_bytes[tokens[1:]].sum(dtype=int)
        return np.stack(losses), np.stack(hits), n_bytes
    return scored


@pytest.mark.parametrize("step, length, n", [(0, 64, 40), (6, 64, 40), (7, 200, 13)])
def test_an_evaluation_equals_transformers_on_its_stages_windows(run, scored, step, length, n):
    config = dataclasses.replace(run, eval_tokens=2_600, micro_batch_tokens=777, plan_ppl=((1, 100), (100, 10)))
    data = open_dataset(run.data_dir, 200)
    trained, _ = load_model(Path(run.out_dir) / "best.pt")
    record = evaluate(trained, data, Curriculum(TABLE, 12), step, config, Team())
    losses, hits, n_bytes = scored("val", length, n)
    train_loss, last_len_loss = scored("train", length, n // 4)[0].mean(), scored("val", 200, 13 // 4)[0].mean()
    expected = {"val_loss": losses.mean(), "val_ppl": math.exp(losses.mean()), "val_accuracy": hits.mean(),
                "val_bpb": losses.sum() / math.log(2) / n_bytes, "train_loss": train_loss,
                "gap": losses.mean() - train_loss, "last_len_loss": last_len_loss}  # fmt: skip
    assert (record.pop("stage"), record.pop("seq_len")) == (1 if length == 64 else 2, length)
    assert record.pop("plan_ppl") == (pytest.approx(100 / math.sqrt(step)) if step else None)
    assert record == pytest.approx(expected, rel=1e-5, abs=1e-5)


def mean_and_error(losses: np.ndarray) -> tuple[float, float]:
    """Return the mean of losses (windows, positions) and its standard error, with one observation per window."""
    means = losses.mean(1)
    return means.mean(), means.std(ddof=1) / math.sqrt(len(means))


def test_the_printed_tables_equal_those_of_transformers(run, scored, monkeypatch):
    on_machine = model.on_machine
    monkeypatch.setattr(model, "on_machine", lambda *args: on_machine(*args[:3], compile=False))
    done = call_program("evaluate.py", f"--out_dir={run.out_dir}", "--micro_batch_tokens=190", "--dtype=float32")
    first, by_length, by_position = done.stdout.split("\n\n")
    assert first == f"{run.out_dir}/best.pt is the model after 12 steps. On all held-out articles:"
    rows = {}
    for line in by_length.splitlines()[1:]:
        length, *rows[int(length)] = (float(cell.strip("%").replace(",", "")) for cell in line.split())
    for length in (64, 200):
        losses, hits, n_bytes = scored("val", length)
        n, loss, error, ppl, accuracy, bpb = rows[length]
        assert n == len(losses) == 4_199 // length and (loss, error) == pytest.approx(mean_and_error(losses), abs=1e-4)
        assert (ppl, accuracy) == pytest.approx((math.exp(losses.mean()), 100 * hits.mean()), rel=1e-4, abs=0.006)
        assert bpb == pytest.approx(losses.sum() / math.log(2) / n_bytes, abs=1e-4)
    for (start, end), line in zip([(0, 64), (64, 128), (128, 200)], by_position.splitlines()[1:], strict=True):
        name, *printed = line.split()
        assert name == f"{start + 1}-{end}"
        assert list(map(float, printed)) == pytest.approx(mean_and_error(losses[:, start:end]), abs=1e-4)
    final = read_log(Path(run.out_dir))[-1]  # scores the last weights, here also the best
    of_final = [final["val_loss"], final["val_ppl"], 100 * final["val_accuracy"], final["val_bpb"]]
    assert final["event"] == "final" and of_final == pytest.approx([loss, ppl, accuracy, bpb], rel=1e-4, abs=0.006)


@pytest.mark.parametrize("changes, end", [
    ({}, "ppl 20.1, gap +0.10, best"), ({"plan_ppl": 20.0}, "ppl 20.1 (behind plan: 20), gap +0.10, best"),
    ({"plan_ppl": 20.4}, "ppl 20.1 (ahead of plan: 20), gap +0.10, best"),
    ({"gap": 0.70}, "ppl 20.1, gap +0.70 overfits, best"),  # at ln 2 or more
    ({"gap": 0.69, "is_best": False, "bad_evals": 3}, "ppl 20.1, gap +0.69, no best for 3")])  # fmt: skip
def test_an_evaluations_line_compares_with_plan_best_and_training(changes, end):
    record = {"step": 1_000, "stage": 1, "seq_len": 64, "val_loss": 3.0, "val_ppl": math.exp(3), "plan_ppl": None}
    record |= {"gap": 0.1, "is_best": True, "bad_evals": 0, **changes}
    assert summary(record, Config(stages=TABLE)) == f"step 1,000: stage 1/2, length 64, val loss 3.000, {end}"
