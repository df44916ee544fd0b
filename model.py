"""The GPT: its layers, its first weights, what a token costs, and the cache for generating. Positions are `rotate`.

    tokens (B, T) -> embedding (B, T, C) -> n_layer x [ x += attention(norm(x)); x += mlp(norm(x)) ] -> norm
                  -> logits (B, T, V), by the embedding's own weights

B sequences of T tokens, width C = n_embd, H = n_head heads of D = C / H, V = vocab_size (GPT-2's 50,257 padded
to 50,304: a multiple of 128, which matrix units like).

The form is exactly that of Hugging Face's Qwen3ForCausalLM (pre-norm RMSNorm, QK-norm, rotary positions, SwiGLU,
no biases), so that transformers, vLLM and llama.cpp open an exported checkpoint, and so that an implementation
which is not ours can check this one (tests/test_model.py).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loss import compiled, cross_entropy, score_targets


@dataclass(frozen=True)
class GPTConfig:
    """A model's form. The default is GPT-2 sized: 123.6M parameters. The first three are in every checkpoint; the rest
    is this file's alone, so that with another value here an old checkpoint is another model."""

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    vocab_size: int = 50304
    rope_base: float = 10000.0  # Su et al. 2021; kept at this size by Marek et al. and Semenov et al. 2025
    norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def n_hidden(self) -> int:
        """SwiGLU's hidden size: 8/3 of the width (Shazeer 2020), so that three matrices hold what GPT-2's two do."""
        return 64 * max(1, round(self.n_embd * 8 / 3 / 64))

    @property
    def n_matmul(self) -> int:
        """Parameters in matrix products: four projections and three of SwiGLU per layer, and the head."""
        C = self.n_embd
        return self.n_layer * (4 * C * C + 3 * C * self.n_hidden) + self.vocab_size * C

    @property
    def n_params(self) -> int:
        """All parameters: the norms' weights too; the embedding is the head."""
        return self.n_matmul + self.n_layer * (2 * self.n_embd + 2 * self.head_dim) + self.n_embd

    def flops_per_token(self, seq_len: int) -> int:
        """FLOPs to train on one token of a window of seq_len, forward and backward (PaLM's appendix B).

        Each parameter in a matrix product multiplies and adds once forward and twice backward: 6. Attention's two
        products, of T x D by D x T and T x T by T x D per head, make 12 * n_layer * n_embd * T, causal or not.
        """
        return 6 * self.n_matmul + 12 * self.n_layer * self.n_embd * seq_len


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019), in float32 whatever comes in."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """Rotary positions (Su et al. 2021): turns the pairs (i, i + D/2) of x (B, H, T, D) by angles (T, D/2).

    Each half is converted to dtype before they are joined, so that the compiled kernel writes nothing in float32.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat(((a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)), dim=-1)


HAS_AMX = torch.cpu.get_capabilities().get("amx_bf16", False)


def project(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., I) times weight (O, I) transposed. A CPU with AMX takes a single row as a vector: in bfloat16 that is
    faster there, and slower on one without."""
    is_slow = not HAS_AMX or x.device.type != "cpu"
    if is_slow or torch.compiler.is_compiling() or x.numel() > x.shape[-1]:  # compiled, the rows are not known
        return F.linear(x, weight)
    return weight.mv(x.flatten().to(weight.dtype)).view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return project(x, self.weight)


class Attention(nn.Module):
    """Causal self-attention; queries and keys pass an RMSNorm over each head (QK-norm, Henry et al. 2020)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        C, D = config.n_embd, config.head_dim
        self.head_dim = D
        self.q_proj = Linear(C, C, bias=False)
        self.k_proj = Linear(C, C, bias=False)
        self.v_proj = Linear(C, C, bias=False)
        self.o_proj = Linear(C, C, bias=False)
        self.q_norm = RMSNorm(D, config.norm_eps)
        self.k_norm = RMSNorm(D, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x (B, T, C) attends to itself or, given past, to keys and values (B, H, T', D): their last T are made x's."""
        B, T, C = x.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (x.view(B, T, -1, self.head_dim).transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
        dtype = v.dtype if past is None else torch.float32  # attention's, or the cache's
        q, k = rotate(self.q_norm(q), cos, sin, dtype), rotate(self.k_norm(k), cos, sin, dtype)
        if past is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            keys, values = past
            keys[:, :, -T:], values[:, :, -T:] = k, v
            with torch.autocast(x.device.type, enabled=False):  # it would convert all of the past for each token
                y = F.scaled_dot_product_attention(q, keys, values, is_causal=T == keys.shape[2])
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate_proj = Linear(config.n_embd, config.n_hidden, bias=False)
        self.up_proj = Linear(config.n_embd, config.n_hidden, bias=False)
        self.down_proj = Linear(config.n_hidden, config.n_embd, bias=False)

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


class Cache:
    """Every layer's keys and values of the `length` tokens seen so far, so that the next one costs only itself.

    In float32 whatever the type of the matrix products: nothing is rounded a second time, and a CPU is faster at the
    attention of a single query in float32 than in bfloat16.
    """

    def __init__(self, config: GPTConfig, batch_size: int, max_seq_len: int, device: torch.device):
        shape = (config.n_layer, batch_size, config.n_head, max_seq_len, config.head_dim)
        self.keys, self.values = torch.empty(shape, device=device), torch.empty(shape, device=device)
        self.length = 0


class GPT(nn.Module):
    """max_seq_len is the longest window that it can be given: no weight depends on it."""

    def __init__(self, config: GPTConfig, max_seq_len: int):
        super().__init__()
        self.config = config
        self.max_seq_len = max_seq_len
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        # 1 / base ** x as transformers has it, not base ** -x: rounded alike, an export's logits are ours to the bit.
        frequencies = 1.0 / config.rope_base ** (torch.arange(0, config.head_dim, 2) / config.head_dim)
        angles = torch.arange(max_seq_len)[:, None] * frequencies  # (T, D/2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """All weights, as in GPT-2 (Radford et al. 2019):

        embedding, q, k, v, gate, up    normal, standard deviation 0.02
        o, down                         normal, 0.02 / sqrt(2 * n_layer): 2 * n_layer of them add up in the residual
        norms                           1
        """
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.ndim == 1:
                weight.fill_(1.0)
            else:
                is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if is_output else 0.02
                weight.normal_(std=std, generator=generator)

    def hidden(self, tokens: Tensor) -> Tensor:
        """What the head is given (B, T, C), of tokens (B, T)."""
        T = tokens.shape[1]
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.cos[:T], self.sin[:T])
        return self.norm(x)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of the token that follows each of tokens (B, T)."""
        return F.linear(self.hidden(tokens), self.embed.weight)

    @torch.no_grad()
    def extend(self, cache: Cache, tokens: Tensor) -> Tensor:
        """Logits (B, V) of the token that follows tokens (B, T), which follow those in the cache and join them.

        T is 1 unless the cache is empty: several further tokens would see each other's future.
        """
        start, end = cache.length, cache.length + tokens.shape[1]
        assert (start == 0 or end == start + 1) and end <= cache.keys.shape[3]
        x = self.embed(tokens).float()
        for block, keys, values in zip(self.blocks, cache.keys, cache.values):
            x = block(x, self.cos[start:end], self.sin[start:end], (keys[:, :, :end], values[:, :, :end]))
        cache.length = end
        return project(self.norm(x[:, -1]), self.embed.weight)

    def loss(self, windows: Tensor) -> Tensor:
        """Cross-entropy in nats, summed over the B * T targets of windows (B, T + 1)."""
        return cross_entropy(self.hidden(windows[:, :-1]).flatten(0, 1), self.embed.weight, windows[:, 1:].flatten())

    def score(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """For each target of windows (B, T + 1): its cross-entropy in nats, and whether it had the largest logit."""
        x, targets = self.hidden(windows[:, :-1]), windows[:, 1:]
        losses, hits = compiled(score_targets)(x.flatten(0, 1), self.embed.weight, targets.flatten())
        return losses.view_as(targets), hits.view_as(targets)
