"""Small models by train.py's own step: what the recipe and the curriculum are worth, and by which part.

    python bench/recipe.py nanogpt --data_dir=data/sample [--dry] [--steps 300 --tokens 2048 --seeds 3 --folds 5 ...]

Names of EXPERIMENTS, or `all`: what each variant differs in stands there. Each is trained at each learning rate of its
grid with seed 0, then with the other seeds at the best one. Every run writes one file into --results when it is done;
a finished run is never repeated, in whatever experiment it is listed, and a killed one is done again. --dry lists them.

data            an article is what lies between two 50256. The long ones (--long tokens or more) of the train shards are
                dealt into folds in their order. Seed i trains without the long articles of fold i % folds, and without
                their leads: articles of the same title. So what differs between seeds is the text as well
held-out loss   windows of 2,048 targets that tile each held-out long article, so that none crosses its borders; what
                remains of an article behind its last whole window is dropped. No rate is chosen by it. `short` scores
                the same targets in windows of 256, `context` in windows of several lengths: what a model loses by
                shorter ones is what the tokens further back are worth to it
validation loss windows of 2,048 of the dataset's own val split (many short articles): it chooses the learning rates
budget          steps * tokens for all variants, to the nearest step: batches are of whole windows

bench/report.py makes tables and pictures of the results.
"""

import argparse
import hashlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.gpt2 import GPT2, LearnedPositions, nanogpt_optimizer  # noqa: E402
from bench.roofline import muon_flops  # noqa: E402
from config import Config, curriculum9  # noqa: E402
from curriculum import Curriculum, format_table, learning_rate  # noqa: E402
from dataset import Split, open_dataset  # noqa: E402
from errors import CommandLine, UserError, user_errors  # noqa: E402
from parallel import parts, to_device  # noqa: E402
from train import compile_block, make_optimizers, pick_device, pick_dtype, set_up, train_step  # noqa: E402

# --------------------------------------------------------------------------------------------------------------------
# The experiments, in the order of their worth. A variant gives what differs from BASE.

BASE = {
    "model": "ours",  # 'gpt2': nanoGPT's; 'learned': ours with learned positions
    "optimizer": "muon",  # or 'adamw'; nanoGPT's model has its own AdamW
    "lengths": "table",  # of windows: curriculum9's by share of tokens; a number: fixed; else a name in `lengths`
    "decay": "linear",  # of the learning rate: to 0; 'cosine': to a tenth; 'table': the table's factors; 'cooled': with
    # a last part that takes them to 0; 'constant'
    "warmup": 0.1,  # share of the steps
    "share": 1.0,  # of the budget
    "size": None,  # (n_layer, n_embd), if not that of the command line
    "at_change": "",  # 'warm': WARM steps of warmup after each change of length; 'reset': optimizers forget
    "watch": False,  # score around each change of length
    "lrs": (2e-3, 4e-3, 8e-3),  # the grid
    "seeds": True,  # more than one
}
# Some have "beta2", of nanoGPT's AdamW, for 0.95; "score_len", the windows that a score cuts (a divisor of LAST_LEN),
# for LAST_LEN; "cuts", further lengths at which the last model is scored; or "cooldown", the last part's share, for a
# fifth.
# A grid of factors of two for all, of which each variant has a part.
NANOGPT = {"model": "gpt2", "optimizer": "adamw", "decay": "cosine", "lrs": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)}
LONGER = {"size": (2, 128), "share": 10.0, "lrs": (4e-3,)}
SHORT = {"lengths": 256, "score_len": 256, "seeds": False}
DOUBLING = {"lengths": "doubling", "watch": True, "lrs": (4e-3,)}
CONTEXT = {"cuts": (64, 256, 512), "lrs": (4e-3,), "seeds": False}

EXPERIMENTS = {
    # From nanoGPT's recipe to ours: its model, decay and second moment's memory; the optimizer; the lengths. Then ours
    # with less to train on: how little reaches nanoGPT's loss? And nanoGPT with the beta2 that ours has.
    "nanogpt": {
        "nanoGPT": NANOGPT | {"lengths": 2048},
        "our model, AdamW, linear": {"optimizer": "adamw", "lengths": 2048, "lrs": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)},
        "and Muon": {"lengths": 2048},
        "and the lengths of the table": {},
        "or lengths that double": DOUBLING,
        "the table, 0.4 of the tokens": {"share": 0.4, "lrs": (4e-3,)},
        "the table, 0.3 of the tokens": {"share": 0.3, "lrs": (4e-3, 8e-3)},
        "doubling, 0.3 of the tokens": {"lengths": "doubling", "share": 0.3, "lrs": (4e-3, 8e-3)},
        "nanoGPT, beta2 0.99": NANOGPT | {"lengths": 2048, "beta2": 0.99, "lrs": (1e-3, 2e-3), "seeds": False},
    },
    "lengths": {
        "2,048": {"lengths": 2048},
        "512": {"lengths": 512},
        "64": {"lengths": 64},
        "the table": {"decay": "table", "lrs": (2e-3, 4e-3, 8e-3, 16e-3)},
        "the table, cooling down": {"decay": "cooled", "lrs": (4e-3,)},
        "the table, cooling down over half": {"decay": "cooled", "cooldown": 0.5, "lrs": (4e-3,), "seeds": False},
        "its lengths, linear decay": {},
        "doubling, linear decay": DOUBLING,
    },
    "parts": {
        "2,048, constant": {"lengths": 2048, "decay": "constant", "lrs": (2e-3, 4e-3)},
        "growing alone": {"decay": "constant", "lrs": (2e-3, 4e-3)},
        "falling alone: the table's factors": {"lengths": 2048, "decay": "table", "lrs": (2e-3, 4e-3)},
        "both: the table": {"decay": "table", "lrs": (2e-3, 4e-3, 8e-3, 16e-3)},
        "falling alone: linear": {"lengths": 2048},
        "both: linear": {},
        # A grid of one: what was best with a linear fall, of 2,048 and of the table's lengths.
        "order reversed, linear": {"lengths": "reversed", "lrs": (4e-3,)},
        "three stages, linear": {"lengths": "three", "lrs": (4e-3,)},
        "length grows linearly, linear": {"lengths": "linear", "lrs": (4e-3,)},
        "length doubles, linear": DOUBLING,
    },
    "sizes": {
        "2 x 128": {"size": (2, 128), "lrs": (2e-3, 4e-3, 8e-3, 16e-3), "seeds": False},
        "4 x 256": {"size": (4, 256), "seeds": False},
        "8 x 512": {"size": (8, 512), "seeds": False},
    },
    # Does a model use its context? The same targets with less and less before them. The rate is what `lengths` found.
    "context": {
        "2,048": CONTEXT | {"lengths": 2048},
        "512": CONTEXT | {"lengths": 512},
        "256": CONTEXT | {"lengths": 256},
        "64": CONTEXT | {"lengths": 64},
        "the table's lengths": CONTEXT,
        "doubling": CONTEXT | {"lengths": "doubling"},
    },
    # Ten times the tokens, of a smaller model: is context used by then, and what is growing worth?
    "longer": {
        "2,048": LONGER | {"lengths": 2048},
        "512": LONGER | {"lengths": 512},
        "64": LONGER | {"lengths": 64},
        "the table's lengths": LONGER,
        "doubling": LONGER | {"lengths": "doubling"},
    },
    # Windows of 256, as nanoGPT's own small settings have them, and scored in such windows.
    "short": {
        "nanoGPT, length 256": NANOGPT | SHORT | {"lrs": (1e-3, 2e-3)},
        "ours, length 256": SHORT | {"lrs": (4e-3, 8e-3)},
    },
    "changes": {
        "rotary": DOUBLING,
        "learned": DOUBLING | {"model": "learned"},
        "rotary, warmup again": DOUBLING | {"at_change": "warm"},
        "rotary, moments reset": DOUBLING | {"at_change": "reset"},
    },
}

LAST_LEN = curriculum9.stages[-1][1]
WARM = 10  # steps of warmup at a change of length: chosen
POINTS = 10  # evaluations of a run, evenly spread over its steps, besides the one before the first
OFFSETS = (0, 1, 2, 4, 8, 16, 32)  # steps after a change of length at which it is watched


def lengths(name: str | int) -> list[tuple[float, int, float]]:
    """Rows (share of the tokens, seq_len, the table's lr_scale there)."""
    table = Curriculum(curriculum9.stages, curriculum9.max_steps)
    total = table.tokens_before(table.max_steps)
    rows = [(stage.tokens / total, stage.seq_len, stage.lr_scale) for stage in table.stages]
    if name == "table":
        return rows
    if name == "reversed":
        return rows[::-1]
    if name == "three":  # chosen; shares much as the table has up to 128, up to 768 and above
        return [(0.05, 128, 1.0), (0.15, 512, 1.0), (0.8, LAST_LEN, 1.0)]
    if name == "doubling":  # chosen: long enough stages to see a change's whole effect, in the table's usual ratio
        return [(0.25, seq_len, 1.0) for seq_len in (256, 512, 1024, LAST_LEN)]
    if name == "linear":  # Li et al. 2022 (sequence length warmup), until where the table reaches its last length
        grown = sum(share for share, seq_len, _ in rows if seq_len < LAST_LEN)
        steps = range(64, LAST_LEN, 64)
        return [(grown / len(steps), seq_len, 1.0) for seq_len in steps] + [(1 - grown, LAST_LEN, 1.0)]
    return [(share, name, lr_scale) for share, _, lr_scale in rows]


def stages_of(rows: list[tuple[float, int, float]], tokens: int, budget: float) -> tuple[tuple, int]:
    """A configuration's stages and max_steps, for about `tokens` a step and `budget` in all.

    A stage ends at the step at which the tokens trained on are nearest to what it and those before it may have; what
    one has too many or too few, the next makes up for. A stage too short for a step is left out.
    """
    stages, step, trained, due = [], 0, 0, 0.0
    for share, seq_len, lr_scale in rows:
        due += share * budget
        batch_size = max(1, round(tokens / seq_len))
        steps = max(0, round((due - trained) / (batch_size * seq_len)))
        if steps and (not stages or stages[-1][1:] != (seq_len, batch_size, lr_scale)):
            stages.append((step, seq_len, batch_size, lr_scale))
        step, trained = step + steps, trained + steps * batch_size * seq_len
    return tuple(stages), step


def learning_rate_at(run: dict, config: Config, curriculum: Curriculum, step: int) -> float:
    stage = curriculum.at(step)
    progress = max(0, step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    cosine = 0.55 + 0.45 * math.cos(math.pi * progress) if run["decay"] == "cosine" else 1.0  # nanoGPT's: to a tenth
    again = (step - stage.start + 1) / WARM if run["at_change"] == "warm" and stage.start else 1.0
    return learning_rate(config, stage, step) * cosine * min(1.0, again)


# --------------------------------------------------------------------------------------------------------------------
# The articles


def fold_of(shards: list[np.ndarray], fold: int, folds: int, long: int) -> tuple[Split, list[np.ndarray]]:
    """What a run trains on, and the long articles that are held out from it.

    Raises UserError if there are fewer long articles than folds.
    """
    starts = [np.flatnonzero(shard == 50256) for shard in shards]
    articles = [np.split(shard, start[1:]) for shard, start in zip(shards, starts)]
    longs = [article for shard in articles for article in shard if len(article) >= long]
    if len(longs) < folds:
        raise UserError(f"{len(longs)} articles of {long:,} tokens cannot be dealt into {folds} folds")
    held_out = longs[fold::folds]
    titles = {title(article) for article in held_out}
    kept = [[article for article in shard if title(article) not in titles] for shard in articles]
    return Split([np.concatenate(shard) for shard in kept if shard]), held_out


def title(article: np.ndarray) -> bytes:
    """The tokens between 50256 and the first newline (198)."""
    newlines = np.flatnonzero(article == 198)
    return article[1 : newlines[0] if len(newlines) else None].tobytes()


def tiles(articles: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The whole windows (W, LAST_LEN + 1) inside the articles, and the number (W,) of each one's article."""
    split = Split(articles)
    counts = split.tiles(LAST_LEN)
    return split.fixed_windows(LAST_LEN, np.arange(counts.sum())), np.repeat(np.arange(len(articles)), counts)


def spread(windows: np.ndarray, n: int) -> np.ndarray:
    """n of the windows, evenly spread; all if there are no more."""
    n = min(n, len(windows))
    return windows[np.arange(n) * len(windows) // n]


# --------------------------------------------------------------------------------------------------------------------
# A run


def build(run: dict, config: Config, device: torch.device, dtype: torch.dtype) -> tuple:
    """The model, its optimizers, and its loss and score as compiled, like train.set_up."""
    model, optimizers, *functions = set_up(config, LAST_LEN, device, dtype)
    if run["model"] == "ours":
        return model, optimizers, *functions
    # set_up has made the process's choices for the device; its model makes room for another.
    is_gpt2 = run["model"] == "gpt2"
    model = (GPT2 if is_gpt2 else LearnedPositions)(model.config, LAST_LEN)
    model.init_weights(config.seed)
    model.to(device)
    functions = [model.loss, model.score]
    if is_gpt2:
        optimizers = [nanogpt_optimizer(model, run.get("beta2", 0.95))]
        functions = [torch.compile(f, dynamic=True) for f in functions]
    else:
        optimizers = make_optimizers(model, config)
        optimizers[0].add_param_group({"params": [model.positions.weight]})
        for module in (*model.blocks, model.norm):
            compile_block(module)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    return model, optimizers, *map(autocast, functions)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    amx = torch.cpu.get_capabilities().get("amx_bf16")  # which decides how fast products in bfloat16 are
    return f"CPU {'with' if amx else 'without'} AMX"


def flops_per_token(model: torch.nn.Module, seq_len: int) -> int:
    """As GPTConfig.flops_per_token, of any of the models: their matrices, but not the table of positions."""
    matrices = sum(w.numel() for name, w in model.named_parameters() if w.ndim == 2 and name != "positions.weight")
    return 6 * matrices + 12 * model.config.n_layer * model.config.n_embd * seq_len


def token_losses(score_of, windows: np.ndarray, seq_len: int, device: torch.device, config: Config) -> np.ndarray:
    """The loss (W, LAST_LEN), nats, of each target of windows (W, LAST_LEN + 1), cut into windows of seq_len.

    Each target is scored once: where seq_len is no divisor, the last window of each row is shorter.
    """
    losses = np.empty((len(windows), LAST_LEN), np.float32)
    for first in range(0, LAST_LEN, seq_len):
        pieces, row = windows[:, first : first + seq_len + 1], 0
        for batch in parts(pieces, pieces.shape[1] - 1, config.micro_batch_tokens):
            with torch.no_grad():
                scored = score_of(to_device(batch, device))[0].float().numpy(force=True)
            # No part's own result is kept: lying behind the freed logits, it would keep the next ones from their place.
            losses[row : row + len(batch), first : first + seq_len] = scored
            row += len(batch)
    return losses


def train_run(run: dict, args: argparse.Namespace) -> dict:
    """The results of a run: `points` through it, `changes` of length if watched, and all there is to say at its end."""
    dataset = open_dataset(args.data_dir, LAST_LEN)
    train, articles = fold_of(dataset.train.shards, run["seed"] % run["folds"], run["folds"], run["long"])
    held_out, owners = tiles(articles)
    val = dataset.val.fixed_windows(LAST_LEN, np.arange(dataset.val.count(LAST_LEN, 0)))
    held_out, owners, val = (spread(what, args.windows) for what in (held_out, owners, val))
    few, few_val = spread(held_out, args.few), spread(val, max(1, args.few // 2))

    rows = lengths(run["lengths"])
    if run["decay"] not in ("table", "cooled"):
        rows = [(share, seq_len, 1.0) for share, seq_len, _ in rows]
    stages, max_steps = stages_of(rows, run["tokens"], run["share"] * run["steps"] * run["tokens"])
    n_layer, n_embd = run["size"]
    warmup = round(run["warmup"] * max_steps)
    cooled = {"linear": 1.0, "cooled": run.get("cooldown", 0.2)}.get(run["decay"], 0.0)
    config = Config(
        stages=stages, max_steps=max_steps, learning_rate=run["lr"], warmup_steps=warmup,
        cooldown_steps=round(cooled * (max_steps - warmup)),
        optimizer=run["optimizer"], seed=run["seed"], n_layer=n_layer, n_head=max(1, n_embd // 64), n_embd=n_embd,
        device=args.device, dtype=args.dtype, compile=not args.eager, micro_batch_tokens=max(8_192, run["tokens"]),
    )  # fmt: skip
    curriculum = Curriculum(stages, max_steps)
    device = pick_device(config.device)
    torch._dynamo.reset()  # the graphs of the run before
    model, optimizers, loss_of, score_of = build(run, config, device, pick_dtype(config.dtype, device))

    score_len = run.get("score_len", LAST_LEN)

    def score(windows: np.ndarray, seq_len: int = score_len) -> np.ndarray:
        return token_losses(score_of, windows, seq_len, device, config)

    def by_article(losses: np.ndarray) -> list[list]:
        """Rows (number, targets, mean loss)."""
        return [[int(n), losses[owners == n].size, float(losses[owners == n].mean())] for n in np.unique(owners)]

    due = {round(max_steps * i / POINTS) for i in range(POINTS + 1)}
    points, changes, took, flops, skipped = [], [], [], 0.0, 0
    for step in range(max_steps + 1):
        stage, number = curriculum.at(step), curriculum.index(step)
        if step in due:
            points.append({"step": step, "tokens": curriculum.tokens_before(step), "flops": flops,
                           "loss": float(score(few).mean()), "val_loss": float(score(few_val).mean())})  # fmt: skip
        if run["watch"] and number and step - stage.start in OFFSETS:
            if step == stage.start:
                before = curriculum.stages[number - 1].seq_len
                changes.append({"step": step, "from": before, "to": stage.seq_len, "after": [],
                                "loss_before": float(score(few, before).mean())})  # fmt: skip
            changes[-1]["after"].append([step - stage.start, float(score(few, stage.seq_len).mean())])
        if step == max_steps:
            break
        if run["at_change"] == "reset" and number and step == stage.start:
            for optimizer in optimizers:
                optimizer.state.clear()
        started = time.perf_counter()
        windows = train.random_windows(stage.seq_len, stage.batch_size, config.seed, step)
        lr = learning_rate_at(run, config, curriculum, step)
        loss, norm = train_step(loss_of, model, optimizers, windows, lr, config)
        took.append(time.perf_counter() - started)
        flops += stage.tokens_per_step * flops_per_token(model, stage.seq_len)
        flops += muon_flops(model.config) if run["optimizer"] == "muon" else 0
        skipped += not (math.isfinite(loss) and math.isfinite(norm))

    # A token counts as the middle one of its stage, or of the stage's first steps and those after them if it is short:
    # others may use the machine too, and the first step compiles.
    a_token = [seconds / curriculum.at(step).tokens_per_step for step, seconds in enumerate(took)]
    middle = [statistics.median(a_token[s.start : max(s.end, s.start + 5)]) for s in curriculum.stages]
    steps = range(max_steps)
    seconds = np.cumsum([0.0, *(middle[curriculum.index(s)] * curriculum.at(s).tokens_per_step for s in steps)])
    for point in points:
        point["seconds"] = float(seconds[point["step"]])
    losses, own_len = score(held_out), stages[-1][1]
    own = losses if own_len == score_len else score(held_out, own_len)
    by_position = losses.reshape(-1, score_len)
    edges = [0, *(2**i for i in range(6, 11) if 2**i < score_len), score_len]
    return {
        "run": run, "stages": stages, "skipped": skipped, "points": points, "changes": changes,
        "loss": float(losses.mean()), "val_loss": float(score(val).mean()),
        "own_len": own_len, "own_loss": float(own.mean()),
        "articles": by_article(losses),
        "cuts": [[seq_len, by_article(score(held_out, seq_len))] for seq_len in run.get("cuts", ())],
        "positions": [[a, b, float(by_position[:, a:b].mean())] for a, b in zip(edges, edges[1:])],
        "params": sum(weight.numel() for weight in model.parameters()), "torch": torch.__version__,
        "device": device_name(device),
        "threads": torch.get_num_threads(), "dtype": str(pick_dtype(config.dtype, device)).removeprefix("torch."),
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Which runs there are, and which are done


def settings(variant: dict, lr: float | None, seed: int, args: argparse.Namespace) -> dict:
    """All that decides a run's outcome but for rounding: with dtype 'auto' the type is the device's."""
    run = BASE | variant | {"lr": lr, "seed": seed, "data": Path(args.data_dir).name}
    run |= {key: getattr(args, key) for key in ("steps", "tokens", "folds", "long", "windows", "few", "dtype")}
    run["size"] = list(run["size"] or (args.n_layer, args.n_embd))
    return {key: value for key, value in run.items() if key not in ("lrs", "seeds")}


def result_path(run: dict, args: argparse.Namespace) -> Path:
    """The file of a run: a name to read, and a hash of its settings."""
    digest = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:8]
    words = [run["model"], run["optimizer"], run["lengths"], run["decay"], "x".join(map(str, run["size"])),
             f"{run['lr']:g}", run["seed"], digest]  # fmt: skip
    return Path(args.results) / ("_".join(map(str, words)) + ".json")


def read(run: dict, args: argparse.Namespace) -> dict | None:
    """The results of a finished run; None of one that is not."""
    path = result_path(run, args) if run["lr"] else None  # no lr: not known yet
    return json.loads(path.read_text()) if path and path.exists() else None


def best_lr(variant: dict, args: argparse.Namespace) -> float | None:
    """Of the grid, by validation loss with seed 0; None until all of it is done."""
    lrs = (BASE | variant)["lrs"]
    done = [read(settings(variant, lr, 0, args), args) for lr in lrs]
    return None if None in done else min(zip(lrs, done), key=lambda pair: pair[1]["val_loss"])[0]


def seeds_of(variant: dict, args: argparse.Namespace) -> range:
    return range(args.seeds if (BASE | variant)["seeds"] else 1)


def runs(variant: dict, args: argparse.Namespace) -> Iterator[dict]:
    """The grid with seed 0; then, at its best learning rate as known by then (lr None: not yet), the other seeds."""
    variant = BASE | variant
    for lr in variant["lrs"]:
        yield settings(variant, lr, 0, args)
    for seed in seeds_of(variant, args)[1:]:
        yield settings(variant, best_lr(variant, args), seed, args)


def add_arguments(parser: CommandLine) -> None:
    """What recipe.py and report.py must agree in to speak of the same runs."""
    parser.add_argument("experiments", nargs="+", metavar="EXPERIMENT", choices=[*EXPERIMENTS, "all"])
    parser.add_argument("--data_dir", default="data/sample")
    parser.add_argument("--results", default="out/recipe", help="a folder: one file per run")
    parser.add_argument("--steps", type=int, default=300, help="of a whole run in batches of --tokens")
    parser.add_argument("--tokens", type=int, default=2_048, help="of a step, to the nearest whole window")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--long", type=int, default=LAST_LEN + 1, help="tokens that make an article a long one")
    parser.add_argument("--windows", type=int, default=64, help="most windows scored at the end of a run")
    parser.add_argument("--few", type=int, default=6, help="held-out windows scored on the way; of val, half as many")
    parser.add_argument("--n_layer", type=int, default=4)
    parser.add_argument("--n_embd", type=int, default=256)
    parser.add_argument("--dtype", default="auto")


def chosen(args: argparse.Namespace) -> list[str]:
    return list(EXPERIMENTS) if "all" in args.experiments else args.experiments


def main() -> None:
    parser = CommandLine(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--dry", action="store_true", help="list the runs, and which are done")
    args = parser.parse_args()
    if args.dry:
        rows, seen = [], {}
        for name in chosen(args):
            for variant, differs in EXPERIMENTS[name].items():
                for run in runs(differs, args):
                    again = seen.setdefault(json.dumps(run), (name, variant)) != (name, variant)
                    state = "done" if read(run, args) else "listed above" if again else "to do"
                    rows.append([name, variant, f"{run['lr']:g}" if run["lr"] else "best", f"{run['seed']}", state])
        print(format_table(["experiment", "variant", "lr", "seed", ""], rows))
        print(f"{sum(row[-1] == 'to do' for row in rows)} runs to do")
        return
    Path(args.results).mkdir(parents=True, exist_ok=True)
    for name in chosen(args):
        for variant, differs in EXPERIMENTS[name].items():
            for run in runs(differs, args):
                if read(run, args):
                    continue
                started = time.perf_counter()
                result = train_run(run, args)
                path = result_path(run, args)
                path.with_suffix(".tmp").write_text(json.dumps(result))
                os.replace(path.with_suffix(".tmp"), path)
                print(f"{name}: {variant}, lr {run['lr']:g}, seed {run['seed']}: held-out loss {result['loss']:.3f}, "
                      f"val {result['val_loss']:.3f}, {time.perf_counter() - started:.0f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    with user_errors():
        main()
