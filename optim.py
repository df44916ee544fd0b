"""The optimizers: Muon for the matrices of the blocks, AdamW for the embedding and the norms, or AdamW for all."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from model import GPT
from settings import Config

SHARE_ON_GPU = False  # several GPUs each do all of Muon: sharing exchanges 170 MB more a step. Not yet run there


def make_optimizers(model: GPT, config: Config) -> list[torch.optim.Optimizer]:
    """Return AdamW for all weights, or Muon for the blocks' matrices and AdamW for the rest. train_step sets lr."""
    matrices = [weight for weight in model.blocks.parameters() if weight.ndim == 2]
    use_muon = config.optimizer == "muon"
    decayed = [model.embed.weight] if use_muon else [model.embed.weight, *matrices]
    groups = [{"params": decayed}, {"params": [w for w in model.parameters() if w.ndim == 1], "weight_decay": 0.0}]
    # 0.99, not 0.95: with few tokens per step, the second moment needs a longer memory (Marek et al. 2025).
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True)
    return [adamw, Muon(matrices, config.weight_decay, model.dtype)] if use_muon else [adamw]


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): Nesterov momentum, then an update whose singular values are all near 1.
    0.2 * sqrt(larger side) scales an update to the size of AdamW's (Liu et al. 2025): one learning rate serves both.
    Matrices of one shape are updated together, in products of type dtype: one by one they leave a GPU idle."""

    def __init__(self, matrices: list[Tensor], weight_decay: float, dtype: torch.dtype, momentum: float = 0.95):
        super().__init__(matrices, {"lr": 0.0, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype
        for weight in matrices:
            self.state[weight]["momentum"] = torch.zeros_like(weight)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for shape in dict.fromkeys(weight.shape for weight in group["params"]):
                weights = [weight for weight in group["params"] if weight.shape == shape]
                grads = [weight.grad for weight in weights]
                momenta = [self.state[weight]["momentum"] for weight in weights]
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                updates = torch.stack(torch._foreach_lerp(grads, momenta, group["momentum"]))
                updates = orthogonalize(updates, self.dtype).float().unbind()
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, updates, alpha=-group["lr"] * 0.2 * math.sqrt(max(shape)))


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Return matrices (N, O, I) of type dtype with the same singular vectors, most singular values 0.7 to 1.2.
    Takes five Newton-Schulz steps (coefficients of Jordan et al. 2024). On CPUs several processes share the work."""
    is_shared = dist.is_initialized() and (SHARE_ON_GPU or not matrices.is_cuda)
    rank, count = (dist.get_rank(), dist.get_world_size()) if is_shared else (0, 1)
    share = slice(len(matrices) * rank // count, len(matrices) * (rank + 1) // count)
    x, is_tall = matrices[share], matrices.shape[1] > matrices.shape[2]
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    x = (x.mT if is_tall else x).to(dtype, memory_format=torch.contiguous_format)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    updates = torch.zeros_like(matrices, dtype=dtype)
    updates[share] = x.mT if is_tall else x
    if is_shared:
        dist.all_reduce(updates)  # the other shares are zeros here: all processes get the same bits
    return updates
