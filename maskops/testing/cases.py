"""The cases of every op: the one list that tests, benchmarks and ``maskops verify`` read.

Star-shaped: around a base case, one property at a time leaves it. Each case says what it is there for.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from maskops import masks
from maskops.masks import Mask

_Device = torch.device | str


@dataclass(frozen=True)
class Case:
    """One problem for ``check``.

    Attributes:
        name: unique among the cases of its op.
        intent: what it is there to catch.
        op: the op that it is a case of.
        batch, heads, kv_heads, q_len, k_len, head_dim, value_dim: sizes of q (batch, heads, q_len, head_dim),
            k (batch, kv_heads, k_len, head_dim) and v (batch, kv_heads, k_len, value_dim).
        mask: builds the mask on a device; None in its place means no mask.
        dtype: dtype of q, k and v.
        packed: the sequences lie one behind the other in a batch of 1.
        sequences: of a packed case, the rows and keys of each: (q_begin, q_end, k_begin, k_end).
        softcap: 0 for none.
        bias_shape: shape of a bias, None for none. ``blocked_row`` makes row 0 of it -inf.
        alibi, sinks: whether the case uses them.
        alibi_per_element: the slopes differ by batch element.
    """

    name: str
    intent: str
    op: str = "attention"
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    q_len: int = 72
    k_len: int = 72
    head_dim: int = 16
    value_dim: int = 16
    mask: Callable[[_Device], Mask | None] = field(default=lambda device: None, repr=False)
    dtype: torch.dtype = torch.float32
    packed: bool = False
    sequences: tuple[tuple[int, int, int, int], ...] = ()
    softcap: float = 0.0
    bias_shape: tuple[int, ...] | None = None
    blocked_row: bool = False
    alibi: bool = False
    alibi_per_element: bool = False
    sinks: bool = False

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the keyword arguments, beyond ``softmax_scale``, that the callable is given."""
        used = {
            "softcap": self.softcap > 0,
            "bias": self.bias_shape is not None,
            "alibi_slopes": self.alibi,
            "sinks": self.sinks,
        }
        return tuple(name for name, is_used in used.items() if is_used)

    @property
    def softmax_scale(self) -> float:
        """The factor of the scores, ``1 / sqrt(head_dim)``."""
        return float(self.head_dim**-0.5)

    def with_dtype(self, dtype: torch.dtype) -> "Case":
        """The same case in another dtype."""
        return dataclasses.replace(self, dtype=dtype)

    def allowed(self, device: _Device = "cpu") -> Tensor:
        """The mask as bool (batch, heads|1, q_len, k_len), True = attend."""
        mask = self.mask(device)
        if mask is None:
            return torch.ones(self.batch, 1, self.q_len, self.k_len, dtype=torch.bool, device=device)
        allowed = mask.to_dense(self.q_len, self.k_len, batch=self.batch, device=device)
        return allowed.expand(self.batch, -1, -1, -1)

    def inputs(self, device: _Device = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v in float64, rounded to the case's dtype: the same values for every backend and for the oracle."""
        generator = torch.Generator().manual_seed(1)
        sizes = (
            (self.batch, self.heads, self.q_len, self.head_dim),
            (self.batch, self.kv_heads, self.k_len, self.head_dim),
            (self.batch, self.kv_heads, self.k_len, self.value_dim),
        )
        q, k, v = (
            torch.randn(size, generator=generator, dtype=torch.float64).to(self.dtype).double().to(device)
            for size in sizes
        )
        return q, k, v

    def extras(self, device: _Device = "cpu") -> dict[str, Tensor | float]:
        """The keyword arguments named by ``features``; tensors in float64, rounded to float32."""
        generator = torch.Generator().manual_seed(2)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float32).double().to(device)

        extras: dict[str, Tensor | float] = {}
        if self.softcap:
            extras["softcap"] = self.softcap
        if self.bias_shape is not None:
            bias = draw(*self.bias_shape)
            if self.blocked_row:
                bias[..., 0, :] = -torch.inf
            extras["bias"] = bias
        if self.alibi:
            sizes = (self.batch, self.heads) if self.alibi_per_element else (self.heads,)
            extras["alibi_slopes"] = draw(*sizes).abs()
        if self.sinks:
            extras["sinks"] = draw(self.heads)
        return extras


def _lengths(*values: int) -> Callable[[_Device], Tensor]:
    return lambda device: torch.tensor(values, device=device)


def _documents(*lengths: int) -> Callable[[_Device], Tensor]:
    """Cumulative lengths."""
    return lambda device: torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)


def _sequences(q_lengths: tuple[int, ...], k_lengths: tuple[int, ...]) -> tuple[tuple[int, int, int, int], ...]:
    places = []
    row = key = 0
    for q_length, k_length in zip(q_lengths, k_lengths, strict=True):
        places.append((row, row + q_length, key, key + k_length))
        row, key = row + q_length, key + k_length
    return tuple(places)


def _packed(
    name: str,
    intent: str,
    q_lengths: tuple[int, ...],
    k_lengths: tuple[int, ...] | None = None,
    *,
    pattern: Mask | None = None,
    tail: int = 0,
    **changes: Any,
) -> Case:
    """Sequences one behind the other, and ``tail`` tokens behind them that belong to none."""
    keys = q_lengths if k_lengths is None else k_lengths

    def mask(device: _Device) -> Mask:
        offsets_k = None if k_lengths is None else _documents(*keys)(device)
        documents = masks.documents(cu_seqlens=_documents(*q_lengths)(device), cu_seqlens_k=offsets_k)
        return documents if pattern is None else documents & pattern

    return Case(
        name,
        intent,
        batch=1,
        q_len=sum(q_lengths) + tail,
        k_len=sum(keys) + tail,
        mask=mask,
        packed=True,
        sequences=_sequences(q_lengths, keys),
        **changes,
    )


def _mask_cases() -> Iterator[Case]:
    long: dict[str, Any] = {"batch": 1, "heads": 2, "kv_heads": 1, "q_len": 201, "k_len": 201}
    yield Case("full", "the base: no mask, a ragged last tile, two query heads to a key head")
    yield Case("causal", "a triangle over several tiles", mask=lambda device: masks.causal(), **long)
    yield Case("causal, fewer queries", "bottom-right alignment", q_len=5, mask=lambda device: masks.causal())
    yield Case(
        "causal, more queries",
        "bottom-right alignment: the first rows see no key",
        q_len=80,
        k_len=70,
        mask=lambda device: masks.causal(),
    )
    yield Case("window", "both ends move", mask=lambda device: masks.sliding_window(9, 4), **long)
    yield Case(
        "causal window", "an intersection of patterns", mask=lambda device: masks.causal() & masks.sliding_window(20, 3)
    )
    yield Case(
        "prefix",
        "prefix-LM: a union that stays one span",
        mask=lambda d: masks.causal() | masks.prefix(_lengths(7, 70)(d)),
    )
    yield Case("chunked", "spans jump at chunk borders", mask=lambda device: masks.chunked(16))
    yield Case(
        "first tokens and window",
        "two spans per row, which merge near the beginning (StreamingLLM, arXiv 2309.17453)",
        mask=lambda d: masks.causal() & (masks.sliding_window(30, 0) | masks.prefix(4)),
        **long,
    )
    yield Case("padding right", "what tokenizers make", mask=lambda d: masks.padding(_lengths(72, 31)(d)))
    yield Case(
        "padding left, causal",
        "what generation makes; the diagonal moves with the sequence",
        mask=lambda d: masks.padding(_lengths(60, 9)(d), side="left") & masks.causal(),
    )
    yield Case(
        "padding with an empty sequence",
        "a batch element that is padding alone, one token",
        batch=3,
        mask=lambda d: masks.padding(_lengths(0, 1, 40)(d)) & masks.causal(),
    )
    yield Case(
        "padding with holes",
        "a (batch, length) mask whose ones are not contiguous",
        mask=lambda d: masks.padding(
            torch.arange(72, device=d).expand(2, 72) % torch.tensor([[5], [7]], device=d) != 3
        ),
    )
    yield Case(
        "padding with long holes",
        "rows that see nothing between rows that do, as many as fill a vector of a kernel",
        heads=8,
        kv_heads=1,
        mask=lambda d: masks.causal() & masks.padding((torch.arange(72, device=d) % 12 < 3).expand(2, 72)),
    )
    yield Case(
        "cache, one query",
        "decoding: one row, keys filled to different lengths",
        q_len=1,
        k_len=150,
        mask=lambda d: masks.causal() & masks.key_padding(_lengths(6, 131)(d)),
    )
    yield Case(
        "cache, two queries",
        "a cache of capacity 10 filled to 6",
        q_len=2,
        k_len=10,
        mask=lambda d: masks.causal() & masks.key_padding(_lengths(6, 10)(d)),
    )
    yield Case(
        "cross-attention", "keys have their own padding", q_len=17, mask=lambda d: masks.key_padding(_lengths(72, 5)(d))
    )
    yield Case(
        "dense",
        "a mask with real holes, one per head, with empty rows and unseen keys",
        heads=4,
        mask=lambda d: masks.dense(_random_mask(2, 4, 72, 72).to(d)),
    )


def _random_mask(*size: int) -> Tensor:
    allowed = torch.rand(size, generator=torch.Generator().manual_seed(3)) < 0.3
    allowed[:, :, 5] = False
    allowed[..., 60:] = False
    return allowed


def _packed_cases() -> Iterator[Case]:
    causal = masks.causal()
    yield _packed("documents", "short ones share a tile, long ones start their own", (3, 150, 40, 1, 20), heads=2)
    yield _packed("documents, causal", "the triangle begins anew in each", (3, 150, 40, 1, 20), pattern=causal, heads=2)
    yield _packed(
        "documents, window", "a pattern inside each sequence", (50, 20, 2), pattern=masks.sliding_window(5, 2), heads=2
    )
    yield _packed(
        "documents with a tail",
        "a buffer of fixed capacity, and an empty sequence",
        (30, 0, 25),
        pattern=causal,
        tail=40,
    )
    yield _packed(
        "documents, other keys", "cu_seqlens_k != cu_seqlens_q", (20, 0, 7, 30), (5, 12, 0, 64), pattern=causal
    )
    yield _packed("documents of one token", "every tile shared", (1,) * 70, pattern=causal)
    yield _packed(
        "decode, packed", "one row a sequence (FlashAttention's shape 239 x 1)", (1, 1, 1), (239, 3, 70), pattern=causal
    )
    yield _packed(
        "documents, two spans",
        "merging of spans inside a document",
        (90, 33),
        pattern=causal & (masks.sliding_window(12, 0) | masks.prefix(2)),
    )


def _shape_cases() -> Iterator[Case]:
    padding: dict[str, Any] = {
        "mask": lambda d: masks.padding(_lengths(40, 23)(d)) & masks.causal(),
        "q_len": 40,
        "k_len": 40,
    }
    for head_dim in (1, 5, 80, 192, 256):
        yield Case(
            f"head_dim {head_dim}", "no multiple of a vector, or many", head_dim=head_dim, value_dim=head_dim, **padding
        )
    yield Case("narrow values", "value_dim < head_dim (192, 128 in DeepSeek)", head_dim=24, value_dim=9, **padding)
    yield Case("wide values", "value_dim > head_dim", head_dim=7, value_dim=33, **padding)
    yield Case(
        "one head",
        "batch x heads below the threads",
        batch=1,
        heads=1,
        kv_heads=1,
        q_len=140,
        k_len=140,
        mask=lambda device: masks.causal(),
    )
    yield Case("multi-query", "one key head for all", heads=6, kv_heads=1, **padding)
    yield Case("one head each", "no grouping", heads=3, kv_heads=3, **padding)
    yield Case("one token", "the smallest problem", batch=1, q_len=1, k_len=1)


def _feature_cases() -> Iterator[Case]:
    padding: dict[str, Any] = {
        "mask": lambda d: masks.padding(_lengths(40, 23)(d)) & masks.causal(),
        "q_len": 40,
        "k_len": 40,
    }
    yield Case("softcap", "tanh before the mask", softcap=1.5, **padding)
    yield Case("bias", "broadcast over the batch (T5)", bias_shape=(1, 4, 40, 40), **padding)
    yield Case("bias per key", "broadcast over heads and rows", bias_shape=(2, 1, 1, 40), **padding)
    yield Case("bias that empties a row", "-inf for every key", bias_shape=(40, 40), blocked_row=True, **padding)
    yield Case("bias per row", "broadcast over keys and batch", bias_shape=(4, 40, 1), **padding)
    yield Case("bias for all heads", "one gradient for several key heads", bias_shape=(2, 1, 40, 40), **padding)
    yield Case("bias per head and key", "one gradient for all rows", bias_shape=(4, 1, 40), **padding)
    yield _packed(
        "bias, packed",
        "a bias with a place for pairs of different documents, which nobody reads",
        (20, 0, 31),
        pattern=masks.causal(),
        tail=9,
        bias_shape=(1, 4, 60, 60),
        softcap=2.0,
    )
    yield Case("ALiBi", "distance from the diagonal of the sequence", alibi=True, **padding)
    yield Case("ALiBi per element", "slopes for each batch element", alibi=True, alibi_per_element=True, **padding)
    yield Case(
        "dense for all heads",
        "one bit for all heads and batch elements, under another mask",
        mask=lambda d: masks.dense(_random_mask(1, 1, 40, 40).to(d)) & masks.padding(_lengths(40, 23)(d)),
        q_len=40,
        k_len=40,
        alibi=True,
        bias_shape=(2, 1, 1, 40),
    )
    yield Case(
        "two spans with features",
        "both spans read the same bias and positions",
        mask=lambda d: masks.causal() & (masks.sliding_window(30, 0) | masks.prefix(4)),
        bias_shape=(4, 72, 72),
        alibi=True,
        sinks=True,
    )
    yield Case("sinks", "a logit without a value (gpt-oss)", sinks=True, **padding)
    yield _packed(
        "ALiBi, packed", "positions begin anew in each document", (20, 31), pattern=masks.causal(), alibi=True
    )
    yield Case(
        "everything", "all features at once", softcap=3.0, bias_shape=(2, 4, 40, 40), alibi=True, sinks=True, **padding
    )


_CASES: Mapping[str, Callable[[], list[Case]]] = {
    "attention": lambda: [*_mask_cases(), *_packed_cases(), *_shape_cases(), *_feature_cases()],
}


def cases(op: str = "attention", *, features: bool = False) -> list[Case]:
    """The cases of an op, in float32 (``case.with_dtype`` gives others).

    Args:
        op: ``"attention"``.
        features: include the cases that give the callable more keywords than ``softmax_scale``: softcap, bias,
            alibi_slopes or sinks (``case.features`` says which).

    Raises:
        ValueError: there are no cases for the op.
    """
    if op not in _CASES:
        raise ValueError(f"op is {op!r}: there are cases for {', '.join(map(repr, _CASES))}")
    return [case for case in _CASES[op]() if features or not case.features]
