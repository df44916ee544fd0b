"""Validation: how good a model is on held-out windows, and what follows from it.

    windows of a split -> score_windows -> Score     loss, accuracy, bits per byte of a model at one length
    the run's losses   -> Best                       whether this one is a new best, and when to stop early
    the log's records  -> summary, eval_table        what a run says of an evaluation, and of all at its end
    all windows        -> score_lengths -> report    what --eval_only says: every length, by position, with errors
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from config import Config
from curriculum import format_table
from dataset import Split
from errors import UserError
from parallel import Processes, memory_errors, parts, smaller_parts, to_device

OVERFIT_GAP = math.log(2)  # nats, chosen: validation perplexity is twice that of training


class Score(NamedTuple):
    """Means over the scored targets."""

    loss: float  # nats per token
    accuracy: float  # share of the targets that had the largest logit
    bpb: float  # bits per byte: all targets' loss over all targets' UTF-8 bytes
    windows: int  # how many were scored
    error: float  # standard error of loss
    by_position: list[tuple[float, float]]  # loss and its standard error at each of position_ranges(seq_len)


class Stopped(Exception):
    """A stop signal came during an evaluation."""


def position_ranges(seq_len: int) -> list[tuple[int, int]]:
    """The positions of a window, from 0, in ranges that double: (0, 64), (64, 128), (128, 256), ..., (_, seq_len)."""
    ends = [64 * 2**i for i in range(seq_len.bit_length()) if 64 * 2**i < seq_len]
    return list(itertools.pairwise([0, *ends, seq_len]))


def standard_error(total: float, squares: float, n: int) -> float:
    """Of the mean of n independent values, from their sum and that of their squares; NaN of a single one."""
    return math.sqrt(max(0.0, squares - total**2 / n) / (n - 1) / n) if n > 1 else math.nan


def score_windows(
    score_of: Callable[[Tensor], tuple[Tensor, Tensor]],
    split: Split,
    seq_len: int,
    n: int,
    token_bytes: Tensor,
    config: Config,
    team: Processes,
) -> Score:
    """The score of n windows of seq_len, evenly spread over a split and shared by the processes.

    score_of is train.set_up's; token_bytes (V,) holds each token's UTF-8 bytes, on the model's device.
    Raises Stopped on all processes once one has seen a stop signal.

    The targets of a window share its text and so are not independent. Standard errors therefore take a window for one
    observation, its mean loss: all windows have equally many targets. Windows of one article still resemble each other,
    so at lengths far below an article's the true error is larger.
    """
    ranges = [(0, seq_len), *position_ranges(seq_len)]
    # Losses, hits, bytes; the windows' means in each range; their squares. On the device, which nobody has to wait for.
    sums = torch.zeros(3 + 2 * len(ranges), dtype=torch.float64, device=token_bytes.device)
    share = team.share(split.spread(seq_len, n))
    advice, out_of_memory = smaller_parts(config, share, seq_len), False
    try:
        with memory_errors(advice):
            for numbers in parts(share, seq_len, config.micro_batch_tokens):
                if team.seen:
                    break
                windows = to_device(split.fixed_windows(seq_len, numbers), token_bytes.device)
                with torch.no_grad():
                    losses, is_hit = score_of(windows)
                losses = losses.double()
                means = torch.stack([losses[:, start:end].mean(1) for start, end in ranges])  # (ranges, B)
                totals = torch.stack([losses.sum(), is_hit.sum(), token_bytes[windows[:, 1:]].sum()])
                sums += torch.cat([totals, means.sum(1), means.square().sum(1)])
    except UserError:
        out_of_memory = True
    if team.heed(team.sum(team.flags(out_of_memory))):
        raise team.error(f"out of memory: {advice}")
    if team.stop:
        raise Stopped
    loss, hits, n_bytes, *by_range = team.sum(sums.tolist())
    range_sums, range_squares = by_range[: len(ranges)], by_range[len(ranges) :]
    means = [(total / n, standard_error(total, squares, n)) for total, squares in zip(range_sums, range_squares)]
    return Score(loss / (n * seq_len), hits / (n * seq_len), loss / math.log(2) / max(1, n_bytes),
                 n, means[0][1], means[1:])  # fmt: skip


class Best(NamedTuple):
    """What early stopping remembers: the best validation loss of the current length, and evaluations without it.

    train.py stops once bad_evals is more than config.patience.
    """

    seq_len: int = 0
    loss: float = math.inf
    bad_evals: int = 0

    def after(self, seq_len: int, loss: float) -> "Best":
        """Losses at different lengths do not compare, so a new length starts anew."""
        best = self if seq_len == self.seq_len else Best(seq_len)
        return Best(seq_len, loss) if loss < best.loss else best._replace(bad_evals=best.bad_evals + 1)


def summary(record: dict, config: Config) -> str:
    """One line about an evaluation: how the run stands against the plan, and whether it overfits."""
    line = f"step {record['step']:,}: stage {record['stage']}/{len(config.stages)}, length {record['seq_len']:,}, "
    line += f"val loss {record['val_loss']:.3f}, ppl {record['val_ppl']:,.1f}"
    if plan := record["plan_ppl"]:
        line += f" ({'ahead of' if record['val_ppl'] <= plan else 'behind'} plan: {plan:,.0f})"
    line += f", gap {record['gap']:+.2f}" + (" overfits" if record["gap"] >= OVERFIT_GAP else "")
    return line + (", best" if record["is_best"] else f", no best for {record['bad_evals']}")


def eval_table(records: list[dict]) -> str:
    """The evaluations of a run, one a row. The last loss is at the table's last length: it compares across stages."""
    columns = {
        "step": ("step", "{:,}"),
        "stage": ("stage", "{}"),
        "length": ("seq_len", "{:,}"),
        "val loss": ("val_loss", "{:.3f}"),
        "val ppl": ("val_ppl", "{:,.1f}"),
        "accuracy": ("val_accuracy", "{:.1%}"),
        "bpb": ("val_bpb", "{:.3f}"),
        "train loss": ("train_loss", "{:.3f}"),
        "gap": ("gap", "{:+.3f}"),
        "last len": ("last_len_loss", "{:.3f}"),
        "seconds": ("time_s", "{:,.0f}"),
    }
    rows = [[form.format(record[key]) for key, form in columns.values()] for record in records]
    return format_table(list(columns), rows)


# --------------------------------------------------------------------------------------------------------------------
# A model at every length


def score_lengths(
    score_of: Callable, split: Split, token_bytes: Tensor, config: Config, team: Processes
) -> dict[int, Score]:
    """The scores of all windows of a split at each of the table's lengths, ascending, those never reached too."""
    lengths = sorted({row[1] for row in config.stages})
    bar = tqdm(lengths, unit="length", leave=False, dynamic_ncols=True, disable=True if team.rank else None)
    return {length: score_windows(score_of, split, length, split.count(length, 0), token_bytes, config, team)
            for length in bar}  # fmt: skip


def report(scores: dict[int, Score]) -> str:
    """What was scored at each length, and the losses by position in the window, all with standard errors."""
    header = ["length", "windows", "loss", "error", "ppl", "accuracy", "bpb"]
    rows = [[f"{length:,}", f"{s.windows:,}", f"{s.loss:.4f}", f"{s.error:.4f}", f"{math.exp(min(s.loss, 700)):,.2f}",
             f"{s.accuracy:.2%}", f"{s.bpb:.4f}"] for length, s in scores.items()]  # fmt: skip
    tables = [format_table(header, rows), "Loss by position in the window, a length a column:"]
    for first in range(0, len(scores), 9):  # more columns would be more than 100 characters
        lengths, rows = list(scores)[first : first + 9], []
        by_position = [scores[length].by_position for length in lengths]
        for (start, end), *means in itertools.zip_longest(position_ranges(lengths[-1]), *by_position):
            rows.append([f"{start + 1:,}-{end:,}", *(f"{mean[0]:.4f}" if mean else "" for mean in means)])
            rows.append(["", *(f"±{mean[1]:.4f}" if mean else "" for mean in means)])
        tables.append(format_table(["position", *(f"{length:,}" for length in lengths)], rows))
    return "\n\n".join(tables)
