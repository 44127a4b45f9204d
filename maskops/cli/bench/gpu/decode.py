"""One query a sequence over a cache of keys and values: it waits for memory."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import maskops
from maskops.cli.bench.gpu.contest import Contender, Contest, Function, Leaves, Setting
from maskops.cli.bench.jobs import Outcome

_PAGE = 64


class DecodeContest(Contest):
    """A cache (batch, kv_heads, capacity, D), whole or filled to different lengths."""

    group = "decode"
    differentiated = False

    def __init__(
        self,
        setting: Setting,
        batch: int,
        heads: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        ragged: bool,
        name: str,
    ) -> None:
        self.setting, self.name, self._ragged, self._grouped = setting, name, ragged, heads != kv_heads
        shares = torch.linspace(0.2, 1.0, batch) if ragged else torch.ones(batch)
        self._host_lengths = (shares * capacity).long().tolist()
        self._lengths = torch.tensor(self._host_lengths, dtype=torch.int32, device=setting.device)
        size = (batch, kv_heads, capacity, head_dim)
        self._leaves = (
            setting.randn(batch, heads, 1, head_dim),
            setting.randn(*size, stream=1),
            setting.randn(*size, stream=2),
        )

    def leaves(self, layout: str) -> Leaves:
        """q and the cache."""
        return self._leaves

    def bytes(self, backward: bool) -> float:
        """The keys and values that count, once."""
        _, k, _ = self._leaves
        return float(2 * sum(self._host_lengths) * k.shape[1] * k.shape[3] * k.element_size())

    def contenders(self) -> list[Contender]:
        """torch on whole tensors, with a mask where lengths differ; maskops on the cache and on pages of it."""

        def mask(k: Tensor) -> Tensor | None:
            if not self._ragged:
                return None
            return torch.arange(k.shape[2], device=k.device) < self._lengths[:, None, None, None]

        def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask(k), enable_gqa=self._grouped)

        def rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # One query each: the heads of a group are as good as queries.
            packed = q.view(q.shape[0], k.shape[1], -1, q.shape[3])
            return F.scaled_dot_product_attention(packed, k, v, attn_mask=mask(k)).reshape(q.shape)

        def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            packed = q.view(q.shape[0], k.shape[1], -1, q.shape[3])
            scores = (packed @ k.transpose(2, 3)) * q.shape[3] ** -0.5
            seen = mask(k)
            visible: Tensor = scores if seen is None else scores.masked_fill(~seen, -math.inf)
            return torch.matmul(visible.softmax(-1), v).view(q.shape)

        setting = self.setting
        found = [Contender("SDPA", lambda leaves: plain, habit=True)]
        if self._grouped:
            found.append(Contender("SDPA, heads as rows", lambda leaves: rows))
        found += [
            Contender("two matrix products", lambda leaves: products),
            Contender("torch.compile of two matrix products", lambda leaves: setting.compiled(products), compiles=True),
        ]
        for name in setting.backends("decode_attention"):
            compiles = name == "triton"
            found.append(Contender(f"maskops {name}", self._ours(name), ours=True, compiles=compiles))
            label = f"maskops {name}, pages of {_PAGE}"
            found.append(Contender(label, self._paged(name), ours=True, compiles=compiles))
        return found

    def _ours(self, backend: str) -> Callable[[Leaves], Function]:
        return lambda leaves: lambda q, k, v: maskops.decode_attention(q, k, v, self._lengths, backend=backend)

    def _paged(self, backend: str) -> Callable[[Leaves], Function]:
        def make(leaves: Leaves) -> Function:
            q, *caches = leaves
            pages = [x.unflatten(2, (-1, _PAGE)).transpose(1, 2).flatten(0, 1).contiguous() for x in caches]
            count = pages[0].shape[0]
            # In mixed order, as pages of a server are.
            places = torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(q.device)
            table = places.to(torch.int32).view(q.shape[0], -1)
            k_pages, v_pages = (torch.empty_like(x).index_copy_(0, places, x) for x in pages)

            def run(q: Tensor, *unused: Any) -> Tensor:
                return maskops.decode_attention(q, k_pages, v_pages, self._lengths, block_table=table, backend=backend)

            return run

        return make

    def sample(self, layout: str, results: Sequence[Tensor]) -> Outcome:
        """The first and the last sequence."""
        return {"out": results[0][[0, -1]].double()}

    def exact(self, backward: bool) -> Outcome:
        """In float64."""
        return self._written_out(torch.float64)

    def plain(self, backward: bool) -> Outcome:
        """In the dtype of the run."""
        return self._written_out(self.setting.dtype)

    def _written_out(self, dtype: torch.dtype) -> Outcome:
        outs = []
        for index in (0, -1):
            length = self._host_lengths[index]
            q, k, v = (x[index].to(dtype) for x in self._leaves)
            k, v = (x[:, :length].repeat_interleave(q.shape[0] // k.shape[0], 0) for x in (k, v))
            scores = (q @ k.transpose(1, 2)) * q.shape[2] ** -0.5
            outs.append(scores.softmax(-1) @ v)
        return {"out": torch.stack(outs).double()}
