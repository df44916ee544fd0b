"""The GPT: its layers, its loss, its initial weights, and its settings for a machine.

    tokens (B, T) -> embedding (B, T, C) -> n_layer x [ x += attention(norm(x)); x += mlp(norm(x)) ] -> norm
                  -> logits (B, T, V), by the embedding's own weights

B sequences of T tokens, width C = n_embd, H = n_head heads of D = C / H, V = vocab_size. The architecture is exactly
Hugging Face's Qwen3ForCausalLM, so other tools open an export and an independent implementation checks this one.
"""

import ctypes
import math
import os
import sys
import timeit
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from settings import UserError

USE_STATIC_SHAPES = False  # saves a GPU 2.7 of 44.8 ms a step (bench/log.md); seen there for two shapes


@dataclass(frozen=True)
class GPTConfig:
    """A model's shape. Checkpoints store the first three; changing a later default breaks or alters them."""

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    vocab_size: int = 50304  # GPT-2's 50,257, padded to a multiple of 128 for fast matrix products
    rope_base: float = 10000.0  # Su et al. 2021; kept at this size by Marek et al. and Semenov et al. 2025
    norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def n_hidden(self) -> int:
        """SwiGLU's hidden size: 8/3 of the width (Shazeer 2020), so three matrices are as large as GPT-2's two."""
        return 64 * max(1, round(self.n_embd * 8 / 3 / 64))

    @property
    def n_matmul(self) -> int:
        """Parameters in matrix products: four projections and SwiGLU's three per layer, and the head."""
        return (self.n_layer * (4 * self.n_embd + 3 * self.n_hidden) + self.vocab_size) * self.n_embd

    @property
    def n_params(self) -> int:
        """All parameters, the norms' weights too. The embedding and the head are one matrix."""
        return self.n_matmul + self.n_layer * (2 * self.n_embd + 2 * self.head_dim) + self.n_embd

    def flops_per_token(self, seq_len: int) -> int:
        """Return the FLOPs to train on one token: 2 per multiply-add, forward and twice backward (PaLM, appendix B)."""
        return 6 * self.n_matmul + 12 * self.n_layer * self.n_embd * seq_len


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019), computed in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of x (B, H, T, D) by the angles of their positions (T, D/2) (Su et al. 2021)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat(((a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype)), dim=-1)


class Attention(nn.Module):
    """Causal self-attention, with an RMSNorm over each head's queries and keys (QK-norm, Henry et al. 2020)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        C, self.head_dim = config.n_embd, config.head_dim
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(C, C, bias=False) for _ in range(4))
        self.q_norm, self.k_norm = (RMSNorm(self.head_dim, config.norm_eps) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Attend from x (B, T, C) to x, or to past keys and values (B, H, T', D) with x's written over the last T."""
        B, T, C = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, D)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))  # fmt: skip
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        if past is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            keys, values = past
            keys[:, :, -T:], values[:, :, -T:] = k, v
            with torch.autocast(x.device.type, enabled=False):  # autocast would convert all of the past for each token
                y = F.scaled_dot_product_attention(q.to(keys.dtype), keys, values, is_causal=T == keys.shape[2])
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.down_proj = nn.Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attn_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: tuple[Tensor, Tensor] | None = None) -> Tensor:
        x = x + self.attn(self.attn_norm(x), cos, sin, past)
        return x + self.mlp(self.mlp_norm(x))


@torch.compile(dynamic=True)
def softmax_minus_one_hot_(logits: Tensor, targets: Tensor) -> Tensor:
    """Return each row's cross-entropy (N,) in nats, and overwrite logits (N, V) with their gradient."""
    x = logits.float()
    log_sums = x.logsumexp(1, keepdim=True)
    is_target = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    losses = log_sums.squeeze(1) - torch.where(is_target, x, 0.0).sum(1)  # torch 2.11 compiles a gather wrongly
    logits.copy_((x - log_sums).exp_().add_(is_target, alpha=-1))  # rounded only now: 1 - p is exact even near 0
    return losses


class CrossEntropy(torch.autograd.Function):
    """Cross-entropy in nats, summed over targets (N,), of logits x @ weight.T: x (N, C), weight (V, C). Forward
    overwrites the logits with their gradient, so only N * V values are stored, in the type of x."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = x @ weight.to(x.dtype).T
        losses = softmax_minus_one_hot_(logits, targets)
        ctx.save_for_backward(x, weight, logits)
        return losses.sum()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, grad_logits = ctx.saved_tensors
        grad_x = grad_logits @ weight.to(x.dtype) * grad
        grad_weight = grad_logits.T @ (x * grad)  # scale x, which is smaller than grad_logits
        return grad_x, grad_weight.to(weight.dtype), None


class GPT(nn.Module):
    """The model, for windows of up to max_seq_len, on which no weight depends. on_machine sets its two dtypes."""

    def __init__(self, config: GPTConfig, max_seq_len: int):
        super().__init__()
        self.config, self.max_seq_len = config, max_seq_len
        self.dtype = self.stream = torch.float32  # of matrix products, by autocast, and of the residual stream
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        # 1 / base ** x as in transformers, not base ** -x: an export's logits then equal these to the bit.
        frequencies = 1.0 / config.rope_base ** (torch.arange(0, config.head_dim, 2) / config.head_dim)
        angles = torch.arange(max_seq_len)[:, None] * frequencies  # (T, D/2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Set all weights as in GPT-2 (Radford et al. 2019): norms 1, the rest normal with deviation 0.02. For o_proj
        and down_proj it is 0.02 / sqrt(2 * n_layer): 2 * n_layer outputs add up in the residual. Call it on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / math.sqrt(2 * self.config.n_layer) if is_output else 0.02
            weight.fill_(1.0) if weight.ndim == 1 else weight.normal_(std=std, generator=generator)

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return the head's input (B, T, C) for tokens (B, T), in the dtype of products."""
        x, T = self.embed(tokens).to(self.stream), tokens.shape[1]
        for block in self.blocks:
            if x.device.type == "cpu":  # else a batch of one window recompiles, which takes 10 s
                torch._dynamo.decorators.mark_unbacked(x, 0)
            elif USE_STATIC_SHAPES and torch.is_grad_enabled():
                torch._dynamo.mark_static(x)
            x = block(x, self.cos[:T], self.sin[:T])
        return self.norm(x).to(self.dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (B, T, V) of the token after each of tokens (B, T)."""
        with self.autocast():
            return F.linear(self.hidden(tokens), self.embed.weight)

    def loss(self, windows: Tensor) -> Tensor:
        """Return the cross-entropy in nats, summed over the B * T targets of windows (B, T + 1)."""
        with self.autocast():
            x, targets = self.hidden(windows[:, :-1]), windows[:, 1:]
            return CrossEntropy.apply(x.flatten(0, 1), self.embed.weight, targets.flatten())

    def add_gradients(self, windows: Tensor, scale: Tensor) -> Tensor:
        """Add the gradients of scale (scalar) times the loss of windows (B, T + 1); return the loss."""
        loss = self.loss(windows)
        loss.backward(scale)
        return loss.detach()

    @torch.no_grad()
    def score(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Return each target's cross-entropy in nats, and whether its logit was the largest, for windows (B, T + 1)."""
        logits, targets = self(windows[:, :-1]), windows[:, 1:]
        is_hit = logits.argmax(-1) == targets
        return softmax_minus_one_hot_(logits.flatten(0, 1), targets.flatten()).view_as(targets), is_hit


def fast_dtype(device: torch.device) -> str:
    """Return the fast dtype for matrix products. On a CPU, bfloat16 may be several times as fast as float32 or much
    slower, so time a product. On CPUs process 0 decides for all."""
    if device.type != "cpu":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    seconds = torch.zeros(2)
    for i, dtype in enumerate((torch.bfloat16, torch.float32)):
        x = torch.ones(512, 512, dtype=dtype)
        seconds[i] = min(timeit.repeat("F.linear(x, x)", number=1, globals={"F": F, "x": x}))
    if dist.is_initialized():
        dist.broadcast(seconds, 0)
    return "bfloat16" if 1.2 * seconds[0] <= seconds[1] else "float32"  # near-equal types: float32


def on_machine(model: GPT, device="auto", dtype="auto", compile=True) -> GPT:
    """Move the model to a device and choose dtype and compilation for it. Raises UserError if it is not usable."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        target = torch.device(device)
        torch.zeros(1, device=target).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={device!r} is not usable here: {str(error).splitlines()[0].split('. ')[0]}") from error
    is_cpu = target.type == "cpu"
    if not is_cpu and target.index is not None:
        torch.cuda.set_device(target)
    dtype = fast_dtype(target) if dtype == "auto" else dtype
    if is_cpu:
        # Keep freed memory for the next step, which is then 1.1 to 1.2 times as fast, in a fifth to a third more memory
        # (bench/log.md). -4 is M_MMAP_MAX, and -1 is M_TRIM_THRESHOLD. C libraries other than glibc lack mallopt.
        with suppress(OSError, AttributeError):
            for option, value in ((-4, 0), (-1, -1)):
                ctypes.CDLL("libc.so.6").mallopt(option, value)
    torch.use_deterministic_algorithms(is_cpu)
    torch.utils.deterministic.fill_uninitialized_memory = False  # this filling is slow
    torch.set_float32_matmul_precision("high")  # TF32 for float32 products on a GPU
    torch.compiler.set_stance("default" if compile else "force_eager")
    try:
        torch.compile(torch.neg)(torch.zeros(1, device=target))
    except Exception as error:  # no C++ compiler, a path with a space, ...
        reason = f"torch.compile fails here: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        if not is_cpu:
            raise UserError(f"{reason}; --compile=False trains without it") from error
        print(f"{reason}; continuing without it, more slowly", file=sys.stderr)
        torch.compiler.set_stance("force_eager")
    # Compile layer by layer, with symbolic sizes: all layers and stages share a few graphs
    torch.fx.experimental._config.use_duck_shape = False  # give sizes that happen to be equal different symbols
    torch._dynamo.config.recompile_limit = 64  # a GPU may need 23 graphs; torch gives up at 8
    for layer in (*model.blocks, model.norm):
        layer.compile(dynamic=True)
    model.to(target).dtype = getattr(torch, dtype)
    model.stream = torch.bfloat16 if dtype == "bfloat16" else torch.float32  # float16 would overflow
    return model
