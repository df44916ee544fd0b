"""AdamW and Muon against their formulas in float64, and Muon against torch's own."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from model import GPT, GPTConfig
from optim import Muon, make_optimizers
from settings import Config

SHAPES = [(64, 64), (160, 64), (64, 64), (64, 160), (64, 64), (160, 64)]  # square, tall, wide; in a model's order
RATES = (0.01, 0.03, 0.1)


def set_gradients(weights: list[torch.nn.Parameter], seed: int) -> None:
    """Set gradients of very different sizes; the last matrix's are zero."""
    generator = torch.Generator().manual_seed(seed)
    for i, weight in enumerate(weights):
        weight.grad = torch.randn(weight.shape, generator=generator) * 10.0 ** (i - 3) * (i < len(weights) - 1)


def newton_schulz(x: torch.Tensor) -> torch.Tensor:
    """Divide x by its Frobenius norm, and return x after five steps of x <- a x + b (x x') x + c (x x')^2 x."""
    x = x / max(x.norm().item(), 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)], ids=["fp32", "bf16"])
def test_muons_update_is_its_formula_in_float64_and_torchs(dtype, tolerance):
    """torch's Muon multiplies in bfloat16, whose rounding depends on the products' shapes."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    theirs = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
    optimizer = Muon(weights, weight_decay=1.0, dtype=dtype)  # large, so that the order of decay and update matters
    reference = torch.optim.Muon(theirs, weight_decay=1.0, adjust_lr_fn="match_rms_adamw")
    exact, momenta = [weight.detach().double() for weight in weights], [0.0] * len(weights)
    for step, lr in enumerate(RATES):
        for opt in (optimizer, reference):
            set_gradients(opt.param_groups[0]["params"], step)
            opt.param_groups[0]["lr"] = lr
            opt.step()
        for i, weight in enumerate(weights):
            gradient, old = weight.grad.double(), exact[i]
            momenta[i] = 0.95 * momenta[i] + 0.05 * gradient
            update = newton_schulz(0.05 * gradient + 0.95 * momenta[i])
            exact[i] = (1 - lr * 1.0) * old - lr * 0.2 * math.sqrt(max(weight.shape)) * update
            assert (weight - exact[i]).norm() <= tolerance * (exact[i] - old).norm()
            assert (theirs[i] - exact[i]).norm() <= 0.02 * (exact[i] - old).norm()


def three_steps(dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the matrices after three steps of Muon."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = Muon(weights, weight_decay=0.1, dtype=dtype)
    for step, lr in enumerate(RATES):
        set_gradients(weights, step)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    return [weight.detach() for weight in weights]


def three_steps_of_a_rank(rank: int, count: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{folder}/{count}", rank=rank, world_size=count)
    torch.save([three_steps(torch.float32), three_steps(torch.bfloat16)], folder / f"{count}_{rank}.pt")


@pytest.mark.slow
def test_several_processes_share_muons_work_and_get_one_processs_bits(tmp_path):
    """Shapes have 3, 2 and 1 matrices: of three processes, one has none of the second shape, two none of the third."""
    for count in (2, 3):
        mp.spawn(three_steps_of_a_rank, (count, tmp_path), nprocs=count)
    for dtype, name in enumerate((torch.float32, torch.bfloat16)):
        one = three_steps(name)
        for file in ("2_0.pt", "2_1.pt", "3_0.pt", "3_1.pt", "3_2.pt"):
            assert all(map(torch.equal, torch.load(tmp_path / file)[dtype], one))


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest():
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=100), 16)
    optimizers = make_optimizers(model, Config(optimizer="muon", weight_decay=0.5))
    assert [g["weight_decay"] for opt in optimizers for g in opt.param_groups] == [0.5, 0.0, 0.5]  # norms have none
    names = {weight: name for name, weight in model.named_parameters()}
    adamw, muon = ({names[w] for group in opt.param_groups for w in group["params"]} for opt in optimizers)
    assert muon == {name for name in names.values() if name.endswith("_proj.weight")} and len(muon) == 14
    assert adamw == set(names.values()) - muon


def test_adamw_updates_by_its_formula_with_decay_for_matrices_alone():
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=100), 16)
    (adamw,) = make_optimizers(model, Config(optimizer="adamw", weight_decay=0.5))
    exact = [weight.detach().double() for weight in model.parameters()]
    m, v = [0.0] * len(exact), [0.0] * len(exact)
    generator = torch.Generator().manual_seed(5)
    for step, lr in enumerate(RATES, 1):
        for group in adamw.param_groups:
            group["lr"] = lr
        for weight in model.parameters():
            weight.grad = torch.randn(weight.shape, generator=generator)
        adamw.step()
        for i, weight in enumerate(model.parameters()):
            gradient = weight.grad.double()
            m[i], v[i] = 0.9 * m[i] + 0.1 * gradient, 0.99 * v[i] + 0.01 * gradient**2
            decayed = exact[i] * (1 - lr * 0.5 * (weight.ndim == 2))
            exact[i] = decayed - lr * (m[i] / (1 - 0.9**step)) / ((v[i] / (1 - 0.99**step)).sqrt() + 1e-8)
            assert (weight - exact[i]).abs().max() < 1e-5
