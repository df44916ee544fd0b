"""The arithmetic of bench/: FLOPs against torch's own counts, times that add up, and planted differences."""

import json
import re
from collections import Counter

import pytest
import torch
from conftest import ROOT, call_program
from torch.utils.flop_counter import FlopCounterMode

from bench import breakdown, exactness, throughput
from parallel import Team
from settings import Config
from train import train_step

EAGER = {"n_layer": 2, "n_head": 2, "n_embd": 64, "compile": False, "device": "cpu", "dtype": "float32"}


@pytest.fixture
def a_step(sample_dir) -> tuple:
    """Return what a training step needs: a model, its optimizers and scaler, and a dataset."""
    return throughput.set_up(Config(**EAGER, data_dir=str(sample_dir)), 64)


def test_muons_flops_are_those_that_torch_counts(a_step):
    model, (_, muon), *_ = a_step
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    with FlopCounterMode(display=False) as counter:
        muon.step()
    assert breakdown.muon_flops(model.config) == counter.get_total_flops() > 0


def test_a_breakdown_gives_every_product_to_its_part(a_step):
    """Compare the FLOPs that torch's profiler counts in an uncompiled step with a closed form for each part."""
    *machine, data = a_step
    windows = data.train.random_windows(64, 4, 0, 0)
    with torch.profiler.profile(with_flops=True) as profiler:
        train_step(*machine, windows, 6e-4, Config(**EAGER), Team())
    flops, seconds = Counter(), Counter()
    for event in profiler.events():
        flops[breakdown.part_of(event)] += event.flops or 0
        seconds[breakdown.part_of(event)] += event.self_cpu_time_total
    m, tokens = machine[0].config, windows[:, 1:].size
    head = 6 * m.vocab_size * m.n_embd * tokens
    assert flops["head's products"] == head and flops["products"] == 6 * m.n_matmul * tokens - head
    assert flops["muon"] >= breakdown.muon_flops(m)  # the profiler counts additions, too
    assert min(seconds.values()) > 0 and seconds.keys() == {"products", "head's products", "loss", "attention", "muon",
                                                            "adamw", "the rest"}  # fmt: skip


def test_a_breakdown_adds_up_to_the_step(sample_dir, monkeypatch):
    monkeypatch.setattr(throughput, "peak_rate", lambda device, dtype: 1e12)
    keys = EAGER | {"stages": [(0, 64, 4, 1.0)], "data_dir": sample_dir}
    flags = [f"--{key}={value}" for key, value in keys.items()]
    first, *lines = call_program("bench/breakdown.py", ROOT / "config/curriculum9.py", *flags).stdout.splitlines()
    rows = [re.split("  +", line.strip()) for line in lines[2:-2]]
    ms = {part: float(own.replace(",", "")) for part, own, *_ in rows}
    total = 1000 * float(re.search(r"profiled ([\d.]+) s", first)[1])
    assert sum(ms.values()) == pytest.approx(total, abs=2) and min(ms.values()) >= 0
    assert ms["no operation"] < total / 2  # the operations' times are in the unit of the step's


def plant_run(out_dir, loss=1.0, weight=1.0, moment=1.0, bad_evals=0, missing=None):
    """Write the files of a finished run that differences() reads. Its times are random."""
    out_dir.mkdir()
    times = torch.rand(()).item()
    for name in ("last.pt", "best.pt"):
        state = {"config": {"out_dir": str(out_dir), "seed": 1}, "model": {"weight": torch.tensor([1.0, weight])},
                 "optimizers": [{"state": {0: {"momentum": torch.tensor([moment])}}}], "log_length": times,
                 "progress": {"step": 20, "bad_evals": bad_evals, "seconds": times}}  # fmt: skip
        torch.save(state, out_dir / name)
    records = [{"event": "train", "step": step, "loss": loss if step == 7 else 2.0, "time_s": times}
               for step in range(20) if step != missing]  # fmt: skip
    (out_dir / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return out_dir


@pytest.mark.parametrize("changes, found", [
    ({}, []),  # only times differ
    ({"weight": 1.0 + 2**-23}, ["last.pt/model/weight", "best.pt/model/weight"]),
    ({"moment": 0.5}, ["last.pt/optimizers/0/state/0/momentum", "best.pt/optimizers/0/state/0/momentum"]),
    ({"bad_evals": 1}, ["last.pt/progress/bad_evals", "best.pt/progress/bad_evals"]),
    ({"loss": 1.5}, ["log line 8"]), ({"missing": 18}, ["log line 19", "log line 20"])])  # fmt: skip
def test_a_planted_difference_is_found(changes, found, tmp_path):
    assert exactness.differences(plant_run(tmp_path / "one"), plant_run(tmp_path / "two", **changes)) == found
