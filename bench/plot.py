"""One picture of a run, or of several over each other, from their logs; also while they still go.

    python bench/plot.py out/a [out/b ...] [--x=tokens|time|flops|step] [--to=FILE.png]

large panel    training and validation loss, with perplexity on the right; validation loss at the table's last length,
               which alone compares across stages; what the plan expects; the stages, named by their window lengths
small panels   validation minus training loss, learning rate, tokens/s

Writes out/a/loss.png for one run and ./loss.png for several, unless --to says otherwise, and prints the path. With
several runs, the stages and the plan are those of the first.
"""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from errors import CommandLine, UserError, user_errors  # noqa: E402

# --------------------------------------------------------------------------------------------------------------------
# A log as arrays

COMMON = ("step", "stage", "seq_len", "time_s")
KEYS = {
    "train": (*COMMON, "batch_size", "lr", "loss", "tokens", "tokens_per_s"),
    "eval": (*COMMON, "val_loss", "gap", "last_len_loss", "plan_ppl"),
}


class Run(NamedTuple):
    """The KEYS of a log's training records and evaluations, each a float64 array; null is NaN."""

    name: str
    train: dict[str, np.ndarray]
    evals: dict[str, np.ndarray]
    flops_per_token: Callable | None = None  # by seq_len; only FLOPs need it

    def both(self, key: str) -> np.ndarray:
        return np.append(self.train[key], self.evals[key])


def read_run(out_dir: Path) -> Run:
    """The run that out_dir/log.jsonl tells of; a last line that is still being written does not count.

    Raises UserError if there is no log, no training in it yet, or a line that is no record.
    """
    path = out_dir / "log.jsonl"
    if not path.is_file():
        raise UserError(f"{path} does not exist: {out_dir} is not the out_dir of a run")
    lines = path.read_bytes().splitlines()
    rows = {"train": [], "eval": []}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if record["event"] != "skip":
                rows[record["event"]].append([record[key] for key in KEYS[record["event"]]])
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):
                raise UserError(f"{path}, line {number} is not a record of a log: {error!r}") from error
    if not rows["train"]:
        raise UserError(f"{path} holds no records of training yet")
    columns = [np.array(rows[event], float).reshape(-1, len(keys)).T for event, keys in KEYS.items()]
    return Run(str(out_dir), *(dict(zip(keys, arrays)) for keys, arrays in zip(KEYS.values(), columns)))


def run_config(out_dir: Path) -> dict:
    """The configuration of the run, from a checkpoint in out_dir. Raises UserError if there is none yet."""
    from checkpoint import load_checkpoint  # imports torch: seconds that only FLOPs and configurations are worth

    for path in (out_dir / "last.pt", out_dir / "best.pt"):
        if path.exists():
            return load_checkpoint(path)["config"]
    raise UserError(f"a run's configuration is in its checkpoint, and {out_dir} has no last.pt or best.pt")


def flops_per_token(config: dict) -> Callable:
    """FLOPs to train on a token, by seq_len, of the model that a configuration describes."""
    from model import GPTConfig

    return GPTConfig(config["n_layer"], config["n_head"], config["n_embd"]).flops_per_token


def x_at(run: Run, steps: np.ndarray, x: str) -> np.ndarray:
    """Where `steps` done lie on the axis x: in steps, seconds of training, tokens, or FLOPs.

    Linear between (0, 0) and what the records say; after the last training record, as its own step went. The tokens
    since the record before cost what a token costs at the record's own seq_len.
    """
    if x == "step":
        return steps
    if x == "time":
        known, first = np.unique(np.append(0, run.both("step")), return_index=True)
        return np.interp(steps, known, np.append(0, run.both("time_s"))[first])
    train = run.train
    price = run.flops_per_token(train["seq_len"]) if x == "flops" else 1
    known, values = np.append(0, train["step"]), np.append(0, np.cumsum(np.diff(train["tokens"], prepend=0) * price))
    per_step = np.append(0, train["batch_size"] * train["seq_len"] * price)
    return np.interp(steps, known, values) + np.maximum(0, steps - known[-1]) * per_step[-1]


def stage_bands(run: Run) -> list[tuple[float, float, int]]:
    """(first step, last step, seq_len) of each stage so far. A stage's last record is the evaluation at its end."""
    stages, steps, lengths = run.both("stage"), run.both("step"), run.both("seq_len")
    ends = [0.0, *(steps[stages == stage].max() for stage in np.unique(stages))]
    return list(zip(ends, ends[1:], (int(lengths[stages == stage][0]) for stage in np.unique(stages))))


def band_labels(bands: list[tuple[float, float, int]], least: float) -> list[tuple[float, float, str]]:
    """(left, right, text) for bands (left, right, seq_len): those too narrow for a label of their own share one."""
    labels, group = [], []
    for band in bands:
        group.append(band)
        (left, _, first), (_, right, last) = group[0], band
        if right - left >= least:
            labels.append((left, right, f"{first:,}" if first == last else f"{first:,}\u2013{last:,}"))
            group = []
    return labels


def smooth(values: np.ndarray, reach: int) -> np.ndarray:
    """The mean of each value and `reach` on both sides: near the start, of as many after it as come before it, so that
    the first fall is not flattened."""
    at = np.arange(len(values))
    reach = np.minimum(reach, at)
    stop = np.minimum(at + reach + 1, len(values))
    sums = np.append(0, np.cumsum(values))
    return (sums[stop] - sums[at - reach]) / (stop - at + reach)


# --------------------------------------------------------------------------------------------------------------------
# The picture

X_AXES = {"tokens": "tokens trained on", "time": "training time", "flops": "training FLOPs", "step": "optimizer steps"}

# Told apart by line and marker, so that grey will do. Of several runs each has its own colour and marker instead.
CURVES = {
    "train": {"label": "training, smoothed", "color": "#2b7bba", "lw": 1.3},
    "last": {"label": "validation at the last length", "color": "#d55e00", "ls": "--", "marker": "^"},
    "val": {"label": "validation at the stage's length", "color": "black", "lw": 2.5, "marker": "o"},
    "plan": {"label": "validation as planned", "color": "#006040", "lw": 2.5, "ls": ":", "marker": "x"},
}
RUNS = [("black", "o"), ("#d55e00", "^"), ("#0072b2", "s"), ("#cc79a7", "D"), ("#009e73", "v"), ("#e69f00", "P")]


def tick(value: float, _: int) -> str:
    """0.003, 250k, 1.5B, 2e18."""
    for unit, name in ((1e3, "k"), (1e6, "M"), (1e9, "B")):
        if unit <= value < 1000 * unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}".replace("e+", "e")


def draw(runs: list[Run], x: str, to: Path) -> None:
    """Writes the picture. Raises UserError if there is no matplotlib, or if the file cannot be written."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("a picture takes matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    first, several = runs[0], len(runs) > 1
    hours = max(run.both("time_s").max() for run in runs) / 3600
    unit, unit_name = (1, "") if x != "time" else (3600, " (hours)") if hours > 2 else (60, " (minutes)")
    plt.rcParams |= {"font.size": 16, "lines.linewidth": 2, "lines.markersize": 7, "text.parse_math": False}
    figure, panels = plt.subplots(4, sharex=True, figsize=(10, 12), height_ratios=[5, 1.3, 1.3, 1.3])
    figure.subplots_adjust(left=0.16, right=0.86, top=0.88, bottom=0.06, hspace=0.1)
    loss, gap, rate, speed = panels

    # What the runs say. markevery: in records, or as a share of the panel's diagonal along the curve.
    neutral = {"color": "dimgrey", "marker": ""} if several else {}
    legend = [plt.Line2D([], [], **CURVES[curve] | neutral) for curve in ("train", "last", "val")]
    end, late = 0.0, []
    for number, run in enumerate(runs):
        train, evals, last_step = run.train, run.evals, run.both("step").max()
        own = dict(zip(("color", "marker"), RUNS[number % len(RUNS)])) if several else {}
        spread = 1 + len(train["step"]) // 8
        of_train = CURVES["train"] | own | {"markevery": (spread * number // len(runs), spread)}
        of_last = CURVES["last"] | own | {"markevery": (0.03, 0.06)}
        of_val = CURVES["val"] | own | {"markevery": 0.06}
        train_x, evals_x = (x_at(run, steps, x) / unit for steps in (train["step"], evals["step"]))
        losses = smooth(train["loss"], len(train_x) // 100)
        if several:
            legend.append(plt.Line2D([], [], label=run.name, **own))
        else:
            loss.plot(train_x, train["loss"], ".", color="#9ecae1", ms=2)
        loss.plot(train_x, losses, **of_train)
        loss.plot(evals_x, evals["last_len_loss"], **of_last)
        loss.plot(evals_x, evals["val_loss"], **of_val)
        gap.plot(evals_x, evals["gap"], **of_val)
        rate.plot(train_x, train["lr"], **of_train)
        speed.plot(train_x, train["tokens_per_s"], **of_train)
        end = max(end, x_at(run, last_step, x) / unit)
        late += [*losses[train["step"] >= 0.03 * last_step], *evals["val_loss"][evals["step"] >= 0.03 * last_step]]
    has_plan = np.isfinite(first.evals["plan_ppl"]).any()
    if has_plan:
        steps, plan = first.evals["step"], np.log(first.evals["plan_ppl"])
        legend += loss.plot(x_at(first, steps, x) / unit, plan, **CURVES["plan"], markevery=0.06)
        late += [*plan[steps >= 0.1 * steps.max()]]
    loss.legend(handles=legend, loc="upper right", fontsize=14)

    # The stages
    point = end / (loss.bbox.width / figure.dpi * 72)  # 1/72 inch on the x axis
    bands = [(*x_at(first, np.array(steps), x) / unit, seq_len) for *steps, seq_len in stage_bands(first)]
    for panel in panels:
        for left, right, _ in bands[1::2]:
            panel.axvspan(left, right, color="#e6e6e6", lw=0, zorder=0)
    above = {"transform": loss.get_xaxis_transform(), "fontsize": 14}
    for left, right, text in band_labels(bands, 14 * point):
        rotation = 0 if right - left > 60 * point else 90
        loss.text((left + right) / 2, 1.015, text, ha="center", rotation=rotation, **above)
    loss.text(-10 * point, 1.04, "window\nlength", ha="right", **above)
    title = f"{first.name} after {first.both('step').max():,.0f} steps"
    figure.suptitle(f"stages{' and plan' if has_plan else ''} of {first.name}" if several else title, fontsize=18)

    # The axes. The first steps' losses would press all that follows flat, so they may lie outside.
    if late := [value for value in late if math.isfinite(value)]:
        loss.set_ylim(min(late) - 0.2, min(max(late) + 0.2, 12))
    perplexity = loss.twinx()
    perplexity.set(yscale="log", ylim=np.exp(loss.get_ylim()), ylabel="perplexity")
    gap.axhline(math.log(2), color="black", ls="--")
    gap.text(end - 5 * point, math.log(2), "overfitting from ln 2 up", ha="right", va="bottom", fontsize=14)
    gap.set_ylim(min(-0.1, gap.get_ylim()[0]), max(1.1, gap.get_ylim()[1]))
    rate.set_yscale("log")
    fine = (1, 1.5, 2, 3, 4, 5, 7) if np.ptp(loss.get_ylim()) < 4 else (1, 2, 5)
    coarse = (1, 2, 5) if np.ptp(np.log(rate.get_ylim())) < 3.5 else (1, 3)
    for axis, digits in ((perplexity.yaxis, fine), (rate.yaxis, coarse)):
        axis.set_major_locator(matplotlib.ticker.FixedLocator(np.outer(10.0 ** np.arange(-9, 9), digits).ravel()))
        axis.set_minor_locator(matplotlib.ticker.NullLocator())
    for axis in (perplexity.yaxis, rate.yaxis, speed.yaxis, speed.xaxis):
        axis.set_major_formatter(tick)
    speed.set(xlim=(0, end), ylim=(0, None), xlabel=X_AXES[x] + unit_name)
    labels = ("loss (nats per token)", "val \u2212 train\n(nats)", "learning\nrate", "tokens/s")
    for panel, label in zip(panels, labels):
        panel.set_ylabel(label)
        panel.grid(color="#c4c4c4", lw=0.8)
    figure.align_ylabels(panels)
    try:
        figure.savefig(to, dpi=150, format="png")
    except OSError as error:
        raise UserError(f"cannot write {to}: {error.strerror}") from error


def main() -> None:
    parser = CommandLine(description="One picture of a run, or of several over each other, from their logs.")
    parser.add_argument("out_dirs", metavar="OUT_DIR", nargs="+", type=Path, help="of training runs")
    parser.add_argument("--x", choices=X_AXES, default="tokens", help="the x axis (tokens)")
    parser.add_argument("--to", type=Path, help="picture to write (OUT_DIR/loss.png; for several runs loss.png)")
    args = parser.parse_args()
    runs = [read_run(out_dir) for out_dir in args.out_dirs]
    if args.x == "flops":
        configs = map(run_config, args.out_dirs)
        runs = [run._replace(flops_per_token=flops_per_token(config)) for run, config in zip(runs, configs)]
    to = args.to or (args.out_dirs[0] if len(runs) == 1 else Path()) / "loss.png"
    draw(runs, args.x, to)
    print(to)


if __name__ == "__main__":
    with user_errors():
        main()
