"""What sequences cost: attention grows with the square of a length, everything else with the length."""

from __future__ import annotations

from dataclasses import dataclass

from maskops.data.lengths import Lengths, check_count, read_lengths

FORWARD_AND_BACKWARD = 3
"""A product's backward pass is two products of the same size."""


def attention_work(lengths: Lengths) -> int:
    """Pairs of a query and a key in a batch of sequences that do not see each other: the sum of squared lengths.

    A causal mask keeps about half of them, in every sequence alike, so that ratios stay as they are.

    Args:
        lengths: tokens of each sequence.
    """
    return sum(length * length for length in read_lengths(lengths))


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a transformer that decide what a token costs; by default those of Llama 3.2 1B.

    Attributes:
        layers: Blocks of attention and feed-forward network.
        hidden: Width of the residual stream.
        intermediate: Width inside the feed-forward network.
        vocabulary: Rows of the output projection; 0 for a model without one.
        heads: Heads of queries.
        key_value_heads: Heads of keys and values.
        head_dim: Width of a head.
        gated: Whether the feed-forward network has three matrices (SwiGLU) instead of two.
        causal: Whether a token sees only those before it.
    """

    layers: int = 16
    hidden: int = 2048
    intermediate: int = 8192
    vocabulary: int = 128_256
    heads: int = 32
    key_value_heads: int = 8
    head_dim: int = 64
    gated: bool = True
    causal: bool = True

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "intermediate", "heads", "key_value_heads", "head_dim"):
            check_count(name, getattr(self, name))
        check_count("vocabulary", self.vocabulary, least=0)

    @property
    def flops_per_token(self) -> int:
        """Operations of the forward pass that a token costs whatever its sequence: the matrix products but attention's.

        A multiplication and an addition count as two.
        """
        projections = 2 * self.hidden * self.head_dim * (self.heads + self.key_value_heads)
        network = (3 if self.gated else 2) * self.hidden * self.intermediate
        return 2 * (self.layers * (projections + network) + self.hidden * self.vocabulary)

    @property
    def flops_per_pair(self) -> int:
        """Operations of the forward pass for a query and a key: their product in each head, and that with the value."""
        return 4 * self.layers * self.heads * self.head_dim


def flops(lengths: Lengths, shape: ModelShape | None = None, *, training: bool = True) -> int:
    """Floating-point operations of one pass over sequences that do not see each other.

    ``tokens * shape.flops_per_token + pairs * shape.flops_per_pair``, as in appendix B of "PaLM" (Chowdhery et al.,
    2022), but with each sequence's own pairs: ``l * (l + 1) / 2`` under a causal mask, ``l * l`` without.

    Args:
        lengths: tokens of each sequence.
        shape: the model; see `ModelShape`.
        training: forward and backward, three times the forward pass.
    """
    shape = ModelShape() if shape is None else shape
    tokens = pairs = 0
    for length in read_lengths(lengths):
        tokens += length
        pairs += length * (length + 1) // 2 if shape.causal else length * length
    forward = tokens * shape.flops_per_token + pairs * shape.flops_per_pair
    return FORWARD_AND_BACKWARD * forward if training else forward
