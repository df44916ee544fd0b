"""How the cost of training grows: with the window's length, the model's size, and the tokens of a step.

    python bench/growth.py [--device=cpu] [--rounds 5] [--burst 3]

One table each, of train.py's own step, compiled. The sizes of a table take turns, each in a process of its own, so that
a machine that slows down slows them all. Fitted: the exponent of the time per token (or per step) over what grows.
"""

import argparse
import statistics
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from throughput import Player, spread

SMALL = {"n_layer": 4, "n_head": 4, "n_embd": 256}
MODELS = [{"n_layer": 2, "n_head": 2, "n_embd": 128}, SMALL, {"n_layer": 8, "n_head": 8, "n_embd": 512},
          {"n_layer": 12, "n_head": 12, "n_embd": 768}]  # fmt: skip


def take_turns(args: argparse.Namespace, shapes: list[dict]) -> list[list[float]]:
    """Seconds per step of each shape (a model, length and batch), one for each round."""
    players = []
    for shape in shapes:
        known = vars(args) | shape
        flags = [f"--{key}={known[key]}" for key in ("n_layer", "n_head", "n_embd", "device", "data_dir")]
        players.append(Player("ours", flags, shape["length"], shape["batch"]))
    for player in players:
        player.read()
        player.turn(args.burst)
    seconds = [[] for _ in players]
    for _ in range(args.rounds):
        for player, mine in zip(players, seconds):
            mine.append(player.turn(args.burst))
    for player in players:
        player.end()
    return seconds


def exponent(sizes: list[float], seconds: list[list[float]]) -> str:
    """The slope of log(seconds) over log(size), fitted to each round: the median, the least and the most."""
    slopes = [np.polyfit(np.log(sizes), np.log(one_round), 1)[0] for one_round in zip(*seconds)]
    return spread(slopes, ".2f")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--data_dir", default="data/sample")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--burst", type=int, default=3)
    args = parser.parse_args()
    args.data_dir = str(Path(args.data_dir).resolve())

    from curriculum import format_table
    from model import GPTConfig

    def print_table(title: str, shapes: list[dict], sizes: list[float], per_token: bool) -> None:
        seconds = take_turns(args, shapes)
        rows = []
        for shape, mine in zip(shapes, seconds):
            model = GPTConfig(shape["n_layer"], shape["n_head"], shape["n_embd"])
            tokens, middle = shape["length"] * shape["batch"], statistics.median(mine)
            rate = model.flops_per_token(shape["length"]) * tokens / middle / 1e12
            rows.append([f"{model.n_params / 1e6:.1f}M", f"{shape['length']:,}", f"{shape['batch']}", f"{tokens:,}",
                         spread([tokens / s for s in mine], ",.0f"), f"{rate:.2f}"])
        print(f"{title}\n" + format_table(["parameters", "length", "batch", "tokens", "tokens/s", "TFLOP/s"], rows))
        what = [[s / shape["length"] / shape["batch"] for s in mine] for shape, mine in zip(shapes, seconds)]
        fitted = exponent(sizes, what if per_token else seconds)
        print(f"exponent of the time a {'token' if per_token else 'step'}: {fitted}\n", flush=True)

    lengths = [64 * 2**i for i in range(8)]
    print_table("Windows of 64 to 8,192, 8,192 tokens a step",
                [SMALL | {"length": length, "batch": 8192 // length} for length in lengths], lengths, True)
    sizes = [GPTConfig(*model.values()).n_params for model in MODELS]
    print_table("Models, 2,048 tokens a step", [model | {"length": 512, "batch": 4} for model in MODELS], sizes, True)
    batches = [2, 4, 8, 16, 32, 64]
    print_table("Tokens of a step", [SMALL | {"length": 256, "batch": batch} for batch in batches],
                [256 * batch for batch in batches], False)


if __name__ == "__main__":
    main()
