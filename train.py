"""Train a GPT through a curriculum of growing windows. --resume=True continues as if the run had never stopped.

    python train.py config/curriculum9.py --data_dir=data/wiki --out_dir=out/curriculum9 [--key=value ...]
"""

import dataclasses
import math
import signal
import sys
import time

import torch
from numpy import ndarray
from torch.amp import GradScaler
from torch.optim import Optimizer
from tqdm import tqdm

from checkpoint import Progress, Run, read_log
from curriculum import PEAK_FLOPS, Curriculum, learning_rate
from data import Dataset, micro_batches, open_dataset
from evaluate import eval_table, evaluate, score_windows, summary
from graph import gradient_function
from model import GPT, GPTConfig, on_machine
from optim import make_optimizers
from parallel import Team, join_team
from settings import Config, UserError, load_config

MAX_SKIPPED = 10  # the run ends after this many skipped steps in a row (a guess); each halves float16's scale


def train_step(
    model: GPT, optimizers: list[Optimizer], scaler: GradScaler, windows: ndarray, lr: float, config: Config, team: Team
) -> tuple[float, float]:
    """Make one update from windows (B, T + 1); return their mean loss in nats and the gradient's norm before clipping.
    Every target weighs the same. If loss or norm is not finite, skip the update. `scaler` acts only in float16."""
    seq_len, n_targets = windows.shape[1] - 1, windows[:, 1:].size
    loss = torch.zeros((), device=model.device)
    grad = scaler.scale(torch.full_like(loss, 1 / n_targets))
    parts = micro_batches(team.share(windows), seq_len, config.micro_batch_tokens)
    add_gradients = gradient_function(model, len(parts))  # the forward and the backward pass
    for part in parts:
        loss += add_gradients(torch.from_numpy(part).to(model.device), grad) / n_targets
    loss = team.sum_gradients(model, loss)
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
    loss, grad_norm = torch.stack([loss, grad_norm]).tolist()  # waits for the GPU
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        if math.isfinite(loss) and math.isfinite(grad_norm):
            optimizer.step()
        optimizer.zero_grad()
    scaler.update()
    return loss, grad_norm


def set_up(config: Config, curriculum: Curriculum, run: Run) -> tuple[GPT, list, GradScaler, Progress]:
    """Return a run's model, optimizers, scaler and progress: new ones, or those of its last checkpoint."""
    state = run.read()
    model = GPT(GPTConfig(config.n_layer, config.n_head, config.n_embd), curriculum.max_len)
    model.init_weights(config.seed)
    dtype = state["config"]["dtype"] if state and config.dtype == "auto" else config.dtype
    on_machine(model, config.device, dtype, config.compile)
    run.config = dataclasses.replace(config, dtype=str(model.dtype).removeprefix("torch."))
    print(f"{model.config.n_params / 1e6:,.1f}M parameters on {model.device} in {run.config.dtype}")
    optimizers = make_optimizers(model, config)
    scaler = GradScaler(model.device.type, enabled=model.dtype == torch.float16)
    if state is None:
        return model, optimizers, scaler, Progress()
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    scaler.load_state_dict(state["scaler"] or scaler.state_dict())  # {} if the saved run was not in float16
    step, old = state["step"], Config(**state["config"])
    rates = [learning_rate(c, curriculum.at(s), s) for c, s in ((old, max(0, step - 1)), (config, step))]
    print(f"resuming from step {step:,} of {config.out_dir} at learning rate {rates[1]:.2g}, after {rates[0]:.2g}")
    if old.dtype != run.config.dtype:
        print(f"continuing in {run.config.dtype}; --dtype={old.dtype} would continue exactly")
    return model, optimizers, scaler, Progress(**state["progress"])


def train(config: Config, team: Team) -> int:
    """Run the training that config describes. Return the exit status: 0, or 128 + the signal that stopped it."""
    curriculum = Curriculum(config.stages, config.max_steps)
    if config.micro_batch_tokens < curriculum.max_len:
        raise UserError(f"micro_batch_tokens={config.micro_batch_tokens} is less than a window of {curriculum.max_len}")
    config = dataclasses.replace(config, micro_batch_tokens=min(config.micro_batch_tokens, curriculum.max_tokens))
    data = open_dataset(config.data_dir, curriculum.max_len)
    run = Run(config, data.fingerprint, team)
    model, optimizers, scaler, progress = set_up(config, curriculum, run)
    run.start()
    team.watch_signals()

    peak_flops = PEAK_FLOPS.get(torch.cuda.get_device_name(model.device)) if model.device.type == "cuda" else None
    bar = tqdm(total=config.max_steps, initial=progress.step, unit="step", disable=True if team.rank else None)
    skipped = 0  # steps in a row without a finite loss and gradient; only the run's end saves last.pt then
    logged_tokens, logged_seconds = curriculum.tokens_before(progress.step), progress.seconds
    while True:
        step = progress.step

        # Evaluate, unless a stop signal came or these weights were evaluated before. best_len 0 means no best.pt
        just_evaluated = is_best = False
        eval_due = step % config.eval_interval == 0 or step in curriculum.ends
        if eval_due and not team.stopping and (progress.evaluated != step or progress.best_len == 0):
            model.graph = None  # free its memory for the evaluation; the next steps capture another
            scores = evaluate(model, data, curriculum, step, config, team)
            is_best = progress.record(scores["seq_len"], scores["val_loss"])
            record = {"step": step, **scores, "is_best": is_best, "bad_evals": progress.bad_evals}
            run.log("eval", **record, time_s=round(progress.seconds, 3))
            bar.write(summary(record, config))
            just_evaluated = True

        # Save. If the disk refused best.pt, forget that there was a best, so that a resumed run writes one
        finished = step == config.max_steps or progress.bad_evals > config.patience
        if is_best:
            run.save("best.pt", step=step, model=model.state_dict())
        if finished or (skipped == 0 and (just_evaluated or step % config.checkpoint_interval == 0 or team.stopping)):
            run.save("last.pt", step=step, model=model.state_dict(), scaler=scaler.state_dict(),
                     optimizers=[optimizer.state_dict() for optimizer in optimizers],
                     progress=vars(progress) | ({"best_len": 0} if "best.pt" in run.refused else {}))  # fmt: skip
        if finished or team.stopping:
            break

        # One step; its windows depend only on the seed and the step
        started, stage = time.perf_counter(), curriculum.at(step)
        lr = learning_rate(config, stage, step)
        windows = data.train.random_windows(stage.seq_len, stage.batch_size, config.seed, step)
        loss, grad_norm = train_step(model, optimizers, scaler, windows, lr, config, team)
        progress.step += 1
        progress.seconds += time.perf_counter() - started

        # Log
        record = {"step": progress.step, "stage": stage.number, "seq_len": stage.seq_len,
                  "batch_size": stage.batch_size, "lr": lr, "time_s": round(progress.seconds, 3)}  # fmt: skip
        skipped = 0 if math.isfinite(loss) and math.isfinite(grad_norm) else skipped + 1
        if skipped:
            run.log("skip", **record)
            bar.write(f"step {progress.step:,} is skipped: loss {loss}, gradient norm {grad_norm}, rate {lr:.3g}")
            if skipped == MAX_SKIPPED:
                raise UserError(f"{skipped} skipped steps in a row, at step {progress.step:,} and rate {lr:.3g}")
        elif progress.step % config.log_interval == 0:
            tokens = curriculum.tokens_before(progress.step)
            rate = (tokens - logged_tokens) / (progress.seconds - logged_seconds)  # tokens/s
            mfu = peak_flops and rate * model.config.flops_per_token(stage.seq_len) / (peak_flops * team.count)
            logged_tokens, logged_seconds = tokens, progress.seconds
            run.log("train", **record, loss=loss, grad_norm=grad_norm, tokens=tokens, tokens_per_s=rate, mfu=mfu)
            bar.set_postfix_str(f"stage {stage.number}, loss {loss:.3f}, {rate:,.0f} tokens/s", refresh=False)
        bar.update()
    bar.close()

    if progress.bad_evals > config.patience:
        print(f"stopped early: {progress.bad_evals} evaluations without a new best at length {progress.best_len:,}")
    if not team.stopping:
        report_end(model, data, curriculum, progress, run, team)
    run.finish()
    if team.stopping:
        print(f"stopped by {signal.Signals(team.stopping).name} after step {step:,}; --resume=True continues")
    return team.stopping and 128 + team.stopping


def report_end(model: GPT, data: Dataset, curriculum: Curriculum, progress: Progress, run: Run, team: Team) -> None:
    """Score the final weights on all held-out windows, log the score as `final`, and print all evaluations."""
    stage = curriculum.at(max(0, progress.step - 1))
    shared = data.token_bytes, run.config.micro_batch_tokens, team
    score = score_windows(model, data.val, stage.seq_len, data.val.spread(stage.seq_len), *shared)
    run.log("final", step=progress.step, stage=stage.number, seq_len=stage.seq_len, **score.fields(),
            time_s=round(progress.seconds, 3))  # fmt: skip
    if team.rank == 0:
        print(eval_table([record for record in read_log(run.out_dir) if record["event"] == "eval"]))
        print(f"on all held-out windows: loss {score.loss:.3f}, ppl {score.fields()['val_ppl']:,.1f}")


if __name__ == "__main__":
    with join_team("halve --micro_batch_tokens, down to one window of the longest stage") as team:
        sys.exit(train(load_config(sys.argv[1:]), team))
