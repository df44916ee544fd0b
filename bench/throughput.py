"""Compare speed and memory with nanoGPT's train.py and transformers' GPT-2.

    python bench/throughput.py --nanogpt=PATH [--n_layer=4 --n_head=4 --n_embd=256 --tokens=2048] [--device=cpu]
    python bench/throughput.py --nanogpt=PATH --n_layer=12 --n_head=12 --n_embd=768 --tokens=16384 --apart

At each stage's length every program makes compiled optimizer steps of one batch of real tokens, in its own process.
Programs take turns of --burst steps, --rounds times: a machine that slows down slows all of them. With --apart, for
less memory, a program takes all its turns before the next starts. nanoGPT's train.py runs unchanged, on a CPU in
float32. There it also runs in bf16, with its autocast line changed. transformers' GPT-2 runs under bf16 autocast with
sdpa and fused AdamW. "Muon" and "AdamW" are the steps of this project's train.py with its default settings.

MFU is a share of the rate of a large product timed between turns, or of a known GPU's datasheet. Memory is the peak of
the whole process, on a GPU the peak that torch allocated. --to=FILE.json keeps the median tokens/s for bench/recipe.py.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import SUPPRESS, ArgumentParser, Namespace
from functools import partial
from pathlib import Path
from typing import NamedTuple, TextIO

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from config import curriculum9  # noqa: E402
from curriculum import PEAK_FLOPS, format_table  # noqa: E402
from data import Dataset, open_dataset  # noqa: E402
from model import GPT, GPTConfig, on_machine  # noqa: E402
from optim import make_optimizers  # noqa: E402
from parallel import Team  # noqa: E402
from settings import ONE_OF, Config, UserError, user_errors  # noqa: E402
from train import train_step  # noqa: E402


def a_path(text: str) -> str:
    return os.path.abspath(os.path.expanduser(text))


class Gate:
    """A function that a program calls after every step. At a turn's end, when the GPU is done, it reports its time and
    memory, and reads how many steps the next turn has. The first step is a turn of its own."""

    def __init__(self, reports: TextIO, device: str):
        self.reports, self.device, self.left, self.since = reports, device, 1, time.perf_counter()

    def __call__(self) -> None:
        self.left -= 1
        if self.left > 0:
            return
        if self.device != "cpu":
            torch.cuda.synchronize()
        print(time.perf_counter() - self.since, self.peak_gib(), file=self.reports, flush=True)
        if not (wanted := sys.stdin.readline()):
            os._exit(0)
        self.left, self.since = int(wanted), time.perf_counter()

    def peak_gib(self) -> float:
        if self.device != "cpu":
            return torch.cuda.max_memory_allocated() / 2**30
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20


def set_up(config: Config, max_len: int) -> tuple[GPT, list, torch.amp.GradScaler, Dataset]:
    """Return a new model on its machine, its optimizers and scaler, and the dataset, as train.py makes them."""
    model = GPT(GPTConfig(config.n_layer, config.n_head, config.n_embd), max_len)
    model.init_weights(config.seed)
    on_machine(model, config.device, config.dtype, config.compile)
    scaler = torch.amp.GradScaler(model.device.type, enabled=model.dtype == torch.float16)
    return model, make_optimizers(model, config), scaler, open_dataset(config.data_dir, max_len)


def run_train(args: Namespace, after_step: Gate, optimizer: str) -> None:
    keys = ("n_layer", "n_head", "n_embd", "device", "dtype", "data_dir")
    whole = {"optimizer": optimizer, "micro_batch_tokens": args.batch * args.length}  # one pass, as the other programs
    config = Config(**{key: getattr(args, key) for key in keys}, **whole)
    model, optimizers, scaler, data = set_up(config, args.length)
    for step in range(10**9):
        windows = data.train.random_windows(args.length, args.batch, config.seed, step)
        train_step(model, optimizers, scaler, windows, 6e-4, config, Team())
        after_step()


def run_transformers(args: Namespace, after_step: Gate) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_float32_matmul_precision("high")
    data = open_dataset(args.data_dir, args.length)
    shape = {"n_layer": args.n_layer, "n_head": args.n_head, "n_embd": args.n_embd, "n_positions": args.length}
    config = GPT2Config(**shape, vocab_size=50304, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, use_cache=False)
    model = GPT2LMHeadModel(config).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    compiled = torch.compile(model)
    for step in range(10**9):
        windows = data.train.random_windows(args.length - 1, args.batch, 0, step)  # the model shifts the targets itself
        tokens = torch.from_numpy(windows).to(args.device)
        with torch.autocast(args.device, torch.bfloat16):
            loss = compiled(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        after_step()


def run_nanogpt(args: Namespace, after_step: Gate, bf16: bool) -> None:
    """Run nanoGPT's train.py in its own folder, with a print that counts the lines that report a step."""
    source = (Path(args.nanogpt) / "train.py").read_text()
    if bf16:
        source, unchanged = source.replace("nullcontext() if device_type == 'cpu' else ", ""), source
        assert source != unchanged, "this train.py has another line for autocast"
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data" / "sample"
        data.mkdir(parents=True)
        for split in ("train", "val"):
            (data / f"{split}.bin").symlink_to(Path(args.data_dir) / f"{split}_00000.bin")
        (Path(folder) / "configurator.py").write_text((Path(args.nanogpt) / "configurator.py").read_text())
        os.chdir(folder)
        sys.path.insert(0, args.nanogpt)
        del sys.modules["model"]  # nanoGPT has a model.py, too
        keys = {key: getattr(args, key) for key in ("device", "n_layer", "n_head", "n_embd")}
        keys |= {"dataset": "sample", "block_size": args.length, "batch_size": args.batch, "eval_iters": 1,
                 "gradient_accumulation_steps": 1, "eval_interval": 10**6, "log_interval": 1}  # fmt: skip
        keys |= {"dtype": "bfloat16" if bf16 else "float32"} if args.device == "cpu" else {}
        sys.argv = ["train.py", *(f"--{key}={value}" for key, value in keys.items())]
        count = lambda *words, **_: after_step() if str(words[0]).startswith("iter ") else None  # noqa: E731
        exec(compile(source, "train.py", "exec"), {"__name__": "__main__", "__file__": "train.py", "print": count})


PROGRAMS = {
    "Muon": partial(run_train, optimizer="muon"),
    "AdamW": partial(run_train, optimizer="adamw"),
    "nanoGPT": partial(run_nanogpt, bf16=False),
    "nanoGPT bf16": partial(run_nanogpt, bf16=True),
    "transformers": run_transformers,
}


class Shape(NamedTuple):
    n_layer: int
    n_head: int
    n_embd: int
    length: int
    tokens: int  # per step


class Player:
    """A program that trains on one shape in a process of its own."""

    def __init__(self, name: str, shape: Shape):
        flags = [f"--{key}={value}" for key, value in zip(("n_layer", "n_head", "n_embd", "lengths", "tokens"), shape)]
        command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], *flags, f"--play={name}"]
        pipe = subprocess.PIPE
        self.name, self.process = name, subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def read(self) -> float:
        """Return the seconds of the program's current turn, and note its peak memory so far, in GiB."""
        if not (line := self.process.stdout.readline()):
            raise UserError(f"{self.name} has ended")
        seconds, self.memory = map(float, line.split())
        return seconds

    def turn(self, steps: int) -> float:
        """Return the seconds per step of a turn."""
        print(steps, file=self.process.stdin, flush=True)
        return self.read() / steps


def take_turns(names: list[str], shape: Shape, args: Namespace) -> list[tuple[list[float], list[float], float]]:
    """Return, for each program, seconds per step and the machine's peak by round, and the peak memory."""
    players, seconds, peaks = [Player(name, shape) for name in names], [], []
    for player in players:
        player.read()  # the first step compiles, in all programs at once
    for player in players:
        player.turn(2)  # the next steps allocate their memory
    for _ in range(args.rounds):
        seconds.append([player.turn(args.burst) for player in players])
        peaks.append(peak_rate(args.device, args.taken))
    for player in players:
        player.process.kill()
        player.process.wait()
    return [(list(mine), peaks, player.memory) for mine, player in zip(zip(*seconds), players)]


def product_rate(device: str, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large product in dtype, the best of five, or of those started within two seconds."""
    n = 2048 if device == "cpu" else 16384
    a, b, c = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(3))
    seconds = []
    while len(seconds) < 5 and sum(seconds) < 2:
        started = time.perf_counter()
        torch.mm(a, b, out=c)[0, 0].item()
        seconds.append(time.perf_counter() - started)
    return 2 * n**3 / min(seconds)


def peak_rate(device: str, dtype: torch.dtype) -> float:
    """Return the peak FLOP/s for MFU: the datasheet's for bf16 on a known GPU, else a large product's."""
    name = torch.cuda.get_device_name() if device != "cpu" else ""
    return PEAK_FLOPS[name] if dtype == torch.bfloat16 and name in PEAK_FLOPS else product_rate(device, dtype)


def spread(values: list[float], form: str) -> str:
    low, middle, high = (format(f(values), form) for f in (min, statistics.median, max))
    return f"{middle} ({low}-{high})"


def measure(names: list[str], shape: Shape, args: Namespace) -> tuple[list[list[str]], list[list[float]]]:
    """Return a row of the table and the seconds per step for each program. The first two are this project's."""
    groups = [[name] for name in names] if args.apart else [names]
    results = [result for group in groups for result in take_turns(group, shape, args)]
    model, rows = GPTConfig(*shape[:3]), []
    flops = model.flops_per_token(shape.length) * shape.tokens
    for name, (seconds, peaks, gib) in zip(names, results):
        mfu = spread([flops / s / peak for s, peak in zip(seconds, peaks)], ".0%") if name in ("Muon", "AdamW") else ""
        row = [f"{model.n_params / 1e6:.1f}M", f"{shape.length:,}", f"{shape.tokens:,}", name,
               spread([shape.tokens / s for s in seconds], ",.0f"), mfu, f"{gib:.2f}"]  # fmt: skip
        row += [spread([s / own for own, s in zip(mine, seconds)], ".2f") for mine, *_ in results[:2]]
        rows.append([*row, f"{results[0][2] / gib:.2f}"])
    return rows, [seconds for seconds, *_ in results]


def main() -> None:
    parser = ArgumentParser(usage=SUPPRESS, description="Compare training steps with nanoGPT's and transformers'.")
    parser.add_argument("--nanogpt", type=a_path, help="a checkout of nanoGPT; by default nanoGPT is left out")
    for key, value in {"n_layer": 4, "n_head": 4, "n_embd": 256, "tokens": 2048, "rounds": 5, "burst": 4}.items():
        parser.add_argument(f"--{key}", type=int, default=value)
    parser.add_argument("--lengths", type=int, nargs="+", default=sorted({row[1] for row in curriculum9.stages}))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="auto", choices=ONE_OF["dtype"], help="of our matrix products")
    parser.add_argument("--data_dir", type=a_path, default="data/sample")
    parser.add_argument("--skip", nargs="+", default=[], choices=[*PROGRAMS][2:], help="programs to leave out")
    parser.add_argument("--apart", action="store_true", help="one program after the other")
    parser.add_argument("--to", type=a_path, help="file for the median rates")
    parser.add_argument("--play", help=SUPPRESS)
    args = parser.parse_args()
    if args.play:
        args.length, args.batch = args.lengths[0], max(1, args.tokens // args.lengths[0])
        reports = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # keep a program's own prints out of its reports
        return PROGRAMS[args.play](args, Gate(reports, args.device))

    args.taken = on_machine(GPT(GPTConfig(1, 1, 2), 1), args.device, args.dtype).dtype
    sys.argv.append(f"--dtype={args.taken}".replace("torch.", ""))  # for every Player
    bf16, float32 = (product_rate(args.device, dtype) / 1e12 for dtype in (torch.bfloat16, torch.float32))
    print(f"train.py takes {args.taken}; a large product reaches {bf16:.3g} TFLOP/s in bf16, {float32:.3g} in float32")
    # On a GPU, nanoGPT configures itself for bf16 already
    left_out = ("nanoGPT",) if not args.nanogpt else ("nanoGPT bf16",) if args.device != "cpu" else ()
    names = [name for name in PROGRAMS if not name.startswith(left_out) and name not in args.skip]
    table, rates = [], {}
    for length in args.lengths:
        shape = Shape(args.n_layer, args.n_head, args.n_embd, length, max(1, args.tokens // length) * length)
        rows, seconds = measure(names, shape, args)
        table += rows
        for name, mine in zip(names, seconds):
            rates.setdefault(name, {})[length] = shape.tokens / statistics.median(mine)
        print(f"length {length:,} done", flush=True)
    header = "parameters,length,tokens,program,tokens/s,MFU,GiB,Muon is faster by,AdamW by,memory of Muon".split(",")
    print(format_table(header, table))
    if args.to:
        Path(args.to).write_text(json.dumps({"dtype": str(args.taken), "tokens_per_s": rates}, indent=1) + "\n")


if __name__ == "__main__":
    with user_errors():
        main()
