"""The arithmetic of bench/: counts against torch's own, fits against closed forms, differences that were planted."""

import io
import json
import re
import sys
from collections import Counter

import pytest
import torch
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

from bench import breakdown, exactness, throughput
from model import GPT, GPTConfig
from optim import make_optimizers
from parallel import Team
from settings import Config, load_config
from train import train_step

EAGER = {"n_layer": 2, "n_head": 2, "n_embd": 64, "compile": False, "device": "cpu", "dtype": "float32"}


def test_muons_flops_are_those_that_torch_counts():
    config = GPTConfig(2, 2, 64)
    model = GPT(config, 16)
    model.init_weights(0)
    _, muon = make_optimizers(model, Config(n_layer=2, n_head=2, n_embd=64))
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    with FlopCounterMode(display=False) as counter:
        muon.step()
    assert breakdown.muon_flops(config) == counter.get_total_flops() > 0


def test_a_breakdown_gives_every_product_to_its_part(sample_dir):
    """By the FLOPs that torch's profiler counts in a step, not compiled: in closed form for each part."""
    config = Config(**EAGER, data_dir=str(sample_dir))
    model, optimizers, scaler, data = throughput.set_up(config, 64)
    windows = data.train.random_windows(64, 4, 0, 0)
    with torch.profiler.profile(with_flops=True) as profiler:
        train_step(model, optimizers, scaler, windows, 6e-4, config, Team())
    flops, seconds = Counter(), Counter()
    for event in profiler.events():
        flops[breakdown.part_of(event)] += event.flops or 0
        seconds[breakdown.part_of(event)] += event.self_cpu_time_total
    m, tokens = model.config, windows[:, 1:].size
    head = 6 * m.vocab_size * m.n_embd * tokens
    assert flops["head's products"] == head
    assert flops["products"] == 6 * m.n_matmul * tokens - head
    assert flops["muon"] >= breakdown.muon_flops(m)  # the profiler counts additions, too
    assert min(seconds.values()) > 0 and seconds.keys() == {"products", "head's products", "loss", "attention", "muon",
                                                            "adamw", "the rest"}  # fmt: skip


def test_a_breakdown_adds_up_to_the_step(sample_dir, capsys, monkeypatch):
    keys = EAGER | {"stages": [(0, 64, 16, 1.0)], "data_dir": sample_dir}
    flags = [f"--{key}={value}" for key, value in keys.items()]
    monkeypatch.setattr(sys, "argv", ["breakdown.py", str(ROOT / "config/curriculum9.py"), *flags])
    monkeypatch.setattr(breakdown, "peak_rate", lambda device, dtype: 1e12)
    breakdown.main()
    first, *lines = capsys.readouterr().out.splitlines()
    assert "torch.float32" in first
    total = float(re.search(r"profiled ([\d.]+) s", first)[1])
    rows = [re.split("  +", line.strip()) for line in lines[2:-2]]
    assert sum(float(row[1].replace(",", "")) for row in rows) == pytest.approx(1000 * total, abs=2)
    assert {row[0]: row[3:4] for row in rows}["muon"] == ["0.00"]


def test_an_exponent_is_the_slope_of_a_power():
    sizes = [1, 2, 4, 8]
    rounds = [[3 * n**k for k in (0.5, 1.0, 1.5)] for n in sizes]
    assert throughput.exponent(sizes, rounds) == "1.00 (0.50-1.50)"


def test_a_turn_is_as_many_steps_as_were_asked_for(monkeypatch):
    """After the first step, a report at each turn's end."""
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO("3\n1\n9\n"))
    after_step = throughput.Gate(out, "cpu")
    told = []
    for _ in range(8):
        after_step()
        told.append(len(out.getvalue().splitlines()))
    assert told == [1, 1, 1, 2, 3, 3, 3, 3]
    resident = int(re.search(r"VmRSS:\s+(\d+)", open("/proc/self/status").read())[1]) / 2**20
    seconds, gib = map(float, out.getvalue().splitlines()[-1].split())
    assert seconds >= 0 and resident <= gib < 64


def plant_run(out_dir, loss: float = 1.0, weight: float = 1.0, moment: float = 1.0, bad_evals: int = 0, lost: int = -1):
    """Write what differences() reads of a finished run, with times that no other run has."""
    out_dir.mkdir()
    times = torch.rand(()).item()
    for name in ("last.pt", "best.pt"):
        state = {"config": {"out_dir": str(out_dir), "seed": 1}, "model": {"weight": torch.tensor([1.0, weight])},
                 "optimizers": [{"state": {0: {"momentum": torch.tensor([moment])}}}], "log_length": times,
                 "progress": {"step": exactness.STEPS, "bad_evals": bad_evals, "seconds": times}}  # fmt: skip
        torch.save(state, out_dir / name)
    records = []
    for step in range(exactness.STEPS + 1):
        if step > 0:
            records.append({"event": "train", "step": step, "loss": loss if step == 7 else 2.0, "tokens_per_s": times})
        if step % 8 == 0 or step in (20, 60):
            records.append({"event": "eval", "step": step, "time_s": times})
    records.append({"event": "final", "step": exactness.STEPS, "time_s": times})
    del records[lost : lost + (lost >= 0)]
    (out_dir / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return out_dir


@pytest.mark.parametrize("planted, found", [
    ({}, []),
    ({"weight": 1.0 + 2**-23}, ["last.pt/model/weight", "best.pt/model/weight"]),
    ({"moment": 0.5}, ["last.pt/optimizers/0/state/0/momentum", "best.pt/optimizers/0/state/0/momentum"]),
    ({"bad_evals": 1}, ["last.pt/progress/bad_evals", "best.pt/progress/bad_evals"]),
    ({"loss": 1.5}, ["log line 8"]),
], ids=["times alone", "weight", "moment", "progress", "loss"])  # fmt: skip
def test_a_planted_difference_is_found(planted, found, tmp_path):
    assert exactness.differences(plant_run(tmp_path / "a"), plant_run(tmp_path / "b", **planted)) == found


def test_a_record_that_both_logs_lack_is_missed(tmp_path):
    found = exactness.differences(plant_run(tmp_path / "a", lost=40), plant_run(tmp_path / "b", lost=40))
    assert found == ["log has a gap or repeats a record"]


def test_configurations_of_exactness_are_valid():
    """All their keys are train.py's, and the evaluations that are expected follow from them."""
    flags = [f"--{key}={value}" for key, value in (exactness.KILLED | {"data_dir": "x"}).items()]
    config = load_config([str(ROOT / "config/demo.py"), *flags])
    assert config.stages == exactness.STAGES and config.max_steps == exactness.STEPS
