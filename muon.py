"""torch.optim.Muon for a GPU: the same updates, of all matrices of a shape at once.

torch's own takes the matrices one by one, at GPT-2 size in 2,856 kernels a step, most of them too small for a large GPU
and all of them launched while it has nothing else to do. On an H100 they took two fifths to half of a step
(bench/RESULTS.md). All at once needs some ten bytes for each weight of a shape, when the activations are gone.
"""

import math

import torch
from torch import Tensor


def orthogonalize(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Each matrix of x (N, I, O) with singular values near 1, by Newton-Schulz (Jordan et al. 2024) in bfloat16."""
    a, b, c = coefficients
    is_tall = x.shape[1] > x.shape[2]
    x = (x.mT if is_tall else x).to(torch.bfloat16, memory_format=torch.contiguous_format)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(torch.float32, memory_format=torch.contiguous_format)


class Muon(torch.optim.Muon):
    """With adjust_lr_fn="match_rms_adamw" and Nesterov's momentum; its settings, state and checkpoints are torch's."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            assert group["adjust_lr_fn"] == "match_rms_adamw" and group["nesterov"]
            weights, grads, momenta = [], [], []
            self._init_group(group, weights, grads, momenta)  # those that have a gradient
            if not weights:
                continue
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            updates = torch._foreach_lerp(grads, momenta, group["momentum"])
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            for shape in {weight.shape for weight in weights}:
                alike = [i for i, weight in enumerate(weights) if weight.shape == shape]
                x = torch.stack([updates[i] for i in alike])
                x = orthogonalize(x, group["ns_coefficients"], group["ns_steps"], group["eps"])
                lr = group["lr"] * 0.2 * math.sqrt(max(shape))  # match_rms_adamw (Liu et al. 2025)
                torch._foreach_add_([weights[i] for i in alike], x.unbind(), alpha=-lr)
