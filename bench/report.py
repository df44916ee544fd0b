"""bench/recipe.py's results as Markdown tables and pictures.

    python bench/report.py nanogpt lengths --results=bench/recipe [--pictures=bench] [what else recipe.py was given]

Prints a section per experiment; --pictures draws one each into a folder as well. What is not done yet is said, and what
is done is shown. Of each variant the runs at the learning rate that validation chose:

held-out loss   of the long articles, windows of 2,048 (`short`: 256), all seeds' targets together; +- is its standard
                error over the articles. Seeds hold out different articles, so the range over seeds is of texts, too
difference      to the first variant, on the same articles: its standard error over the articles of all seeds, and its
                range over the seeds, are what tells two variants apart. Articles of one seed share a model, so where
                the seeds disagree the error is too small
FLOPs           the model's, and Muon's own
at equal ...    the difference to the first variant on a few windows, interpolated between a run's points, where the
                cheapest whole run ends. A learning rate that has not fallen yet costs a run that goes on behind that
                point. Compare times only where they differ by more than a tenth: the machine does by itself. None is
                given for runs on another kind of device than the first variant's

A later position is harder text besides having more before it, for many windows begin where an article does. So what
context is worth stands in the table of `context`, not in that of positions. By position and in pictures stand the
variants with the most seeds, for others speak of other texts.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.plot import tick  # noqa: E402
from bench.recipe import BASE, EXPERIMENTS, add_arguments, best_lr, chosen, read, runs, seeds_of, settings  # noqa: E402
from curriculum import short  # noqa: E402
from errors import CommandLine, UserError, user_errors  # noqa: E402

AXES = {"tokens": "tokens", "flops": "FLOPs", "seconds": "seconds"}
COLORS = ["black", "#d55e00", "#0072b2", "#cc79a7", "#009e73", "#e69f00", "#56b4e9", "#999999", "#7f3c8d", "#b07d3a"]

# --------------------------------------------------------------------------------------------------------------------
# Numbers


def article_mean(rows: list[tuple[float, float]]) -> tuple[float, float]:
    """The mean over all targets of articles (targets, mean), and its standard error over the articles.

    Of a ratio of sums, articles being drawn at random (Cochran 1977, chapter 2): NaN for a single one.
    """
    targets, means = np.array(rows, float).T
    mean = float(np.average(means, weights=targets))
    n = len(targets)
    variance = np.sum((targets * (means - mean)) ** 2) / targets.sum() ** 2 * n / (n - 1) if n > 1 else np.nan
    return mean, float(np.sqrt(variance))


def held_out(results: dict[int, dict]) -> tuple[float, float]:
    return article_mean([(n, loss) for result in results.values() for _, n, loss in result["articles"]])


def over_seeds(results: dict[int, dict], values: list) -> np.ndarray:
    """The mean of the seeds' mean losses (scalars or rows) over all their targets."""
    targets = [sum(n for _, n, _ in result["articles"]) for result in results.values()]
    return np.average(values, axis=0, weights=targets)


def difference(results: dict[int, dict], first: dict[int, dict]) -> tuple[float, float, list[float]]:
    """results minus first on the same articles, its standard error, and the differences of each seed that both have."""
    rows, per_seed = [], []
    for seed in results.keys() & first.keys():
        pairs = zip(results[seed]["articles"], first[seed]["articles"], strict=True)
        rows.append([(n, loss - other) for (_, n, loss), (_, _, other) in pairs])
        per_seed.append(article_mean(rows[-1])[0])
    return *(article_mean(sum(rows, [])) if rows else (np.nan, np.nan)), per_seed


def shared(results: dict[int, dict], first: dict[int, dict], axis: str) -> list[int]:
    """The seeds that both have; in seconds only those that both ran on the same kind of device."""
    return [seed for seed in sorted(results.keys() & first.keys())
            if axis != "seconds" or results[seed]["device"] == first[seed]["device"]]  # fmt: skip


def curve(result: dict, axis: str) -> tuple[np.ndarray, np.ndarray]:
    """What was spent at each point of a run, in tokens, FLOPs or seconds of training; and the loss there."""
    return tuple(np.array([point[key] for point in result["points"]], float) for key in (axis, "loss"))


def loss_at(result: dict, axis: str, spent: float) -> float:
    """Linear between the points; NaN behind the last."""
    return float(np.interp(spent, *curve(result, axis), right=np.nan))


def spent_to_reach(result: dict, axis: str, loss: float) -> float:
    """What a run spends until it first has this loss, linear between its points; infinity if it never has."""
    spent, losses = curve(result, axis)
    below = np.flatnonzero(losses <= loss)
    if not len(below):
        return np.inf
    at = below[0]
    return float(spent[0] if at == 0 else np.interp(-loss, -losses[at - 1 : at + 1], spent[at - 1 : at + 1]))


def vertex(lrs: list[float], losses: list[float]) -> float:
    """The learning rate at the lowest point of a parabola in its logarithm, through the best of a grid and the one on
    each side; NaN if the best is at the grid's edge."""
    order = np.argsort(lrs)
    x, y = np.log(np.array(lrs)[order]), np.array(losses)[order]
    best = int(np.argmin(y))
    if not 0 < best < len(x) - 1:
        return np.nan
    a, b, _ = np.polyfit(x[best - 1 : best + 2], y[best - 1 : best + 2], 2)
    return float(np.exp(-b / (2 * a)))


def spread(values: list[float], form: str) -> str:
    """Mean (least to most)."""
    return f"{format(np.mean(values), form)} ({format(min(values), form)} to {format(max(values), form)})"


# --------------------------------------------------------------------------------------------------------------------
# Tables


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main_table(found: dict[str, dict[int, dict]], name: str) -> str:
    """Every variant at its best learning rate."""
    whole = [r for variant, mine in found.items() for r in mine.values() if mine[0]["run"]["share"] >= 1]
    first = next(iter(found.values()))
    rows = []
    for variant, mine in found.items():
        run, lrs = mine[0]["run"], (BASE | EXPERIMENTS[name][variant])["lrs"]
        edge = " (edge of its grid)" if len(lrs) > 1 and run["lr"] in (min(lrs), max(lrs)) else ""
        mean, error = held_out(mine)
        delta, delta_error, per_seed = difference(mine, first)
        row = [variant, f"{run['lr']:g}{edge}", f"{len(mine)}", f"{mean:.3f} ± {error:.3f}"]
        row += [f"{min(r['loss'] for r in mine.values()):.3f} to {max(r['loss'] for r in mine.values()):.3f}"]
        row += [f"{delta:+.3f} ± {delta_error:.3f}" if mine is not first and per_seed else ""]
        row += [f"{min(per_seed):+.3f} to {max(per_seed):+.3f}" if mine is not first and per_seed else ""]
        row += [f"{np.mean([r['val_loss'] for r in mine.values()]):.3f}"]
        row += [f"{over_seeds(mine, [r['own_loss'] for r in mine.values()]):.3f} ({mine[0]['own_len']:,})"]
        for axis in AXES:
            least = min((result["points"][-1][axis] for result in whole), default=np.nan)
            ahead = [loss_at(mine[s], axis, least) - loss_at(first[s], axis, least) for s in shared(mine, first, axis)]
            row += [f"{np.mean(ahead):+.3f}" if mine is not first and ahead and np.isfinite(ahead).all() else ""]
        rows.append(row)
    header = ["variant", "lr", "seeds", "held-out loss", "over seeds", "difference", "over seeds", "val loss"]
    header += ["at its own length", *(f"at equal {what}" for what in AXES.values())]
    return markdown(header, rows)


def reach_table(found: dict[str, dict[int, dict]]) -> str:
    """What each variant spends until it has the final loss of the first, as a multiple of what that one spent: of the
    seeds the middle one, the least and the most."""
    (name, first), *others = found.items()
    rows = []
    for variant, mine in others:
        row = [variant]
        for axis in AXES:
            seeds = shared(mine, first, axis)
            ends = [first[seed]["points"][-1] for seed in seeds]
            ratios = sorted(spent_to_reach(mine[s], axis, end["loss"]) / end[axis] for s, end in zip(seeds, ends))
            said = ["never" if np.isinf(ratio) else f"{ratio:.2f}" for ratio in ratios]
            between = f"{said[0]} to {said[-1]}" if len(said) > 1 else "one seed"
            row.append(f"{said[len(said) // 2]} ({between})" if said else "")
        rows.append(row)
    return f"Spent until the final loss of {name}, as a multiple of what it took:\n\n" + markdown(
        ["variant", *AXES.values()], rows)  # fmt: skip


def position_table(found: dict[str, dict[int, dict]]) -> str:
    """Held-out loss by the target's position in its window."""
    columns = next(iter(found.values()))[0]["positions"]
    means = {variant: over_seeds(mine, positions(mine)) for variant, mine in found.items()}
    rows = [[variant, *(f"{loss:.3f}" for loss in losses)] for variant, losses in means.items()]
    return "Held-out loss by position in the window:\n\n" + markdown(
        ["variant", *(f"{a:,}-{b:,}" for a, b, _ in columns)], rows)  # fmt: skip


def context_table(found: dict[str, dict[int, dict]]) -> str:
    """Held-out loss with windows cut shorter and shorter, and what the cuts cost, +- over the articles (one seed)."""
    result = next(iter(found.values()))[0]
    lengths, whole_len = [seq_len for seq_len, _ in result["cuts"]], result["positions"][-1][1]
    rows = []
    for variant, mine in found.items():
        whole = mine[0]["articles"]
        row = [variant, *(f"{article_mean([article[1:] for article in cut])[0]:.3f}" for _, cut in mine[0]["cuts"])]
        row.append(f"{held_out(mine)[0]:.3f}")
        for _, cut in mine[0]["cuts"]:
            gain, error = article_mean([(n, loss - other) for (_, n, loss), (_, _, other) in zip(cut, whole)])
            row.append(f"{gain:+.3f} ± {error:.3f}")
        rows.append(row)
    header = ["variant", *(f"in windows of {n:,}" for n in lengths), f"of {whole_len:,}"]
    header += [f"lost by the cut to {n:,}" for n in lengths]
    return "The same targets in windows cut shorter:\n\n" + markdown(header, rows)


def with_most_seeds(found: dict[str, dict[int, dict]]) -> dict[str, dict[int, dict]]:
    most = max(map(len, found.values()))
    return {variant: mine for variant, mine in found.items() if len(mine) == most}


def positions(results: dict[int, dict]) -> list[list[float]]:
    return [[loss for *_, loss in result["positions"]] for result in results.values()]


def size_table(found: dict[str, dict[int, dict]], name: str, args) -> str:
    """The grid of each size, its best learning rate, and how that moves with the width."""
    rows, best = [], []
    for variant, mine in found.items():
        grid = grid_of(EXPERIMENTS[name][variant], args)
        for key in ("val_loss", "loss"):
            losses = [result[key] for result in grid.values()]
            best.append((key, mine[0]["run"]["size"][1], vertex(list(grid), losses)))
            words = ", ".join(f"{lr:g}: {loss:.3f}" for lr, loss in zip(grid, losses))
            rows.append([variant, short(mine[0]["params"]), key, words, f"{best[-1][2]:.2g}"])
    text = markdown(["size", "parameters", "loss", "by learning rate", "best (parabola)"], rows)
    for key in ("val_loss", "loss"):
        widths, lrs = np.array([[width, lr] for which, width, lr in best if which == key and lr == lr]).reshape(-1, 2).T
        if len(widths) > 1:
            slope, start = np.polyfit(np.log(widths), np.log(lrs), 1)
            factor = np.exp(np.abs(np.log(lrs) - start - slope * np.log(widths)).max())
            fit = f", off by a factor of at most {factor:.2f}" if len(widths) > 2 else ", which two always fit"
            text += (f"\nBy {key}: best learning rate ~ width^{slope:.2f} over {len(widths)} sizes{fit}; at width 768 "
                     f"that makes {np.exp(start + slope * np.log(768)):.2g}.\n")  # fmt: skip
        else:
            text += f"\nBy {key}: fewer than two sizes have their best inside the grid, so nothing is fitted.\n"
    return text


def spike(change: dict) -> tuple[float, float]:
    """How far the loss at the new length rises above that at the old one just before the change, on the same targets;
    and the first watched step from the highest one on at which it is back (infinity if none is)."""
    offsets, losses = np.array(change["after"], float).T
    back = offsets[(losses <= change["loss_before"]) & (offsets >= offsets[losses.argmax()])]
    return float(losses.max() - change["loss_before"]), float(back[0]) if len(back) else np.inf


def change_table(found: dict[str, dict[int, dict]]) -> str:
    rows = []
    for variant, mine in found.items():
        for changes in zip(*(result["changes"] for result in mine.values())):
            sizes, steps = zip(*map(spike, changes))
            rows.append([variant, f"{changes[0]['from']:,} to {changes[0]['to']:,}", spread(sizes, "+.3f"),
                         ", ".join(f"{n:g}" if n < np.inf else "not seen" for n in steps)])  # fmt: skip
    return "At each change of length, scored at the new length against the old one just before:\n\n" + markdown(
        ["variant", "change", "largest rise (nats)", "steps until it is gone, by seed"], rows)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Pictures


def draw(found: dict[str, dict[int, dict]], name: str, args, to: Path) -> None:
    """The curves over tokens, FLOPs and seconds, means over seeds; then what the experiment is about."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("a picture takes matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams |= {"font.size": 13}
    more = min(len(mine[0]["changes"]) for mine in found.values()) if name == "changes" else 1
    columns = (3 + more + 1) // 2
    figure, panels = plt.subplots(2, columns, figsize=(6 * columns, 11), layout="constrained")
    panels, own, rest = np.split(panels.flatten(), [3, 3 + more])
    late, first = [], next(iter(found.values()))
    for panel in rest:
        panel.remove()
    for number, (variant, mine) in enumerate(found.items()):
        style = {"color": COLORS[number % len(COLORS)], "marker": "osv^DPX"[number % 7], "label": variant, "ms": 5}
        for axis, panel in zip(AXES, panels):
            if len(shared(mine, first, axis)) < len(mine):
                continue  # seconds of another device
            spent, losses = np.mean([curve(result, axis) for result in mine.values()], axis=0)
            panel.plot(spent, losses, **style)
            late += [*losses[spent >= 0.4 * spent[-1]]]
        if name == "changes":
            for change, panel in enumerate(own):
                changes = [result["changes"][change] for result in mine.values()]
                rise = np.mean([np.array(c["after"], float)[:, 1] - c["loss_before"] for c in changes], axis=0)
                panel.plot([offset for offset, _ in changes[0]["after"]], rise, **style)
                panel.set(xscale="symlog", xlabel=f"steps after {changes[0]['from']:,} to {changes[0]['to']:,}",
                          ylabel="loss at the new length\nminus that at the old one before")  # fmt: skip
        elif name == "context":
            cuts = [(seq_len, article_mean([article[1:] for article in cut])[0]) for seq_len, cut in mine[0]["cuts"]]
            own[0].plot(*zip(*cuts, (mine[0]["positions"][-1][1], held_out(mine)[0])), **style)
            own[0].set(xscale="log", xlabel="in windows of", ylabel="held-out loss")
        elif name == "sizes":
            lrs, results = zip(*grid_of(EXPERIMENTS[name][variant], args).items())
            own[0].plot(lrs, [result["val_loss"] for result in results], **style)
            own[0].set(xscale="log", xlabel="learning rate", ylabel="validation loss")
        else:
            own[0].plot([b for _, b, _ in mine[0]["positions"]], over_seeds(mine, positions(mine)), **style)
            own[0].set(xscale="log", xlabel="position in the window, up to", ylabel="held-out loss")
    for what, panel in zip(AXES.values(), panels):
        what += ", on the first's kind of device alone" * (what == "seconds")
        panel.set(xlabel=what, ylabel="held-out loss", ylim=(min(late) - 0.1, max(late) + 0.1))
    for panel in [*panels, *own]:
        panel.grid(color="#d0d0d0")
        if panel.get_xscale() == "linear":
            panel.xaxis.set_major_formatter(tick)
    panels[0].legend(fontsize=10)
    figure.savefig(to, dpi=100)
    plt.close(figure)


# --------------------------------------------------------------------------------------------------------------------


def grid_of(variant: dict, args) -> dict[float, dict]:
    """The results with seed 0 by learning rate, of those that are done."""
    lrs = (BASE | variant)["lrs"]
    return {lr: result for lr in lrs if (result := read(settings(variant, lr, 0, args), args))}


def find(name: str, args) -> tuple[dict[str, dict[int, dict]], list[str]]:
    """Of each variant the results by seed at its best learning rate so far, seed 0 always; and what is not done."""
    found, missing = {}, []
    for variant, differs in EXPERIMENTS[name].items():
        todo = [run for run in runs(differs, args) if not read(run, args)]
        if todo:
            lrs = [f"{run['lr']:g} seed {run['seed']}" for run in todo if run["lr"]]
            more = ["then the seeds at the best"] * (len(lrs) < len(todo))
            missing.append(f"{variant} ({'; '.join(lrs + more)})")
        if grid := grid_of(differs, args):
            lr = best_lr(differs, args) or min(grid, key=lambda lr: grid[lr]["val_loss"])
            mine = {seed: read(settings(differs, lr, seed, args), args) for seed in seeds_of(differs, args)}
            found[variant] = {seed: result for seed, result in mine.items() if result}
    return found, missing


def section(name: str, args) -> str:
    found, missing = find(name, args)
    text = f"## {name}\n\n"
    if missing:
        text += "Not done yet: " + "; ".join(missing) + ".\n\n"
    if not found:
        return text
    results = [result for mine in found.values() for result in mine.values()]
    where = sorted({f"{r['device']}, {r['threads']} threads, torch {r['torch']}" for r in results})
    run = max((result["run"] for result in results), key=lambda run: run["share"])
    text += (f"`python bench/recipe.py {name} --data_dir={args.data_dir} --steps={args.steps} --tokens={args.tokens} "
             f"--seeds={args.seeds} --n_layer={args.n_layer} --n_embd={args.n_embd} --results={args.results}`: a whole "
             f"run has {short(run['share'] * run['steps'] * run['tokens'])} tokens; seed i holds out fold i of "
             f"{run['folds']} ({'; '.join(where)}).\n\n")  # fmt: skip
    if skipped := sum(result["skipped"] > 0 for result in results):
        text += f"{skipped} of these runs had steps without a finite gradient, which were skipped.\n\n"
    text += main_table(found, name)
    if len(found) > 1:
        text += "\n" + reach_table(found)
    if name not in ("sizes", "changes"):
        text += "\n" + position_table(with_most_seeds(found))
    if name == "sizes":
        text += "\n" + size_table(found, name, args)
    if name == "changes":
        text += "\n" + change_table(found)
    if name == "context":
        text += "\n" + context_table(found)
    if args.pictures:
        draw(with_most_seeds(found), name, args, Path(args.pictures) / f"recipe_{name}.png")
        text += f"\n![{name}](recipe_{name}.png)\n"
    return text


def main() -> None:
    parser = CommandLine(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--pictures", help="a folder to draw into")
    args = parser.parse_args()
    print("\n".join(section(name, args) for name in chosen(args)))


if __name__ == "__main__":
    with user_errors():
        main()
