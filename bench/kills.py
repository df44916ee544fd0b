"""Runs killed at random moments, against runs that were not: final weights, moments and log, bit for bit.

    python bench/kills.py --data_dir=data/sample [--kills=10]

Four runs through four stages: both optimizers, eager and compiled. Each is killed with SIGKILL at least so many times
and started again until it is done. A quarter of the kills each waits for one of: a step, an evaluation, a checkpoint
that is being written, the change of a stage; then it falls at a random moment. Where it fell is read from what it left.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from curriculum import format_table  # noqa: E402

STAGES = ((0, 16, 8, 1.0), (20, 32, 5, 0.5), (40, 64, 3, 0.25), (60, 128, 2, 0.25))
STEPS, EVAL_INTERVAL = 80, 8
KEYS = {"stages": STAGES, "max_steps": STEPS, "eval_interval": EVAL_INTERVAL, "checkpoint_interval": 3}
KEYS |= {"eval_tokens": 1_024, "log_interval": 1, "n_layer": 2, "n_head": 2, "n_embd": 64, "learning_rate": 1e-3}
KEYS |= {"warmup_steps": 5, "micro_batch_tokens": 1_024, "device": "cpu", "dtype": "float32", "resume": True}
STARTS = {row[0] for row in STAGES} | {STEPS}
WRITTEN = ("last.tmp", "best.tmp", "log.tmp")


def read_log(out_dir: Path) -> list[dict]:
    """The log's records; a last line that is cut off does not count."""
    path, records = out_dir / "log.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            pass
    return records


def due(step: int) -> bool:
    return step % EVAL_INTERVAL == 0 or step in STARTS


def where(out_dir: Path) -> str:
    """What the run was doing, by what is in out_dir."""
    if any((out_dir / name).exists() for name in WRITTEN):
        return "writing"
    records = read_log(out_dir)
    step = records[-1]["step"] if records else 0
    if due(step) and (not records or records[-1]["event"] == "train"):
        return "evaluation"
    return "stage change" if step in STARTS else "step"


def kill_once(command: list[str], out_dir: Path, aim: str, chance: random.Random) -> bool:
    """Starts the run and kills it once it has got further and does what is aimed at. False if it ended before."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    before, further = len(read_log(out_dir)), chance.randint(1, 5)
    while process.poll() is None:
        if len(read_log(out_dir)) >= before + further or before == 0:
            if aim == "step" or where(out_dir) == aim:
                time.sleep(chance.uniform(0, 0.03))
                process.kill()
        time.sleep(0.0005)
    if process.returncode not in (0, -signal.SIGKILL):
        sys.exit(process.stderr.read().decode())
    return process.returncode != 0


def flat(value: object, path: str = "") -> dict:
    """Everything in a checkpoint by its place, tensors as bytes; without the times and the paths."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return {path: value.numpy().tobytes() if isinstance(value, torch.Tensor) else value}
    parts = [flat(item, f"{path}/{key}") for key, item in items if key not in ("time_s", "out_dir")]
    return {key: item for part in parts for key, item in part.items()}


def differences(one: Path, other: Path) -> str:
    """What differs between two finished runs: nothing, or the names of the first few things."""
    found = []
    for name in ("last.pt", "prev.pt", "best.pt"):
        a, b = (flat(torch.load(out_dir / name, weights_only=True)) for out_dir in (one, other))
        found += [name + key for key in a.keys() | b.keys() if a.get(key) != b.get(key)]
    times = ("time_s", "tokens_per_s", "mfu")
    logs = [[{k: v for k, v in r.items() if k not in times} for r in read_log(out_dir)] for out_dir in (one, other)]
    expected = [(event, step) for step in range(STEPS + 1) for event in ("train", "eval")
                if (step > 0 if event == "train" else due(step))]  # fmt: skip
    if [(r["event"], r["step"]) for r in logs[0]] != expected:
        found.append("records")
    return ", ".join(sorted(found)[:3] + ["log"] * (logs[0] != logs[1])) or "nothing"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data_dir", default="data/sample")
    parser.add_argument("--kills", type=int, default=10, help="of each of the four runs, at least")
    args = parser.parse_args()
    chance, rows = random.Random(0), []
    for optimizer in ("adamw", "muon"):
        for compile in (False, True):
            with tempfile.TemporaryDirectory() as name:
                unbroken, killed = Path(name) / "unbroken", Path(name) / "killed"
                keys = KEYS | {"data_dir": args.data_dir, "optimizer": optimizer, "compile": compile}
                command = [sys.executable, "train.py", "config/demo.py", *(f"--{k}={v}" for k, v in keys.items())]
                subprocess.run([*command, f"--out_dir={unbroken}"], cwd=ROOT, check=True, capture_output=True)
                command.append(f"--out_dir={killed}")
                fell, aims = Counter(), ["writing", "evaluation", "stage change", "step"]
                while fell.total() < args.kills and kill_once(command, killed, aims[fell.total() % 4], chance):
                    fell[where(killed)] += 1
                subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
                rows.append([optimizer, "compiled" if compile else "eager", f"{fell.total()}",
                             *(f"{fell[aim]}" for aim in aims), differences(killed, unbroken)])  # fmt: skip
                print(f"{optimizer}, {rows[-1][1]}: {fell.total()} kills; differs: {rows[-1][-1]}", flush=True)
    print("\n" + format_table(["optimizer", "", "kills", *aims, "differs"], rows))


if __name__ == "__main__":
    main()
