"""The GPT against transformers' Qwen3, against itself written out in numpy's float64, and against closed forms."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from bench.head import make_sure
from loss import CrossEntropy
from model import GPT, Attention, GPTConfig, RMSNorm

SMALL = GPTConfig(n_layer=3, n_head=2, n_embd=64, vocab_size=257)
ODD = GPTConfig(n_layer=2, n_head=3, n_embd=96, vocab_size=1000)
WIDE = GPTConfig(n_layer=2, n_head=12, n_embd=768, vocab_size=1000)  # the default's heads and widths
CONFIGS = pytest.mark.parametrize("config", [SMALL, ODD, WIDE], ids=["small", "odd", "wide"])

QWEN3_NAMES = {
    "embed.": "embed_tokens.",
    "blocks.": "layers.",
    ".attn.": ".self_attn.",
    ".attn_norm.": ".input_layernorm.",
    ".mlp_norm.": ".post_attention_layernorm.",
}


def random_model(config: GPTConfig, max_seq_len: int = 512) -> GPT:
    """Weights as no run starts with: norms that are not 1, attention that is far from uniform."""
    torch.manual_seed(0)
    model = GPT(config, max_seq_len)
    for weight in model.parameters():
        if weight.ndim == 1:
            torch.nn.init.uniform_(weight, 0.5, 2.0)
        else:
            torch.nn.init.normal_(weight, std=1.5 / math.sqrt(weight.shape[1]))
    return model


def random_tokens(config: GPTConfig, *shape: int) -> torch.Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(sum(shape)))


def qwen3_name(name: str) -> str:
    for ours, theirs in QWEN3_NAMES.items():
        name = name.replace(ours, theirs)
    return f"model.{name}"


def as_qwen3(model: GPT) -> Qwen3ForCausalLM:
    """transformers' model with our weights. Its cosines and sines are its own."""
    c = model.config
    theirs = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=c.vocab_size,
            hidden_size=c.n_embd,
            intermediate_size=c.n_hidden,
            num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head,
            num_key_value_heads=c.n_head,
            head_dim=c.n_embd // c.n_head,
            max_position_embeddings=model.max_seq_len,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
            attention_bias=False,
            attn_implementation="eager",
        )
    )
    weights = {qwen3_name(name): weight for name, weight in model.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    return theirs.eval()


def assert_near(ours, theirs, tolerance: float) -> None:
    """Apart by no more than `tolerance` times the largest of theirs."""
    ours, theirs = (np.asarray(x.detach() if torch.is_tensor(x) else x, np.float64) for x in (ours, theirs))
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


# --------------------------------------------------------------------------------------------------------------------
# Against transformers


@CONFIGS
def test_logits_are_those_of_transformers(config):
    model = random_model(config)
    theirs = as_qwen3(model)
    for seq_len in (1, 2, 64, 129, 512):
        tokens = random_tokens(config, 2, seq_len)
        with torch.no_grad():
            assert_near(model(tokens), theirs(input_ids=tokens).logits, 2e-5)


@CONFIGS
def test_loss_and_all_gradients_are_those_of_transformers(config):
    model = random_model(config)
    theirs = as_qwen3(model)
    windows = random_tokens(config, 3, 97)
    loss = model.loss(windows)
    loss.backward()
    mean_loss = theirs(input_ids=windows, labels=windows).loss  # it shifts the labels itself
    (mean_loss * 3 * 96).backward()
    assert loss.item() == pytest.approx(mean_loss.item() * 3 * 96, rel=1e-6)
    gradients = {name: weight.grad for name, weight in theirs.named_parameters()}
    assert len(gradients) == len(list(model.parameters())) == 2 + 11 * config.n_layer
    for name, weight in model.named_parameters():
        assert_near(weight.grad, gradients[qwen3_name(name)], 2e-5)


def test_logits_at_the_longest_windows_are_those_of_transformers():
    model = random_model(ODD, 2048)
    tokens = random_tokens(ODD, 1, 2048)
    with torch.no_grad():
        assert_near(model(tokens), as_qwen3(model)(input_ids=tokens).logits, 2e-5)


# --------------------------------------------------------------------------------------------------------------------
# Against numpy in float64


def rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def turned(x: np.ndarray) -> np.ndarray:
    """Rotary positions of x (H, T, D) by complex numbers: element i and element i + D/2 are one number's parts."""
    T, D = x.shape[1:]
    z = x[..., : D // 2] + 1j * x[..., D // 2 :]
    z = z * np.exp(1j * np.outer(np.arange(T), 10_000.0 ** (-2 * np.arange(D // 2) / D)))
    return np.concatenate([z.real, z.imag], -1)


def plain_attention(x: np.ndarray, w: dict[str, np.ndarray], n_head: int) -> np.ndarray:
    """Attention of x (T, C) with a T x T mask."""
    T, C = x.shape
    q, k, v = ((x @ w[f"{n}_proj.weight"].T).reshape(T, n_head, -1).transpose(1, 0, 2) for n in "qkv")  # (H, T, D)
    q, k = turned(rms_norm(q, w["q_norm.weight"])), turned(rms_norm(k, w["k_norm.weight"]))
    scores = q @ k.transpose(0, 2, 1) / math.sqrt(C / n_head)
    scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
    return (softmax(scores) @ v).transpose(1, 0, 2).reshape(T, C) @ w["o_proj.weight"].T


def plain_forward(tokens: np.ndarray, w: dict[str, np.ndarray], config: GPTConfig) -> np.ndarray:
    """Logits (T, V) of tokens (T,)."""
    x = w["embed.weight"][tokens]
    for i in range(config.n_layer):
        block = {name.removeprefix(f"blocks.{i}."): weight for name, weight in w.items() if f"blocks.{i}." in name}
        attention = {name.removeprefix("attn."): weight for name, weight in block.items()}
        x = x + plain_attention(rms_norm(x, block["attn_norm.weight"]), attention, config.n_head)
        h = rms_norm(x, block["mlp_norm.weight"])
        gate, up = h @ block["mlp.gate_proj.weight"].T, h @ block["mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ block["mlp.down_proj.weight"].T
    return rms_norm(x, w["norm.weight"]) @ w["embed.weight"].T


def in_float64(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: weight.detach().double().numpy() for name, weight in module.named_parameters()}


@pytest.mark.parametrize("seq_len", [1, 7, 130])
def test_attention_is_plain_attention_in_float64(seq_len):
    model = random_model(ODD)
    attention: Attention = model.blocks[0].attn
    x = torch.randn(2, seq_len, ODD.n_embd, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = attention(x, model.cos[:seq_len], model.sin[:seq_len])
    for row in range(2):
        assert_near(y[row], plain_attention(x[row].double().numpy(), in_float64(attention), ODD.n_head), 1e-5)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])  # the first is no larger than epsilon's root
def test_norms_are_computed_in_float32_whatever_comes_in(scale):
    norm = RMSNorm(96, 1e-6)
    torch.nn.init.uniform_(norm.weight, 0.5, 2.0, generator=torch.Generator().manual_seed(2))
    x = (scale * torch.randn(4, 96, generator=torch.Generator().manual_seed(3))).bfloat16()
    with torch.no_grad():
        assert_near(norm(x), rms_norm(x.double().numpy(), norm.weight.double().numpy()), 1e-6)


@CONFIGS
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)], ids=["fp32", "bf16"])
def test_logits_are_those_of_the_forward_written_out_in_float64(config, dtype, tolerance):
    model = random_model(config)
    tokens = random_tokens(config, 2, 70)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits = model(tokens).float()
    for row in range(2):
        assert_near(logits[row], plain_forward(tokens[row].numpy(), in_float64(model), config), tolerance)


# --------------------------------------------------------------------------------------------------------------------
# What a token sees


@CONFIGS
def test_a_later_token_changes_no_earlier_logit(config):
    model = random_model(config)
    tokens = random_tokens(config, 1, 100)
    with torch.no_grad():
        before = model(tokens)
        for position in (0, 1, 50, 99):
            changed = tokens.clone()
            changed[0, position] = (changed[0, position] + 1) % config.vocab_size
            after = model(changed)
            assert torch.equal(after[0, :position], before[0, :position])
            assert (after[0, position:] != before[0, position:]).any(-1).all()  # and every later one sees it


def test_windows_of_a_batch_do_not_see_each_other():
    model = random_model(SMALL)
    tokens = random_tokens(SMALL, 3, 40)
    with torch.no_grad():
        assert_near(model(tokens)[1], model(tokens[1:2])[0], 1e-6)


def test_weights_serve_any_length_and_the_state_dict_holds_weights_alone():
    short, long = random_model(SMALL, 33), GPT(SMALL, 1024)
    assert set(short.state_dict()) == {name for name, _ in short.named_parameters()}
    long.load_state_dict(short.state_dict())
    tokens = random_tokens(SMALL, 2, 33)
    with torch.no_grad():
        assert torch.equal(short(tokens), long(tokens))
        assert_near(long(random_tokens(SMALL, 2, 900))[:, :33], short(random_tokens(SMALL, 2, 900)[:, :33]), 1e-5)


# --------------------------------------------------------------------------------------------------------------------
# What it costs


def test_the_default_has_gpt2s_size():
    with torch.device("meta"):
        model = GPT(GPTConfig(), 2048)
    C, hidden, V = 768, 2048, 50304
    block = 4 * C * C + 3 * C * hidden + 2 * C + 2 * 64
    assert sum(weight.numel() for weight in model.parameters()) == V * C + 12 * block + C == 123_588_864
    assert GPTConfig().n_params == 123_588_864
    assert GPTConfig().n_hidden == hidden


@CONFIGS
def test_n_params_counts_the_real_parameters(config):
    model = GPT(config, 8)
    assert config.n_params == sum(weight.numel() for weight in model.parameters())
    assert config.n_matmul == sum(weight.numel() for weight in model.parameters() if weight.ndim == 2)


@pytest.mark.parametrize("config", [SMALL, ODD], ids=["small", "odd"])
@pytest.mark.parametrize("seq_len", [16, 100])
def test_flops_per_token_are_the_matrix_products_that_torch_counts(config, seq_len):
    """Forward and backward. The plain ("math") attention multiplies T x T scores in full, causal or not, which is how
    the formula counts them; the fused one is not seen by the counter, which leaves 6 per parameter."""
    model = GPT(config, seq_len)
    windows = random_tokens(config, 3, seq_len + 1)

    def counted() -> float:
        with FlopCounterMode(display=False) as counter:
            model.loss(windows).backward()
        return counter.get_total_flops() / (3 * seq_len)

    with sdpa_kernel(SDPBackend.MATH):
        assert counted() == config.flops_per_token(seq_len)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert counted() == config.flops_per_token(seq_len) - 12 * config.n_layer * config.n_embd * seq_len


@pytest.mark.parametrize("seq_len", [64, 2048])
def test_flops_of_the_default_are_those_of_the_plan(seq_len):
    in_products = 12 * (4 * 768 * 768 + 3 * 768 * 2048) + 50304 * 768
    assert GPTConfig().flops_per_token(seq_len) == 6 * in_products + 12 * 12 * 768 * seq_len


# --------------------------------------------------------------------------------------------------------------------
# Where it starts


def initialized(config: GPTConfig, seed: int) -> GPT:
    """A model of NaNs that init_weights has to replace, all of them."""
    model = GPT(config, 64)
    for weight in model.parameters():
        torch.nn.init.constant_(weight, math.nan)
    model.init_weights(seed)
    return model


@pytest.fixture(scope="module")
def default_model() -> GPT:
    return initialized(GPTConfig(), 1337)


def test_initial_weights_are_distributed_as_documented(default_model):
    seen = 0
    for name, weight in default_model.named_parameters():
        if name.endswith("norm.weight"):
            assert (weight == 1).all(), name
            continue
        is_output = name.split(".")[-2] in ("o_proj", "down_proj")
        std = 0.02 / math.sqrt(24) if is_output else 0.02
        x = weight.detach() / std
        n = x.numel()
        assert abs(x.mean().item()) < 5 / math.sqrt(n), name
        assert abs(x.square().mean().item() - 1) < 5 * math.sqrt(2 / n), name
        assert abs(x.square().square().mean().item() - 3) < 5 * math.sqrt(96 / n), name  # normal, not uniform
        seen += 1
    assert seen == 1 + 7 * 12


def test_no_two_initial_matrices_are_alike(default_model):
    matrices = [weight.detach().flatten() for weight in default_model.parameters() if weight.ndim == 2]
    first = torch.stack([matrix[: 768 * 768] / matrix[: 768 * 768].norm() for matrix in matrices])
    correlations = first @ first.T - torch.eye(len(matrices))
    assert correlations.abs().max() < 6 / 768


def test_initial_loss_is_that_of_knowing_nothing(default_model):
    """Logits are nearly independent of the target, with variance C * 0.02^2: log V + variance / 2 is expected."""
    windows = random_tokens(GPTConfig(), 4, 65)
    expected = math.log(50304) + 768 * 0.02**2 / 2
    with torch.no_grad():
        loss = default_model.loss(windows).item() / (4 * 64)
    assert loss == pytest.approx(expected, abs=4 * 0.02 * math.sqrt(768) / math.sqrt(4 * 64))
    assert loss == pytest.approx(math.log(50304), abs=0.4)


def test_initial_weights_are_a_function_of_the_seed():
    a = initialized(ODD, 7)
    torch.rand(3)  # the global generator has no part in it
    b, c = initialized(ODD, 7), initialized(ODD, 8)
    for (name, x), y, z in zip(a.named_parameters(), b.parameters(), c.parameters(), strict=True):
        assert torch.equal(x, y), name
        assert x.ndim == 1 or (x == z).float().mean() < 0.01, name


# --------------------------------------------------------------------------------------------------------------------
# Loss and score


@pytest.mark.parametrize("shape", [(1, 2), (3, 41)], ids=["one target", "many"])
def test_loss_is_the_sum_over_targets(shape):
    model = random_model(SMALL)
    windows = random_tokens(SMALL, *shape)
    by_hand = 0.0
    with torch.no_grad():
        for window in windows:
            probabilities = softmax(plain_forward(window[:-1].numpy(), in_float64(model), SMALL))
            by_hand -= np.log(probabilities[np.arange(len(window) - 1), window[1:]]).sum()
        assert model.loss(windows).item() == pytest.approx(by_hand, rel=1e-5)


def test_score_is_each_targets_loss_and_whether_it_had_the_largest_logit():
    model = random_model(SMALL)
    windows = random_tokens(SMALL, 3, 41)
    with torch.no_grad():
        for i in range(0, 40, 3):  # some targets that are hit, which random ones hardly are
            windows[1, i + 1] = model(windows[1:2, : i + 1])[0, -1].argmax()
        losses, hits = model.score(windows)
        logits = model(windows[:, :-1])
    assert losses.shape == hits.shape == (3, 40)
    for row in range(3):
        assert_near(losses[row], F.cross_entropy(logits[row], windows[row, 1:], reduction="none"), 1e-6)
        expected = [bool(np.argmax(x) == target) for x, target in zip(logits[row].numpy(), windows[row, 1:])]
        assert hits[row].tolist() == expected
    assert hits[1].sum() >= 14
    assert losses.sum().item() == pytest.approx(model.loss(windows).item(), rel=1e-6)


def reference_cross_entropy(x, weight, targets):
    """The sum of the cross-entropies and both gradients of three times it, by torch in float64."""
    x, weight = (value.double().requires_grad_() for value in (x, weight))
    loss = F.cross_entropy(x @ weight.T, targets, reduction="sum")
    (3 * loss).backward()
    return loss.detach(), x.grad, weight.grad


def our_cross_entropy(x, weight, targets, monkeypatch, part):
    monkeypatch.setattr(CrossEntropy, "VOCAB_PART", part)
    weight = weight.clone().requires_grad_()
    x = x.clone().requires_grad_()
    loss = CrossEntropy.apply(x, weight, targets)
    (3 * loss).backward()
    return loss.detach(), x.grad, weight.grad


@pytest.mark.parametrize("part", [350, 100, 7], ids=["one part", "parts of unequal size", "many parts"])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0], ids=["flat", "sharp", "logits in the hundreds"])
def test_cross_entropy_by_parts_of_the_vocabulary_is_that_of_float64(part, scale, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    x = scale * torch.randn(40, 16, generator=generator)
    weight = torch.randn(350, 16, generator=generator)
    targets = torch.randint(350, (40,), generator=generator)
    ours = our_cross_entropy(x, weight, targets, monkeypatch, part)
    for value, expected in zip(ours, reference_cross_entropy(x, weight, targets)):
        assert (value - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("sure", [0.0, 0.5, 1.0], ids=["unsure", "half sure", "sure"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_cross_entropy_in_sixteen_bits_loses_no_more_than_torchs_own(dtype, sure, monkeypatch):
    """Also where the targets have a probability of 0.99, so that the gradients are what rounding could hide."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(200, 32, generator=generator).to(dtype)
    weight = torch.randn(5000, 32, generator=generator).to(dtype).float()
    targets = torch.randint(5000, (200,), generator=generator)
    n = int(sure * len(x))
    make_sure(x[:n], weight, targets[:n])
    expected = reference_cross_entropy(x, weight, targets)
    ours = our_cross_entropy(x, weight, targets, monkeypatch, 1024)
    theirs_x, theirs_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.autocast("cpu", dtype):
        loss = F.cross_entropy(F.linear(theirs_x, theirs_weight), targets, reduction="sum")
    (3 * loss).backward()
    for own, their, exact in zip(ours, (loss.detach(), theirs_x.grad, theirs_weight.grad), expected):
        assert (own - exact).norm() <= 1.2 * (their - exact).norm() + 1e-6 * exact.norm()
