"""Small models in plain torch whose mistakes are chosen, for the tests of the audit."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

VOCABULARY = 40
_LOWEST = -1e9


class Attention(nn.Module):
    """Attention of one head over documents; what it forgets is chosen.

    Args:
        width: of the vectors.
        forgets: some of ``"documents"``, ``"padding"``, ``"order"``.
        scale: of the scores; large ones reach a mask that the dtype has clamped.
    """

    def __init__(self, width: int, forgets: Collection[str], scale: float) -> None:
        super().__init__()
        self.project = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.forgets = forgets
        self.scale = scale

    def forward(self, hidden: Tensor, same: Tensor, kept: Tensor) -> Tensor:
        query, key, value = self.project(hidden).chunk(3, -1)
        length = hidden.shape[1]
        allowed = torch.ones(length, length, dtype=torch.bool) if "order" in self.forgets else _earlier(length)
        allowed = allowed.expand(hidden.shape[0], -1, -1)
        if "documents" not in self.forgets:
            allowed = allowed & same
        if "padding" not in self.forgets:
            allowed = allowed & kept.unsqueeze(1)
        low = max(_LOWEST, torch.finfo(hidden.dtype).min)
        mask = torch.zeros(allowed.shape, dtype=hidden.dtype).masked_fill(~allowed, low)
        scores = query @ key.transpose(1, 2) * self.scale + mask
        return self.out(scores.float().softmax(-1).to(value.dtype) @ value)


def _earlier(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


class Block(nn.Module):
    """Attention, and a product of its own for each token."""

    def __init__(self, width: int, forgets: Collection[str], scale: float) -> None:
        super().__init__()
        self.attention = Attention(width, forgets, scale)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, hidden: Tensor, same: Tensor, kept: Tensor) -> Tensor:
        hidden = hidden + self.attention(hidden, same, kept)
        return hidden + self.mlp(self.norm(hidden))


class Decoder(nn.Module):
    """A causal language model: ids, documents as ``seq_idx`` (batch, length), a mask of padding; logits.

    Args:
        forgets: for each layer, what its attention forgets.
        width: of the vectors.
        scale: as of ``Attention``.
    """

    def __init__(self, *forgets: Collection[str], width: int = 16, scale: float | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, each, scale or width**-0.5) for each in forgets)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, input_ids: Tensor, seq_idx: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.embedding(input_ids)
        documents = torch.zeros_like(input_ids) if seq_idx is None else seq_idx
        same = documents.unsqueeze(2) == documents.unsqueeze(1)
        kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        for block in self.blocks:
            hidden = block(hidden, same, kept.bool())
        logits: Tensor = self.head(hidden)
        return logits


def packed(*lengths: int, rows: int = 1) -> dict[str, Tensor]:
    """Documents of these lengths in each row, of tokens 1 and up."""
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    tokens = torch.randint(1, VOCABULARY, (rows, sum(lengths)), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "seq_idx": ids.expand(rows, -1)}


def padded(*lengths: int) -> dict[str, Tensor]:
    """A row for each document, padding on the right."""
    width = max(lengths)
    tokens = torch.randint(1, VOCABULARY, (len(lengths), width), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(width) < torch.tensor(lengths).unsqueeze(1)).long()
    return {"input_ids": tokens * mask, "attention_mask": mask}
