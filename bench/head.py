"""The head and its loss alone: loss.CrossEntropy, by the size of its parts, beside torch's own, compiled.

    python bench/head.py [--tokens 2048] [--n_embd 256] [--rounds 7] [--device=cpu] [--dtype=auto] [--linear]

Seconds of the forward and the backward pass under autocast, median and spread over rounds in which all take turns, and
how much slower each is than CrossEntropy as it stands, round by round. Last, how far its loss and gradients are off
float64's, relative, beside torch's own, for at most 2,048 tokens: for targets by chance, and where half of them have a
probability of 0.99.
--linear adds F.linear_cross_entropy, which computes in parts of the batch.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.throughput import spread
from curriculum import format_table
from loss import CrossEntropy, cross_entropy
from model import GPTConfig
from train import keep_memory, pick_dtype

VOCAB = GPTConfig.vocab_size


@torch.no_grad()
def make_sure(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> None:
    """Sets each x to so much of its target's weights that the target has a probability of 0.99 (or a logit of 50)."""
    toward = weight[targets]
    high = 50 / toward.square().sum(1, keepdim=True)  # makes its logit 50
    low = torch.zeros_like(high)
    for _ in range(40):
        middle = (low + high) / 2
        p = (middle * toward @ weight.T).softmax(1).gather(1, targets[:, None])
        low, high = torch.where(p < 0.99, middle, low), torch.where(p < 0.99, high, middle)
    x.copy_(low * toward)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--n_embd", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--linear", action="store_true")
    args = parser.parse_args()
    dtype = pick_dtype(args.dtype, torch.device(args.device))
    print(f"{args.tokens:,} tokens, width {args.n_embd}, {dtype}, {args.device}\n")
    keep_memory()
    torch.manual_seed(0)
    x = torch.randn(args.tokens, args.n_embd, device=args.device, requires_grad=True)
    weight = (0.02 * torch.randn(VOCAB, args.n_embd, device=args.device)).requires_grad_()
    targets = torch.randint(50257, (args.tokens,), device=args.device)

    def by_parts(part: int):
        def loss() -> torch.Tensor:
            CrossEntropy.VOCAB_PART = part
            return cross_entropy(x, weight, targets)

        return loss

    own = CrossEntropy.VOCAB_PART
    compiled = torch.compile(lambda x, w, t: F.cross_entropy(F.linear(x, w), t, reduction="sum"), dynamic=True)
    losses = {f"parts of {part:,}": by_parts(part) for part in (own, own // 4, own // 2, 2 * own, 4 * own, VOCAB)}
    losses["torch's cross_entropy"] = lambda: compiled(x, weight, targets)
    if args.linear:
        by_rows = torch.nn.LinearCrossEntropyOptions()  # without: the plain loss; it heeds no autocast
        losses["torch's linear_cross_entropy"] = lambda: F.linear_cross_entropy(
            x.to(dtype), weight.to(dtype), targets, reduction="sum", options=by_rows)  # fmt: skip

    def run(loss) -> tuple[float, float, list[torch.Tensor]]:
        """Seconds forward and backward, and (loss, gradient of x, gradient of weight)."""
        x.grad = weight.grad = None
        started = time.perf_counter()
        with torch.autocast(args.device, dtype, enabled=dtype != torch.float32):
            value = loss()
        value.detach().item()
        middle = time.perf_counter()
        value.backward()
        x.grad.sum().item()
        return middle - started, time.perf_counter() - middle, [value.detach(), x.grad, weight.grad]

    times = {name: [] for name in losses}
    for round_number in range(args.rounds + 2):  # the first two compile and find their memory
        for name, loss in losses.items():
            forward, backward, _ = run(loss)
            if round_number >= 2:
                times[name].append((forward, backward))
    totals = {name: [sum(pair) for pair in pairs] for name, pairs in times.items()}
    first = totals[f"parts of {own:,}"]
    form = ".0f" if args.device == "cpu" else ".2f"
    rows = [[name, *(spread([1000 * pair[i] for pair in pairs], form) for i in (0, 1)),
             spread([own_time / base for own_time, base in zip(totals[name], first)], ".2f")]
            for name, pairs in times.items()]  # fmt: skip
    print(format_table(["loss", "forward ms", "backward ms", "times ours"], rows))

    x, targets = x.detach()[:2048].requires_grad_(), targets[:2048]  # float64's logits are large
    for targets_are in ("by chance", "half of them sure"):
        if targets_are != "by chance":
            make_sure(x.detach()[::2], weight, targets[::2])
        # What both are given, rounded: how far off they are is then their own doing.
        exact_x, exact_weight = (value.detach().to(dtype).double().requires_grad_() for value in (x, weight))
        exact_loss = F.cross_entropy(exact_x @ exact_weight.T, targets, reduction="sum")
        exact_loss.backward()
        exact = [exact_loss.detach(), exact_x.grad, exact_weight.grad]
        rows = []
        for name in (f"parts of {own:,}", "torch's cross_entropy"):
            values = run(losses[name])[2]
            rows.append([name, *(f"{((a - b).norm() / b.norm()).item():.1e}" for a, b in zip(values, exact))])
        header = [f"off from float64, targets {targets_are}", "loss", "gradient of x", "of weight"]
        print("\n" + format_table(header, rows))


if __name__ == "__main__":
    main()
