"""A small byte-level transformer; `wmtp.nn.MTPHeads` gives it its heads."""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmtp.nn import MTPHeads, ValueHead

from .config import ModelConfig
from .corpus import VOCABULARY
from .seeds import derive_seed


def attention_bias(segment_ids: Tensor, heads: int) -> Tensor:
    """`[batch heads seq seq]`: what each byte may look at, and how fast each head forgets (ALiBi).

    Minus infinity for later bytes and other documents, else minus the distance times a slope.
    """
    place = torch.arange(segment_ids.shape[1])
    distance = place[:, None] - place
    slopes = 2.0 ** -torch.arange(1, 2 * heads, 2).float()
    seen = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (distance >= 0)
    return torch.where(seen[:, None], -slopes[:, None, None] * distance, -torch.inf)


class Block(nn.Module):
    """Attention and a feed-forward layer, each on a normalised input, each added back."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.dim
        self.attention_heads = config.attention_heads
        self.norm_in, self.norm_mid = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.down = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        batch, seq, dim = x.shape
        q, k, v = (
            part.view(batch, seq, self.attention_heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm_in(x)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, seq, dim))
        return x + self.down(F.gelu(self.up(self.norm_mid(x))))


class Trunk(nn.Module):
    """Bytes to `[batch seq dim]`; attention never looks into another document."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCABULARY, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim)
        nn.init.normal_(self.embedding.weight, std=0.5)

    def forward(self, tokens: Tensor, segment_ids: Tensor) -> Tensor:
        bias = attention_bias(segment_ids, self.config.attention_heads)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, bias)
        return self.norm(x)


class ByteLM(nn.Module):
    """A trunk, H heads, one unembedding that every head shares."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.trunk = Trunk(config)
        self.heads = MTPHeads(config.dim, config.heads)
        self.unembedding = nn.Parameter(torch.randn(VOCABULARY, config.dim) * config.dim**-0.5)

    def forward(self, tokens: Tensor, segment_ids: Tensor) -> Tensor:
        """Hidden states `[batch seq heads dim]`; the loss multiplies by the unembedding."""
        return self.heads(self.trunk(tokens, segment_ids))


class ByteCritic(nn.Module):
    """A trunk and a value head: the value of the prefix that ends at each byte."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.trunk = Trunk(config)
        self.value = ValueHead(config.dim)

    def forward(self, tokens: Tensor, segment_ids: Tensor) -> Tensor:
        return self.value(self.trunk(tokens, segment_ids))


Model = TypeVar("Model", ByteLM, ByteCritic)


def build(kind: type[Model], config: ModelConfig, seed: int) -> Model:
    """A fresh model: the same weights for the same seed, and no other randomness disturbed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("init", seed))
        return kind(config)
