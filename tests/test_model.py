"""The GPT against transformers' Qwen3, against the same formulas in numpy's float64, and against closed forms."""

import math
import timeit
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import as_qwen3, qwen3_name
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import GPT, CrossEntropy, GPTConfig, on_machine
from settings import UserError

SMALL = GPTConfig(n_layer=3, n_head=2, n_embd=64, vocab_size=257)
ODD = GPTConfig(n_layer=2, n_head=3, n_embd=96, vocab_size=1000)
WIDE = GPTConfig(n_layer=2, n_head=12, n_embd=768, vocab_size=1000)  # the default's heads and widths


def random_model(config: GPTConfig, max_seq_len: int = 512) -> GPT:
    """Return a model with weights unlike any initial ones: norms far from 1, attention far from uniform."""
    torch.manual_seed(0)
    model = GPT(config, max_seq_len)
    for weight in model.parameters():
        weight.data.uniform_(0.5, 2.0) if weight.ndim == 1 else weight.data.normal_(std=1.5 / weight.shape[1] ** 0.5)
    return model


def random_tokens(config: GPTConfig, *shape: int) -> torch.Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(sum(shape)))


def assert_near(ours, theirs, tolerance: float) -> None:
    """Assert that the two differ by no more than `tolerance` times the largest of theirs."""
    ours, theirs = (np.asarray(x.detach() if torch.is_tensor(x) else x, np.float64) for x in (ours, theirs))
    assert ours.shape == theirs.shape and np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("config, B, T", [(SMALL, 3, 97), (SMALL, 1, 3), (ODD, 1, 2049), (WIDE, 2, 97)])
def test_loss_logits_and_all_gradients_are_those_of_transformers(config, B, T):
    model = random_model(config, T + 5)
    theirs = as_qwen3({"config": vars(config), "model": model.state_dict()})  # computes its own cosines and sines
    windows = random_tokens(config, B, T)
    loss = model.loss(windows)
    loss.backward()
    expected = theirs(input_ids=windows, labels=windows)  # transformers shifts the labels itself
    (expected.loss * B * (T - 1)).backward()
    assert loss.item() == pytest.approx(expected.loss.item() * B * (T - 1), rel=1e-6)
    assert_near(model(windows), expected.logits, 2e-5)
    gradients = {name: weight.grad for name, weight in theirs.named_parameters()}
    assert len(gradients) == len(list(model.parameters())) == 2 + 11 * config.n_layer
    for name, weight in model.named_parameters():
        assert_near(weight.grad, gradients[qwen3_name(name)], 2e-5)


def rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def turned(x: np.ndarray) -> np.ndarray:
    """Rotate x (H, T, D) by position: elements i and i + D/2 are the real and imaginary part of a complex number."""
    T, D = x.shape[1:]
    z = x[..., : D // 2] + 1j * x[..., D // 2 :]
    z = z * np.exp(1j * np.outer(np.arange(T), 10_000.0 ** (-2 * np.arange(D // 2) / D)))
    return np.concatenate([z.real, z.imag], -1)


def plain_forward(tokens: torch.Tensor, model: GPT) -> np.ndarray:
    """Return the logits (T, V) of tokens (T,), in float64 and with a T x T mask."""
    T, H, D = len(tokens), model.config.n_head, model.config.head_dim
    w = {name.removesuffix(".weight"): weight.detach().double().numpy() for name, weight in model.named_parameters()}
    x = w["embed"][tokens.numpy()]
    for i in range(model.config.n_layer):
        b = {name.removeprefix(f"blocks.{i}."): weight for name, weight in w.items() if f"blocks.{i}." in name}
        h = rms_norm(x, b["attn_norm"])
        q, k, v = ((h @ b[f"attn.{name}_proj"].T).reshape(T, H, D).transpose(1, 0, 2) for name in "qkv")  # (H, T, D)
        q, k = turned(rms_norm(q, b["attn.q_norm"])), turned(rms_norm(k, b["attn.k_norm"]))
        scores = np.where(np.tri(T, dtype=bool), q @ k.transpose(0, 2, 1) / math.sqrt(D), -np.inf)
        x = x + (softmax(scores) @ v).transpose(1, 0, 2).reshape(T, H * D) @ b["attn.o_proj"].T
        h = rms_norm(x, b["mlp_norm"])
        gate = h @ b["mlp.gate_proj"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ b["mlp.up_proj"].T)) @ b["mlp.down_proj"].T
    return rms_norm(x, w["norm"]) @ w["embed"].T


@pytest.mark.parametrize("dtype, each, mean", [
    (torch.float32, 1e-6, 1e-7), (torch.bfloat16, 5e-3, 3e-4), (torch.float16, 1e-3, 1e-4)])  # fmt: skip
def test_logits_losses_and_hits_are_near_those_of_float64(dtype, each, mean):
    """Use weights near a run's, because a bfloat16 model rounds its residual stream to bfloat16, too."""
    model = GPT(GPTConfig(n_layer=6, n_head=4, n_embd=128, vocab_size=2_000), 128)
    model.init_weights(1)
    model.embed.weight.data *= 5  # as in training: losses then spread over several nats
    on_machine(model, "cpu", str(dtype).removeprefix("torch."), compile=False)
    windows = random_tokens(model.config, 2, 129)
    windows[1, 1::2] = windows[1, :-1:2]  # repeats, which the model expects: its head is the embedding
    targets = windows[:, 1:].numpy()
    exact = np.stack([plain_forward(row, model) for row in windows[:, :-1]])
    expected = -np.log(np.take_along_axis(softmax(exact), targets[:, :, None], 2)[:, :, 0])
    logits, (losses, hits) = model(windows[:, :-1]), model.score(windows)
    assert logits.dtype == dtype and hits.sum() > 60 and np.array_equal(hits, exact.argmax(-1) == targets)
    assert_near(logits.float(), exact, each)
    assert_near(losses, expected, each)
    assert losses.double().mean().item() == pytest.approx(expected.mean(), rel=mean)
    assert model.loss(windows).item() == pytest.approx(expected.sum(), rel=mean)


@pytest.mark.parametrize("config, T", [(SMALL, 16), (ODD, 100)])
def test_flops_per_token_are_the_matrix_products_that_torch_counts(config, T):
    """Plain ("math") attention multiplies T x T scores in full, as the formula counts them."""
    model = GPT(config, T)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.loss(random_tokens(config, 3, T + 1)).backward()
    assert counter.get_total_flops() == 3 * T * config.flops_per_token(T)


def test_a_model_starts_as_documented_and_knows_nothing():
    """Norms are 1. Matrices are normally distributed, by their variance and by the Kolmogorov-Smirnov distance."""
    model, other = (GPT(GPTConfig(n_layer=4, n_head=4, n_embd=256, vocab_size=9_000), 64) for _ in range(2))
    for weight in model.parameters():
        weight.data.fill_(math.nan)  # init_weights must replace every value
    model.init_weights(1337)
    other.init_weights(1338)
    assert model.config.n_params == sum(weight.numel() for weight in model.parameters())
    matrices = [other.embed.weight.detach().flatten()[: 256 * 256]]
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (weight == 1).all(), name
            continue
        is_output = name.split(".")[-2] in ("o_proj", "down_proj")
        x = weight.detach().double().flatten() / (0.02 / math.sqrt(8) if is_output else 0.02)
        shares = (torch.arange(x.numel()) + 0.5) / x.numel()
        assert abs(x.square().mean() - 1) < 5 * math.sqrt(2 / x.numel()), name
        assert (torch.special.ndtr(x.sort().values) - shares).abs().max() < 1.7 / math.sqrt(x.numel()), name
        matrices.append(x[: 256 * 256])
    correlations = torch.corrcoef(torch.stack(matrices))  # no two matrices are alike
    assert len(matrices) == 30 and (correlations - torch.eye(30)).abs().max() < 6 / 256
    # Logits have variance C * 0.02^2, so the expected loss is log V + variance / 2 for every target
    loss = model.loss(random_tokens(model.config, 4, 65)).item() / (4 * 64)
    error = 0.02 * math.sqrt(256) / math.sqrt(4 * 64)
    assert loss == pytest.approx(math.log(9_000) + 256 * 0.02**2 / 2, abs=4 * error)


def loss_and_gradients(function, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple:
    """Return the function's value, and the gradients of three times that value."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = function(x, weight, targets)
    (3 * loss).backward()
    return loss.detach(), x.grad, weight.grad


def torchs_own(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(x, weight), targets, reduction="sum")


@pytest.mark.parametrize("stance", ["force_eager", "default"], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_cross_entropy_is_about_as_near_to_float64_as_torchs_own(dtype, stance):
    """Try logits flat or in the hundreds, and targets near probability 0.99, whose gradients rounding could hide."""
    torch.compiler.set_stance(stance)
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(5000, 32, generator=generator).to(dtype).float()
    targets = torch.randint(5000, (200,), generator=generator)
    for scale, n_sure in ((0.1, 0), (1.0, 0), (20.0, 0), (1.0, 100), (1.0, 200)):
        x, toward = (scale * torch.randn(200, 32, generator=generator)).to(dtype), weight[targets[:n_sure]]
        x[:n_sure] = 18 * toward / toward.square().sum(1, keepdim=True)  # gives their targets the logit 18
        expected = loss_and_gradients(torchs_own, x.double(), weight.double(), targets)
        ours = loss_and_gradients(CrossEntropy.apply, x, weight, targets)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            theirs = loss_and_gradients(torchs_own, x, weight, targets)
        for own, their, exact in zip(ours, theirs, expected):
            assert (own - exact).norm() <= 1.6 * (their - exact).norm() + 1e-5 * exact.norm(), (scale, n_sure)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.05)])
def test_compiling_changes_losses_and_gradients_by_rounding_alone(dtype, tolerance):
    def results(compiled: bool) -> list[torch.Tensor]:
        model = GPT(ODD, 64)
        model.init_weights(2)
        on_machine(model, "cpu", dtype, compiled)
        results = []
        for windows in (random_tokens(ODD, 4, 65), random_tokens(ODD, 1, 33)):
            model.zero_grad()
            loss = model.loss(windows)
            loss.backward()
            results += [loss, *model.score(windows), *(weight.grad for weight in model.parameters())]
        return results
    for eager, compiled in zip(results(False), results(True), strict=True):
        assert_near(compiled.float(), eager.float(), tolerance)


@pytest.mark.parametrize("bfloat16, taken", [(0.5, "bfloat16"), (0.83, "bfloat16"), (0.84, "float32"), (2, "float32")])
def test_auto_takes_the_type_that_the_clock_finds_fast(bfloat16, taken, monkeypatch):
    def repeat(statement: str, number: int, globals: dict) -> list[float]:
        assert (y := eval(statement, globals)).shape == (512, 512)
        return [7.0, 1.0 if y.dtype == torch.float32 else 2 * bfloat16]  # process 0, whose time counts, measured half

    monkeypatch.setattr(timeit, "repeat", repeat)
    monkeypatch.setattr("model.dist", SimpleNamespace(is_initialized=lambda: True, broadcast=lambda s, _: s[0].div_(2)))
    model = GPT(SMALL, 8)
    assert on_machine(model, "cpu").dtype == getattr(torch, taken)
    assert on_machine(model, "cpu", "float16").dtype == torch.float16


@pytest.mark.parametrize("device, tried", [("cuda", "cuda:98"), ("gpu", "gpu"), ("meta", "meta"), ("cpu:x", "cpu:x")])
def test_a_device_that_cannot_be_used_is_the_users_error(monkeypatch, device, tried):
    monkeypatch.setenv("LOCAL_RANK", "98")
    with pytest.raises(UserError, match=f"device='{tried}' is not usable here: "):
        on_machine(GPT(SMALL, 8), device)
