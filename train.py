"""Train a GPT through a curriculum of growing windows.

    python train.py config/curriculum9.py --data_dir=data/wiki --out_dir=out/curriculum9 [--key=value ...]

Each step draws its windows (curriculum.py), runs them forward and backward in parts of at most micro_batch_tokens,
clips the gradient and updates the weights. Around the steps: validation on held-out articles, early stopping,
checkpoints, the log. The same command with --resume=True goes on where a stopped or killed run was, exactly.

out_dir/last.pt    everything needed to go on      out_dir/best.pt    the model at the best validation of its length
out_dir/prev.pt    the last.pt before it           out_dir/log.jsonl  one record per logged step and evaluation
"""

import dataclasses
import json
import math
import os
import signal
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from config import Config, UserError, load_config, user_errors
from curriculum import PEAK_FLOPS, Curriculum, Split, expected_ppl, format_table, learning_rate, open_dataset
from model import GPT, GPTConfig

# Huge pages, where Linux gives them (torch reads this at its first allocation): with small ones, a tenth of a CPU's
# work was faulting in the memory that every step takes and gives back. 1.2 times as fast with a model of width 256.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# --------------------------------------------------------------------------------------------------------------------
# One optimizer step


def make_optimizers(model: GPT, config: Config) -> list[torch.optim.Optimizer]:
    """Fused AdamW for everything, or Muon (Jordan et al. 2024) for the blocks' matrices and AdamW for the rest.

    match_rms_adamw (Liu et al. 2025) scales Muon's updates to the size of AdamW's: one learning rate serves both.
    """
    matrices = [weight for weight in model.blocks.parameters() if weight.ndim == 2]
    norms = [weight for weight in model.parameters() if weight.ndim == 1]
    use_muon = config.optimizer == "muon"
    decayed = [model.embed.weight] if use_muon else [model.embed.weight, *matrices]
    groups = [{"params": decayed}, {"params": norms, "weight_decay": 0.0}]
    # 0.99, not 0.95: with so few tokens a step the second moment needs a longer memory (Marek et al. 2025).
    optimizers = [torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True)]
    if use_muon:
        optimizers += [torch.optim.Muon(matrices, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")]
    return optimizers


def parts(windows: np.ndarray, seq_len: int, micro_batch_tokens: int) -> list[np.ndarray]:
    """Windows of seq_len (or their numbers) in parts within micro_batch_tokens: as few and as equal as can be."""
    return np.array_split(windows, math.ceil(len(windows) / (micro_batch_tokens // seq_len)))


def to_device(windows: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(windows)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def train_step(
    loss_of: Callable[[Tensor], Tensor],
    model: GPT,
    optimizers: list[torch.optim.Optimizer],
    windows: np.ndarray,
    lr: float,
    config: Config,
) -> tuple[float, float]:
    """One update from windows (B, T + 1): its mean loss in nats per token, and the gradient's norm before clipping.

    loss_of is model.loss, as compiled. Every target weighs the same, however the batch is parted: the parts' sums of
    losses are divided by the whole batch's number of targets.
    """
    seq_len = windows.shape[1] - 1
    device = model.embed.weight.device
    mean_loss = torch.zeros((), device=device)
    for part in parts(windows, seq_len, config.micro_batch_tokens):
        loss = loss_of(to_device(part, device)) / (len(windows) * seq_len)
        loss.backward()
        mean_loss += loss.detach()
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    return mean_loss.item(), grad_norm.item()


# --------------------------------------------------------------------------------------------------------------------
# Validation


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
    micro_batch_tokens: int,
    stop: list[int],
) -> Score:
    """The score of n windows of seq_len, evenly spread over a split; raises Stopped once a signal stands in stop.

    score_of is model.score, as compiled; token_bytes (V,) holds each token's UTF-8 bytes, on the model's device.
    """
    loss, hits, n_bytes = 0.0, 0, 0
    for numbers in parts(split.spread(seq_len, n), seq_len, micro_batch_tokens):
        if stop:
            raise Stopped
        windows = to_device(split.fixed_windows(seq_len, numbers), token_bytes.device)
        with torch.no_grad():
            losses, is_hit = score_of(windows)
        loss += losses.double().sum().item()
        hits += is_hit.sum().item()
        n_bytes += token_bytes[windows[:, 1:]].sum().item()
    return Score(loss / (n * seq_len), hits / (n * seq_len), loss / math.log(2) / max(1, n_bytes))


class Best(NamedTuple):
    """What early stopping remembers: the best validation loss of the current length, and evaluations without it."""

    seq_len: int = 0
    loss: float = math.inf
    bad_evals: int = 0

    def after(self, seq_len: int, loss: float) -> "Best":
        """Losses at different lengths do not compare, so a new length starts anew."""
        if seq_len != self.seq_len or loss < self.loss:
            return Best(seq_len, loss)
        return self._replace(bad_evals=self.bad_evals + 1)


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


# --------------------------------------------------------------------------------------------------------------------
# Files: checkpoints and the log


def save_checkpoint(path: Path, state: dict) -> None:
    """Writes state beside path, makes it durable, and only then gives it the name; last.pt becomes prev.pt."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    if path.name == "last.pt" and path.exists():
        path.replace(path.with_name("prev.pt"))
    temporary.replace(path)


def load_checkpoint(path: Path) -> dict:
    """What save_checkpoint wrote, on the CPU. Raises UserError for a file that is damaged or no checkpoint.

    torch.load does not look at the archive's checksums; weights_only keeps a foreign file from running code.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise UserError(f"{path} is damaged: {damaged} in it does not match its checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # zipfile, pickle and torch each have their own
        raise UserError(f"{path} is not a readable checkpoint: {type(error).__name__}: {error}") from error


def find_checkpoint(out_dir: Path) -> dict | None:
    """last.pt, or prev.pt where that is missing or damaged (which is said); None if there is neither."""
    candidates = [path for path in (out_dir / "last.pt", out_dir / "prev.pt") if path.exists()]
    for path in candidates[:-1]:
        try:
            return load_checkpoint(path)
        except UserError as error:
            print(f"{error}; going on from the checkpoint before it", file=sys.stderr)
    return load_checkpoint(candidates[-1]) if candidates else None


# What may differ between a checkpoint and the run that goes on from it; anything else would make it another run.
MAY_CHANGE = {"data_dir", "out_dir", "resume", "max_steps", "plan_ppl", "phases", "micro_batch_tokens", "device"}
MAY_CHANGE |= {"dtype", "compile", "eval_interval", "eval_tokens", "patience", "checkpoint_interval", "log_interval"}


def check_same_run(config: Config, state: dict) -> None:
    """Raises UserError with the keys that differ between this configuration and the checkpoint's."""
    old, new = state["config"], dataclasses.asdict(config)
    changes = [key for key in new if key not in MAY_CHANGE and old.get(key) != new[key]]
    if changes:
        listed = ", ".join(f"{key} was {old.get(key)!r} and is {new[key]!r}" for key in changes)
        raise UserError(f"the checkpoint in {config.out_dir} is of another run: {listed}")


class Log:
    """log.jsonl, one JSON object a line, written out as it comes.

    Opened at a step, it forgets what a killed run logged after it. The evaluation at that very step, which comes after
    the checkpoint, is kept if keep_eval: if it was made under the same configuration.
    """

    def __init__(self, path: Path, step: int, keep_eval: bool):
        self.records = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                record = json.loads(line)
            except ValueError:
                break  # cut off in the middle by a kill
            if record["step"] < step or (record["step"] == step and (record["event"] == "train" or keep_eval)):
                self.records.append(record)
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in self.records))
        temporary.replace(path)
        self.file = open(path, "a", buffering=1)

    def evaluations(self) -> list[dict]:
        return [record for record in self.records if record["event"] == "eval"]

    def write(self, record: dict) -> None:
        self.records.append(record)
        self.file.write(json.dumps(record) + "\n")


# --------------------------------------------------------------------------------------------------------------------
# The machine


def pick_device(name: str) -> torch.device:
    """'cpu', 'cuda', 'cuda:1', ...; 'auto' is a GPU if there is one. Raises UserError for what cannot be had."""
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        device = torch.device(chosen)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of matrix products. 'auto' is bfloat16 where it is fast: a CPU without it would emulate it."""
    if name == "auto":
        has_bf16 = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
        name = "bfloat16" if has_bf16 else "float32"
    if name not in ("bfloat16", "float32"):
        raise UserError(f"dtype={name!r} is none of 'auto', 'bfloat16', 'float32'")
    return getattr(torch, name)


def set_up(
    config: Config, max_len: int, device: torch.device, dtype: torch.dtype
) -> tuple[GPT, list[torch.optim.Optimizer], Callable, Callable]:
    """The model with its first weights, its optimizers, and model.loss and model.score under autocast and compiled.

    One graph of each serves the whole table: its sizes are symbols, and sizes that happen to be equal do not become one
    symbol (with duck shaping, 128 windows of 128 would compile anew). A part of a single window compiles anew, once,
    and so does one of more than 4,096 tokens where the first had fewer, and the other way round.
    """
    # Same inputs, same bits: without this the compiled gradient of the embedding differs from run to run. It costs
    # nothing measurable on a CPU as long as fresh memory is not filled with NaN first.
    torch.use_deterministic_algorithms(device.type == "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.set_float32_matmul_precision("high")  # TF32 for what is float32 on a GPU
    torch.fx.experimental._config.use_duck_shape = False

    model = GPT(GPTConfig(config.n_layer, config.n_head, config.n_embd), max_len)
    model.init_weights(config.seed)
    model.to(device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    functions = [torch.compile(f, dynamic=True) if config.compile else f for f in (model.loss, model.score)]
    return model, make_optimizers(model, config), *map(autocast, functions)


# --------------------------------------------------------------------------------------------------------------------
# The loop


def train(config: Config) -> int:
    """The run that config describes. Returns 0, or the number of the signal that stopped it."""
    curriculum = Curriculum(config.stages, config.max_steps)
    if config.micro_batch_tokens < curriculum.max_len:
        raise UserError(f"micro_batch_tokens={config.micro_batch_tokens} is less than a window of {curriculum.max_len}")
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    out_dir = Path(config.out_dir)
    used = [name for name in ("last.pt", "prev.pt", "best.pt", "log.jsonl") if (out_dir / name).exists()]
    if used and not config.resume:
        raise UserError(f"{out_dir} holds a run ({', '.join(used)}): give --resume=True or another --out_dir")
    dataset = open_dataset(config.data_dir, curriculum)
    state = find_checkpoint(out_dir)
    if state:
        check_same_run(config, state)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make out_dir {out_dir}: {error.strerror}") from error

    model, optimizers, loss_of, score_of = set_up(config, curriculum.max_len, device, dtype)
    step, time_s, best = 0, 0.0, Best()
    if state:
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, time_s, best = state["step"], state["time_s"], Best(*state["best"])
        print(f"going on from step {step:,} of {out_dir}")
    saved_step = step if state else None
    keep_eval = state is not None and state["config"] | {"resume": True} == dataclasses.asdict(config)
    state = None  # its tensors were copied
    token_bytes = torch.from_numpy(dataset.token_bytes.astype(np.int64)).to(device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak_flops = next((peak for name, peak in PEAK_FLOPS.items() if name in gpu), None)
    log = Log(out_dir / "log.jsonl", step, keep_eval)

    stop = []  # the signals that came; a second one of its kind kills

    def on_signal(number: int, frame: object) -> None:
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)

    def save(name: str, **more: object) -> None:
        state = {"config": dataclasses.asdict(config), "step": step, "model": model.state_dict()}
        save_checkpoint(out_dir / name, state | more)

    def score(split: Split, seq_len: int, n: int) -> Score:
        return score_windows(score_of, split, seq_len, n, token_bytes, config.micro_batch_tokens, stop)

    def evaluate() -> dict:
        """The log's record of an evaluation after `step` steps."""
        number, last_len = curriculum.index(max(0, step - 1)), curriculum.last_len
        seq_len = curriculum.stages[number].seq_len
        n = dataset.val.count(seq_len, 0 if step == config.max_steps else config.eval_tokens)
        n_last = max(1, dataset.val.count(last_len, config.eval_tokens) // 4)
        n_train = dataset.train.count(seq_len, max(1, n // 4) * seq_len)
        val = score(dataset.val, seq_len, n)
        train_loss = score(dataset.train, seq_len, n_train).loss
        after = best.after(seq_len, val.loss)
        return {"event": "eval", "step": step, "stage": number + 1, "seq_len": seq_len, "val_loss": val.loss,
                "val_ppl": math.exp(min(val.loss, 700)), "val_accuracy": val.accuracy, "val_bpb": val.bpb,
                "train_loss": train_loss, "gap": val.loss - train_loss,
                "last_len_loss": score(dataset.val, last_len, n_last).loss,
                "plan_ppl": expected_ppl(config.plan_ppl, step), "is_best": after.bad_evals == 0,
                "bad_evals": after.bad_evals, "time_s": round(time_s, 3)}  # fmt: skip

    bar = tqdm(total=config.max_steps, initial=step, unit="step", disable=None, dynamic_ncols=True)
    counted = (step, time_s)  # where the next tokens/s starts
    while True:
        eval_due = step % config.eval_interval == 0 or curriculum.ends_stage(step)
        if (eval_due or stop or step % config.checkpoint_interval == 0) and step != saved_step:
            optimizer_states = [optimizer.state_dict() for optimizer in optimizers]
            save("last.pt", optimizers=optimizer_states, time_s=time_s, best=tuple(best))
            saved_step = step
        if stop:
            break
        if eval_due:
            record = next((record for record in log.evaluations() if record["step"] == step), None)
            if not record:
                try:
                    record = evaluate()
                except Stopped:
                    continue
                if record["is_best"]:
                    save("best.pt")
                log.write(record)
                bar.write(summary(record, config))
            best = best.after(record["seq_len"], record["val_loss"])
            if best.bad_evals > config.patience:
                bar.write(f"stopped early: {best.bad_evals} evaluations without a new best at length {best.seq_len:,}")
                break
        if step == config.max_steps:
            break

        started = time.perf_counter()
        stage = curriculum.at(step)
        lr = learning_rate(config, stage, step)
        windows = dataset.train.random_windows(stage.seq_len, stage.batch_size, config.seed, step)
        loss, grad_norm = train_step(loss_of, model, optimizers, windows, lr, config)
        step += 1
        time_s += time.perf_counter() - started

        if step % config.log_interval == 0:
            number, tokens = curriculum.index(step - 1) + 1, curriculum.tokens_before(step)
            tokens_per_s = (tokens - curriculum.tokens_before(counted[0])) / (time_s - counted[1])
            mfu = tokens_per_s * model.config.flops_per_token(stage.seq_len) / peak_flops if peak_flops else None
            counted = (step, time_s)
            log.write({"event": "train", "step": step, "stage": number, "seq_len": stage.seq_len,
                       "batch_size": stage.batch_size, "lr": lr, "loss": loss, "grad_norm": grad_norm,
                       "tokens": tokens, "tokens_per_s": round(tokens_per_s, 1), "mfu": mfu,
                       "time_s": round(time_s, 3)})  # fmt: skip
            bar.set_description(f"stage {number}/{len(config.stages)}, length {stage.seq_len:,}", refresh=False)
            bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_s:,.0f} tokens/s", refresh=False)
        bar.update()
    bar.close()
    if stop:
        print(f"stopped by {signal.Signals(stop[0]).name} after step {step:,}; --resume=True goes on")
    else:
        print(eval_table(log.evaluations()))
    return stop[0] if stop else 0


if __name__ == "__main__":
    with user_errors():
        if number := train(load_config(sys.argv[1:])):
            sys.exit(128 + number)
