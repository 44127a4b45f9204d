"""Who does attention on a processor: torch's own kernels in every way that they can be called, and maskops."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import maskops
from maskops.cli.bench.contests.attention import PACKED, PADDED, AttentionContest
from maskops.cli.bench.contests.contest import Contender, Function, Leaves, always
from maskops.cli.bench.contests.decode import DecodeContest

SDPA, OURS = "SDPA", "maskops"
CELLS = {"FLASH": SDPBackend.FLASH_ATTENTION, "MATH": SDPBackend.MATH}
LOOPS = tuple(f"loop, {cell}" for cell in CELLS)
"""Sequence by sequence, in the dtype of the inputs."""

UPCAST_LOOPS = tuple(f"loop in float32, {cell}" for cell in CELLS)
BOOL_MASK = "SDPA, bool mask"
CHUNKS = tuple(f"SDPA, chunks of {size}" for size in (128, 256, 512))
PLANNED, VARLEN = "maskops, RowSpans", "maskops, varlen"
UPCAST, HEADS_AS_ROWS, PRODUCTS = "SDPA in float32", "SDPA, heads as rows", "two matrix products"


class Attention(AttentionContest):
    """Self-attention; tensors of equal lengths are (batch, heads, sequence, D) and contiguous, the best for torch."""

    def in_layout(self, packed: Tensor, layout: str) -> Tensor:
        """See the base class."""
        laid = super().in_layout(packed, layout)
        return laid.contiguous() if layout == PADDED else laid

    def upstream(self, layout: str, out: Tensor) -> Tensor:
        """Random, laid out once."""
        kept: dict[str, Tensor] = self.__dict__.setdefault("_upstream", {})
        if layout not in kept:
            kept[layout] = super().upstream(layout, out)
        return kept[layout]

    def contenders(self) -> list[Contender]:
        """Torch's calls of whole tensors or sequence by sequence, and maskops."""
        if self.ragged:
            loops = [
                Contender(name, self._loop(kernel, wide), PACKED)
                for names, wide in ((LOOPS, False), (UPCAST_LOOPS, True))
                for name, kernel in zip(names, CELLS.values(), strict=True)
            ]
            return [*loops, Contender(OURS, lambda leaves: self._varlen, PACKED, ours=True)]
        found = [Contender(OURS, lambda leaves: self._call, PADDED, ours=True)]
        if self.window is not None:
            found += [Contender(BOOL_MASK, self._masked, PADDED)]
            sizes = [(name, int(name.rpartition(" ")[2])) for name in CHUNKS]
            return [*found, *(Contender(name, self._chunked(size), PADDED) for name, size in sizes)]
        return [
            *found,
            Contender(SDPA, lambda leaves: self._sdpa, PADDED),
            Contender(PLANNED, self._planned, PADDED, ours=True),
            Contender(VARLEN, lambda leaves: self._varlen, PACKED, ours=True),
        ]

    def _call(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        whole = not self.causal and self.window is None
        return maskops.attention(q, k, v, None if whole else self.pattern)

    def _varlen(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = self.pattern if self.causal else None
        return maskops.varlen_attention(q, k, v, cu_seqlens_q=self.cu_seqlens, mask=mask)

    def _planned(self, leaves: Leaves) -> Function:
        batch, length = leaves[0].shape[0], leaves[0].shape[2]
        plan = self.pattern.spans(length, length, batch=batch)
        return lambda q, k, v: maskops.attention(q, k, v, plan)

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.heads == self.kv_heads:
            return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=True)

    def _masked(self, leaves: Leaves) -> Function:
        seen = self._allowed(0, self.longest)
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    def _chunked(self, size: int) -> Callable[[Leaves], Function]:
        """Rows in chunks, each with the keys that one of its rows sees."""
        window = self.longest if self.window is None else self.window

        def make(leaves: Leaves) -> Function:
            bounds = [
                (first, min(first + size, self.longest), max(first - window, 0))
                for first in range(0, self.longest, size)
            ]
            seen = [self._allowed(first, last)[:, low:last].contiguous() for first, last, low in bounds]

            def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                outs = [
                    F.scaled_dot_product_attention(q[:, :, first:last], k[:, :, low:last], v[:, :, low:last], mask)
                    for (first, last, low), mask in zip(bounds, seen, strict=True)
                ]
                return torch.cat(outs, 2)

            return run

        return make

    def _loop(self, kernel: SDPBackend, wide: bool) -> Callable[[Leaves], Function]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            dtype = q.dtype
            if wide:
                q, k, v = q.float(), k.float(), v.float()
            sequences = zip(*(x.split(list(self.lengths)) for x in (q, k, v)), strict=True)
            with sdpa_kernel(kernel):
                outs = [
                    F.scaled_dot_product_attention(
                        query.transpose(0, 1)[None],
                        key.transpose(0, 1)[None],
                        value.transpose(0, 1)[None],
                        is_causal=self.causal,
                    )
                    for query, key, value in sequences
                ]
            return torch.cat([out[0].transpose(0, 1) for out in outs]).to(dtype)

        return lambda leaves: run


class Decode(DecodeContest):
    """One query a sequence over a full cache."""

    def contenders(self) -> list[Contender]:
        """Torch on the whole cache, and maskops."""

        def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if not self.grouped:
                return F.scaled_dot_product_attention(q, k, v)
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        def upcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return plain(q.float(), k.float(), v.float()).to(q.dtype)

        def rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # One query each: the heads of a group are as good as queries.
            packed = q.view(q.shape[0], k.shape[1], -1, q.shape[3])
            return F.scaled_dot_product_attention(packed, k, v).reshape(q.shape)

        def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            packed = q.view(q.shape[0], k.shape[1], -1, q.shape[3])
            scores = (packed @ k.transpose(2, 3)) * q.shape[3] ** -0.5
            return torch.matmul(scores.softmax(-1), v).view(q.shape)

        def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return maskops.decode_attention(q, k, v, self.lengths)

        named = {SDPA: plain, UPCAST: upcast, HEADS_AS_ROWS: rows, PRODUCTS: products}
        found = [Contender(name, always(function)) for name, function in named.items()]
        return [*found, Contender(OURS, always(ours), ours=True)]
