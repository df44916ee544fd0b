"""What a GPU could do at best, on paper: tokens/s of each stage from the FLOPs and bytes of a step, and hours of a run.

    python bench/roofline.py config/curriculum9.py [--key=value ...]

FLOPs are those of model.py (6 per parameter in a matrix product, and attention), and Muon's: five rounds of three
products for each matrix of m x n, m <= n, so 5 * (4 m^2 n + 2 m^3). Bytes are what cannot stay on chip, with bf16
products and float32 weights, gradients and moments:

    per part of micro_batch_tokens    weights: read as float32 and written as bf16 (6), read forward and backward (4);
                                      gradients: read and added to (8)                                   18 a weight
    per step                          the optimizer reads and writes weight, gradient and two moments     32 a weight
    per token                         logits in bf16: written and read; their exponentials written, and read by two
                                      products                                                         10 a vocabulary
                                      each layer's activations in bf16, each written and read, forward and backward:
                                      some 16 of width C and 6 of SwiGLU's hidden size     8 * (16 C + 6 H) a layer

So the time of a step is the larger of FLOPs / peak and bytes / bandwidth. Nothing here is measured.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import load_config
from curriculum import PEAK_FLOPS, Curriculum, Stage, format_table
from errors import user_errors
from model import GPTConfig

BANDWIDTH = {"RTX 4090": 1008e9, "A100": 2039e9, "H100": 3352e9}  # bytes/s, datasheets (80 GB SXM of the last two)
SHARES = (1.0, 0.45, 0.15)  # of the roofline; 15 % on an RTX 4090 is the plan's 17 hours, with AdamW


def step_bytes(model: GPTConfig, stage: Stage, micro_batch_tokens: int) -> float:
    parts = math.ceil(stage.batch_size / (micro_batch_tokens // stage.seq_len))
    per_layer = 8 * (16 * model.n_embd + 6 * model.n_hidden)
    per_token = 10 * model.vocab_size + model.n_layer * per_layer
    return model.n_params * (18 * parts + 32) + stage.tokens_per_step * per_token


def muon_flops(model: GPTConfig) -> int:
    C, H = model.n_embd, model.n_hidden
    return model.n_layer * sum(count * 5 * (4 * C * C * n + 2 * C**3) for count, n in ((4, C), (3, H)))


def main() -> None:
    config = load_config(sys.argv[1:])
    model = GPTConfig(config.n_layer, config.n_head, config.n_embd)
    stages = Curriculum(config.stages, config.max_steps).stages
    hours = dict.fromkeys(BANDWIDTH, 0.0)
    header = ["stage", "length", "batch", "TFLOP/step", "GB/step"]
    for name in BANDWIDTH:
        header += [f"{name}: tokens/s", "bound by"]
    rows = []
    for number, stage in enumerate(stages, 1):
        flops = stage.tokens_per_step * model.flops_per_token(stage.seq_len)
        flops += muon_flops(model) if config.optimizer == "muon" else 0
        moved = step_bytes(model, stage, config.micro_batch_tokens)
        row = [f"{number}", f"{stage.seq_len:,}", f"{stage.batch_size}", f"{flops / 1e12:.2f}", f"{moved / 1e9:.1f}"]
        for name, bandwidth in BANDWIDTH.items():
            compute, memory = flops / PEAK_FLOPS[name], moved / bandwidth
            seconds = max(compute, memory)
            hours[name] += (stage.end - stage.start) * seconds / 3600
            row += [f"{stage.tokens_per_step / seconds:,.0f}", "FLOPs" if compute >= memory else "bytes"]
        rows.append(row)
    print(format_table(header, rows))
    rows = [[f"{share:.0%}", *(f"{hours[name] / share:.2f}" for name in BANDWIDTH)] for share in SHARES]
    print("\n" + format_table(["of the roofline: hours", *BANDWIDTH], rows))


if __name__ == "__main__":
    with user_errors():
        main()
