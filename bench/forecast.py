"""What to expect of a configuration at GPT-2 size before anyone has run it, next to what its plan expects.

    python bench/forecast.py [config/curriculum9.py config/sprint.py ...] [--tokens_per_s=130000]

A forecast, not a measurement. It starts from one published curve and adds what is known to differ, in nats per token,
each with its standard deviation. Perplexities are of validation at the stage's own length, as train.py and the plan
have them.

The curve   validation loss on FineWeb of a 124M model with rotary positions, QK-norm and Muon, windows of 1,024, a
            rate that is constant up to step 3,650 and then falls to 0 at 5,100, when the loss is 3.2760: the log
            8d6193f4 in records/track_1_short/2024-10-29_Optimizers of github.com/KellerJordan/modded-nanogpt. Fitted:
            loss = E + A * tokens^-b over its constant part from step 500 on, 262M to 1,835M tokens: below that it is
            extrapolated. Its batches are 32 times ours; for GPT-2 size and 2.5B tokens, batches of 1 and of 512 windows
            reach similar losses when tuned (Marek et al. 2025)
Its kin     the same with AdamW in Muon's place ends at 3.3406 (log 95a9fd44 beside it); with a plainer recipe AdamW
            needs 5.0B tokens for 3.276 (2024-06-06_AdamW), llm.c 10.3B for 3.272 (2024-10-13_llmc). A variant with
            further changes got 3.286 out of 0.92B tokens on one RTX 4090, at 130,000 to 140,000 tokens/s
            (huggingface.co/DevParker/NanoGPT-124m-In-A-Cave-With-A-Box-Of-Scraps)
Ours        is much like the curve's recipe, so perhaps nothing is to be added. Or one goes by nanoGPT's, which is
            llm.c's: with the table's lengths and a linear fall ours needs 0.38 of its tokens for its loss on small
            models (bench/RESULTS.md), and if it does at this size, 3.272 comes later than in the curve. The forecast is
            half way between the two. Nothing is added for having trained on other lengths: small models that have seen
            0.6M tokens do not say what that gains at this size
Length      of the windows that are scored: 0.10 ± 0.05 more for each halving below 1,024, and 0.03 ± 0.03 less at
            2,048. Both are chosen, for no figure was found
Wikipedia   no curve of such a model on Wikipedia was found. OpenAI's GPT-2 of this size has 3.29 on FineWeb-Edu
            (debtirthasaha.github.io/blog/2026/gpt2-124m) and 3.12 on OpenWebText; tuned on that, 2.85 (nanoGPT's
            README); tuned on WikiText-103, 2.99 (huggingface.co/Graphcore/gpt2-wikitext-103) or, in sliding windows,
            perplexity 14.84, so 2.70 (neulab/gpt2-finetuned-wikitext103 beside it). So Wikipedia is about as hard as
            OpenWebText, and that is easier than FineWeb by some 0.17
"""

import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import load_config  # noqa: E402
from curriculum import Curriculum, Stage, expected_ppl, format_table, learning_rate, short  # noqa: E402
from errors import CommandLine, user_errors  # noqa: E402

# The published curve: step of 524,288 tokens, and its validation loss.
CURVE = {500: 3.8996, 750: 3.7604, 1000: 3.6764, 1250: 3.6194, 1500: 3.5762, 1750: 3.5421, 2000: 3.5135, 2250: 3.4918,
         2500: 3.4738, 2750: 3.4559, 3000: 3.4424, 3250: 3.4269, 3500: 3.4145}  # fmt: skip
END = (5100, 3.2760)
NANOGPT = (10_300, 3.272)  # what llm.c needs, in millions of tokens, for what loss
RATIO = 0.38  # of nanoGPT's tokens that ours, falling linearly, needs for its final loss: bench/RESULTS.md, "nanogpt"

WIKIPEDIA = (-0.2, 0.2)  # against FineWeb; see above
LENGTH = (0.1, 0.05)  # for each halving of the window below 1,024: chosen, no figure was found
LONGER = (-0.03, 0.03)  # 2,048 against 1,024: chosen, no figure was found


def fit(tokens: np.ndarray, losses: np.ndarray, floors: np.ndarray) -> tuple[float, float, float]:
    """(E, A, b) of E + A * tokens^-b: least squares in log(loss - E) for each floor E, and the floor that fits best."""

    def error(e: float) -> tuple[float, tuple[float, float, float]]:
        slope, start = np.polyfit(np.log(tokens), np.log(losses - e), 1)
        law = (float(e), float(np.exp(start)), float(-slope))
        return float(np.square(losses - predict(law, tokens)).sum()), law

    return min(error(e) for e in floors)[1]


def predict(law: tuple[float, float, float], tokens: np.ndarray | float) -> np.ndarray | float:
    return law[0] + law[1] * tokens ** -law[2]


TOKENS, LOSSES = np.array(list(CURVE)) * 0.524288, np.array(list(CURVE.values()))  # in millions
LAW = fit(TOKENS, LOSSES, np.arange(2.5, 3.4, 0.01))
ASKEW = [fit(TOKENS, LOSSES, np.array([LAW[0] + off])) for off in (-0.1, 0.1)]  # floors that the curve hardly excludes
FALL = END[1] - predict(LAW, END[0] * 0.524288)  # what the rate's fall to 0 is worth
BY_RATIO = NANOGPT[1] - predict(LAW, RATIO * NANOGPT[0]) - FALL  # how far above the curve ours is, by nanoGPT's recipe
OURS = (BY_RATIO / 2, 0.05)  # the deviation is chosen: no less than that between the two ways


def forecast(stage: Stage, tokens: float, fallen: float) -> tuple[float, float]:
    """Validation loss in nats and its standard deviation: at this stage, after so many tokens, with a learning rate
    that has fallen by the share `fallen` from its peak."""
    millions = tokens / 1e6
    halvings = math.log2(1024 / stage.seq_len)
    length = [part * halvings for part in LENGTH] if halvings > 0 else [part * -halvings for part in LONGER]
    mean = predict(LAW, millions) + WIKIPEDIA[0] + length[0] + FALL * fallen + OURS[0]
    low, high = (predict(law, millions) for law in ASKEW)
    return mean, math.hypot((high - low) / 2, WIKIPEDIA[1], length[1], FALL / 2 * fallen, OURS[1])


def rows_of(argv: list[str], tokens_per_s: float) -> list[list[str]]:
    """A row for each step of the configuration's plan, or where it has none for the end of each of its stages."""
    config = load_config(argv)
    curriculum = Curriculum(config.stages, config.max_steps)
    steps = [step for step, _ in config.plan_ppl if step <= config.max_steps]
    rows = []
    for step in steps or [stage.end for stage in curriculum.stages]:
        stage = curriculum.at(step - 1)
        tokens = curriculum.tokens_before(step)
        peak = max(stage.lr_scale for stage in curriculum.stages if stage.start < step) * config.learning_rate
        fallen = max(0.0, 1 - learning_rate(config, stage, step - 1) / peak)
        loss, deviation = forecast(stage, tokens, fallen)
        plan = expected_ppl(config.plan_ppl, step)
        chance = 0.5 * math.erfc((loss - math.log(plan or 25)) / deviation / math.sqrt(2))
        rows.append([f"{step:,}", f"{stage.seq_len:,}", short(tokens), f"{tokens / tokens_per_s / 3600:.2f}",
                     f"{loss:.2f} ± {deviation:.2f}", f"{math.exp(loss):.1f}",
                     f"{math.exp(loss - deviation):.1f} to {math.exp(loss + deviation):.1f}",
                     f"{plan:,.0f}" if plan else "", f"{chance:.0%}"])  # fmt: skip
    return rows


def main() -> None:
    parser = CommandLine(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="*", default=["config/curriculum9.py", "config/sprint.py"])
    parser.add_argument("--tokens_per_s", type=float, default=130_000)
    args = parser.parse_args()
    e, a, b = LAW
    print(f"{e:.2f} + {a:.2f} * (tokens / 1M)^-{b:.3f} on FineWeb; Wikipedia {WIKIPEDIA[0]:+.2f}; the rate's fall to 0 "
          f"{FALL:+.3f}; ours {OURS[0]:+.3f}. A range holds two cases in three.")  # fmt: skip
    header = ["\nstep", "\nlength", "\ntokens", f"hours at\n{args.tokens_per_s:,.0f}/s", "\nloss", "\nppl", "\nrange",
              "\nplan", "chance of plan\n(or of 25)"]  # fmt: skip
    for config in args.configs:
        print(f"\n{config}, a forecast:\n" + format_table(header, rows_of([config], args.tokens_per_s)))
    last = Stage(0, 1, 2048, 8, 0.0)
    grid = np.arange(50e6, 20e9, 1e6)
    mean, deviation = np.vectorize(lambda tokens: forecast(last, tokens, 1.0))(grid)
    least, middle, most = (short(grid[np.argmax(mean + k * deviation < math.log(25))]) for k in (-1, 0, 1))
    hour = int(np.searchsorted(grid, 3600 * args.tokens_per_s))
    low, ppl, high = (math.exp(mean[hour] + k * deviation[hour]) for k in (-1, 0, 1))
    print("\nWith a rate that has fallen to nearly 0, at length 2,048:")
    print(f"perplexity 25 takes {middle} tokens ({least} to {most})")
    print(f"an hour's {short(grid[hour])} tokens give perplexity {ppl:.1f} ({low:.1f} to {high:.1f})")


if __name__ == "__main__":
    with user_errors():
        main()
