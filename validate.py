"""Validation: how good a model is on windows that it was not trained on, and what follows from it.

    windows of a split -> score_windows -> Score     loss, accuracy, bits per byte of a model at one length
    the run's losses   -> Best                       whether this one is a new best, and when to stop early
    the log's records  -> summary, eval_table        what a run says of an evaluation, and of all at its end
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from config import Config, UserError
from curriculum import Split, format_table
from parallel import Processes, memory_errors, parts, smaller_parts, to_device


class Score(NamedTuple):
    """Means over the scored targets."""

    loss: float  # nats per token
    accuracy: float  # share of the targets that had the largest logit
    bpb: float  # bits per byte: all targets' loss over all targets' UTF-8 bytes


class Stopped(Exception):
    """A stop signal came during an evaluation."""


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

    score_of is model.score, as compiled; token_bytes (V,) holds each token's UTF-8 bytes, on the model's device.
    Raises Stopped on all processes once one has seen a stop signal.
    """
    loss, hits, n_bytes = 0.0, 0, 0
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
                loss += losses.double().sum().item()
                hits += is_hit.sum().item()
                n_bytes += token_bytes[windows[:, 1:]].sum().item()
    except UserError:
        out_of_memory = True
    loss, hits, n_bytes, *flags = team.sum([loss, hits, n_bytes, *team.flags(out_of_memory)])
    if team.heed(flags):
        raise team.error(f"out of memory: {advice}")
    if team.stop:
        raise Stopped
    return Score(loss / (n * seq_len), hits / (n * seq_len), loss / math.log(2) / max(1, n_bytes))


class Best(NamedTuple):
    """What early stopping remembers: the best validation loss of the current length, and evaluations without it."""

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
    line += f", gap {record['gap']:+.2f}" + (" overfits" if record["gap"] >= math.log(2) else "")
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
