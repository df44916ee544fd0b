"""The curriculum: the stage table and what follows from it. As a program, print what a run takes at --speed tokens/s:

    python curriculum.py config/curriculum9.py [--data_dir=data/wiki] [--speed=130000]
"""

import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import open_dataset
from model import GPTConfig
from settings import Config, UserError, load_config, user_errors

# Dense bf16 tensor-core peaks with float32 accumulation in FLOP/s, from the datasheets. The keys are torch's names.
PEAK_FLOPS = {"NVIDIA GeForce RTX 3090": 71e12, "NVIDIA GeForce RTX 4090": 165.2e12, "NVIDIA A100-SXM4-40GB": 312e12,
              "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H200": 989.4e12}  # fmt: skip


class Stage(NamedTuple):
    """One row of the table, and the step at which it ends."""

    number: int  # from 1
    start: int  # first step
    end: int  # one past its last step
    seq_len: int  # tokens of a window
    batch_size: int  # windows of an optimizer step, over all processes
    lr_scale: float

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def tokens(self) -> int:
        return (self.end - self.start) * self.tokens_per_step


class Curriculum:
    """The stages that a run of max_steps reaches. Raises UserError for an invalid table."""

    def __init__(self, rows: tuple, max_steps: int):
        for number, row in enumerate(rows, 1):
            typed = isinstance(row, tuple) and list(map(type, row)) in ([int] * 4, [int, int, int, float])
            if not (typed and row[1] > 0 and row[2] > 0 and 0 < row[3] < math.inf):
                raise UserError(f"stages, row {number}: {row!r} is not (step, seq_len, batch_size, lr_scale), positive")
        starts = [row[0] for row in rows]
        if starts[:1] != [0] or starts != sorted(set(starts)):
            raise UserError(f"stages: the steps of its rows must ascend from 0, and are {starts}")
        self.max_len = max(row[1] for row in rows)
        self.max_tokens = max(row[1] * row[2] for row in rows)  # of a step: train.py's cap for micro_batch_tokens
        self.last_len = rows[-1][1]  # scored at every evaluation, reached or not, to compare stages
        ends = [*starts[1:], max_steps]
        self.stages = [Stage(number, row[0], min(end, max_steps), *row[1:])
                       for number, (row, end) in enumerate(zip(rows, ends), 1) if row[0] < max_steps]  # fmt: skip
        self.ends = {stage.end for stage in self.stages}

    def at(self, step: int) -> Stage:
        """Return the stage that trains step `step` (0 is the first)."""
        return next(stage for stage in reversed(self.stages) if stage.start <= step)

    def tokens_before(self, step: int) -> int:
        """Return the tokens trained on after `step` steps."""
        return sum(max(0, min(step, s.end) - s.start) * s.tokens_per_step for s in self.stages)


def learning_rate(config: Config, stage: Stage, step: int) -> float:
    """Return a step's learning rate. It rises from 0 over warmup_steps and falls to 0 over the last cooldown_steps."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    cooldown = min(1.0, (config.max_steps - step) / config.cooldown_steps) if config.cooldown_steps else 1.0
    return config.learning_rate * stage.lr_scale * warmup * cooldown


def expected_ppl(plan_ppl: tuple, step: int) -> float | None:
    """Return the plan's perplexity after `step` steps, None before its first point; linear in logs between points."""
    if not plan_ppl or step < plan_ppl[0][0]:
        return None
    steps, ppls = np.log(np.array(plan_ppl, dtype=float)).T
    return float(np.exp(np.interp(math.log(step), steps, ppls)))


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """Return a table with right-aligned columns. A header may have several lines."""
    lines = [list(line) for line in zip(*(column.split("\n") for column in header))] + rows
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines)


def print_plan(config: Config, corpus: str, articles: int, tokens: int, speed: int | None) -> None:
    """Print a run's plan per stage, per phase and in all, for a corpus of these training articles and tokens."""
    curriculum, last = Curriculum(config.stages, config.max_steps), config.stages[-1]
    model = GPTConfig(config.n_layer, config.n_head, config.n_embd)

    def row(name: str, stages: list[Stage], *shape: str, ppl: float | None = None) -> list[str]:
        trained, flops = sum(s.tokens for s in stages), sum(s.tokens * model.flops_per_token(s.seq_len) for s in stages)
        seconds = trained / speed if speed else flops / (0.15 * PEAK_FLOPS["NVIDIA GeForce RTX 4090"])
        return [name, f"{stages[0].start:,}-{stages[-1].end:,}", *(shape or [""] * 5),
                f"{sum(s.tokens // s.seq_len for s in stages):,}", f"{trained:,}", f"{trained / tokens:.3f}",
                f"{flops:.2e}", f"{ppl:,.0f}" if ppl else "-", f"{seconds / 3600:,.3g}"]  # fmt: skip

    rows = [row(str(s.number), [s], f"{s.seq_len:,}", f"{s.batch_size}", f"{config.learning_rate * s.lr_scale:.2g}",
                f"{tokens / articles / s.seq_len:.1f}", f"{tokens / s.tokens_per_step:,.0f}",
                ppl=expected_ppl(config.plan_ppl, s.end)) for s in curriculum.stages]  # fmt: skip
    for name, end in (*config.phases, ("in all", config.max_steps)):
        if end <= config.max_steps:
            rows.append(row(name, Curriculum(config.stages, end).stages, ppl=expected_ppl(config.plan_ppl, end)))
    steps = max(1, round(curriculum.tokens_before(config.max_steps) / (last[1] * last[2])))
    throughout = [Stage(0, 0, steps, last[1], last[2], 1.0)]  # the same tokens in windows of the last length
    rows.append(row(f"all at {last[1]:,}", throughout))
    header = ["\nstage", "\nsteps", "\nlength", "\nbatch", "learning\nrate", "windows/\narticle", "steps/\nepoch",
              "\nexamples", "\ntokens", "\nepochs", "\nFLOPs", "expected\nppl", "\nhours"]  # fmt: skip
    seen = sum(s.tokens // s.seq_len for s in curriculum.stages)
    at = f"{speed:,} tokens/s" if speed else "15% of an RTX 4090's peak"
    print(f"{config.max_steps:,} steps of a GPT with {model.n_params / 1e6:,.1f}M parameters on {corpus}:\n"
          f"{articles:,} training articles, {tokens:,} tokens. Hours at {at}.\n\n{format_table(header, rows)}\n\n"
          f"The curriculum sees {seen / (steps * last[2]):.2f}x as many examples as windows of {last[1]:,} throughout.")
    for row in config.stages[len(curriculum.stages) :]:
        print(f"Never reached with max_steps={config.max_steps}: {row}")


def main() -> None:
    argv = [argument for argument in sys.argv[1:] if not argument.startswith("--speed=")]
    config = load_config(argv)
    speeds = [text.removeprefix("--speed=") for text in sys.argv[1:] if text not in argv]
    if not all(text.isdecimal() and int(text) for text in speeds):
        raise UserError(f"--speed={speeds[-1]} is not a whole number of tokens/s")
    corpus, counts = "the plan's corpus", {"articles": 225_870, "tokens": 874_000_000}  # training articles only
    if any(argument.startswith("--data_dir=") for argument in argv) or (Path(config.data_dir) / "meta.json").exists():
        corpus = config.data_dir
        counts = open_dataset(corpus, Curriculum(config.stages, config.max_steps).max_len).meta["splits"]["train"]
    print_plan(config, corpus, counts["articles"], counts["tokens"], int(speeds[-1]) if speeds else None)


if __name__ == "__main__":
    with user_errors():
        main()
