"""The head and its loss: cross-entropy over 50,304 tokens, most of a small model's work and of its memory.

    cross_entropy(x, weight, targets)    to train by: the sum over targets, in parts of the vocabulary
    score_targets(x, weight, targets)    to validate by: each target's, and whether it was the model's first choice

x (N, C) is what the head is given, weight (V, C) the head, targets (N,) the tokens that followed; logits are
x @ weight.T, in autocast's type. bench/head.py measures this beside torch's own.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def compiled(function: Callable) -> Callable:
    """The function compiled, once it is needed: a program that trains nothing starts without the compiler."""
    return torch.compile(function, dynamic=True)


def shifted_exp(logits: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Sets out to exp(logits - largest of the row), all (N, V'); gives these largest and the rows' sums, both (N,)."""
    logits = logits.float()
    largest = logits.amax(1, keepdim=True)
    exps = (logits - largest).exp()
    out.copy_(exps)
    return largest.squeeze(1), exps.sum(1)


class CrossEntropy(torch.autograd.Function):
    """-log softmax(x @ weight.T)[target] in nats, summed over the N targets: x (N, C), weight (V, C), targets (N,).

    Forward, a part of the vocabulary at a time: its logits, of which only exp(logits - largest of the part) is kept, in
    the type of x. Backward, probabilities would be exps * scale, with a scale for each part and target: exp(largest -
    logsumexp of all logits). The scale multiplies x and the products instead, which are small, and exps go into the
    products as they are. So N * V values are written once and read twice, and nothing else of that size is made.

    The gradient of a target's logit is probability - 1. Where the model is sure of it, so that little is left, the 1 is
    taken from what goes into the products, before they round; else from what comes out of them, which rounds nothing.
    """

    VOCAB_PART = 4192  # a twelfth: parts are for the memory, their size changes the speed little (bench/head.py)

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        weight = weight.to(x.dtype)
        parts = weight.split(CrossEntropy.VOCAB_PART)
        sizes = [len(x) * len(part) for part in parts]
        block = x.new_empty(sum(sizes))  # of memory for all parts
        exps = [e.view(len(x), -1) for e in block.split(sizes)]
        logits = torch.empty_like(exps[0])  # and one that each uses in turn
        largest, sums = torch.empty(2, len(parts), len(x), device=x.device)
        for i, (part, exp) in enumerate(zip(parts, exps)):
            logits = torch.mm(x, part.t(), out=logits[:, : len(part)])
            largest[i], sums[i] = compiled(shifted_exp)(logits, exp)
        log_sums = (largest + sums.log()).logsumexp(0)  # (N,)
        scales = (largest - log_sums).exp()
        number = targets // CrossEntropy.VOCAB_PART  # of the target's part
        before = number * CrossEntropy.VOCAB_PART  # tokens in the parts before it
        width = (len(weight) - before).clamp(max=CrossEntropy.VOCAB_PART)
        at = len(x) * before + torch.arange(len(x), device=x.device) * width + targets - before  # in the block
        exp, scale = block[at].float(), scales.gather(0, number[None])[0]
        is_sure = exp * scale > 0.5  # exp is at most 1, so 1 / scale is less than 2
        block[at] = torch.where(is_sure, exp - 1 / scale, exp).to(x.dtype)
        ctx.save_for_backward(x, weight, targets, (~is_sure).float(), scales, *exps)
        target_logits = (x.float() * weight[targets].float()).sum(1).to(x.dtype)  # rounded, as those in log_sums are
        return (log_sums - target_logits).sum()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, targets, is_left, scales, *exps = ctx.saved_tensors
        ones = (is_left * grad)[:, None]
        grad_x = weight[targets].float() * -ones
        grad_weight = torch.empty_like(weight, dtype=torch.float32)
        x32 = x.t().contiguous().float()  # laid out as it is multiplied: saves a sixth of the backward pass
        parts = zip(exps, weight.split(CrossEntropy.VOCAB_PART), grad_weight.split(CrossEntropy.VOCAB_PART))
        for scale, (exp, weight_part, grad_part) in zip(scales * grad, parts):
            grad_x.addcmul_(exp @ weight_part, scale[:, None])
            grad_part.copy_(((x32 * scale).to(x.dtype) @ exp).t())  # exp as the right factor: it is not transposed
        grad_weight.index_add_(0, targets, x.float() * -ones)
        return grad_x.to(x.dtype), grad_weight, None


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """CrossEntropy with x in the type of autocast's matrix products, if there is autocast."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    return CrossEntropy.apply(x, weight, targets)


def score_targets(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """For each of N targets its cross-entropy in nats, and whether it had the largest logit (the first of equals)."""
    logits = F.linear(x, weight)
    return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets
