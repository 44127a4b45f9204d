"""maskops' own attention, one backend at a time, as a function that ``check`` takes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from maskops import masks
from maskops.backend import BACKENDS, Call
from maskops.masks import Mask
from maskops.ops.attention.api import attention
from maskops.spans import RowSpans, build_row_spans
from maskops.testing.cases import Case


def spans_of(allowed: Tensor) -> RowSpans:
    """The plan of a bool mask (batch, 1, q_len, k_len) whose rows are few runs of keys; unseen keys count as either.

    The way back from a mask to its spans, value by value: it shares nothing with ``masks``, so that agreement means
    something, and it serves masks that a check has permuted or cut.
    """
    batch, heads, q_len, k_len = allowed.shape
    if heads != 1:
        raise ValueError(f"allowed has shape {tuple(allowed.shape)}: expected (batch, 1, q_len, k_len)")
    runs: list[list[list[tuple[int, int]]]] = []
    for element in allowed[:, 0]:
        seen = element.any(0).nonzero().flatten()
        rows = []
        for row in element[:, seen]:
            edges = torch.diff(torch.nn.functional.pad(row.to(torch.int8), (1, 1))).nonzero().flatten().tolist()
            rows.append([(int(seen[a]), int(seen[b - 1]) + 1) for a, b in zip(edges[::2], edges[1::2], strict=True)])
        runs.append(rows)
    n_spans = max((len(row) for rows in runs for row in rows), default=0) or 1
    bounds = torch.zeros(2, n_spans, batch, q_len, dtype=torch.int64)
    for index, rows in enumerate(runs):
        for place, row in enumerate(rows):
            last = row[-1][1] if row else 0
            for span in range(n_spans):
                begin, end = row[span] if span < len(row) else (last, last)
                bounds[0, span, index, place], bounds[1, span, index, place] = begin, end
    bounds = bounds.to(allowed.device)
    return build_row_spans(bounds[0], bounds[1], k_len, key_holes=~allowed.any(2).squeeze(1))


def refusals(backend: str, case: Case, device: str = "cpu") -> list[str]:
    """Why a backend does not serve a case, in its own words; empty where it does."""
    mask = case.mask(device)
    features = case.features if mask is None or not mask.is_dense else (*case.features, "dense mask")
    return BACKENDS[backend].refusals(Call(case.op, device, case.dtype, features))


def attention_on(backend: str, case: Case) -> Callable[..., tuple[Tensor, Tensor]]:
    """``maskops.attention`` on a named backend, for ``check``: it takes the case's mask, not its dense form.

    Where a check changes the mask, the plan is built from the dense form; a dense mask stays dense.
    """

    def run(
        q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, *, softmax_scale: float, **features: Any
    ) -> tuple[Tensor, Tensor]:
        described = case.mask(q.device)
        mask: Mask | RowSpans | None = described
        if not torch.equal(allowed, case.allowed(q.device)):
            mask = masks.dense(allowed) if described is not None and described.is_dense else spans_of(allowed)
        out, lse = attention(q, k, v, mask, softmax_scale=softmax_scale, return_lse=True, backend=backend, **features)
        return out, lse

    return run
