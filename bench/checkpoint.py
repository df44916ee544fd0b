"""What a checkpoint costs: seconds per GB to save and to load one, and the share of a run's time that saving takes.

    python bench/checkpoint.py [--to=FOLDER] [--tokens_per_s=130000]

A model of GPT-2's size with the moments of each optimizer, five times. The share is of a run at so many tokens/s, with
the tokens of config/curriculum9.py's steps and the default checkpoint_interval. FOLDER decides: a disk differs from
the memory that /tmp may be.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from config import Config, curriculum9  # noqa: E402
from curriculum import Curriculum, format_table  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from train import make_optimizers  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--to", default=".")
    parser.add_argument("--tokens_per_s", type=float, default=130_000)
    args = parser.parse_args()
    curriculum = Curriculum(curriculum9.stages, curriculum9.max_steps)
    tokens_per_step = curriculum.tokens_before(curriculum.max_steps) / curriculum.max_steps
    between = Config().checkpoint_interval * tokens_per_step / args.tokens_per_s
    rows = []
    for name in ("muon", "adamw"):
        model = GPT(GPTConfig(), 64)
        model.init_weights(0)
        optimizers = make_optimizers(model, Config(optimizer=name))
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight)
        for optimizer in optimizers:
            optimizer.step()  # makes the moments
        state = {"config": {}, "step": 0, "model": model.state_dict()}
        state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
        with tempfile.TemporaryDirectory(dir=args.to) as folder:
            path, saves, loads = Path(folder) / "last.pt", [], []
            for _ in range(5):
                started = time.perf_counter()
                save_checkpoint(path, state)
                saves.append(time.perf_counter() - started)
            for _ in range(2):
                started = time.perf_counter()
                load_checkpoint(path)
                loads.append(time.perf_counter() - started)
            gb = path.stat().st_size / 1e9
        save, slowest = statistics.median(saves), max(saves)
        rows.append([name, f"{gb:.2f}", f"{save:.1f}", f"{slowest:.1f}", f"{save / gb:.2f}", f"{min(loads) / gb:.2f}",
                     f"{save / (save + between):.1%}", f"{slowest / (slowest + between):.1%}"])  # fmt: skip
    header = ["\noptimizer", "\nGB", "save s\nmedian", "\nslowest", "save\ns/GB", "load\ns/GB"]
    header += ["share\nmedian", "\nslowest"]
    print(f"{between:.0f} s between two checkpoints at {args.tokens_per_s:,.0f} tokens/s\n")
    print(format_table(header, rows))


if __name__ == "__main__":
    main()
