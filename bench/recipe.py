"""Train variants of the recipe and compare them: nanoGPT's, windows of one length, the curriculum and its parts.

    python bench/recipe.py [VARIANT ...] [--data_dir=data/corpus --tokens=4e6 --seeds=2 --lrs 2e-3 4e-3 --key=value ...]

A variant is a set of configuration keys; --key=value applies to all variants. train.py trains each run in a process of
its own, in out/recipe/NAME. A finished run leaves one file in --results, and the same command does not repeat it. A
stopped or killed run resumes. Tables of the runs come at the end, or at once with --dry. --picture=FILE draws losses.

budget    --tokens for every variant, to the nearest step, in steps of --batch_tokens. A tenth is warmup by default
loss      of the final weights on 512 windows of 2,048, spread evenly over the held-out shards. With seed 0 also on
          the same targets in shorter windows, to show what context is worth
error     the standard error over windows, each about half an article; for a difference, over the windows' differences
at equal  the logs' last_len_loss minus the first variant's, where the cheapest run ends. A last row that no run
          reaches makes it 2,048 for all. Seconds are of training and compiling, or with --rates=FILE tokens over rates
          that bench/throughput.py --to=FILE saved. FLOPs include Muon's; nanoGPT's are counted as model.py's GPT's
"""

import hashlib
import json
import math
import sys
from argparse import SUPPRESS, ArgumentParser, Namespace
from itertools import cycle
from multiprocessing import get_context
from os.path import expanduser
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train  # noqa: E402
from bench.breakdown import muon_flops  # noqa: E402
from bench.plot import RUNS  # noqa: E402
from checkpoint import load_checkpoint, read_log  # noqa: E402
from config import curriculum9  # noqa: E402
from curriculum import Curriculum, Stage, format_table  # noqa: E402
from data import open_dataset  # noqa: E402
from model import GPT, GPTConfig, on_machine  # noqa: E402
from parallel import Team  # noqa: E402
from settings import Config, UserError, as_key_type, check_ranges, user_errors  # noqa: E402

LAST_LEN = curriculum9.stages[-1][1]
PLAN = Curriculum(curriculum9.stages, curriculum9.max_steps).stages
TABLE = [(stage.tokens / sum(s.tokens for s in PLAN), stage.seq_len, stage.lr_scale) for stage in PLAN]
LENGTHS = [(share, seq_len, 1.0) for share, seq_len, _ in TABLE]

# rows are (share of the tokens, seq_len, lr_scale). The rate falls to 0 over the last share `fall` of the steps after
# warmup, by default all. The other keys are train.py's. nanogpt has its own model, optimizer and schedule.
VARIANTS = {
    "nanogpt": {"rows": [(1.0, 2048, 1.0)], "learning_rate": 1e-3, "optimizer": "adamw"},
    "2048": {"rows": [(1.0, 2048, 1.0)]},
    "512": {"rows": [(1.0, 512, 1.0)]},
    "256": {"rows": [(1.0, 256, 1.0)]},
    "doubling": {"rows": [(0.25, seq_len, 1.0) for seq_len in (256, 512, 1024, 2048)]},
    "lengths": {"rows": LENGTHS},  # the table's lengths with a linear fall
    "table": {"rows": TABLE, "fall": 0.2},  # with the table's factors and curriculum9's cooldown
    "reversed": {"rows": LENGTHS[::-1]},
}
# Early stopping would end a run before its budget. Each last_len_loss is of 16 windows of 2,048 (a guess).
SHARED = {"learning_rate": 4e-3, "n_layer": 4, "n_head": 4, "n_embd": 256, "micro_batch_tokens": 8_192, "resume": True,
          "eval_tokens": 4 * 16 * LAST_LEN, "patience": 1_000_000}  # fmt: skip
OWN = ("stages", "max_steps", "seed", "out_dir")  # keys that differ from run to run, so none of them is for all
POINTS = 10  # evaluations of a run, besides the first and those that end a stage (a guess)
WINDOWS, CUTS = 512, (64, 256, 1024)  # scored at the end


def stages_of(rows: list[tuple[float, int, float]], batch_tokens: int, budget: float) -> tuple[tuple, int]:
    """Return a configuration's stages and max_steps, for steps of about `batch_tokens` and `budget` tokens in all.

    A stage ends at the step where the tokens trained on are nearest to the budget of all stages so far, so the next
    stage makes up for the difference. A stage too short for one step is left out.
    """
    stages, step, trained, due = [], 0, 0, 0.0
    for share, seq_len, lr_scale in rows:
        due += share * budget
        batch_size = max(1, round(batch_tokens / seq_len))
        steps = max(0, round((due - trained) / (batch_size * seq_len)))
        if steps:
            stages.append((step, seq_len, batch_size, lr_scale))
        step, trained = step + steps, trained + steps * batch_size * seq_len
    return (*stages, (step, LAST_LEN, 1, 1.0)), step


def config_of(run: dict, args: Namespace) -> Config:
    keys = SHARED | VARIANTS[run["variant"]] | run["keys"]
    stages, max_steps = stages_of(keys.pop("rows"), run["batch_tokens"], run["tokens"])
    warmup = keys.setdefault("warmup_steps", round(0.1 * max_steps))
    keys.setdefault("cooldown_steps", round(keys.pop("fall", 1.0) * (max_steps - warmup)))
    interval = math.ceil(max_steps / POINTS)
    keys |= {"stages": stages, "max_steps": max_steps, "seed": run["seed"], "data_dir": args.data_dir}
    keys |= {"out_dir": f"out/recipe/{result_path(run, args).stem}"}
    config = Config(**{"eval_interval": interval, "checkpoint_interval": interval} | keys)
    check_ranges(config)
    return config


# --------------------------------------------------------------------------------------------------------------------
# nanoGPT's default recipe: GPT-2 without biases or dropout, AdamW, and a cosine


class Block(nn.Module):
    """Pre-norm attention and an MLP of four times the width (Radford et al. 2019)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(C, bias=False), nn.LayerNorm(C, bias=False)
        self.c_attn, self.o_proj = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
        self.c_fc, self.down_proj = nn.Linear(C, 4 * C, bias=False), nn.Linear(4 * C, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(self.ln_1(x)).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down_proj(F.gelu(self.c_fc(self.ln_2(x))))


class GPT2(GPT):
    """nanoGPT's model, with learned positions. Its loss, score and initial weights are those of GPT."""

    def __init__(self, config: GPTConfig, max_seq_len: int):
        super().__init__(config, max_seq_len)
        self.positions = nn.Embedding(max_seq_len, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd, bias=False)

    def hidden(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x).to(self.dtype)


def nanogpt_optimizers(model: GPT2, config: Config) -> list[torch.optim.Optimizer]:
    """Return AdamW that decays everything with two dimensions, the embeddings too."""
    matrices, norms = ([weight for weight in model.parameters() if weight.ndim == ndim] for ndim in (2, 1))
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    return [torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)]


def nanogpt_rate(config: Config, stage: Stage, step: int) -> float:
    """Return the rate of nanoGPT's get_lr: a linear warmup, then a cosine to a tenth."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    cosine = 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (config.max_steps - warmup)))
    return peak / 10 + cosine * (peak - peak / 10)


# --------------------------------------------------------------------------------------------------------------------
# A run: its variant, seed and budget, and the keys given for all runs


def result_path(run: dict, args: Namespace) -> Path:
    """Return the file of a run, named by readable words and a hash of all that decides the outcome."""
    digest = hashlib.sha256(json.dumps([run, SHARED | VARIANTS[run["variant"]]], sort_keys=True).encode()).hexdigest()
    words = [run["variant"], f"{run['tokens'] / 1e6:.1f}M", run["keys"]["learning_rate"], run["seed"], digest[:8]]
    return Path(args.results) / ("_".join(map(str, words)) + ".json")


@user_errors()
def train_run(run: dict, args: Namespace) -> None:
    """Train a run to its end, score the final weights, and write the file of results."""
    config = config_of(run, args)
    if is_nanogpt := run["variant"] == "nanogpt":
        train.GPT, train.make_optimizers, train.learning_rate = GPT2, nanogpt_optimizers, nanogpt_rate
    if status := train.train(config, Team()):
        sys.exit(status)
    state, data = load_checkpoint(Path(config.out_dir) / "last.pt"), open_dataset(config.data_dir, LAST_LEN)
    model = train.GPT(GPTConfig(config.n_layer, config.n_head, config.n_embd), LAST_LEN)
    model.load_state_dict(state["model"])
    on_machine(model, config.device, state["config"]["dtype"], config.compile)

    stages = Curriculum(config.stages, config.max_steps).stages
    windows = torch.from_numpy(data.val.fixed_windows(LAST_LEN, data.val.spread(LAST_LEN, WINDOWS * LAST_LEN)))
    losses = {}
    for n in sorted({LAST_LEN, stages[-1].seq_len, *CUTS}) if run["seed"] == 0 else [LAST_LEN]:
        cuts = windows.unfold(1, n + 1, n).flatten(0, 1).split(max(1, config.micro_batch_tokens // n))  # same targets
        scores = torch.cat([model.score(part.to(model.device))[0] for part in cuts]).view(len(windows), -1)
        losses[n] = [round(loss, 5) for loss in scores.double().mean(1).tolist()]
    muon = muon_flops(model.config) if config.optimizer == "muon" else 0
    costs = {"tokens": [s.tokens_per_step for s in stages],
             "flops": [s.tokens_per_step * model.config.flops_per_token(s.seq_len) + muon for s in stages]}  # fmt: skip
    points = [{axis: spent(stages, record["step"], cost) for axis, cost in costs.items()}
              | {"step": record["step"], "seconds": record["time_s"], "loss": record["last_len_loss"]}
              for record in read_log(config.out_dir) if record["event"] == "eval"]  # fmt: skip
    result = {"run": run, "program": "nanoGPT" if is_nanogpt else "Muon" if muon else "AdamW", "stages": stages,
              "points": points, "losses": losses, "dtype": str(model.dtype), "device": str(model.device),
              "text": data.fingerprint}  # fmt: skip
    path = result_path(run, args)
    path.with_suffix(".tmp").write_text(json.dumps(result))
    path.with_suffix(".tmp").replace(path)


def spent(stages: list[Stage], step: int, costs: list[float]) -> float:
    """Return the cost of `step` steps, where `costs` holds the cost of one step in each stage."""
    return sum(max(0, min(step, stage.end) - stage.start) * cost for stage, cost in zip(stages, costs))


# --------------------------------------------------------------------------------------------------------------------
# Tables. A group is the results of one variant and learning rate, by seed


def read_result(path: Path, rates: dict[str, dict[str, float]] | None) -> dict:
    """Return a finished run. Given rates, tokens/s by program and length, compute its seconds from the rates."""
    result = json.loads(path.read_text())
    if rates:
        stages = [Stage(*stage) for stage in result["stages"]]
        mine = [rates[name] for name in rates if name in (result["program"], result["program"] + " bf16")]
        if not mine or any(str(s.seq_len) not in rate for s in stages for rate in mine):
            raise UserError(f"the rates lack {result['program']} or one of its lengths")
        costs = [s.tokens_per_step / max(rate[str(s.seq_len)] for rate in mine) for s in stages]
        for point in result["points"]:
            point["seconds"] = spent(stages, point["step"], costs)
    return result


def curve(group: dict[int, dict], axis: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the cost of each point and the loss at 2,048 there, as means over seeds."""
    points = [[(point[axis], point["loss"]) for point in result["points"]] for result in group.values()]
    return tuple(np.mean(points, axis=0).T)


def mean_and_error(losses: np.ndarray, form: str) -> str:
    return f"{losses.mean():{form}} ± {losses.std(ddof=1) / math.sqrt(len(losses)):.3f}"


def grouped(results: list[dict]) -> dict[tuple[str, float], dict[int, dict]]:
    """Return the results by (variant, learning rate), then by seed."""
    groups = {}
    for result in results:
        run = result["run"]
        groups.setdefault((run["variant"], run["keys"]["learning_rate"]), {})[run["seed"]] = result
    return groups


def draw(groups: dict[tuple[str, float], dict[int, dict]], to: str) -> None:
    """Draw loss at 2,048 against tokens, as mean and range over seeds, for the best learning rate of each variant."""
    from matplotlib import pyplot as plt
    figure, panel = plt.subplots(figsize=(8, 5), layout="constrained")
    worst_first = sorted(groups.items(), key=lambda item: -curve(item[1], "tokens")[1][-1])
    best = {variant: (lr, group) for (variant, lr), group in worst_first}  # a variant's last one stays
    for (variant, (lr, group)), (color, marker) in zip(best.items(), cycle(RUNS)):
        tokens, loss = curve(group, "tokens")
        panel.plot(tokens / 1e6, loss, color=color, marker=marker, label=f"{variant}, {lr:g}: {loss[-1]:.2f}")
        losses = [[point["loss"] for point in result["points"]] for result in group.values()]
        panel.fill_between(tokens / 1e6, np.min(losses, axis=0), np.max(losses, axis=0), color=color, alpha=0.25)
    panel.set(xlabel="million tokens", ylabel="held-out loss at length 2,048", xlim=(0, None), ylim=(None, 8))
    panel.legend(title="variant, learning rate: last loss")
    figure.savefig(to, dpi=100)


def tables(groups: dict[tuple[str, float], dict[int, dict]]) -> str:
    """Return a table that compares all groups with the first, and one of what shorter windows cost with seed 0."""
    first, whole, rows, cut_rows = next(iter(groups.values())), str(LAST_LEN), [], []
    for (variant, lr), group in groups.items():
        losses = {seed: np.array(result["losses"][whole]) for seed, result in group.items()}
        common = sorted(group.keys() & first.keys())
        deltas = [losses[s] - np.array(first[s]["losses"][whole]) for s in common]
        row = [variant, f"{lr:g}", f"{len(group)}"]
        for by_seed, form in ((list(losses.values()), ".3f"), (deltas, "+.3f")):
            ends = [f"{f(map(np.mean, by_seed), default=0):{form}}" for f in (min, max)]
            row += [mean_and_error(np.mean(by_seed, axis=0), form), " to ".join(ends)] if by_seed else ["", ""]
        for axis in ("tokens", "flops", "seconds"):
            end = min(curve(other, axis)[0][-1] for other in groups.values())
            both = [np.interp(end, *curve({s: g[s] for s in common}, axis)) for g in (group, first) if common]
            row.append(f"{both[0] - both[1]:+.3f}" if both else "")
        rows.append(row)
        for n, cut in group[0]["losses"].items() if 0 in group else ():
            if n != whole:
                cost = mean_and_error(np.array(cut) - losses[0], "+.3f")
                cut_rows.append([variant, f"{lr:g}", n, f"{np.mean(cut):.3f}", cost])
    header = ["variant", "lr", "seeds", "loss at 2,048", "over seeds", "difference", "over seeds"]
    header += [f"at equal {axis}" for axis in ("tokens", "FLOPs", "seconds")]
    machines = "\n".join(sorted({f"{r['dtype']}, {r['device']}" for group in groups.values() for r in group.values()}))
    cuts = format_table(["variant", "lr", "cut to", "loss", "lost by the cut"], cut_rows)
    return f"{machines}\n\n{format_table(header, rows)}\n\n{cuts}"


def main() -> int:
    parser = ArgumentParser(usage=SUPPRESS, allow_abbrev=False, description="Train and compare recipes.")
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=f"of {', '.join(VARIANTS)}; by default all")
    defaults = {"data_dir": "data/corpus", "results": "bench/recipe", "tokens": 4e6, "batch_tokens": 2_048, "seeds": 2}
    for key, value in defaults.items():
        parser.add_argument(f"--{key}", type=expanduser if isinstance(value, str) else type(value), default=value)
    parser.add_argument("--lrs", type=float, nargs="+", help="learning rates, if not the variants' own")
    parser.add_argument("--rates", type=expanduser, help="file of bench/throughput.py --to")
    parser.add_argument("--picture", type=expanduser, help="file to draw the losses in")
    parser.add_argument("--dry", action="store_true", help="train nothing")
    args, rest = parser.parse_known_args()
    pairs = [argument.removeprefix("--").split("=", 1) for argument in rest]
    if unknown := set(args.variants) - set(VARIANTS) or [pair[0] for pair in pairs if len(pair) == 1 or pair[0] in OWN]:
        raise UserError(f"neither a variant nor --key=value for all variants: {', '.join(unknown)}")
    if large := [f"{lr:g}" for lr in args.lrs or () if lr >= 1]:
        raise UserError(f"not a learning rate: {', '.join(large)}; name variants before --lrs")
    keys = {key: as_key_type(key, text, f"--{key}={text}") for key, text in pairs}
    runs = [{"variant": name, "seed": seed, "tokens": args.tokens, "batch_tokens": args.batch_tokens,
             "data": Path(args.data_dir).name, "keys": keys | {"learning_rate": lr}}
            for name in args.variants or VARIANTS
            for lr in args.lrs or [(SHARED | VARIANTS[name] | keys)["learning_rate"]]
            for seed in range(args.seeds)]  # fmt: skip
    rates = json.loads(Path(args.rates).read_text())["tokens_per_s"] if args.rates else None
    Path(args.results).mkdir(parents=True, exist_ok=True)
    plan = [(run, config_of(run, args), result_path(run, args)) for run in runs]
    known = {json.loads(path.read_text()).get("text") for *_, path in plan if path.exists()}
    if not args.dry and known - {open_dataset(args.data_dir).fingerprint}:
        raise UserError(f"{args.results} has results on other text than {args.data_dir}: give another --results")
    for run, config, path in plan:
        if not args.dry and not path.exists():
            process = get_context("spawn").Process(target=train_run, args=(run, args))
            process.start()
            process.join()
            if not 0 <= process.exitcode <= 2:  # stopped or killed; a run that failed is left to the next call
                sys.exit(process.exitcode)
        log = Path(config.out_dir) / "log.jsonl"
        evals = [record for record in read_log(log.parent) if record["event"] == "eval"] if log.exists() else []
        so_far = "loss {last_len_loss:.3f} after {step:,} steps, {time_s:,.0f} s".format(**evals[-1]) if evals else ""
        print(f"{path.stem}: {'done' if path.exists() else so_far or 'to do'}", flush=True)
    if groups := grouped([read_result(path, rates) for *_, path in plan if path.exists()]):
        print("\n" + tables(groups))
        if args.picture:
            draw(groups, args.picture)
    return 0 if args.dry or all(path.exists() for *_, path in plan) else 2


if __name__ == "__main__":
    with user_errors():
        sys.exit(main())
