"""A small decoder-only Transformer whose attention is an argument, so that every variant trains the same weights."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Block(nn.Module):
    """Pre-norm attention and a GELU MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.projection = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor, attend: Attend) -> Tensor:
        """Applies the block to `(batch, sequence, width)` or packed `(total, width)`."""
        qkv = self.qkv(self.attention_norm(hidden)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.unbind(-3)
        if hidden.ndim == 3:  # heads before the sequence, as a view: what models hand to SDPA
            mixed = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
        else:
            mixed = attend(q, k, v)
        hidden = hidden + self.projection(mixed.flatten(-2))
        widened: Tensor = F.gelu(self.widen(self.mlp_norm(hidden)), approximate="tanh")
        narrowed: Tensor = self.narrow(widened)
        return hidden + narrowed


class Transformer(nn.Module):
    """Token and position embeddings, blocks, and an output layer that shares the token embedding.

    Args:
        vocabulary: Number of token ids.
        width: Model dimension.
        heads: Attention heads; each has `width // heads` dimensions.
        layers: Number of blocks.
        max_length: Longest document.
    """

    def __init__(self, vocabulary: int, width: int, heads: int, layers: int, max_length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(max_length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for weight in (self.tokens.weight, self.positions.weight):
            nn.init.normal_(weight, std=width**-0.5)

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states in the layout of `tokens`."""
        hidden: Tensor = self.tokens(tokens) + self.positions(positions)
        for block in self.blocks:
            hidden = block(hidden, attend)
        normalised: Tensor = self.norm(hidden)
        return normalised

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token, `(..., vocabulary)`."""
        return F.linear(hidden, self.tokens.weight)


def build(
    *,
    vocabulary: int,
    width: int,
    heads: int,
    layers: int,
    max_length: int,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Transformer:
    """A model whose weights depend on the seed alone, rounded to `dtype`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Transformer(vocabulary, width, heads, layers, max_length)
    return model.to(device=device, dtype=dtype)
