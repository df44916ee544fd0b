"""--eval_only: its tables are those that transformers and numpy make of the same windows, and it changes nothing."""

import dataclasses
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, as_qwen3, assert_same_run, read_log

import train
from config import Config
from validate import Score, position_ranges, report, standard_error

TABLE = ((0, 64, 16, 1.0), (6, 200, 6, 0.5))
RANGES = {64: [(0, 64)], 200: [(0, 64), (64, 128), (128, 200)]}


@pytest.fixture(scope="module")
def run(small_dir, tmp_path_factory) -> Config:
    """A finished run on TABLE."""
    out_dir = tmp_path_factory.mktemp("validate") / "run"
    config = Config(**SMALL, data_dir=str(small_dir), out_dir=str(out_dir), stages=TABLE, max_steps=12)
    assert train.train(config) == 0
    return config


def evaluate(config: Config, capsys, **keys) -> str:
    capsys.readouterr()
    assert train.train(dataclasses.replace(config, eval_only=True, **keys)) == 0
    return capsys.readouterr().out


def tables(text: str) -> tuple[dict[int, list[float]], dict[tuple[str, int], tuple[float, float]]]:
    """By length the first table's columns after it; by range and length the second's losses and errors."""
    first, second = (text.split("\n\n")[i].splitlines() for i in (1, 3))
    lines = [[float(cell.strip("%").replace(",", "")) for cell in line.split()] for line in first[1:]]
    lengths = [int(cell.replace(",", "")) for cell in second[0].split()[1:]]
    by_position = {}
    for (name, *losses), errors in zip(map(str.split, second[1::2]), map(str.split, second[2::2])):
        assert len(losses) == len(errors)
        for length, loss, error in zip(lengths[-len(losses) :], losses, errors):  # short windows have no later ranges
            by_position[name, length] = float(loss), float(error.removeprefix("±"))
    return {int(length): values for length, *values in lines}, by_position


def test_another_program_repeats_losses_by_length_and_position_and_their_standard_errors(run, small_dir, capsys):
    by_length, by_position = tables(evaluate(run, capsys, micro_batch_tokens=777))
    qwen3 = as_qwen3(torch.load(f"{run.out_dir}/best.pt", weights_only=True))
    shard = np.fromfile(small_dir / "val_00000.bin", "<u2").astype(np.int64)
    token_bytes = np.load(small_dir / "token_bytes.npy")

    def mean_and_error(windows: np.ndarray) -> tuple[float, float]:
        """Of the mean of losses (windows, positions), a window being one observation of unknown variance."""
        means = [math.fsum(row) / len(row) for row in windows]
        mean = math.fsum(means) / len(means)
        return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in means) / (len(means) - 1) / len(means))

    assert list(by_length) == list(RANGES) and len(by_position) == 4
    for length, ranges in RANGES.items():
        losses, hits, n_bytes = [], 0, 0
        for start in range(0, len(shard) - length, length):
            tokens = torch.from_numpy(shard[start : start + length + 1])
            with torch.no_grad():
                logits = qwen3(tokens[None, :-1]).logits[0].double()
            losses.append(torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none").numpy())
            hits += (logits.argmax(-1) == tokens[1:]).sum().item()
            n_bytes += token_bytes[tokens[1:]].sum(dtype=int)
        losses = np.array(losses)
        n, loss, error, ppl, accuracy, bpb = by_length[length]
        assert n == len(losses) == 4_199 // length
        assert (loss, error) == pytest.approx(mean_and_error(losses), abs=1e-4)
        assert abs(error - losses.std() / math.sqrt(losses.size)) > 1e-3  # what independent targets would have
        assert ppl == pytest.approx(math.exp(losses.mean()), rel=1e-4)
        assert accuracy == pytest.approx(100 * hits / losses.size, abs=0.03)
        assert bpb == pytest.approx(losses.sum() / math.log(2) / n_bytes, abs=1e-4)
        for start, end in ranges:
            expected = mean_and_error(losses[:, start:end])
            end = 64 if start == 0 else end
            assert by_position[f"{start + 1}-{end}", length] == pytest.approx(expected, abs=1e-4)


def test_the_loss_is_the_log_s_and_out_dir_stays_as_it_is(run, capsys):
    def contents():
        return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out_dir.iterdir()}

    out_dir = Path(run.out_dir)
    before, record = contents(), read_log(out_dir)[-1]
    text = evaluate(run, capsys)
    assert contents() == before and f"{out_dir}/best.pt is the model after 12 steps" in text
    (line,) = re.findall("^ +200 .*", text, re.MULTILINE)
    _, _, loss, _, ppl, accuracy, bpb = line.split()
    assert (loss, bpb) == (f"{record['val_loss']:.4f}", f"{record['val_bpb']:.4f}")
    assert (ppl, accuracy) == (f"{record['val_ppl']:,.2f}", f"{record['val_accuracy']:.2%}")


def test_a_run_that_was_evaluated_midway_goes_on_as_if_it_had_not_been(run, tmp_path, capsys):
    config = dataclasses.replace(run, out_dir=str(tmp_path / "midway"))
    assert train.train(dataclasses.replace(config, max_steps=6)) == 0
    assert "best.pt is the model after" in evaluate(config, capsys)
    assert train.train(dataclasses.replace(config, resume=True)) == 0
    assert_same_run(tmp_path / "midway", Path(run.out_dir))


def test_a_stop_signal_ends_an_evaluation_with_nothing_printed(run, monkeypatch, capsys):
    set_up, calls = train.set_up, []

    def interrupted(*args):
        model, optimizers, loss_of, score_of = set_up(*args)

        def score(windows):
            calls.append(windows)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return score_of(windows)

        return model, optimizers, loss_of, score

    monkeypatch.setattr(train, "set_up", interrupted)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert train.train(dataclasses.replace(run, eval_only=True, micro_batch_tokens=200)) == signal.SIGINT
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert len(calls) == 2 and capsys.readouterr().out == ""


def test_two_processes_print_once_what_one_does(run, tmp_path, capsys):
    path = tmp_path / "run.py"
    path.write_text("".join(f"{key} = {value!r}\n" for key, value in dataclasses.asdict(run).items()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", path,
               "--eval_only=True"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    for ours, one in zip(tables(done.stdout), tables(evaluate(run, capsys)), strict=True):
        assert ours.keys() == one.keys()
        assert all(ours[key] == pytest.approx(one[key], abs=2e-4, rel=1e-4) for key in one)


def test_no_line_is_longer_than_100_columns_however_many_lengths_there_are():
    lengths = [64 * i for i in range(1, 33)]
    scores = {n: Score(10.8, 0.5, 3.4, 2**30 // n, 0.01, [(10.8, 0.01)] * len(position_ranges(n))) for n in lengths}
    text = report(scores)
    assert max(map(len, text.splitlines())) <= 100
    headers = " ".join(line for line in text.splitlines() if line.strip().startswith("position"))
    assert [int(word) for word in headers.replace(",", "").split() if word != "position"] == lengths


def test_the_error_of_a_single_window_is_unknown():
    assert math.isnan(standard_error(3.0, 9.0, 1))
    assert standard_error(6.0, 14.0, 3) == pytest.approx(1 / math.sqrt(3))  # 1, 2, 3
    assert standard_error(9.0, 27.0, 3) == 0.0  # 3, 3, 3
