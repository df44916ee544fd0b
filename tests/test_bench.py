"""The arithmetic of bench/: counts against torch's own, fits and shares against closed forms."""

import io
import re
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(ROOT / "bench"))

from bench import breakdown, growth, memory, roofline, start, throughput
from config import Config, load_config
from curriculum import PEAK_FLOPS, Stage
from dataset import open_dataset
from model import GPT, GPTConfig
from train import make_optimizers, set_up, train_step


def test_muons_flops_are_those_that_torch_counts():
    config = GPTConfig(2, 2, 64)
    model = GPT(config, 16)
    model.init_weights(0)
    _, muon = make_optimizers(model, Config(n_layer=2, n_head=2, n_embd=64))
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    with FlopCounterMode(display=False) as counter:
        muon.step()
    assert roofline.muon_flops(config) == counter.get_total_flops() > 0


def test_the_bytes_of_a_step_by_hand():
    """One layer of width 64, so a hidden size of 192; 4 windows of 8 in two parts of two."""
    stage = Stage(0, 1, 8, 4, 1.0)
    n_params = 50304 * 64 + 4 * 64 * 64 + 3 * 64 * 192 + 2 * 64 + 2 * 32 + 64
    per_token = 10 * 50304 + 8 * (16 * 64 + 6 * 192)
    assert roofline.step_bytes(GPTConfig(1, 2, 64), stage, 16) == n_params * (2 * 18 + 32) + 32 * per_token


def test_the_roofline_is_the_larger_of_two_times(capsys, monkeypatch):
    """Of 3,600 steps of one stage: on a card with little bandwidth the bytes', on one without end the FLOPs'."""
    config = Config(stages=((0, 64, 256, 1.0),), max_steps=3600)
    monkeypatch.setattr(roofline, "load_config", lambda argv: config)
    model = GPTConfig()
    flops = 64 * 256 * model.flops_per_token(64) + roofline.muon_flops(model)
    moved = roofline.step_bytes(model, Stage(0, 3600, 64, 256, 1.0), config.micro_batch_tokens)
    for bandwidth, bound, seconds in ((1e6, "bytes", moved / 1e6), (1e30, "FLOPs", flops / PEAK_FLOPS["A100"])):
        monkeypatch.setattr(roofline, "BANDWIDTH", {"A100": bandwidth})
        roofline.main()
        lines = capsys.readouterr().out.splitlines()
        assert lines[1].endswith(bound) and lines[-3].split() == ["100%", f"{seconds:.2f}"]


def test_memory_is_counted_as_it_says():
    """By hand, at one layer of width 64: what a weight takes, and a token."""
    config = GPTConfig(1, 2, 64)
    matrices = 4 * 64 * 64 + 3 * 64 * 192
    fixed = 10 * config.n_params + 4 * matrices + 8 * 50304 * 64
    assert memory.count(config, 0) == fixed
    assert memory.count(config, 10) - fixed == 10 * (2 * (50304 + 4192) + 24 * 64 + 6 * 192)


def test_an_exponent_is_the_slope_of_a_power():
    sizes = [1, 2, 4, 8]
    rounds = [[3 * n**k for k in (0.5, 1.0, 1.5)] for n in sizes]
    assert growth.exponent(sizes, rounds) == "1.00 (0.50-1.50)"


def test_the_share_of_evaluations_by_hand():
    """Three evaluations at length 64 (the last of all held-out text too) and one at 128, the run's end."""
    config = Config(stages=((0, 64, 4, 1.0), (10, 128, 2, 1.0)), max_steps=20, eval_interval=5, eval_tokens=1000)
    train_s, score_s = {64: 1.0, 128: 2.0}, {64: 0.25, 128: 0.5}
    early = 3 * (1000 + 250) * 0.25 + (1000 + 250) * 0.5  # after 0, 5, 10 steps; after 15
    at_end = (1000 + start.HELD_OUT + start.HELD_OUT / 4) * 0.5
    scoring = early + at_end + 5 * 250 * 0.5  # and each time at the last length
    training = 10 * 256 * 1.0 + 10 * 256 * 2.0
    assert start.evaluation_share(config, train_s, score_s) == pytest.approx(scoring / (scoring + training))


def test_a_player_reports_its_steps_and_its_memory(sample_dir):
    """A real program for two steps: seconds that make sense, and no less memory than torch and its weights take."""
    flags = [f"--data_dir={sample_dir}", "--n_layer=1", "--n_head=1", "--n_embd=32"]
    player = throughput.Player("ours, AdamW", flags, 64, 2)
    first, second = player.read(), player.turn(1)
    assert 0 < second < first < 600 and 0.2 < player.end() < 8
    assert player.process.returncode == -9


def test_a_turn_has_as_many_steps_as_were_asked_for(monkeypatch):
    """The first step is a turn, then three, then one: told after the first, the fourth and the fifth."""
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO("3\n1\n9\n"))
    after_step = throughput.gate(out, "cpu")
    told = []
    for _ in range(8):
        after_step()
        told.append(len(out.getvalue().splitlines()))
    assert told == [1, 1, 1, 2, 3, 3, 3, 3]
    assert all(float(line.split()[0]) >= 0 for line in out.getvalue().splitlines())


def test_a_breakdown_gives_every_product_to_its_part(sample_dir):
    """By the FLOPs that torch's profiler counts in a step, not compiled: in closed form for each part."""
    keys = ["--n_layer=2", "--n_head=2", "--n_embd=64", "--compile=False", "--device=cpu", "--dtype=float32"]
    config = load_config([str(ROOT / "config/curriculum9.py"), *keys])
    model, optimizers, loss_of, _ = set_up(config, 64, torch.device("cpu"), torch.float32)
    windows = open_dataset(str(sample_dir), 64).train.random_windows(64, 4, 0, 0)
    with torch.profiler.profile(with_flops=True) as profiler:
        train_step(loss_of, model, optimizers, windows, 6e-4, config)
    flops, seconds = Counter(), Counter()
    for event in profiler.events():
        flops[breakdown.part_of(event)] += event.flops or 0
        seconds[breakdown.part_of(event)] += event.self_cpu_time_total
    m, tokens = model.config, windows[:, 1:].size
    head = 6 * m.vocab_size * m.n_embd * tokens
    assert flops["head's products"] == head
    assert flops["products"] == 6 * m.n_matmul * tokens - head
    assert flops["muon"] >= roofline.muon_flops(m)  # the profiler counts additions, too
    assert min(seconds.values()) > 0 and seconds.keys() == {"products", "head's products", "loss", "attention", "muon",
                                                            "adamw", "the rest"}  # fmt: skip


def test_a_breakdown_adds_up_to_the_step(sample_dir, capsys, monkeypatch):
    keys = ["--n_layer=1", "--n_head=1", "--n_embd=64", "--stages=[(0, 64, 64, 1.0)]", "--compile=False",
            f"--data_dir={sample_dir}", "--device=cpu"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["breakdown.py", str(ROOT / "config/curriculum9.py"), *keys])
    monkeypatch.setattr(breakdown, "peak_rate", lambda device, dtype: 1e12)
    breakdown.main()
    first, *lines = capsys.readouterr().out.splitlines()
    total = float(re.search(r"profiled ([\d.]+) s", first)[1])
    rows = [re.split("  +", line.strip()) for line in lines[2:-2]]
    assert sum(float(row[1].replace(",", "")) for row in rows) == pytest.approx(1000 * total, abs=2)
    assert {row[0]: row[3:4] for row in rows}["muon"] == ["0.00"]


def test_the_plans_batches_are_those_that_are_timed():
    lengths = {row[1] for row in load_config([str(ROOT / "config/curriculum9.py")]).stages}
    assert throughput.LENGTHS == sorted(lengths)
    assert throughput.spread(list(np.arange(1.0, 6.0)), ".1f") == "3.0 (1.0-5.0)"
