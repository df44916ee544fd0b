"""Two runs side by side: what differs in their configurations, and their losses after the same work.

    python bench/compare.py out/a out/b

What is compared is `last_len_loss`, the loss on held-out windows of the table's last length: a stage's own length would
compare windows of different lengths. It is interpolated linearly between a run's evaluations, at the quarters of what
both runs have done, in tokens trained on, in training FLOPs, and in training time (with compiling; evaluations and
checkpoints left out). The configurations are those in the runs' checkpoints.
"""

import sys
from itertools import zip_longest
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.plot import Run, flops_per_token, read_run, run_config, x_at  # noqa: E402
from curriculum import format_table, short  # noqa: E402
from errors import CommandLine, UserError, user_errors  # noqa: E402

OF_THE_PLACE = {"out_dir", "resume"}  # keys that say nothing about the run itself
AXES = {"tokens": ("tokens", short), "flops": ("FLOPs", "{:.2e}".format), "time": ("seconds", "{:,.1f}".format)}


def differing_keys(a: dict, b: dict) -> list[list[str]]:
    """A row (key, a's value, b's value) for each key that differs; of a table, one for each of its rows."""
    rows = []
    for key in sorted((a.keys() | b.keys()) - OF_THE_PLACE):
        if (old := a.get(key)) != (new := b.get(key)):
            lines = zip_longest(*(x if isinstance(x, tuple) else (x,) for x in (old, new)), fillvalue="")
            rows += [[key if i == 0 else "", *map(str, line)] for i, line in enumerate(lines)]
    return rows


def losses_at(runs: list[Run], x: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """Four points on the axis x ("tokens", "flops" or "time"), and each run's loss there.

    Raises UserError if a run has not been evaluated since its start.
    """
    evaluated = [x_at(run, run.evals["step"], x) for run in runs]
    for run, at in zip(runs, evaluated):
        if not at.max(initial=0) > 0:
            raise UserError(f"{run.name} has no evaluation after its start yet")
    points = min(at.max() for at in evaluated) * np.array([0.25, 0.5, 0.75, 1])
    return points, [np.interp(points, at, run.evals["last_len_loss"]) for run, at in zip(runs, evaluated)]


def main() -> None:
    parser = CommandLine(description="Two runs' configurations and their losses after the same work.")
    parser.add_argument("out_dirs", metavar="OUT_DIR", nargs=2, type=Path, help="of training runs")
    out_dirs = parser.parse_args().out_dirs
    configs = [run_config(out_dir) for out_dir in out_dirs]
    runs = [read_run(out_dir)._replace(flops_per_token=flops_per_token(config))
            for out_dir, config in zip(out_dirs, configs)]  # fmt: skip
    names = [run.name for run in runs]
    if rows := differing_keys(*configs):
        print(format_table(["", *names], rows) + "\n")
    else:
        print("The configurations are the same.\n")
    lengths = [config["stages"][-1][1] for config in configs]
    if lengths[0] != lengths[1]:
        raise UserError(f"the losses do not compare: their tables end at lengths {lengths[0]:,} and {lengths[1]:,}")
    rows = []
    for x, (name, form) in AXES.items():
        points, (old, new) = losses_at(runs, x)
        rows += [[name if i == 0 else "", form(points[i]), f"{old[i]:.3f}", f"{new[i]:.3f}", f"{new[i] - old[i]:+.3f}"]
                 for i in range(len(points))]  # fmt: skip
    print(f"Loss on held-out windows of {lengths[0]:,} tokens, in nats per token, interpolated between evaluations:")
    print(format_table(["after as many", "", *names, "difference"], rows))
    for key in ("data_dir", "eval_tokens"):
        if configs[0][key] != configs[1][key]:
            print(f"{key} differs, so the losses may be of different windows.")


if __name__ == "__main__":
    with user_errors():
        main()
