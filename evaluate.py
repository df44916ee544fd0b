"""Score held-out windows during a run. As a program, score a run's best.pt at every length and position.

    python evaluate.py --out_dir=out/demo [--data_dir=data/other, else the run's] [--device=cpu] [--dtype=float32]
"""

import itertools
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy import ndarray
from tqdm import tqdm

from checkpoint import load_model
from curriculum import Curriculum, expected_ppl, format_table
from data import Dataset, Split, micro_batches, open_dataset
from model import GPT, on_machine
from parallel import Team
from settings import Config, check_ranges, read_arguments, user_errors


class Score(NamedTuple):
    """Means over the scored targets."""

    windows: int  # scored
    loss: float  # nats per token
    accuracy: float  # share of the targets that had the largest logit
    bpb: float  # bits per byte: all targets' loss over all targets' UTF-8 bytes
    error: float  # standard error of loss
    by_position: list[tuple[float, float]]  # loss and its standard error at each of position_ranges(seq_len)

    def fields(self) -> dict[str, float]:
        ppl = math.exp(min(self.loss, 700))
        return {"val_loss": self.loss, "val_ppl": ppl, "val_accuracy": self.accuracy, "val_bpb": self.bpb}


def position_ranges(seq_len: int) -> list[tuple[int, int]]:
    """Return a window's positions in ranges that double: (0, 64), (64, 128), (128, 256), ..., (_, seq_len)."""
    return list(itertools.pairwise([0, *(64 << i for i in range(seq_len.bit_length()) if 64 << i < seq_len), seq_len]))


def score_windows(
    model: GPT, split: Split, seq_len: int, numbers: ndarray, token_bytes: ndarray, micro_batch_tokens: int, team: Team
) -> Score:
    """Score the windows of a split with these numbers. Standard errors count a window as one observation. Windows of
    one article resemble each other: where windows are much shorter than articles, the true error is larger."""
    n, ranges = len(numbers), [(0, seq_len), *position_ranges(seq_len)]
    hits, n_bytes, sums = 0, 0, torch.zeros(2, len(ranges), dtype=torch.float64, device=model.device)
    parts = micro_batches(team.share(numbers), seq_len, micro_batch_tokens)
    for part in tqdm(parts, f"scoring at {seq_len:,}", leave=False, delay=3, disable=True if team.rank else None):
        windows = split.fixed_windows(seq_len, part)
        losses, is_hit = model.score(torch.from_numpy(windows).to(model.device))
        means = torch.stack([losses[:, start:end].double().mean(1) for start, end in ranges])  # (ranges, B)
        sums += torch.stack([means, means.square()]).sum(2)
        hits += is_hit.sum()
        n_bytes += int(token_bytes[windows[:, 1:]].sum(dtype=np.int64))
    hits, n_bytes, *sums = team.sum([float(hits), n_bytes, *sums.flatten().tolist()])
    means, squares = np.array(sums).reshape(2, -1) / n
    errors = np.sqrt(np.maximum(squares - means**2, 0) / (n - 1)) if n > 1 else means * math.nan
    (loss, error), *by_position = zip(means.tolist(), errors.tolist())
    return Score(n, loss, hits / (n * seq_len), loss * n * seq_len / math.log(2) / max(1, n_bytes), error, by_position)


def evaluate(model: GPT, data: Dataset, curriculum: Curriculum, step: int, config: Config, team: Team) -> dict:
    """Score the model after `step` steps at its stage's length; return the log's fields. The training loss and the loss
    at the table's last length use a quarter as many tokens."""
    stage, last_len = curriculum.at(max(0, step - 1)), curriculum.last_len
    shared = data.token_bytes, config.micro_batch_tokens, team
    val = score_windows(model, data.val, stage.seq_len, data.val.spread(stage.seq_len, config.eval_tokens), *shared)
    few = data.train.spread(stage.seq_len, max(1, val.windows // 4) * stage.seq_len)
    train = score_windows(model, data.train, stage.seq_len, few, *shared)
    few = data.val.spread(last_len, max(1, len(data.val.spread(last_len, config.eval_tokens)) // 4) * last_len)
    last = score_windows(model, data.val, last_len, few, *shared)
    return {"stage": stage.number, "seq_len": stage.seq_len, **val.fields(), "train_loss": train.loss,
            "gap": val.loss - train.loss, "last_len_loss": last.loss,
            "plan_ppl": expected_ppl(config.plan_ppl, step)}  # fmt: skip


def summary(record: dict, config: Config) -> str:
    """Return one line about an evaluation: how the run compares with the plan, and whether it overfits."""
    line = f"step {record['step']:,}: stage {record['stage']}/{len(config.stages)}, length {record['seq_len']:,}, "
    line += f"val loss {record['val_loss']:.3f}, ppl {record['val_ppl']:,.1f}"
    if plan := record["plan_ppl"]:
        line += f" ({'ahead of' if record['val_ppl'] <= plan else 'behind'} plan: {plan:,.0f})"
    line += f", gap {record['gap']:+.2f}" + (" overfits" if record["gap"] >= math.log(2) else "")  # twice training ppl
    return line + (", best" if record["is_best"] else f", no best for {record['bad_evals']}")


def eval_table(records: list[dict]) -> str:
    """Return a run's evaluations as a table. Its "last len", the loss at the last stage's length, compares stages."""
    form = ("{step:,} {stage} {seq_len:,} {val_loss:.3f} {val_ppl:,.1f} {val_accuracy:.1%} {val_bpb:.3f} "
            "{train_loss:.3f} {gap:+.3f} {last_len_loss:.3f} {time_s:,.0f}")  # fmt: skip
    header = "step,stage,length,val loss,val ppl,accuracy,bpb,train loss,gap,last len,seconds".split(",")
    return format_table(header, [form.format(**record).split() for record in records])


def report(scores: dict[int, Score]) -> str:
    """Return the scores at each length, and the loss by position in the longest window, with standard errors."""
    header = ["length", "windows", "loss", "error", "ppl", "accuracy", "bpb"]
    rows = [[f"{length:,}", f"{s.windows:,}", f"{s.loss:.4f}", f"{s.error:.4f}", f"{s.fields()['val_ppl']:,.2f}",
             f"{s.accuracy:.2%}", f"{s.bpb:.4f}"] for length, s in scores.items()]  # fmt: skip
    by_position = [[f"{start + 1:,}-{end:,}", f"{loss:.4f}", f"{error:.4f}"] for (start, end), (loss, error)
                   in zip(position_ranges(max(scores)), scores[max(scores)].by_position)]  # fmt: skip
    return f"{format_table(header, rows)}\n\n{format_table(['position', 'loss', 'error'], by_position)}"


def main() -> None:
    given = read_arguments(sys.argv[1:], ("out_dir", "data_dir", "device", "dtype", "compile", "micro_batch_tokens"))
    path = Path(given.get("out_dir", Config.out_dir)) / "best.pt"
    model, state = load_model(path, untrained_lengths=True)
    check_ranges(config := Config(**state["config"] | {"device": "auto", "dtype": "auto"} | given))
    lengths = sorted({row[1] for row in config.stages})
    data = open_dataset(config.data_dir, lengths[-1])
    on_machine(model, config.device, config.dtype, config.compile)
    print(f"{path} is the model after {state['step']:,} steps. On all held-out articles:\n")
    shared = data.token_bytes, config.micro_batch_tokens, Team()
    scores = {length: score_windows(model, data.val, length, data.val.spread(length), *shared) for length in lengths}
    print(report(scores))


if __name__ == "__main__":
    with user_errors("a smaller --micro_batch_tokens than the run's takes less"):
        main()
