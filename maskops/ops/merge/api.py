"""The public function that merges two partial attentions.

Plain PyTorch on every device, differentiable any number of times, so there is one implementation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from maskops.checks import check_tensor


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merges attention of the same queries over two disjoint sets of keys into attention over their union, exactly.

    The formula::

        lse = log(exp(lse_a) + exp(lse_b))
        out = exp(lse_a - lse) * out_a + exp(lse_b - lse) * out_b

    A row that is empty in one part (lse -inf) comes out as the other part, bit for bit; what the empty part's ``out``
    holds is never read. A row that is empty in both gets out 0, lse -inf, and gradients 0 whatever the incoming
    gradient holds. Merging is associative and commutative up to rounding, so more than two parts are merged in turn.
    An lse of +inf (a score that overflowed) takes the whole weight; two of them have no answer and give NaN.

    Parts are computed without ``sinks``: a sink takes part once, at the end, as
    ``out * torch.sigmoid(lse - sinks)``.

    Args:
        out_a: (batch, heads, q_len, value_dim), or packed (total_q, heads, value_dim); floating. Differentiable.
        lse_a: natural logarithm, (batch, heads, q_len), or packed (heads, total_q); floating. Differentiable.
        out_b: same shape and dtype as ``out_a``. Differentiable.
        lse_b: same shape as ``lse_a``. Differentiable.

    Returns:
        out in ``out_a``'s shape and dtype, and lse in ``lse_a``'s shape. float32 arithmetic and lse, float64 where an
        input is float64.

    Raises:
        TypeError: an argument is no floating tensor, or out_a and out_b differ in dtype.
        ValueError: shapes or devices do not fit.

    Source: FlashAttention-2, Dao, arXiv 2307.08691, section 2.3.1; FlashInfer, Ye et al., arXiv 2501.01005, section
    2.2 (attention states).
    """
    _check(out_a, lse_a, out_b, lse_b)
    dtype = torch.float64 if torch.float64 in (out_a.dtype, lse_a.dtype, lse_b.dtype) else torch.float32
    lse_a, lse_b = lse_a.to(dtype), lse_b.to(dtype)
    has_a, has_b = lse_a != -math.inf, lse_b != -math.inf
    both, some = has_a & has_b, has_a | has_b
    # Replaced before use, not afterwards: the gradient of what is computed from -inf or NaN would be NaN.
    safe_a, safe_b = torch.where(both, lse_a, 0.0), torch.where(both, lse_b, 0.0)
    lead = safe_a - safe_b
    weight_a = torch.where(both, torch.sigmoid(lead), has_a.to(dtype))
    weight_b = torch.where(both, torch.sigmoid(-lead), has_b.to(dtype))
    alone = torch.where(has_a, lse_a, torch.where(has_b, lse_b, -math.inf))
    lse = torch.where(both, torch.logaddexp(safe_a, safe_b), alone)

    def beside(x: Tensor) -> Tensor:
        """A value per row, laid out beside the rows of out."""
        return (x if x.dim() == 3 else x.transpose(0, 1)).unsqueeze(-1)

    part_a = torch.where(beside(has_a), out_a.to(dtype), 0.0)
    part_b = torch.where(beside(has_b), out_b.to(dtype), 0.0)
    out = torch.where(beside(some), beside(weight_a) * part_a + beside(weight_b) * part_b, 0.0)
    return out.to(out_a.dtype), lse


def _check(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    named = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    for name, x in named.items():
        check_tensor(name, x, "of floating dtype")
        if not x.is_floating_point():
            raise TypeError(f"{name} is {x.dtype}: expected a floating dtype")
        if x.device != out_a.device:
            raise ValueError(f"{name} is on {x.device}, out_a on {out_a.device}: they must be on one device")
    if out_a.dim() not in (3, 4):
        raise ValueError(
            f"out_a has shape {tuple(out_a.shape)}: expected (batch, heads, q_len, value_dim), or packed (total, heads,"
            " value_dim)"
        )
    if out_b.dtype != out_a.dtype:
        raise TypeError(f"out_a is {out_a.dtype}, out_b is {out_b.dtype}: they must have one dtype")
    if out_b.shape != out_a.shape:
        raise ValueError(f"out_a has shape {tuple(out_a.shape)}, out_b {tuple(out_b.shape)}: they must be equal")
    rows = out_a.shape[:3] if out_a.dim() == 4 else (out_a.shape[1], out_a.shape[0])
    for name in ("lse_a", "lse_b"):
        if named[name].shape != rows:
            meaning = "(batch, heads, q_len)" if out_a.dim() == 4 else "(heads, total)"
            raise ValueError(
                f"{name} has shape {tuple(named[name].shape)}: expected {meaning} = {tuple(rows)} for out_a with shape "
                f"{tuple(out_a.shape)}"
            )
