"""What our model and recipe are measured against: GPT-2's form as nanoGPT trains it, and ours with learned positions.

nanoGPT's train.py by default: no biases, dropout 0, one learned vector per position, LayerNorm, GELU, tied head, and
AdamW with betas (0.9, 0.95). tests/test_recipe.py checks the logits against transformers' GPT2LMHeadModel. The schedule
of its learning rate is bench/recipe.py's "cosine".
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import GPT, GPTConfig  # noqa: E402


class Block(nn.Module):
    """Pre-norm attention and an MLP of four times the width (Radford et al. 2019)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(C, bias=False), nn.LayerNorm(C, bias=False)
        self.c_attn, self.attn_proj = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
        self.c_fc, self.mlp_proj = nn.Linear(C, 4 * C, bias=False), nn.Linear(4 * C, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(self.ln_1(x)).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x))))


class GPT2(nn.Module):
    """No window may be longer than max_seq_len, and positions that no training window had stay as they began."""

    def __init__(self, config: GPTConfig, max_seq_len: int):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = nn.Embedding(max_seq_len, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd, bias=False)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Norms 1; all else normal, 0.02, but 0.02 / sqrt(2 * n_layer) for the projections into the residual."""
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                shrink = math.sqrt(2 * self.config.n_layer) if name.endswith("_proj.weight") else 1
                weight.normal_(std=0.02 / shrink, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of the token that follows each of tokens (B, T)."""
        x = self.embed(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embed.weight)

    def loss(self, windows: Tensor) -> Tensor:
        """As GPT.loss, but from the logits, as nanoGPT has it."""
        return F.cross_entropy(self(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten(), reduction="sum")

    def score(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """As GPT.score."""
        logits, targets = self(windows[:, :-1]), windows[:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view_as(targets), logits.argmax(-1) == targets


def nanogpt_optimizer(model: GPT2, beta2: float) -> torch.optim.Optimizer:
    """Weight decay 0.1 on everything with two dimensions, the embeddings too. nanoGPT's train_shakespeare_char has a
    beta2 of 0.99 for its few tokens a step."""
    matrices, norms = ([weight for weight in model.parameters() if weight.ndim == ndim] for ndim in (2, 1))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, beta2), fused=True)


class LearnedPositions(GPT):
    """Ours with GPT-2's learned positions: attention turns nothing, and each position adds a vector of its own."""

    def __init__(self, config: GPTConfig, max_seq_len: int):
        super().__init__(config, max_seq_len)
        self.positions = nn.Embedding(max_seq_len, config.n_embd)
        self.cos.fill_(1.0)
        self.sin.fill_(0.0)

    def hidden(self, tokens: Tensor) -> Tensor:
        T = tokens.shape[1]
        x = self.embed(tokens) + self.positions.weight[:T]
        for block in self.blocks:
            x = block(x, self.cos[:T], self.sin[:T])
        return self.norm(x)
