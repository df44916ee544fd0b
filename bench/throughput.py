"""Training speed and memory beside what one would use instead: nanoGPT's train.py and transformers' GPT-2.

    python bench/throughput.py --nanogpt=PATH [--n_layer=4 --n_head=4 --n_embd=256 --tokens=2048] [--device=cpu]
    python bench/throughput.py --nanogpt=PATH --n_layer=12 --n_head=12 --n_embd=768 --tokens=16384 --apart

For each stage's length: optimizer steps of one batch of real tokens, compiled, by every program in a process of its
own, that take turns of --burst steps, --rounds times, so that a machine that slows down slows them all. (--apart: one
process at a time, for models of which four do not fit in memory.) nanoGPT's train.py runs unchanged, as it configures
itself, which is float32 on a CPU; and there, with its line for autocast changed to bf16. transformers' GPT-2 runs under
bf16 autocast with sdpa and fused AdamW. Ours is train.py's own step with curriculum9's settings, Muon among them; and
with --optimizer=adamw, which is what the others use.

Printed: tokens/s, median and spread over rounds; MFU, as a share of a large product, in the type that ours takes, timed
between the turns (on a known GPU: of its datasheet's bf16 peak); the largest memory each process ever held (of a GPU:
what torch allocated); the ratio of each round, median, spread.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

LENGTHS = [64, 128, 256, 512, 768, 1024, 1536, 2048]  # the nine stages' (the last two share one)


# --------------------------------------------------------------------------------------------------------------------
# The programs, each in a process that takes as many steps as it is told to, and waits


def reset_peak(device: str) -> None:
    import torch

    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM


def peak_gib(device: str) -> float:
    """The largest memory so far, or since reset_peak: what torch allocated on a GPU, what the process held on a CPU."""
    import torch

    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def gate(out, device: str) -> Callable[[], None]:
    """A function to call after every step: after the last of a turn it reports the turn's seconds and the peak memory,
    and waits to hear how many steps the next has. The first step is a turn of its own.

    A turn has ended when the GPU has. Within it a program waits for the GPU as often as it would by itself.
    """
    import torch

    left, since = 1, time.perf_counter()

    def after_step() -> None:
        nonlocal left, since
        left -= 1
        if left > 0:
            return
        if device != "cpu":
            torch.cuda.synchronize()
        out.write(f"{time.perf_counter() - since} {peak_gib(device)}\n")
        out.flush()
        wanted = sys.stdin.readline()
        if not wanted:
            os._exit(0)
        left, since = int(wanted), time.perf_counter()

    return after_step


def run_ours(args: argparse.Namespace, after_step: Callable[[], None], optimizer: str = "muon") -> None:
    import train
    from config import load_config
    from dataset import open_dataset

    config = load_config(["config/curriculum9.py", f"--n_layer={args.n_layer}", f"--n_head={args.n_head}",
                          f"--n_embd={args.n_embd}", f"--device={args.device}", f"--data_dir={args.data_dir}",
                          f"--optimizer={optimizer}"])  # fmt: skip
    dataset = open_dataset(config.data_dir, 2048)
    device = train.pick_device(config.device)
    longest = max(2048, args.length)
    model, optimizers, loss_of, _ = train.set_up(config, longest, device, train.pick_dtype(config.dtype, device))
    for step in range(10**9):
        windows = dataset.train.random_windows(args.length, args.batch, config.seed, step)
        train.train_step(loss_of, model, optimizers, windows, 6e-4, config)
        after_step()


def run_transformers(args: argparse.Namespace, after_step: Callable[[], None]) -> None:
    import numpy as np
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_float32_matmul_precision("high")
    shard = np.memmap(Path(args.data_dir) / "train_00000.bin", np.uint16, "r")
    config = GPT2Config(n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd, vocab_size=50304,
                        n_positions=args.length, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
                        attn_implementation="sdpa", use_cache=False)
    model = GPT2LMHeadModel(config).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    compiled = torch.compile(model)
    rng = np.random.default_rng(0)
    while True:
        starts = rng.integers(len(shard) - args.length, size=args.batch)
        tokens = torch.from_numpy(np.stack([shard[i : i + args.length] for i in starts]).astype(np.int64))
        tokens = tokens.to(args.device)
        with torch.autocast(args.device, torch.bfloat16):
            loss = compiled(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        after_step()


def run_nanogpt(args: argparse.Namespace, after_step: Callable[[], None], bf16: bool) -> None:
    """Its train.py in its own folder, with a print that counts every line that reports a step."""
    source = (Path(args.nanogpt) / "train.py").read_text()
    if bf16:
        changed = source.replace("nullcontext() if device_type == 'cpu' else ", "")
        assert changed != source, "this train.py has another line for autocast"
        source = changed

    def print_line(*words: object, **kwargs: object) -> None:
        if str(words[0]).startswith("iter "):
            after_step()

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data" / "sample"
        data.mkdir(parents=True)
        for split in ("train", "val"):
            (data / f"{split}.bin").symlink_to(Path(args.data_dir).resolve() / f"{split}_00000.bin")
        os.chdir(folder)
        sys.path.insert(0, args.nanogpt)
        sys.argv = ["train.py", "--dataset=sample", f"--device={args.device}", f"--block_size={args.length}",
                    f"--batch_size={args.batch}", "--gradient_accumulation_steps=1", f"--n_layer={args.n_layer}",
                    f"--n_head={args.n_head}", f"--n_embd={args.n_embd}", "--eval_iters=1",
                    "--eval_interval=1000000", "--log_interval=1", f"--dtype={'bfloat16' if bf16 else 'float32'}"]
        if not bf16 and args.device != "cpu":
            sys.argv.pop()  # as it configures itself
        (Path(folder) / "configurator.py").write_text((Path(args.nanogpt) / "configurator.py").read_text())
        names = {"__name__": "__main__", "__file__": "train.py", "print": print_line}
        exec(compile(source, "train.py", "exec"), names)


PROGRAMS: dict[str, Callable] = {
    "ours": run_ours,
    "ours, AdamW": lambda args, after_step: run_ours(args, after_step, "adamw"),
    "nanoGPT": lambda args, after_step: run_nanogpt(args, after_step, bf16=False),
    "nanoGPT bf16": lambda args, after_step: run_nanogpt(args, after_step, bf16=True),
    "transformers": run_transformers,
}
OURS = [name for name in PROGRAMS if name.startswith("ours")]


# --------------------------------------------------------------------------------------------------------------------
# The referee


class Player:
    """A program at work on one shape."""

    def __init__(self, name: str, flags: list[str], length: int, batch: int):
        words = [sys.executable, __file__, *flags, f"--play={name}", f"--length={length}", f"--batch={batch}"]
        env = os.environ | {"PYTHONWARNINGS": "ignore"}
        self.name = name
        self.process = subprocess.Popen(words, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=None if "--verbose" in flags else subprocess.DEVNULL, text=True)

    def read(self) -> float:
        """Seconds of the turn that it took. The first is one step, with its compilation, which nobody asks for."""
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended; --verbose shows why")
        seconds, self.peak = map(float, line.split())
        return seconds

    def turn(self, steps: int) -> float:
        """Seconds per step of so many."""
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return self.read() / steps

    def end(self) -> float:
        """The largest memory it held, in GiB."""
        self.process.kill()
        self.process.wait()
        return self.peak


def peak_rate(device: str, dtype: object = None) -> float:
    """FLOP/s of products in dtype, or the type that ours takes by itself: of bf16 on a known GPU the datasheet's, else
    of a large product just now (best of five)."""
    import torch

    from train import peak_flops, pick_dtype

    dtype = dtype or pick_dtype("auto", torch.device(device))
    if device == "cuda" and dtype == torch.bfloat16 and (peak := peak_flops(torch.cuda.get_device_name())):
        return peak
    n = 4096 if device == "cpu" else 16384
    a, b, c = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(3))
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        torch.mm(a, b, out=c)[0, 0].item()
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


def spread(values: list[float], form: str) -> str:
    low, middle, high = (format(f(values), form) for f in (min, statistics.median, max))
    return f"{middle} ({low}-{high})"


def measure(args: argparse.Namespace, length: int, batch: int) -> list[list[str]]:
    from model import GPTConfig

    names = [name for name in PROGRAMS if args.nanogpt or "nanoGPT" not in name]
    if args.device != "cpu" and args.nanogpt:
        names.remove("nanoGPT bf16")  # it configures itself so
    seconds: dict[str, list[float]] = {name: [] for name in names}
    memory, rates = {}, []
    if args.apart:
        for _ in range(args.rounds):
            for name in names:
                player = Player(name, sys.argv[1:], length, batch)
                player.read()  # the first step compiles
                player.turn(1)  # the second finds its memory
                seconds[name].append(player.turn(args.burst))
                memory[name] = player.end()
            rates.append(peak_rate(args.device))
    else:
        players = [Player(name, sys.argv[1:], length, batch) for name in names]
        for player in players:  # all compile at once
            player.read()
        for player in players:
            player.turn(args.burst)  # the first steps find their memory
        for _ in range(args.rounds):
            for player in players:
                seconds[player.name].append(player.turn(args.burst))
            rates.append(peak_rate(args.device))
        memory = {player.name: player.end() for player in players}
    flops = GPTConfig(args.n_layer, args.n_head, args.n_embd).flops_per_token(length) * length * batch
    rows = []
    for name in names:
        row = [f"{length:,}", f"{batch}", name, spread([length * batch / s for s in seconds[name]], ",.0f")]
        if name in OURS:
            row += [spread([flops / s / rate for s, rate in zip(seconds[name], rates)], ".0%"), f"{memory[name]:.2f}"]
            row += ["", "", ""]
        else:
            ratios = [[other / own for own, other in zip(seconds[ours], seconds[name])] for ours in OURS]
            row += ["", f"{memory[name]:.2f}", *(spread(ratio, ".2f") for ratio in ratios)]
            row += [f"{memory['ours'] / memory[name]:.2f}"]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", help="a checkout of nanoGPT; without it, it is left out")
    parser.add_argument("--n_layer", type=int, default=4)
    parser.add_argument("--n_head", type=int, default=4)
    parser.add_argument("--n_embd", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=2048, help="of an optimizer step")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--data_dir", default="data/sample")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--burst", type=int, default=4)
    parser.add_argument("--apart", action="store_true", help="one process at a time")
    parser.add_argument("--verbose", action="store_true", help="show what the programs print on stderr")
    for hidden, kind in (("--play", str), ("--length", int), ("--batch", int)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.data_dir = str(Path(args.data_dir).resolve())  # a program may work in a folder of its own
    args.nanogpt = args.nanogpt and str(Path(args.nanogpt).resolve())
    if args.play:
        out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what a program prints is not taken for a report
        return PROGRAMS[args.play](args, gate(out, args.device))

    from curriculum import format_table

    header = ["\nlength", "\nbatch", "\nprogram", "\ntokens/s", "\nMFU", "peak\nGiB", "ours is\nfaster by",
              "ours, AdamW,\nby", "our\nmemory"]
    rows = []
    for length in args.lengths:
        rows += measure(args, length, max(1, args.tokens // length))
        print(format_table(header, rows) if length == args.lengths[-1] else f"length {length} done", flush=True)


if __name__ == "__main__":
    main()
