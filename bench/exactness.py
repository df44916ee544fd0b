"""Compare training runs that should give the same result.

    python bench/exactness.py [kills|processes] [--kills 10] [--data_dir=data/sample]

kills       four small runs, with both optimizers, eager and compiled. Each is stopped --kills times at random moments,
            two thirds by SIGKILL and the others by SIGTERM, and resumed. Final weights, optimizers, Progress and log
            records must equal those of an unbroken run, bit for bit, except for times
processes   1, 2 and 3 processes in float32: the gradients of one step in each shape of the table, and the losses of 30
            steps with both optimizers. The last shape has fewer windows than processes. Takes about 6 GB
"""

import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from argparse import SUPPRESS, ArgumentParser
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.throughput import a_path, set_up  # noqa: E402
from checkpoint import read_log  # noqa: E402
from config import curriculum9  # noqa: E402
from curriculum import format_table  # noqa: E402
from parallel import Team, join_team  # noqa: E402
from settings import Config, user_errors  # noqa: E402
from train import train_step  # noqa: E402

STAGES = ((0, 16, 8, 1.0), (20, 32, 5, 0.5), (40, 64, 3, 0.25), (60, 128, 2, 0.25))
STEPS, EVAL_INTERVAL = 80, 8
SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 32, "device": "cpu", "micro_batch_tokens": 2_048, "log_interval": 1}
KILLED = SMALL | {"stages": STAGES, "max_steps": STEPS, "eval_interval": EVAL_INTERVAL, "checkpoint_interval": 3,
                  "eval_tokens": 1_024, "learning_rate": 1e-3, "warmup_steps": 5, "resume": True}  # fmt: skip
TIMES = ("time_s", "tokens_per_s", "mfu", "seconds", "log_length")  # the log's length depends on its times' digits
DUE = {*range(0, STEPS + 1, EVAL_INTERVAL), *(row[0] for row in STAGES)}  # steps after which a run evaluates


def run(*command: object) -> None:
    """Run a command to its end. If it fails, end this program with what it said."""
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)


def log_of(out_dir: Path) -> list[dict]:
    return read_log(out_dir) if (out_dir / "log.jsonl").exists() else []


def moment(out_dir: Path) -> str:
    """Return what a killed run was doing, judged by the files it left."""
    if any(out_dir.glob("*.tmp")):
        return "in a checkpoint"
    records = log_of(out_dir)
    is_due = records and records[-1]["event"] == "train" and records[-1]["step"] in DUE
    return "in an evaluation" if is_due else "in a step"


def stop_once(command: list[str], out_dir: Path, number: int, chance: random.Random) -> bool:
    """Start the run, and send it a signal at a random moment after some progress. Return False if it ended first."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wanted = len(log_of(out_dir)) + chance.randint(1, 8)
    while process.poll() is None and len(log_of(out_dir)) < wanted:
        time.sleep(0.002)
    time.sleep(chance.uniform(0, 0.03))
    process.send_signal(number)
    error = process.communicate()[1].decode()
    if process.returncode not in (0, -number, 128 + number):
        sys.exit(f"a run ended with status {process.returncode}: {error}")
    return process.returncode != 0


def flat(value: object, path: str = "") -> dict[str, object]:
    """Return a checkpoint's values by their place, tensors as bytes, without times and paths."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return {path: value.numpy().tobytes() if isinstance(value, torch.Tensor) else value}
    parts = [flat(item, f"{path}/{key}") for key, item in items if key not in (*TIMES, "out_dir")]
    return {key: item for part in parts for key, item in part.items()}


def differences(one: Path, other: Path) -> list[str]:
    """Return the places at which two finished runs differ: keys of checkpoints, and lines of the log."""
    found = []
    for name in ("last.pt", "best.pt"):
        a, b = (flat(torch.load(out_dir / name, weights_only=True)) for out_dir in (one, other))
        found += sorted(name + key for key in a.keys() | b.keys() if key not in a or key not in b or a[key] != b[key])
    logs = [[{k: v for k, v in r.items() if k not in TIMES} for r in read_log(out_dir)] for out_dir in (one, other)]
    return found + [f"log line {i + 1}" for i, (a, b) in enumerate(itertools.zip_longest(*logs)) if a != b]


def kills(count: int, data_dir: str) -> bool:
    """Print where the four runs were killed, and what differs. Return whether nothing differs."""
    chance, total = random.Random(0), 0
    for optimizer in ("adamw", "muon"):
        for compiled in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                unbroken, killed = Path(folder) / "unbroken", Path(folder) / "killed"
                keys = KILLED | {"data_dir": data_dir, "optimizer": optimizer, "compile": compiled, "dtype": "float32"}
                command = [sys.executable, "train.py", "config/demo.py", *(f"--{k}={v}" for k, v in keys.items())]
                run(*command, f"--out_dir={unbroken}")
                command.append(f"--out_dir={killed}")
                fell = Counter()
                for i in range(count):
                    number = signal.SIGTERM if i % 3 == 2 else signal.SIGKILL
                    if not stop_once(command, killed, number, chance):
                        break
                    fell[moment(killed) if number == signal.SIGKILL else "by SIGTERM"] += 1
                run(*command)
                found = differences(killed, unbroken)
            total += len(found)
            places = ", ".join(f"{n} {place}" for place, n in fell.items())
            print(f"{optimizer}, {compiled=}: killed {places}; differs: {', '.join(found[:4]) or None}", flush=True)
    return total == 0


SHAPES = [row[1:3] for row in curriculum9.stages[:-1]] + [(2048, 2)]  # the table's last two rows have one shape
SPLIT = SMALL | {"dtype": "float32", "compile": False}


def gradients(data_dir: str, team: Team) -> list[dict[str, torch.Tensor]]:
    """Return, for each shape, one step's gradients from the initial weights, summed over all processes."""
    config = Config(**SPLIT, data_dir=data_dir, grad_clip=0.0)
    model, _, scaler, data = set_up(config, 2_048)
    grads = []
    for step, (seq_len, batch_size) in enumerate(SHAPES):
        model.zero_grad()
        windows = data.train.random_windows(seq_len, batch_size, config.seed, step)
        train_step(model, [], scaler, windows, 0.0, config, team)  # without optimizers, nothing clears the gradients
        grads.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    return grads


def torchrun(count: int, *arguments: object) -> None:
    run(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", *arguments)


def processes(data_dir: str) -> None:
    """Print the largest differences from one process: gradients, relative to their largest entry, and losses."""
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 2, 3):
            torchrun(count, __file__, data_dir, f"{folder}/{count}.pt")
        one, *others = (torch.load(f"{folder}/{count}.pt", weights_only=True) for count in (1, 2, 3))
        rows = []
        for i, (seq_len, batch_size) in enumerate(SHAPES):
            worst = [max(((other[i][name] - grad).abs().max() / grad.abs().max()).item()
                         for name, grad in one[i].items()) for other in others]  # fmt: skip
            rows.append([f"{seq_len:,} x {batch_size}", *(f"{difference:.1e}" for difference in worst)])
        print(format_table(["gradients, float32", "2 processes", "3 processes"], rows), flush=True)

        # Batches that neither 2 nor 3 divides, and at the end fewer windows than processes
        table, rows = ((0, 64, 21, 11.3), (8, 128, 10, 7.0), (16, 256, 8, 3.5), (24, 512, 2, 1.5)), []
        for optimizer in ("muon", "adamw"):
            losses = []
            for count in (1, 2, 3):
                out_dir = Path(folder) / f"{optimizer}{count}"
                keys = SPLIT | {"data_dir": data_dir, "out_dir": out_dir, "stages": table, "max_steps": 30,
                                "cooldown_steps": 0, "optimizer": optimizer, "eval_tokens": 2_048}  # fmt: skip
                torchrun(count, "train.py", "config/curriculum9.py", *(f"--{k}={v}" for k, v in keys.items()))
                losses.append([record.get("loss") or record["val_loss"] for record in read_log(out_dir)])
            worst = [max(abs(a - b) for a, b in zip(mine, losses[0], strict=True)) for mine in losses[1:]]
            rows.append([f"{optimizer}, {len(losses[0])} losses", *(f"{difference:.1e}" for difference in worst)])
        print("\n" + format_table(["30 steps, float32", "2 processes", "3 processes"], rows))


def main() -> None:
    parser = ArgumentParser(usage=SUPPRESS, description="Compare killed runs, and several processes, with a plain run.")
    parser.add_argument("what", nargs="?", choices=("kills", "processes", "both"), default="both")
    parser.add_argument("--kills", type=int, default=10, help="stops of each of the four runs")
    parser.add_argument("--data_dir", type=a_path, default="data/sample")
    args = parser.parse_args()
    if args.what != "kills":
        processes(args.data_dir)
    if args.what != "processes" and not kills(args.kills, args.data_dir):
        sys.exit(1)


if __name__ == "__main__":
    if "RANK" in os.environ:  # one of torchrun's processes, with the arguments of `processes`
        with join_team("three processes take about 6 GB") as team:
            grads = gradients(sys.argv[1], team)
            if team.rank == 0:
                torch.save(grads, sys.argv[2])
    else:
        with user_errors():
            main()
