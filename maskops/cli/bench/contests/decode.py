"""One query a sequence over a cache of keys and values: it waits for memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from maskops.cli.bench.contests.contest import Contest, Leaves, Setting
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
        self.setting, self.name, self.ragged, self.grouped = setting, name, ragged, heads != kv_heads
        shares = torch.linspace(0.2, 1.0, batch) if ragged else torch.ones(batch)
        self.host_lengths = (shares * capacity).long().tolist()
        self.lengths = torch.tensor(self.host_lengths, dtype=torch.int32, device=setting.device)
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
        return float(2 * sum(self.host_lengths) * k.shape[1] * k.shape[3] * k.element_size())

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
            length = self.host_lengths[index]
            q, k, v = (x[index].to(dtype) for x in self._leaves)
            k, v = (x[:, :length].repeat_interleave(q.shape[0] // k.shape[0], 0) for x in (k, v))
            scores = (q @ k.transpose(1, 2)) * q.shape[2] ** -0.5
            outs.append(scores.softmax(-1) @ v)
        return {"out": torch.stack(outs).double()}
