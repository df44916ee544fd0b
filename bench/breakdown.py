"""Show where the time of an optimizer step goes, by torch's profiler, and how fast its matrix products run.

    python bench/breakdown.py config/curriculum9.py --data_dir=data/sample --stages="[(0, 512, 32, 1.0)]" [--key=value]

Times steps of the first stage's shape: one plain, then one under the profiler, after two that compile and allocate.
Each operation's own time, on a GPU that of the kernels it started, goes to one of these parts:

    products           of the blocks' matrices, forward and backward
    head's products    in model.CrossEntropy; `loss` is the rest of model.CrossEntropy
    attention          torch's kernels, forward and backward; its FLOPs count all pairs of tokens, twice the causal ones
    muon, adamw        the optimizers, with Muon's products
    the rest           norms, rotary, SwiGLU, residuals, the embedding, clipping
    no operation       the remaining time of the step, with the profiler's own

MFU is that of the plain step, as a share of throughput.py's peak_rate. The last figure is the MFU if only products and
attention, which are torch's, took time.
"""

import sys
import time
from collections import Counter
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import graph  # noqa: E402
from bench.throughput import peak_rate, set_up  # noqa: E402
from curriculum import Curriculum, format_table  # noqa: E402
from model import GPTConfig  # noqa: E402
from parallel import Team  # noqa: E402
from settings import load_config, user_errors  # noqa: E402
from train import train_step  # noqa: E402

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkl::_mkl_linear", "mkldnn::_linear_pointwise")


def part_of(event) -> str:
    """Return the part that an operation belongs to, by its name and its callers."""
    callers, at = [], event
    while at:
        callers.append(at.name)
        at = at.cpu_parent
    inside = " ".join(callers)
    if "#Muon." in inside or "#AdamW." in inside:
        return "muon" if "#Muon." in inside else "adamw"
    is_product = event.name in PRODUCTS
    if "CrossEntropy" in inside:
        return "head's products" if is_product else "loss"
    if "scaled_dot_product" in inside:
        return "attention"
    return "products" if is_product else "the rest"


def muon_flops(model: GPTConfig) -> int:
    """Return the FLOPs of an update. In each of five rounds an m x n matrix X with m <= n takes 2 m^2 n for X X', 2 m^3
    for the square of X X', and 2 m^2 n for the product with X."""
    C, H = model.n_embd, model.n_hidden
    return model.n_layer * sum(count * 5 * (4 * C * C * n + 2 * C**3) for count, n in ((4, C), (3, H)))


def main() -> None:
    graph.USE_CUDA_GRAPH = False  # the profiler cannot tell which operation started a kernel of a graph
    config = load_config(sys.argv[1:])
    stage = Curriculum(config.stages, config.max_steps).stages[0]
    model, optimizers, scaler, data = set_up(config, stage.seq_len)
    device, m, tokens = model.device.type, model.config, stage.tokens_per_step

    def step(number: int) -> float:
        """Return the seconds of a step."""
        windows = data.train.random_windows(stage.seq_len, stage.batch_size, config.seed, number)
        started = time.perf_counter()
        train_step(model, optimizers, scaler, windows, 6e-4, config, Team())
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    *_, plain = (step(number) for number in range(3))
    rate = peak_rate(device, model.dtype)
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")) as profiler:
        total = step(3)
    seconds: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type == DeviceType.CPU:  # a GPU's kernels are counted with what started them
            own = event.self_cpu_time_total if device == "cpu" else event.self_device_time_total
            seconds[part_of(event)] += own / 1e6
    seconds["no operation"] = total - sum(seconds.values())

    head, all_flops = 6 * m.vocab_size * m.n_embd * tokens, m.flops_per_token(stage.seq_len) * tokens
    flops = {"products": 6 * m.n_matmul * tokens - head, "head's products": head,
             "attention": all_flops - 6 * m.n_matmul * tokens, "muon": muon_flops(m)}  # fmt: skip
    print(f"{m.n_params / 1e6:.1f}M parameters, {stage.batch_size} windows of {stage.seq_len:,}, {model.dtype}, "
          f"{device}: {plain:.3f} s, profiled {total:.3f} s; products reach {rate / 1e12:.2f} TFLOP/s\n")  # fmt: skip
    rows = []
    for part, own in seconds.most_common():
        done = flops.get(part)
        speeds = [f"{done / 1e12:.2f}", f"{done / own / 1e12:.2f}", f"{done / own / rate:.0%}"] if done else [""] * 3
        rows.append([part, f"{1000 * own:,.1f}", f"{own / total:.0%}", *speeds])
    print(format_table(["part", "ms", "of the step", "TFLOP", "TFLOP/s", "of the rate"], rows))
    torchs = sum(seconds[part] for part in ("products", "head's products", "attention"))
    print(f"\nMFU {all_flops / plain / rate:.0%}; with products and attention alone, {all_flops / torchs / rate:.0%}")


if __name__ == "__main__":
    with user_errors():
        main()
