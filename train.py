"""Train a GPT through a curriculum of growing windows.

    python train.py config/curriculum9.py --data_dir=data/wiki --out_dir=out/curriculum9 [--key=value ...]

Each step takes its stage's row (curriculum.py), draws so many windows (dataset.py), runs them forward and backward
(model.py, loss.py) in parts of at most micro_batch_tokens, clips the gradient and updates the weights. Around the
steps: validation and early stopping (validate.py), checkpoints and the log (checkpoint.py). The same command with
--resume=True goes on where a stopped or killed run was, exactly. `torchrun --nproc_per_node=N train.py ...` makes the
same run on N processes (parallel.py).
"""

import ctypes
import dataclasses
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import muon
from checkpoint import load_checkpoint, open_best, open_run, save_checkpoint
from config import Config, load_config
from curriculum import PEAK_FLOPS, Curriculum, expected_ppl, learning_rate
from dataset import Split, open_dataset
from errors import UserError, user_errors
from model import GPT, GPTConfig
from parallel import Processes, join_processes, memory_errors, parts, smaller_parts, to_device
from validate import Best, Score, Stopped, eval_table, report, score_lengths, score_windows, summary

MAX_SKIPPED = 10  # steps in a row without a finite gradient that end a run: chosen. float16's scale halves at each

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
        Muon = muon.Muon if model.embed.weight.is_cuda else torch.optim.Muon
        optimizers += [Muon(matrices, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")]
    return optimizers


def train_step(
    loss_of: Callable[[Tensor], Tensor],
    model: GPT,
    optimizers: list[torch.optim.Optimizer],
    windows: np.ndarray,
    lr: float,
    config: Config,
    scaler: torch.amp.GradScaler | None = None,
    team: Processes | None = None,
) -> tuple[float, float]:
    """One update from windows (B, T + 1): its mean loss in nats per token, and the gradient's norm before clipping.

    loss_of is set_up's. Every target weighs the same, however the batch is parted: the parts' sums of
    losses are divided by the whole batch's number of targets. Where the loss or the norm is not finite, the weights
    and the optimizers stay as they are. scaler is float16's; team are the processes that share the batch.
    """
    scaler, team = scaler or torch.amp.GradScaler(enabled=False), team or Processes()
    seq_len = windows.shape[1] - 1
    device = model.embed.weight.device
    mean_loss = torch.zeros((), device=device)
    scaler.scale(mean_loss)  # makes the scale: unscale_ needs it even where no part comes to scale its loss
    share = team.share(windows)
    advice, out_of_memory = smaller_parts(config, share, seq_len), False
    try:
        with memory_errors(advice):
            for part in parts(share, seq_len, config.micro_batch_tokens):
                loss = loss_of(to_device(part, device)) / (len(windows) * seq_len)
                scaler.scale(loss).backward()
                mean_loss += loss.detach()
    except UserError:
        out_of_memory = True  # the others wait: they hear of it with the gradients
    if out_of_memory:
        loss = None  # frees the graph, and then what the all-reduce may need
        torch.cuda.empty_cache()
    sums = team.sum_gradients(model, mean_loss, team.flags(out_of_memory))
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
    grad_norm = grad_norm.to(device)  # where there is no gradient it is not there yet
    # The step's one wait for the GPU. Here, the next step is launched while the optimizers run; after them, it would
    # be launched while nothing runs.
    loss, *flags, grad_norm = torch.cat((sums, grad_norm[None])).tolist()
    if team.heed(flags):
        raise team.error(f"out of memory: {advice}")
    with memory_errors(advice):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            if math.isfinite(loss) and math.isfinite(grad_norm):
                optimizer.step()
            optimizer.zero_grad()
    if scaler.is_enabled():
        scaler.update()
    return loss, grad_norm


# --------------------------------------------------------------------------------------------------------------------
# The machine


def pick_device(name: str) -> torch.device:
    """'cpu', 'cuda', 'cuda:1', ...; 'auto' is a GPU if there is one. Raises UserError for what cannot be had.

    Under torchrun 'cuda' is the GPU with the process's number on its machine.
    """
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    if chosen == "cuda" and "LOCAL_RANK" in os.environ:
        chosen = f"cuda:{os.environ['LOCAL_RANK']}"
    elif chosen.startswith("cuda:") and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        raise UserError(f"device={name!r} is one GPU for several processes: give 'cuda'")
    try:
        device = torch.device(chosen)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of matrix products. 'auto' is bfloat16 where that is fast, else float16 on a GPU and float32 on a CPU.

    A GPU without bfloat16 would emulate it. So would a CPU; and one that has it, but no AMX, still takes twice as long
    in it as in float32 (an Emerald Rapids with AMX hidden).
    """
    if name == "auto" and device.type == "cuda":
        name = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    elif name == "auto":
        name = "bfloat16" if torch.cpu.get_capabilities().get("amx_bf16") else "float32"
    if name not in ("bfloat16", "float16", "float32"):
        raise UserError(f"dtype={name!r} is none of 'auto', 'bfloat16', 'float16', 'float32'")
    return getattr(torch, name)


def peak_flops(gpu: str) -> float | None:
    """Of a GPU by its full name; None of what is not in the table, as a laptop's of a like name or a MIG part."""
    other = r"(?! (Ti|D|Laptop|PCIe|NVL)\b)(?!.* MIG )"
    return next((peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}\b{other}", gpu)), None)


def keep_memory() -> None:
    """Lets this process keep what it has freed, for its next step.

    By itself, glibc gives large blocks back to the kernel, which fills them with zeros, page by page, before the next
    step gets them again. With the blocks kept a step on a CPU is 1.1 to 1.2 times as fast, small model or large, and
    takes a fifth to a third more memory, for it leaves holes (bench/RESULTS.md).
    """
    with suppress(OSError, AttributeError):  # a C library that is not glibc has its own ways
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is apart from the heap ...
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: ... which never shrinks


def compile_block(module: torch.nn.Module) -> None:
    """Compiles the forward pass of a module whose first argument is x (B, ...), for all B and T.

    Left alone, torch compiles anew for a single window, where B is 1, and once for more tokens than a bound (on a CPU
    4,096) if the first had fewer. On a CPU it is told that B may be anything, which leaves one graph to train by and
    one to score by. A GPU might then compute 64-bit indices, and was not tried.
    """
    forward = torch.compile(module.forward, dynamic=True)

    def forward_any(x: Tensor, *arguments: object) -> Tensor:
        if x.device.type == "cpu":
            torch._dynamo.decorators.mark_unbacked(x, 0)
        return forward(x, *arguments)

    module.forward = forward_any


def set_up(
    config: Config, max_len: int, device: torch.device, dtype: torch.dtype
) -> tuple[GPT, list[torch.optim.Optimizer], Callable, Callable]:
    """The model with its first weights, its optimizers, and model.loss and model.score under autocast and compiled.

    What is chosen for the device's sake, and why (for a GPU measured on one H100, where it says so, and else reasoned):

    compiled        block by block: one graph serves all layers, so a deeper model compiles no longer; the embedding's
                    look-up and the head's large products would gain nothing
    shapes          symbols, on both: a graph serves many shapes, on a CPU the whole table (compile_block). Sizes that
                    happen to be equal do not become one symbol (with duck shaping, 128 windows of 128 would compile
                    anew). A GPU may need up to 12 graphs, where torch would give up at 8
    CUDA graphs     none: they need one graph a shape. An H100 does not quite hide a step's launches behind 16,384
                    tokens of work, and a graph made 49 ms of 54 (bench/RESULTS.md); a slower GPU hides more of them
    loss            loss.CrossEntropy, on both: exponentials of the logits in the products' type (1.6 GB for 16,384
                    tokens in bfloat16), and nothing else of that size. On a CPU torch's own takes 1.65 times as long
                    with AMX and 1.05 without, F.linear_cross_entropy 3 to 4 times there (bench/head.py)
    optimizers      fused AdamW, on both; Muon on a GPU all matrices of a shape at once (muon.py): on an H100 a step of
                    53 ms instead of 81
    copies          pinned and not waited for, to a GPU (to_device)
    determinism     on a CPU, where it costs nothing measurable as long as fresh memory is not filled with NaN first
    memory          on a CPU: kept (keep_memory); for a GPU torch has an allocator of its own
    """
    torch.use_deterministic_algorithms(device.type == "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False
    if device.type == "cpu":
        keep_memory()
    torch.set_float32_matmul_precision("high")  # TF32 for what is float32 on a GPU
    torch.fx.experimental._config.use_duck_shape = False
    torch._dynamo.config.recompile_limit = 32

    model = GPT(GPTConfig(config.n_layer, config.n_head, config.n_embd), max_len)
    model.init_weights(config.seed)
    model.to(device)
    torch.compiler.set_stance("default" if config.compile else "force_eager")
    for module in (*model.blocks, model.norm):
        compile_block(module)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    return model, make_optimizers(model, config), autocast(model.loss), autocast(model.score)


# --------------------------------------------------------------------------------------------------------------------
# The loop


def train(config: Config, team: Processes | None = None) -> int:
    """Trains as config says or, with eval_only, scores best.pt. Returns 0, or the signal that stopped it."""
    team = team or Processes()
    out_dir = Path(config.out_dir)
    state = log = None
    with team.together():
        curriculum = Curriculum(config.stages, config.max_steps)
        if config.micro_batch_tokens < curriculum.max_len:
            raise UserError(f"micro_batch_tokens={config.micro_batch_tokens} is less than a window of "
                            f"{curriculum.max_len}")  # fmt: skip
        device = pick_device(config.device)
        dtype = pick_dtype(config.dtype, device)
        config = dataclasses.replace(config, dtype=str(dtype).removeprefix("torch."))  # what 'auto' was, for a resume
        dataset = open_dataset(config.data_dir, curriculum.max_len)
        if dataset.meta["tokenizer"]["vocab_size"] > GPTConfig.vocab_size:
            raise UserError(f"{config.data_dir} has a vocabulary of {dataset.meta['tokenizer']['vocab_size']:,} "
                            f"tokens; the model's has {GPTConfig.vocab_size:,}")  # fmt: skip
        token_bytes = torch.from_numpy(dataset.token_bytes.astype(np.int64)).to(device)
        with memory_errors("the model does not fit"):
            model, optimizers, loss_of, score_of = set_up(config, curriculum.max_len, device, dtype)
        if team.rank == 0:
            state, log = (open_best(config), None) if config.eval_only else open_run(config)
    state = team.broadcast(state)
    if config.eval_only:
        model.load_state_dict(state["model"])
        team.watch_signals()
        with suppress(Stopped):
            scores = score_lengths(score_of, dataset.val, token_bytes, config, team)
            print(f"{out_dir / 'best.pt'} is the model after {state['step']:,} steps. On all held-out articles:\n")
            print(report(scores))
        return team.stop
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, time_s, best = 0, 0.0, Best()
    skipped = 0  # so many of the last steps, in a row; a checkpoint is of a step that was not
    kept_eval = best_step = None  # the log's evaluation after this step, and the step if best.pt is of it
    if state:
        with team.together(), memory_errors("the model and its optimizers do not fit"):
            model.load_state_dict(state["model"])
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        if state["scaler"]:  # empty if it was not float16 until now
            scaler.load_state_dict(state["scaler"])
        step, time_s, best = state["step"], state["time_s"], Best(*state["best"])
        kept_eval, best_step = state["kept_eval"], step if state["is_best"] else None
        if state["config"]["eval_tokens"] != config.eval_tokens:
            best = Best()
            print("validation scores other windows than it did: its best loss is found anew")
        print(f"going on from step {step:,} of {out_dir}")
        if (was := state["config"]["dtype"]) != config.dtype:
            print(f"from here on in {config.dtype}, where it was {was}: --dtype={was} goes on exactly")
    saved_step = step if state else None  # of the newest checkpoint
    is_other = bool(state) and not state["same"]  # that is of another configuration than this
    state = None  # its tensors were copied
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    team.watch_signals()

    def save(name: str, **more: object) -> bool:
        """Whether the file was written. Where it was not, the one before it stays, and the run goes on."""
        if team.rank != 0:
            return True
        log.flush(durably=True)
        state = {"config": dataclasses.asdict(config), "step": step, "model": model.state_dict(),
                 "unwritten": log.not_on_disk()}  # fmt: skip
        try:
            save_checkpoint(out_dir / name, state | more)
        except OSError as error:
            print(f"step {step:,}: {out_dir / name} cannot be written: {error.strerror}", file=sys.stderr)
            return False
        return True

    def is_saved() -> bool:
        return step == saved_step and not is_other

    def save_last() -> None:
        nonlocal saved_step, is_other
        if skipped:  # weights that gave no finite loss replace none that did
            return
        states = [optimizer.state_dict() for optimizer in optimizers]
        if save("last.pt", optimizers=states, scaler=scaler.state_dict(), time_s=time_s, best=tuple(before)):
            saved_step, is_other = step, False

    def write(record: dict) -> None:
        if team.rank == 0:
            log.write(record)

    def score(split: Split, seq_len: int, n: int) -> Score:
        return score_windows(score_of, split, seq_len, n, token_bytes, config, team)

    def evaluate() -> tuple[dict, Best]:
        """The log's record of an evaluation after `step` steps, and what early stopping remembers from then on."""
        number, last_len = curriculum.index(max(0, step - 1)), curriculum.last_len
        seq_len = curriculum.stages[number].seq_len
        n, n_all = dataset.val.count(seq_len, config.eval_tokens), dataset.val.count(seq_len, 0)
        n_last = max(1, dataset.val.count(last_len, config.eval_tokens) // 4)
        val = score(dataset.val, seq_len, n)
        after = best.after(seq_len, val.loss)  # by the same windows as those before it; then, at the run's end, by all
        if (step == config.max_steps or after.bad_evals > config.patience) and n < n_all:
            n, val = n_all, score(dataset.val, seq_len, n_all)
        train_loss = score(dataset.train, seq_len, dataset.train.count(seq_len, max(1, n // 4) * seq_len)).loss
        return {"event": "eval", "step": step, "stage": number + 1, "seq_len": seq_len, "val_loss": val.loss,
                "val_ppl": math.exp(min(val.loss, 700)), "val_accuracy": val.accuracy, "val_bpb": val.bpb,
                "train_loss": train_loss, "gap": val.loss - train_loss,
                "last_len_loss": score(dataset.val, last_len, n_last).loss,
                "plan_ppl": expected_ppl(config.plan_ppl, step), "is_best": after.bad_evals == 0,
                "bad_evals": after.bad_evals, "time_s": round(time_s, 3)}, after  # fmt: skip

    bar = tqdm(total=config.max_steps, initial=step, unit="step", disable=None if team.rank == 0 else True,
               dynamic_ncols=True)  # fmt: skip
    counted = (step, time_s)  # where the next tokens/s starts
    while True:
        before = best  # the evaluation after this step: a checkpoint does not count on it
        eval_due = step % config.eval_interval == 0 or curriculum.ends_stage(step) or step == best_step
        if (eval_due or team.stop or step % config.checkpoint_interval == 0) and not is_saved():
            save_last()
        if team.stop:
            break
        if eval_due:
            if kept_eval:  # is_best says how it compared: of the last one of a run, val_loss is of other windows
                seq_len, loss = kept_eval["seq_len"], kept_eval["val_loss"]
                best = Best(seq_len, loss) if kept_eval["is_best"] else best.after(seq_len, math.inf)
            else:
                try:
                    record, best = evaluate()
                except Stopped:
                    continue
                if record["is_best"]:
                    save("best.pt")
                write(record)
                bar.write(summary(record, config))
            if best.bad_evals > config.patience:
                bar.write(f"stopped early: {best.bad_evals} evaluations without a new best at length {best.seq_len:,}")
                break
        if step == config.max_steps:
            break
        kept_eval = None

        started = time.perf_counter()
        number = curriculum.index(step)
        stage = curriculum.stages[number]
        lr = learning_rate(config, stage, step)
        windows = dataset.train.random_windows(stage.seq_len, stage.batch_size, config.seed, step)
        loss, grad_norm = train_step(loss_of, model, optimizers, windows, lr, config, scaler, team)
        step += 1
        time_s += time.perf_counter() - started

        record = {"step": step, "stage": number + 1, "seq_len": stage.seq_len, "batch_size": stage.batch_size, "lr": lr}
        skipped = 0 if math.isfinite(loss) and math.isfinite(grad_norm) else skipped + 1
        if skipped:
            bar.write(f"step {step:,} is skipped: loss {loss}, gradient norm {grad_norm}, learning rate {lr:.3g}")
            write({"event": "skip", **record, "in_a_row": skipped, "time_s": round(time_s, 3)})
        elif step % config.log_interval == 0:
            tokens = curriculum.tokens_before(step)
            tokens_per_s = (tokens - curriculum.tokens_before(counted[0])) / (time_s - counted[1])
            mfu = tokens_per_s * model.config.flops_per_token(stage.seq_len) / (peak * team.count) if peak else None
            counted = (step, time_s)
            write({"event": "train", **record, "loss": loss, "grad_norm": grad_norm, "tokens": tokens,
                   "tokens_per_s": round(tokens_per_s, 1), "mfu": mfu, "time_s": round(time_s, 3)})  # fmt: skip
            bar.set_description(f"stage {number + 1}/{len(config.stages)}, length {stage.seq_len:,}", refresh=False)
            bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_s:,.0f} tokens/s", refresh=False)
        bar.update()
        if skipped == MAX_SKIPPED:
            bar.close()
            raise team.error(f"{skipped} steps in a row had no finite loss and gradient, the last of them step "
                             f"{step:,} at learning rate {lr:.3g}; {out_dir} keeps its checkpoint of step {saved_step}")
    bar.close()
    if not is_saved():  # the disk was full; it may have room by now
        save_last()
    team.wait()
    if team.rank == 0:
        log.flush(durably=True)
        if (not is_saved() and not skipped) or log.failed:
            raise UserError(f"{out_dir} lacks the end of the run, which its disk did not take; with room on it, "
                            "--resume=True makes it again")  # fmt: skip
        bests = [record["step"] for record in log.evaluations() if record["is_best"]]
        if bests and not team.stop and load_checkpoint(out_dir / "best.pt")["step"] < bests[-1]:
            raise UserError(f"{out_dir / 'best.pt'} is not the best model, that of step {bests[-1]:,}, which its disk "
                            "did not take; if that is the last step, --resume=True makes it again")  # fmt: skip
        if not team.stop:
            print(eval_table(log.evaluations()))
    if skipped:
        print(f"the last {skipped} steps were skipped; the newest checkpoint is of step {saved_step}")
    if team.stop:
        print(f"stopped by {signal.Signals(team.stop).name} after step {step:,}; --resume=True goes on")
    return team.stop


if __name__ == "__main__":
    with user_errors(), join_processes() as team:
        with team.together():
            config = load_config(sys.argv[1:])
        number = train(config, team)
    team.exit(128 + number if number else 0)
