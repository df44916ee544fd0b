"""Draw a run from its log, also while it trains. Given several runs, draw them together and compare them.

    python bench/plot.py out/a [out/b ...] [--x=tokens|time|flops|step] [--to=FILE.png]

large panel    training and validation loss, with perplexity on the right; validation loss at the table's last length,
               the one curve that compares across stages; the plan's loss; the stages, named by their window lengths
small panels   validation minus training loss, learning rate, tokens/s

One run's picture is out/a/loss.png. Several runs share ./loss.png, with the stages and plan of the first. Two tables
compare them: the configuration keys that differ in their checkpoints, and the loss at the last length after the same
tokens, FLOPs (without Muon's) and training time, with compiling, but without evaluations and checkpoints.
"""

import math
import os
import sys
from argparse import SUPPRESS, ArgumentParser
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle, zip_longest
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoint import load_checkpoint, read_log  # noqa: E402
from curriculum import format_table  # noqa: E402
from model import GPTConfig  # noqa: E402
from settings import UserError, user_errors  # noqa: E402

SECONDS = {"seconds": 1, "minutes": 60, "hours": 3600}


@dataclass
class Run:
    """A run's training records and evaluations: a float64 array for each key, with NaN for null."""

    out_dir: Path
    train: dict[str, np.ndarray]
    evals: dict[str, np.ndarray]

    def both(self, key: str) -> np.ndarray:
        return np.append(self.train[key], self.evals[key])

    @cached_property
    def config(self) -> dict:
        """The configuration in the run's checkpoint. Raises UserError if there is none yet."""
        for path in (self.out_dir / "last.pt", self.out_dir / "best.pt"):
            if path.exists():
                return (state := load_checkpoint(path))["config"] | {"shards": state["fingerprint"][:8]}
        raise UserError(f"{self.out_dir} has no last.pt or best.pt, which hold the run's configuration")


def read_run(out_dir: Path) -> Run:
    """Read out_dir/log.jsonl. Raises UserError if there is none, or no training in it yet."""
    records, arrays = read_log(out_dir), []
    for event in ("train", "eval"):
        rows = [record for record in records if record["event"] == event]
        if not rows:
            raise UserError(f"{out_dir}/log.jsonl has no {event!r} record yet (log_interval?)")
        arrays.append({key: np.array([row[key] for row in rows], float) for key in rows[0] if key != "event"})
    return Run(out_dir, *arrays)


def x_at(run: Run, steps: np.ndarray, x: str) -> np.ndarray:
    """Return where `steps` finished steps are on the axis x: "step", "tokens", "flops" or one of SECONDS. Interpolate
    linearly from (0, 0) through the records, and continue after the last training record at its rate. A record's
    seq_len gives the FLOPs of all tokens since the record before."""
    if x == "step":
        return steps
    if x in SECONDS:
        known, first = np.unique(np.append(0, run.both("step")), return_index=True)
        return np.interp(steps, known, np.append(0, run.both("time_s"))[first]) / SECONDS[x]
    train, price = run.train, 1
    if x == "flops":
        shape = (run.config[key] for key in ("n_layer", "n_head", "n_embd"))
        price = GPTConfig(*shape).flops_per_token(train["seq_len"])
    known, values = np.append(0, train["step"]), np.append(0, np.cumsum(np.diff(train["tokens"], prepend=0) * price))
    per_step = (train["batch_size"] * train["seq_len"] * price)[-1]
    return np.interp(steps, known, values) + np.maximum(0, steps - known[-1]) * per_step


def stage_bands(run: Run) -> list[tuple[float, float, int]]:
    """Return (first step, last step, seq_len) of each stage so far. An evaluation ends each stage."""
    stages, steps, lengths = run.both("stage"), run.both("step"), run.both("seq_len")
    ends = [0.0, *(steps[stages == stage].max() for stage in np.unique(stages))]
    return list(zip(ends, ends[1:], (int(lengths[stages == stage][0]) for stage in np.unique(stages))))


def smooth(values: np.ndarray, reach: int) -> np.ndarray:
    """Return each value's mean with up to `reach` neighbours on both sides; near the start both sides shrink alike."""
    return np.array([values[i - min(reach, i) : i + min(reach, i) + 1].mean() for i in range(len(values))])


LABELS = {"tokens": "tokens trained on", "flops": "training FLOPs", "step": "optimizer steps"}

# The curves differ in line and marker, so you can tell them apart in grey. Several runs differ in colour and marker.
# markevery is a share of the panel's diagonal.
CURVES = {
    "train": {"label": "training, smoothed", "color": "#2b7bba", "lw": 1.3, "markevery": 0.1},
    "last": {"label": "validation, last length", "color": "#d55e00", "ls": "--", "marker": "^", "markevery": 0.05},
    "val": {"label": "validation, stage's length", "color": "black", "lw": 2.5, "marker": "o", "markevery": 0.06},
    "plan": {"label": "validation, planned", "color": "#006040", "lw": 2.5, "ls": ":", "marker": "x"},
}
RUNS = [("black", "o"), ("#d55e00", "^"), ("#0072b2", "s"), ("#cc79a7", "D"), ("#009e73", "v"), ("#e69f00", "P"),
        ("#56b4e9", "X"), ("#7f7f7f", "*")]  # fmt: skip


def tick(value: float, _: int) -> str:
    """Return a label like 0.003, 250k, 1.5B or 2e18."""
    for unit, name in ((1e3, "k"), (1e6, "M"), (1e9, "B")):
        if unit <= value < 1000 * unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}".replace("e+", "e")


def draw(runs: list[Run], x: str, to: Path) -> None:
    """Write the picture. Raises UserError without matplotlib, and if the file cannot be written."""
    try:
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise UserError("a picture needs matplotlib: pip install matplotlib") from error
    if x == "time":
        x = "hours" if max(run.both("time_s").max() for run in runs) > 7200 else "minutes"
    first, several = runs[0], len(runs) > 1
    plt.rcParams |= {"font.size": 16, "lines.linewidth": 2, "lines.markersize": 7, "text.parse_math": False}
    figure, panels = plt.subplots(4, sharex=True, figsize=(10, 12), height_ratios=[5, 1.3, 1.3, 1.3])
    figure.subplots_adjust(left=0.16, right=0.86, top=0.88, bottom=0.06, hspace=0.1)
    grey = {"color": "dimgrey", "marker": ""} if several else {}
    legend = [plt.Line2D([], [], **CURVES[curve] | grey) for curve in ("train", "last", "val")]
    for run, (color, marker) in zip(runs, cycle(RUNS)):
        own = {"color": color, "marker": marker} if several else {}
        draw_curves(panels, run, x, own)
        legend += [plt.Line2D([], [], label=str(run.out_dir), **own)] * several
    if np.isfinite(first.evals["plan_ppl"]).any():
        at, plan = x_at(first, first.evals["step"], x), np.log(first.evals["plan_ppl"])
        legend += panels[0].plot(at, plan, **CURVES["plan"])
    panels[0].legend(handles=legend, loc="upper right", fontsize=14)
    end = max(float(x_at(run, run.both("step").max(), x)) for run in runs)
    draw_stages(panels, first, x, end / (panels[0].bbox.width / figure.dpi * 72))
    set_axes(panels, end, LABELS.get(x, f"training time ({x})"))
    figure.suptitle(f"{'stages of ' * several}{first.out_dir}", fontsize=18)
    figure.align_ylabels(panels)
    try:
        figure.savefig(to, dpi=150)  # in the format of the name's suffix
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {to}: {getattr(error, 'strerror', None) or error}") from error


def draw_curves(panels: list, run: Run, x: str, own: dict) -> None:
    """Draw a run's curves. own: the run's colour and marker, if several runs share the panels."""
    loss, gap, rate, speed = panels
    of_train, of_last, of_val = (CURVES[curve] | own for curve in ("train", "last", "val"))
    train_x, evals_x = (x_at(run, records["step"], x) for records in (run.train, run.evals))
    if not own:
        loss.scatter(train_x, run.train["loss"], s=1, color="#9ecae1")
    loss.plot(train_x, smooth(run.train["loss"], len(train_x) // 100), **of_train)
    loss.plot(evals_x, run.evals["last_len_loss"], **of_last)
    loss.plot(evals_x, run.evals["val_loss"], **of_val)
    gap.plot(evals_x, run.evals["gap"], **of_val)
    rate.plot(train_x, run.train["lr"], **of_train)
    speed.plot(train_x, run.train["tokens_per_s"], **of_train)


def draw_stages(panels: list, run: Run, x: str, point: float) -> None:
    """Shade every other stage and write the window lengths above. point: 1/72 inch in units of the x axis."""
    bands = [(*x_at(run, np.array(steps), x), seq_len) for *steps, seq_len in stage_bands(run)]
    for panel in panels:
        for left, right, _ in bands[1::2]:
            panel.axvspan(left, right, color="#e6e6e6", lw=0, zorder=0)
    above, labelled = {"transform": panels[0].get_xaxis_transform(), "fontsize": 14}, -math.inf
    for left, right, seq_len in bands:
        middle, narrow = (left + right) / 2, right - left < 60 * point
        if middle - labelled > 10 * point:  # else the labels would overlap
            style = above | ({"rotation": 90, "fontsize": 11} if narrow else {})
            panels[0].text(middle, 1.015, f"{seq_len:,}", ha="center", **style)
            labelled = middle
    panels[0].text(-10 * point, 1.04, "window\nlength", ha="right", **above)


def set_axes(panels: list, end: float, xlabel: str) -> None:
    """Set limits, ticks and labels for an x axis from 0 to `end`."""
    from matplotlib import ticker

    loss, gap, rate, speed = panels
    # Leave the first steps' losses out of the limits: they would flatten all others
    late = np.concatenate([line.get_ydata()[line.get_xdata() >= 0.05 * end] for line in loss.lines])
    loss.set_ylim(np.nanmin(late, initial=11.8) - 0.2, min(np.nanmax(late, initial=0) + 0.2, 12))
    perplexity = loss.twinx()
    perplexity.set(yscale="log", ylim=np.exp(loss.get_ylim()), ylabel="perplexity")
    gap.axhline(math.log(2), color="black", ls="--")
    gap.text(0.99 * end, math.log(2), "overfitting from ln 2 up", ha="right", va="bottom", fontsize=14)
    gap.set_ylim(min(-0.1, gap.get_ylim()[0]), max(1.1, gap.get_ylim()[1]))
    rate.set_yscale("log")
    rate.set_ylim(max(rate.get_ylim()[0], rate.get_ylim()[1] / 300))  # a cooldown ends near 0
    of_rate = (1, 2, 5) if np.ptp(np.log(rate.get_ylim())) < 3.5 else (1, 3)
    for axis, digits in ((perplexity.yaxis, (1, 2, 3, 5)), (rate.yaxis, of_rate)):
        axis.set_major_locator(ticker.FixedLocator(np.outer(10.0 ** np.arange(-9, 9), digits).ravel()))
        axis.set_minor_locator(ticker.NullLocator())
    for axis in (perplexity.yaxis, rate.yaxis, speed.yaxis, speed.xaxis):
        axis.set_major_formatter(tick)
    speed.set(xlim=(0, end), ylim=(0, None), xlabel=xlabel)
    for panel, text in zip(panels, ("loss (nats per token)", "val \u2212 train\n(nats)", "learning\nrate", "tokens/s")):
        panel.set_ylabel(text)
        panel.grid(color="#c4c4c4", lw=0.8)


FORMS = {"tokens": "{:,.0f}".format, "flops": "{:.2e}".format, "seconds": "{:,.1f}".format}


def differing_keys(configs: list[dict]) -> list[list[str]]:
    """Return a row (key, each run's value) for each key that differs. A table takes a row for each of its rows."""
    rows = []
    for key in sorted(configs[0].keys() - {"out_dir", "resume"}):
        values = [config[key] for config in configs]
        if any(value != values[0] for value in values):
            lines = zip_longest(*(v if isinstance(v, tuple) else (v,) for v in values), fillvalue="")
            rows += [[key if i == 0 else "", *map(str, line)] for i, line in enumerate(lines)]
    return rows


def compare(runs: list[Run]) -> None:
    """Print the keys that differ, and each run's last_len_loss at the quarters of the work that all runs have done,
    interpolated between evaluations. Raises UserError if the losses are not comparable."""
    names, configs = [str(run.out_dir) for run in runs], [run.config for run in runs]
    differing = differing_keys(configs)
    print("\n" + format_table(["", *names], differing) if differing else "\nThe configurations are the same.")
    rows, lengths = [], {config["stages"][-1][1] for config in configs}
    if len(lengths) > 1:
        raise UserError(f"the losses do not compare: the tables end at different lengths, {sorted(lengths)}")
    for x, form in FORMS.items():
        evaluated = [x_at(run, run.evals["step"], x) for run in runs]
        for name, at in zip(names, evaluated):
            if at.max(initial=0) == 0:
                raise UserError(f"{name} has no evaluation after its start")
        for point in min(at.max() for at in evaluated) * np.array([0.25, 0.5, 0.75, 1]):
            losses = [np.interp(point, at, run.evals["last_len_loss"]) for run, at in zip(runs, evaluated)]
            others = [cell for loss in losses[1:] for cell in (f"{loss:.3f}", f"{loss - losses[0]:+.3f}")]
            rows.append([x, form(point), f"{losses[0]:.3f}", *others])
    print(f"\nLoss on held-out windows of {lengths.pop():,} tokens, in nats per token, after the same work:")
    print(format_table(["", "", names[0], *(cell for name in names[1:] for cell in (name, "difference"))], rows))
    for key in [row[0] for row in differing if row[0] in ("shards", "eval_tokens")]:
        print(f"The losses may be of different windows: see {key} above.")


def main() -> None:
    parser = ArgumentParser(usage=SUPPRESS, description="Draw a run from its log; draw and compare several.")
    parser.add_argument("out_dirs", metavar="OUT_DIR", nargs="+", type=os.path.expanduser, help="of training runs")
    parser.add_argument("--x", choices=[*LABELS, "time"], default="tokens", help="the x axis (tokens)")
    parser.add_argument("--to", type=os.path.expanduser, help="picture to write (loss.png, or OUT_DIR/loss.png)")
    args = parser.parse_args()
    runs = [read_run(Path(out_dir)) for out_dir in args.out_dirs]
    to = Path(args.to or (runs[0].out_dir if len(runs) == 1 else Path()) / "loss.png")
    to = to if to.suffix else to.with_suffix(".png")
    draw(runs, args.x, to)
    print(to)
    if len(runs) > 1:
        compare(runs)


if __name__ == "__main__":
    with user_errors():
        main()
