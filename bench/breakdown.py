"""Where the time of an optimizer step goes, by torch's profiler, and how fast its products run.

    python bench/breakdown.py config/curriculum9.py --data_dir=data/sample --stages="[(0, 512, 32, 1.0)]" [--key=value]

A step of the first stage's shape, after two that compile and find their memory: once as it is, then with the profiler.
The time of every operation itself (on a GPU: of the kernels it started) goes to one of these parts:

    products           of the blocks' matrices, forward and backward
    head's products    and loss: all else in loss.py
    attention          torch's kernels, forward and backward
    muon, adamw        Muon's products among it
    the rest           norms, rotary, SwiGLU, residuals, the embedding, clipping
    no operation       what the step took beside all that, the profiler's own time among it

FLOPs are model.py's and Muon's. MFU is as in bench/throughput.py: of the step without the profiler, and a share of
peak_rate's. And what it would be if products and attention, which are torch's, were all that takes time.
"""

import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.roofline import muon_flops
from bench.throughput import peak_rate
from config import load_config
from curriculum import Curriculum, format_table
from dataset import open_dataset
from errors import user_errors
from train import pick_device, pick_dtype, set_up, train_step

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkl::_mkl_linear", "mkldnn::_linear_pointwise")


def part_of(event) -> str:
    """The part that an operation belongs to, by its name and what called it."""
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


def main() -> None:
    config = load_config(sys.argv[1:])
    curriculum = Curriculum(config.stages, config.max_steps)
    stage, device = curriculum.stages[0], pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    model, optimizers, loss_of, _ = set_up(config, curriculum.max_len, device, dtype)
    dataset = open_dataset(config.data_dir, curriculum.max_len)

    def step(number: int) -> float:
        """Its seconds."""
        windows = dataset.train.random_windows(stage.seq_len, stage.batch_size, config.seed, number)
        started = time.perf_counter()
        train_step(loss_of, model, optimizers, windows, 6e-4, config)
        if device.type != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    *_, plain = (step(number) for number in range(3))
    rate = peak_rate(device.type, dtype)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        total = step(3)
    seconds: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type == DeviceType.CPU:  # a GPU's kernels are counted with what started them
            own = event.self_cpu_time_total if device.type == "cpu" else event.self_device_time_total
            seconds[part_of(event)] += own / 1e6
    seconds["no operation"] = total - sum(seconds.values())

    m, tokens = model.config, stage.tokens_per_step
    head = 6 * m.vocab_size * m.n_embd * tokens
    all_flops = m.flops_per_token(stage.seq_len) * tokens
    flops = {"products": 6 * m.n_matmul * tokens - head, "head's products": head,
             "attention": all_flops - 6 * m.n_matmul * tokens, "muon": muon_flops(m)}  # fmt: skip
    print(f"{m.n_params / 1e6:.1f}M parameters, {stage.batch_size} windows of {stage.seq_len:,}, {dtype}, {device}: "
          f"{plain:.3f} s, profiled {total:.3f} s; products reach {rate / 1e12:.2f} TFLOP/s\n")  # fmt: skip
    rows = []
    for part, own in seconds.most_common():
        done = flops.get(part)
        rows.append([part, f"{1000 * own:,.1f}", f"{own / total:.0%}", f"{done / 1e12:.2f}" if done else "",
                     f"{done / own / 1e12:.2f}" if done else "", f"{done / own / rate:.0%}" if done else ""])
    print(format_table(["part", "ms", "of the step", "TFLOP", "TFLOP/s", "of the rate"], rows))
    torchs = sum(seconds[part] for part in ("products", "head's products", "attention"))
    print(f"\nMFU {all_flops / plain / rate:.0%}; were products and attention all, {all_flops / torchs / rate:.0%}")


if __name__ == "__main__":
    with user_errors():
        main()
