"""The curriculum: the stage table, and what it implies.

    config.stages -> Curriculum       the checked rows: stage and tokens at a step
                  -> learning_rate    at a step
                  -> scale_table, at_length: other tables of the same curriculum
                  -> print_plan       `python curriculum.py config/curriculum9.py [--data_dir=...] [--speed=...]`:
                                      what a run comes to, before anyone pays for it

Everything above the plan is a pure function of the configuration. The windows that a stage trains on are dataset.py's.
"""

import bisect
import itertools
import math
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from config import Config, load_config
from dataset import open_dataset
from errors import UserError, user_errors
from model import GPTConfig

# The corpus that the table was planned for; the plan is printed for it if no --data_dir is given.
PLANNED_ARTICLES, PLANNED_TOKENS = 225_870, 874_000_000  # to train on, without the 5 % held out

# Dense bf16 tensor-core peaks with float32 accumulation, FLOP/s, from the makers' datasheets (NVIDIA Ada and Ampere
# GA102 architecture whitepapers, A100 and H100/H200 SXM datasheets).
PEAK_FLOPS = {"RTX 3090": 71e12, "RTX 4090": 165.2e12, "A100": 312e12, "H100": 989.4e12, "H200": 989.4e12}


class Stage(NamedTuple):
    """One row of the table, with where it ends."""

    start: int  # first step
    end: int  # one past its last step
    seq_len: int  # tokens of a window
    batch_size: int  # windows of an optimizer step, over all processes
    lr_scale: float

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def examples(self) -> int:
        return (self.end - self.start) * self.batch_size

    @property
    def tokens(self) -> int:
        return (self.end - self.start) * self.tokens_per_step


class Curriculum:
    """The rows that a run of max_steps reaches.

    rows: (from step, seq_len, batch_size, lr_scale), as in a configuration. Raises UserError for a table that makes
    no sense: no row, a row that is no such four numbers, a first row that is not at step 0, steps that do not
    ascend, a length, batch or factor that is not positive.
    """

    def __init__(self, rows: tuple, max_steps: int):
        if not rows:
            raise UserError("stages is empty: the configuration gives no curriculum")
        if max_steps < 1:
            raise UserError(f"max_steps={max_steps}: there must be at least one step")
        for number, row in enumerate(rows, 1):
            if not (isinstance(row, tuple) and len(row) == 4 and [type(x) for x in row[:3]] == [int] * 3
                    and type(row[3]) in (int, float)):  # fmt: skip
                raise UserError(f"stages, row {number}: {row!r} is not (step, seq_len, batch_size, lr_scale)")
            if not (row[1] > 0 and row[2] > 0 and 0 < row[3] < 1e300):
                raise UserError(f"stages, row {number}: {row!r}: length, batch and factor must be positive")
        starts = [row[0] for row in rows]
        if starts[0] != 0:
            raise UserError(f"stages, row 1: {rows[0]!r} must start at step 0")
        for number, (before, start) in enumerate(itertools.pairwise(starts), 2):
            if start <= before:
                raise UserError(f"stages, row {number}: {rows[number - 1]!r} must start after step {before:,}")
        self.rows = rows
        self.max_steps = max_steps
        ends = [*starts[1:], math.inf]
        stages = [Stage(row[0], min(end, max_steps), *row[1:]) for row, end in zip(rows, ends)]
        self.stages = [stage for stage in stages if stage.start < max_steps]

    @property
    def last_len(self) -> int:
        """The length of the table's last row, reached or not: what the cross-stage curve is scored at."""
        return self.rows[-1][1]

    @property
    def max_len(self) -> int:
        return max(row[1] for row in self.rows)

    def index(self, step: int) -> int:
        """Number, from 0, of the stage that trains step `step` (0 is the first)."""
        return bisect.bisect_right([stage.start for stage in self.stages], step) - 1

    def at(self, step: int) -> Stage:
        return self.stages[self.index(step)]

    def tokens_before(self, step: int) -> int:
        """Tokens trained on when `step` steps are done."""
        return sum(max(0, min(step, s.end) - s.start) * s.tokens_per_step for s in self.stages)

    def ends_stage(self, step: int) -> bool:
        """Whether a stage is over when `step` steps are done."""
        return any(step == stage.end for stage in self.stages)


def learning_rate(config: Config, stage: Stage, step: int) -> float:
    """config.learning_rate times the stage's factor; warmup_steps rise to it from 0, cooldown_steps fall to 0."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    cooldown = min(1.0, (config.max_steps - step) / config.cooldown_steps) if config.cooldown_steps else 1.0
    return config.learning_rate * stage.lr_scale * warmup * cooldown


def expected_ppl(plan_ppl: tuple, step: int) -> float | None:
    """What the plan expects of validation perplexity after `step` steps.

    Linear in log(step) and log(perplexity) between the plan's points, constant after the last; None before the first
    and where there are no points.
    """
    if not plan_ppl or step < plan_ppl[0][0]:
        return None
    steps, ppls = np.log(np.array(plan_ppl, dtype=float)).T
    return float(np.exp(np.interp(math.log(step), steps, ppls)))


def scale_table(rows: tuple, steps: float, tokens: float) -> tuple:
    """The same curriculum, smaller: the steps of each row times `steps`, the windows of its batches times `tokens`.

    Lengths and factors stay; a batch keeps at least one window.
    """
    return tuple((round(step * steps), length, max(1, round(batch * tokens)), lr) for step, length, batch, lr in rows)


def at_length(rows: tuple, max_steps: int, seq_len: int, batch_size: int) -> tuple[tuple, int]:
    """The same tokens and learning rates in batches of one size: rows that start where the tokens do, and max_steps."""
    curriculum = Curriculum(rows, max_steps)
    ends = [round(curriculum.tokens_before(stage.end) / (seq_len * batch_size)) for stage in curriculum.stages]
    stages = zip([0, *ends], curriculum.stages)
    return tuple((step, seq_len, batch_size, stage.lr_scale) for step, stage in stages), ends[-1]


# --------------------------------------------------------------------------------------------------------------------
# The plan


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """Columns aligned to the right; a header may have several lines."""
    lines = [list(line) for line in zip(*(column.split("\n") for column in header))] + rows
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines)


def short(count: float) -> str:
    """32.8M for 32,768,000."""
    return f"{count / 1e6:,.1f}M" if count >= 1e6 else f"{count / 1e3:,.1f}k"


def print_plan(config: Config, corpus: str, articles: int, tokens: int, speed: str) -> None:
    """The run per stage, per phase and in all, over a corpus of so many training articles and tokens.

    speed: "130000" (tokens/s), or "RTX 4090 at 0.15" (a GPU of PEAK_FLOPS and the share of its peak that is used).
    """
    curriculum = Curriculum(config.stages, config.max_steps)
    model = GPTConfig(config.n_layer, config.n_head, config.n_embd)
    hours_of = parse_speed(speed)

    def so_far(step: int) -> tuple[int, int, float, float]:
        """Examples, tokens, FLOPs and hours of the first `step` steps."""
        stages = Curriculum(config.stages, step).stages
        trained, flops = sum(s.tokens for s in stages), sum(s.tokens * model.flops_per_token(s.seq_len) for s in stages)
        return sum(s.examples for s in stages), trained, flops, hours_of(trained, flops)

    def ppl(step: int) -> str:
        expected = expected_ppl(config.plan_ppl, step)
        return f"{expected:,.0f}" if expected else "-"

    print(f"{curriculum.max_steps:,} steps of a GPT with {short(model.n_params)} parameters on {corpus}:")
    at = f"on an {speed} of its peak" if " at " in speed else f"at {speed} tokens/s"
    print(f"{articles:,} training articles, {short(tokens)} tokens. Hours {at}.\n")
    header = ["\n", "\nsteps", "\nlength", "\nbatch", "learning\nrate", "windows/\narticle", "steps/\nepoch"]
    header += ["\nexamples", "\ntokens", "\nepochs", "\nFLOPs", "expected\nppl", "\nhours"]
    rows = []
    for number, stage in enumerate(curriculum.stages, 1):
        flops = stage.tokens * model.flops_per_token(stage.seq_len)
        rows.append([f"{number}", f"{stage.start:,}-{stage.end:,}", f"{stage.seq_len:,}", f"{stage.batch_size}",
                     f"{config.learning_rate * stage.lr_scale:.2g}", f"{tokens / articles / stage.seq_len:.1f}",
                     f"{tokens / stage.tokens_per_step:,.0f}", f"{stage.examples:,}", short(stage.tokens),
                     f"{stage.tokens / tokens:.3f}", f"{flops:.1e}", ppl(stage.end),
                     f"{hours_of(stage.tokens, flops):,.3g}"])  # fmt: skip
    print(format_table(header, rows))
    for row in curriculum.rows[len(curriculum.stages) :]:
        print(f"Never reached with max_steps={curriculum.max_steps}: {row}")
    if config.phases:
        rows = []
        for name, end in config.phases:
            if end > curriculum.max_steps:
                print(f"Never finished with max_steps={curriculum.max_steps}: {name}, to step {end:,}")
                continue
            examples, trained, _, hours = so_far(end)
            rows.append([name, f"{end:,}", f"{hours:,.3g}", f"{examples:,}", short(trained), ppl(end)])
        print("\n" + format_table(["phase", "to step", "hours", "examples", "tokens", "expected ppl"], rows))
    examples, trained, flops, hours = so_far(curriculum.max_steps)
    last = curriculum.last_len
    print(f"\nIn all {examples:,} examples, {short(trained)} tokens ({trained / tokens:.2f} epochs), "
          f"{flops:.2e} FLOPs, {hours:,.3g} hours.")  # fmt: skip
    same_flops = trained * model.flops_per_token(last)
    print(f"The same tokens in windows of {last:,} throughout: {trained / last:,.0f} examples, {same_flops:.2e} FLOPs, "
          f"{hours_of(trained, same_flops):,.3g} hours.")  # fmt: skip
    print(f"The curriculum sees {examples * last / trained:.2f}x as many examples.")


def parse_speed(speed: str) -> Callable[[float, float], float]:
    """"130000" or "RTX 4090 at 0.15" as a function of tokens and FLOPs that gives hours."""
    gpu, at, share = speed.partition(" at ")
    try:
        if not at:
            tokens_per_s = float(speed)
            if tokens_per_s > 0:
                return lambda tokens, flops: tokens / tokens_per_s / 3600
        elif 0 < float(share) <= 1 and gpu in PEAK_FLOPS:
            return lambda tokens, flops: flops / (PEAK_FLOPS[gpu] * float(share)) / 3600
    except ValueError:
        pass
    raise UserError(f"--speed={speed} is neither tokens/s nor GPU at SHARE, GPU being one of {', '.join(PEAK_FLOPS)}")


def main() -> None:
    speeds = [argument.removeprefix("--speed=") for argument in sys.argv if argument.startswith("--speed=")]
    speed = ["RTX 4090 at 0.15", *speeds][-1]  # the plan's, if none is given
    argv = [argument for argument in sys.argv[1:] if not argument.startswith("--speed=")]
    config = load_config(argv)
    if any(argument.startswith("--data_dir=") for argument in argv):
        dataset = open_dataset(config.data_dir, Curriculum(config.stages, config.max_steps).max_len)
        corpus, counts = config.data_dir, dataset.meta["splits"]["train"]
        articles, tokens = counts["articles"], counts["tokens"]
    else:
        corpus = "the plan's corpus"
        articles, tokens = PLANNED_ARTICLES, PLANNED_TOKENS
    print_plan(config, corpus, articles, tokens, speed)


if __name__ == "__main__":
    with user_errors():
        main()
