"""Tokens/s of sampling at a length, one text at a time: with the cache, without it, and by transformers' generate.

    python bench/sampling.py [--length=1000] [--tokens=32] [--rounds=5] [--device=cpu]

Random weights, of the demo's size and of GPT-2's, in each type of matrix products, all greedily. transformers opens
what export.py writes. Without the cache: the whole text for each token, once with the logits of all its tokens, as
training computes them, and once with those of the last alone. In each round all take turns, so that a busy machine is
busy for all of them. A round's time is its median over the tokens, the prompt left out; printed are the median round,
and the median, least and most of the rounds' ratios.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.generation.streamers import BaseStreamer  # noqa: E402
from transformers.utils import logging  # noqa: E402

from curriculum import format_table  # noqa: E402
from dataset import ENDOFTEXT  # noqa: E402
from errors import CommandLine, user_errors  # noqa: E402
from export import write_model  # noqa: E402
from model import GPT, GPTConfig, project  # noqa: E402
from sample import draw, generate, hold_in  # noqa: E402
from train import pick_device  # noqa: E402

SIZES = {"demo": GPTConfig(n_layer=4, n_head=3, n_embd=192), "GPT-2": GPTConfig()}


class Clock(BaseStreamer):
    """Hears from transformers' generate of each token: first of the prompt, then of those it makes."""

    def __init__(self):
        self.times = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def greedy(logits: torch.Tensor) -> torch.Tensor:
    return draw(logits, temperature=0, top_k=0, top_p=1, generator=None)


def measure(config: GPTConfig, dtype: torch.dtype, device: torch.device, length: int, n: int, rounds: int) -> dict:
    """Seconds per token of each way to sample, a number per round."""
    model = GPT(config, length + n).eval()
    model.init_weights(0)
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), model)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    theirs.generation_config.eos_token_id = None
    autocast = hold_in(dtype, model.to(device))
    text = torch.randint(ENDOFTEXT, (1, length), device=device)
    prompt = text[:, : length - n // 2]

    def with_cache() -> list[float]:
        with autocast:
            return [time.perf_counter() for _ in generate(model, prompt[0].tolist(), n, 1, greedy)]

    def without_cache(logits: Callable[[], torch.Tensor]) -> list[float]:
        times = [time.perf_counter()]
        for _ in range(max(1, n // 16)):
            with autocast, torch.no_grad():
                greedy(logits()).tolist()
            times.append(time.perf_counter())
        return times

    def transformers() -> list[float]:
        clock = Clock()
        theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n, do_sample=False,
                        streamer=clock)  # fmt: skip
        return clock.times[1:]

    ways = {
        "with the cache": with_cache,
        "without": lambda: without_cache(lambda: model(text)[:, -1]),
        "without, last logits": lambda: without_cache(lambda: project(model.hidden(text)[:, -1], model.embed.weight)),
        "transformers": transformers,
    }
    seconds = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times = way()
            seconds[name].append(statistics.median(after - before for before, after in zip(times, times[1:])))
    return seconds


def main() -> None:
    parser = CommandLine(description="Tokens/s of sampling, with the cache, without it, and by transformers.")
    parser.add_argument("--length", type=int, default=1000, help="tokens of the text halfway")
    parser.add_argument("--tokens", type=int, default=32, help="made in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = pick_device(args.device)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(f"Greedy, one text, around {args.length:,} tokens, {device}, {torch.get_num_threads()} threads, "
          f"{args.rounds} rounds of {args.tokens} tokens:")  # fmt: skip
    rows = []
    for size, config in SIZES.items():
        for dtype in (torch.bfloat16, torch.float32):
            seconds = measure(config, dtype, device, args.length, args.tokens, args.rounds)
            for name, times in seconds.items():
                ratios = [time / cached for time, cached in zip(times, seconds["with the cache"])]
                times_slower = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                rows.append([size, str(dtype).removeprefix("torch."), name, f"{1 / statistics.median(times):,.1f}",
                             "" if name == "with the cache" else times_slower])  # fmt: skip
    print(format_table(["\nmodel", "\ntype", "\nway", "\ntokens/s", "with the cache is\nso many times as fast"], rows))


if __name__ == "__main__":
    with user_errors():
        main()
