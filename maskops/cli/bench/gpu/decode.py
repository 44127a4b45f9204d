"""Who decodes on a device: torch on whole tensors, and maskops on the cache and on pages of it."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import maskops
from maskops.cli.bench.contests.contest import Contender, Function, Leaves
from maskops.cli.bench.contests.decode import DecodeContest

_PAGE = 64


class Decode(DecodeContest):
    """See the base class."""

    def contenders(self) -> list[Contender]:
        """torch on whole tensors, with a mask where lengths differ; maskops on the cache and on pages of it."""

        def mask(k: Tensor) -> Tensor | None:
            if not self.ragged:
                return None
            return torch.arange(k.shape[2], device=k.device) < self.lengths[:, None, None, None]

        def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask(k), enable_gqa=self.grouped)

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
        if self.grouped:
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
        return lambda leaves: lambda q, k, v: maskops.decode_attention(q, k, v, self.lengths, backend=backend)

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
                return maskops.decode_attention(q, k_pages, v_pages, self.lengths, block_table=table, backend=backend)

            return run

        return make
