"""Peak memory of an optimizer step by micro_batch_tokens: counted in bytes, and measured here.

    python bench/memory.py [--tokens 2048 4096 8192 16384] [--device=cpu] [--count]

For GPT-2 size (123.6M parameters) and for 24 layers of width 1,024 (355.1M), with Muon and bf16. Counted:

    per weight                4 itself, 4 gradient, 2 as bf16; moments: 4 of Muon (matrices), 8 of AdamW (the rest)
    per token of a part       2 a vocabulary entry: the exponentials of the logits, and a twelfth of that: the logits
                              of a part of the vocabulary;
                              24 C + 6 H a layer of width C and hidden size H, kept for the backward pass: two residual
                              streams in float32 (8 C), two normed in bf16 (4 C), q and k before and after their
                              norms, v and the attention's output (12 C); gate, up and their product (6 H)

Measured on a CPU is what the process held at most, less what it held before the model was made; on a GPU what torch
allocated at most. The rest of a batch is accumulated, so its size does not matter. --count leaves out the measuring.
What a card holds is said with SPARE times as much a token as is counted. An H100's allocator gave out as much as
is counted (bench/RESULTS.md); what it holds beyond that was not measured. On a CPU it was up to 1.4 times as much: the
backward pass has more for a moment, and some of it is holes between what is kept. Several processes also hold their
gradients a second time, for the all-reduce. Muon's updates on a GPU, with less by then beside them, are left out.
"""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "bench"))

from curriculum import format_table  # noqa: E402
from loss import CrossEntropy  # noqa: E402
from model import GPTConfig  # noqa: E402

SIZES = {"GPT-2": GPTConfig(12, 12, 768), "350M": GPTConfig(24, 16, 1024)}
SEQ_LEN = 1024
CARD = 24e9 - 1e9  # bytes; some 0.6 GB are CUDA's own
SPARE = 1.1  # chosen


def count(model: GPTConfig, tokens: int) -> float:
    embedding = model.vocab_size * model.n_embd
    fixed = 10 * model.n_params + 4 * (model.n_matmul - embedding) + 8 * embedding
    per_token = 2 * (model.vocab_size + CrossEntropy.VOCAB_PART)
    per_token += model.n_layer * (24 * model.n_embd + 6 * model.n_hidden)
    return fixed + tokens * per_token


def need(model: GPTConfig, tokens: int) -> float:
    """Bytes of a card for a step with parts of so many tokens."""
    fixed = count(model, 0)
    return fixed + SPARE * (count(model, tokens) - fixed)


def measure(size: str, tokens: int, device_name: str) -> float | None:
    """GiB that two steps of one part took at most, in a process of its own; None where they did not fit."""
    words = [sys.executable, __file__, f"--play={size}", "--tokens", str(tokens), f"--device={device_name}"]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    if done.returncode and done.returncode != -9 and "out of memory" not in done.stderr:  # -9: by the kernel
        raise RuntimeError(done.stderr)
    return None if done.returncode else float(done.stdout)


def play(size: str, tokens: int, device_name: str) -> None:
    import numpy as np
    import torch
    from throughput import peak_gib, reset_peak

    from config import load_config
    from train import pick_device, set_up, train_step

    model = SIZES[size]
    config = load_config([str(ROOT / "config/curriculum9.py"), f"--n_layer={model.n_layer}", f"--n_head={model.n_head}",
                          f"--n_embd={model.n_embd}", f"--micro_batch_tokens={tokens}"])
    device = pick_device(device_name)
    before = peak_gib(device_name)
    gpt, optimizers, loss_of, _ = set_up(config, SEQ_LEN, device, torch.bfloat16)
    windows = np.random.default_rng(0).integers(50257, size=(tokens // SEQ_LEN, SEQ_LEN + 1))
    for _ in range(2):  # the moments are made in the first
        reset_peak(device_name)
        train_step(loss_of, gpt, optimizers, windows, 6e-4, config)
    print(peak_gib(device_name) - (before if device.type == "cpu" else 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192, 16384], help="micro_batch_tokens")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--count", action="store_true", help="do not measure")
    parser.add_argument("--play", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.play:
        return play(args.play, args.tokens[0], args.device)
    rows = []
    for size, model in SIZES.items():
        for tokens in args.tokens:
            counted = count(model, tokens)
            measured = None if args.count else measure(size, tokens, args.device)
            rows.append([size, f"{model.n_params / 1e6:.1f}M", f"{tokens:,}", f"{counted / 2**30:.2f}",
                         f"{measured:.2f}" if measured else "-",
                         f"{measured * 2**30 / counted:.2f}" if measured else "-",
                         "yes" if need(model, tokens) < CARD else "no"])
    print(format_table(["model", "parameters", "tokens", "counted GiB", "measured GiB", "ratio", "fits 24 GB"], rows))
    for size, model in SIZES.items():
        most = (CARD - need(model, 0)) / (need(model, 1) - need(model, 0))
        print(f"{size}: a 24 GB card holds parts of {most:,.0f} tokens")


if __name__ == "__main__":
    main()
