"""One run on 1, 2 and 3 processes: gradients of single steps in every stage's true shape, and losses over 30 steps.

    python bench/processes.py --data_dir=data/sample

A small model in float32 on the CPU, at 6e-4 times the table's first factors, warming up. Prints, per stage and process
count, the largest difference of any weight's gradient from the single process's, relative to the largest entry of that
gradient; then, per optimizer, the largest difference of a loss. The last stage has fewer windows than processes. It
starts itself under torchrun; three processes take some 6 GB.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from config import Config, curriculum9  # noqa: E402
from curriculum import Curriculum, format_table  # noqa: E402
from dataset import open_dataset  # noqa: E402
from errors import CommandLine, user_errors  # noqa: E402
from parallel import Processes, join_processes  # noqa: E402
from train import set_up, train_step  # noqa: E402

SHAPES = [row[1:3] for row in curriculum9.stages[:-1]] + [(2048, 2)]  # the last two rows have one shape
MODEL = {"n_layer": 2, "n_head": 2, "n_embd": 64, "device": "cpu", "dtype": "float32", "compile": False}
MODEL |= {"micro_batch_tokens": 2_048}


def gradients(data_dir: str, team: Processes) -> list[dict]:
    """Per shape, the gradients that the optimizers of this process get."""
    table = tuple((step, *shape, 1.0) for step, shape in enumerate(SHAPES))
    config = Config(**MODEL, data_dir=data_dir, stages=table, grad_clip=0.0)
    curriculum = Curriculum(table, len(table))
    dataset = open_dataset(data_dir, curriculum.max_len)
    model, optimizers, loss_of, _ = set_up(config, curriculum.max_len, torch.device("cpu"), torch.float32)
    grads = []
    for optimizer in optimizers:
        optimizer.step = lambda: None  # every shape at the same weights
        optimizer.zero_grad = lambda: None
    for step, (seq_len, batch_size) in enumerate(SHAPES):
        model.zero_grad()
        windows = dataset.train.random_windows(seq_len, batch_size, config.seed, step)
        train_step(loss_of, model, optimizers, windows, 0.0, config, None, team)
        grads.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    return grads


def torchrun(count: int, *arguments: object) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    done = subprocess.run([*command, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)


def main(data_dir: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count in (1, 2, 3):
            torchrun(count, __file__, data_dir, folder / f"{count}.pt")
        grads = {count: torch.load(folder / f"{count}.pt", weights_only=True) for count in (1, 2, 3)}
        rows = []
        for stage, (seq_len, batch_size) in enumerate(SHAPES):
            one = grads[1][stage]
            worst = [max(((grads[count][stage][name] - one[name]).abs().max() / one[name].abs().max()).item()
                         for name in one) for count in (2, 3)]  # fmt: skip
            rows.append([f"{seq_len:,} x {batch_size}", *(f"{difference:.1e}" for difference in worst)])
        print(format_table(["shape", "2 processes", "3 processes"], rows), flush=True)

        # Batches that neither 2 nor 3 divide among them; fewer windows than processes at the end.
        table = ((0, 64, 21, 11.3), (8, 128, 10, 7.0), (16, 256, 8, 3.5), (24, 512, 2, 1.5))
        rows = []
        for optimizer in ("muon", "adamw"):
            losses = {}
            for count in (1, 2, 3):
                out_dir = folder / f"{optimizer}{count}"
                keys = MODEL | {"data_dir": data_dir, "out_dir": out_dir, "stages": table, "max_steps": 30,
                                "learning_rate": 6e-4, "warmup_steps": 200, "cooldown_steps": 0,
                                "optimizer": optimizer, "eval_tokens": 2_048, "log_interval": 1}  # fmt: skip
                torchrun(count, "train.py", "config/curriculum9.py", *(f"--{k}={v}" for k, v in keys.items()))
                records = map(json.loads, (out_dir / "log.jsonl").read_text().splitlines())
                losses[count] = [record.get("loss") or record.get("val_loss") for record in records]
            worst = [max(abs(a - b) for a, b in zip(losses[count], losses[1], strict=True)) for count in (2, 3)]
            rows.append([f"{optimizer}, {len(losses[1])} losses", *(f"{difference:.1e}" for difference in worst)])
        print("\n" + format_table(["30 steps", "2 processes", "3 processes"], rows))


if __name__ == "__main__":
    if "RANK" in os.environ:  # one of torchrun's processes
        with join_processes() as team:
            grads = gradients(sys.argv[1], team)
            if team.rank == 0:
                torch.save(grads, sys.argv[2])
    else:
        with user_errors():
            parser = CommandLine(description=__doc__.splitlines()[0])
            parser.add_argument("--data_dir", default="data/sample")
            main(parser.parse_args().data_dir)
