"""Attention over sequences of any lengths: inputs in every layout, useful work, the formulas written out."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from maskops import masks
from maskops.cli.bench.contests.contest import Contest, Leaves, Setting
from maskops.cli.bench.jobs import Outcome
from maskops.masks import Mask

_SCORES_AT_ONCE = 1 << 25
PACKED, PADDED, ROWS = "packed", "padded", "rows"
"""(total, heads, D); (sequences, heads, longest, D); (n_rows, heads, total / n_rows, D), sequence behind sequence."""


class AttentionContest(Contest):
    """Self-attention inside each of some sequences.

    Args:
        group, name: Heading and label.
        setting: Where.
        lengths: Of the sequences, known on the host.
        heads, kv_heads, head_dim: Sizes.
        causal: Whether a row sees later keys.
        window: A row sees itself and this many keys before it; None for all.
        allowed: bool (length, length), the same in every sequence: a mask with holes.
        rows: The sequences lie one behind another in this many rows of equal length, as documents.
    """

    def __init__(
        self,
        group: str,
        name: str,
        setting: Setting,
        lengths: Sequence[int],
        *,
        heads: int,
        head_dim: int,
        kv_heads: int | None = None,
        causal: bool = True,
        window: int | None = None,
        allowed: Tensor | None = None,
        rows: int = 0,
    ) -> None:
        self.group, self.name, self.setting = group, name, setting
        self.lengths, self.longest, self.total = tuple(lengths), max(lengths), sum(lengths)
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads or heads, head_dim
        self.causal, self.window, self.allowed, self.n_rows = causal, window, allowed, rows
        ends = torch.tensor([0, *lengths]).cumsum(0)
        self.begins = ends.tolist()
        self.cu_seqlens = ends.to(torch.int32).to(setting.device)
        self.lengths_on_device = torch.tensor(lengths, dtype=torch.int32, device=setting.device)
        numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        self.ids = numbers.to(torch.int32).to(setting.device)
        places = [row * self.longest + torch.arange(length) for row, length in enumerate(lengths)]
        self._places = torch.cat(places).to(setting.device)
        sizes = (heads, self.kv_heads, self.kv_heads, heads)
        self._packed = [setting.randn(self.total, n, head_dim, stream=index) for index, n in enumerate(sizes)]
        self._chosen = self.lengths.index(self.longest)

    @property
    def ragged(self) -> bool:
        """Whether lengths differ."""
        return min(self.lengths) != self.longest

    @property
    def pattern(self) -> Mask:
        """What a row sees inside its sequence."""
        if self.allowed is not None:
            return masks.dense(self.allowed[None, None])
        found = masks.causal() if self.causal else masks.full()
        return found if self.window is None else found & masks.sliding_window(self.window, None)

    @property
    def pairs(self) -> float:
        """Pairs of a row and a key that it sees."""
        if self.allowed is not None:
            return float(self.allowed.sum()) * len(self.lengths)
        window = math.inf if self.window is None else self.window + 1
        if not self.causal:
            return float(sum(length * length for length in self.lengths))
        short = [min(length, window) for length in self.lengths]
        return float(sum(n * (n + 1) / 2 + (length - n) * n for n, length in zip(short, self.lengths, strict=True)))

    def flops(self, backward: bool) -> float:
        """Two products of pairs forward, five more backward."""
        return (3.5 if backward else 1.0) * 4 * self.pairs * self.heads * self.head_dim

    def in_layout(self, packed: Tensor, layout: str) -> Tensor:
        """(total, heads, D) in a layout; heads before the sequence are a view, as a model's projections give them."""
        if layout == PACKED:
            return packed
        if layout == ROWS:
            return packed.view(self.n_rows, -1, *packed.shape[1:]).transpose(1, 2)
        size = (len(self.lengths) * self.longest, *packed.shape[1:])
        padded = packed.new_zeros(size).index_copy_(0, self._places, packed) if self.ragged else packed
        return padded.view(len(self.lengths), -1, *packed.shape[1:]).transpose(1, 2)

    def leaves(self, layout: str) -> Leaves:
        """q, k and v."""
        return tuple(self.in_layout(x, layout).detach().requires_grad_() for x in self._packed[:3])

    def upstream(self, layout: str, out: Tensor) -> Tensor:
        """Random, so that no gradient is 0 by itself."""
        return self.in_layout(self._packed[3], layout).to(out.dtype)

    def sample(self, layout: str, results: Sequence[Tensor]) -> Outcome:
        """The longest sequence, the first key head and its group of query heads."""
        begin = self.begins[self._chosen]
        group = self.heads // self.kv_heads
        named: Outcome = {}
        for name, x in zip(("out", "dq", "dk", "dv"), results, strict=False):
            if layout == PADDED:
                one = x[self._chosen, :, : self.longest].transpose(0, 1)
            else:
                flat = x.transpose(1, 2).flatten(0, 1) if layout == ROWS else x
                one = flat[begin : begin + self.longest]
            named[name] = one[:, : group if name in ("out", "dq") else 1].transpose(0, 1).double()
        return named

    def exact(self, backward: bool) -> Outcome:
        """In float64."""
        return self._written_out(torch.float64, backward)

    def plain(self, backward: bool) -> Outcome:
        """In the dtype of the inputs; sums over rows in float32."""
        return self._written_out(self.setting.dtype, backward)

    def _allowed(self, first: int, last: int) -> Tensor:
        if self.allowed is not None:
            return self.allowed[first:last]
        row = torch.arange(first, last, device=self.setting.device)[:, None]
        key = torch.arange(self.longest, device=self.setting.device)
        seen = key <= row if self.causal else (key >= 0).expand(last - first, -1)
        return seen if self.window is None else seen & (key >= row - self.window)

    def _written_out(self, dtype: torch.dtype, backward: bool) -> Outcome:
        group, begin = self.heads // self.kv_heads, self.begins[self._chosen]
        numbers = (group, 1, 1, group)
        q, k, v, upstream = (
            x[begin : begin + self.longest, :n].transpose(0, 1).to(dtype)
            for x, n in zip(self._packed, numbers, strict=True)
        )
        scale = self.head_dim**-0.5
        wide = dtype if dtype == torch.float64 else torch.float32
        out, dq = torch.empty_like(q), torch.empty_like(q)
        dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        chunk = max(1, _SCORES_AT_ONCE // (group * self.longest))
        for first in range(0, self.longest, chunk):
            rows = slice(first, min(first + chunk, self.longest))
            scores = (q[:, rows] @ k.transpose(1, 2)) * scale
            weights = scores.masked_fill_(~self._allowed(rows.start, rows.stop), -math.inf).softmax(-1)
            out[:, rows] = weights @ v
            if backward:
                received = upstream[:, rows] @ v.transpose(1, 2)
                inner = weights * (received - (received * weights).sum(-1, keepdim=True))
                dq[:, rows] = (inner @ k) * scale
                dk += ((inner.transpose(1, 2) @ q[:, rows]) * scale).sum(0, keepdim=True)
                dv += (weights.transpose(1, 2) @ upstream[:, rows]).sum(0, keepdim=True)
        named = {"out": out, **({"dq": dq, "dk": dk, "dv": dv} if backward else {})}
        return {name: x.to(dtype).double() for name, x in named.items()}
