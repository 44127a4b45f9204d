"""``maskops.masked_softmax``: what it takes, what it refuses, and which backend computes it."""

from __future__ import annotations

import itertools
import operator
from typing import Literal, overload

import torch
from torch import Tensor

from maskops import backend as backends
from maskops.checks import INTEGERS, check_mask_values, check_tensor, has_autocast
from maskops.layouts import values_can_be_read
from maskops.masks import Mask
from maskops.ops.softmax import direct, reference, registration
from maskops.spans import RowSpans

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Scores, their exponentials, the weights and the broadcast mask.
_SCORE_SIZED_TENSORS_OF_REFERENCE = 4


@overload
def masked_softmax(
    x: Tensor,
    mask: Mask | RowSpans | Tensor | None,
    dim: int = -1,
    *,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def masked_softmax(
    x: Tensor,
    mask: Mask | RowSpans | Tensor | None,
    dim: int = -1,
    *,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def masked_softmax(
    x: Tensor,
    mask: Mask | RowSpans | Tensor | None,
    dim: int = -1,
    *,
    return_lse: bool,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...


def masked_softmax(
    x: Tensor,
    mask: Mask | RowSpans | Tensor | None,
    dim: int = -1,
    *,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax over the elements that a mask lets through; masked elements get weight 0 and are never read.

    With the sum over visible elements j along ``dim``::

        lse        = log sum_j exp(x[j])
        weights[j] = exp(x[j] - lse)          where the mask lets j through, else 0

    A softmax over nothing, or over nothing but -inf, gives weights 0, lse -inf and gradients 0, never NaN. What masked
    elements of ``x`` hold, NaN and infinities included, reaches no result; their gradient is exactly 0. So is that of a
    visible element whose weight is 0, whatever the incoming gradient holds there. A visible NaN or +inf makes every
    visible weight of its softmax NaN, as in ``torch.softmax``.

    Args:
        x: float32, bfloat16, float16 or float64, any shape and strides. Computed in float32 (float64 for float64).
            Nothing is copied where the last dimension is contiguous, whichever ``dim`` is.
        mask: one of

            * a ``masks.Mask``: x is a tensor of scores (..., q_len, k_len); its first dimension is the batch where it
              has at least three, and its second one are the heads (of a dense mask) where it has at least four.
              ``masks.documents(cu_seqlens=...)`` also takes packed scores (heads, total, total);
            * a ``RowSpans``, which is a Mask planned once: ``mask.spans(q_len, k_len)``;
            * a bool tensor, or integers 0 and 1: True (1) = visible. Broadcasts to x's shape and never enlarges it. An
              expanded one is read as it is, never materialised;
            * None: everything is visible.

        dim: the dimension of the softmax. Along the last one, spans cost only the keys that they cover; along any
            other, a Mask or RowSpans is expanded to a bool tensor (batch, heads, q_len, k_len) first.
        return_lse: also return the logsumexp of the visible elements; gradients that arrive at it are honoured.
        backend: name of a backend, which then serves the call or raises; None or ``"auto"`` for the choice of
            ``maskops.use_backend`` or the environment variable ``MASKOPS_BACKEND``, else the fastest that serves it.

    Returns:
        The weights, x's shape and dtype, contiguous whatever x's strides are (as from ``torch.softmax``). With
        ``return_lse`` the pair (weights, lse); lse is float32 (float64 for float64), in x's shape without ``dim``, and
        +inf where the largest visible element is.

    Raises:
        TypeError: x or mask has the wrong type or dtype.
        ValueError: mask does not broadcast to x, a plan is for another shape or device, an integer mask holds other
            values than 0 and 1 (checked on the CPU, and on other devices under ``maskops.validate()``), or the named
            backend refuses the call.
        IndexError: x has no dimension ``dim``.

    Under autocast x is cast as by ``torch.softmax``: to float32 on CUDA, not at all on the CPU. Second and higher
    derivatives are computed by plain PyTorch operations from the saved weights. There is no forward-mode derivative.

    Source: the softmax with masking of "Attention is all you need", Vaswani et al. 2017, section 3.2.3, with exact
    zeros in place of large negative scores.

    Example:
        >>> scores, lengths = torch.randn(2, 4, 5, 5), torch.tensor([5, 3])
        >>> weights = maskops.masked_softmax(scores, masks.padding(lengths) & masks.causal())
        >>> weights = maskops.masked_softmax(scores, torch.arange(5) < lengths[:, None, None, None])
    """
    outputs: Tensor | tuple[Tensor, Tensor] | None = direct.masked_softmax(x, mask, dim, return_lse, backend)
    if outputs is not None:
        return outputs
    check_tensor("x", x, "of scores")
    if x.dtype not in _FLOATS:
        raise TypeError(f"x has dtype {x.dtype}: expected float32, bfloat16, float16 or float64")
    dim = _check_dim(x, dim)
    if has_autocast(x.device.type) and torch.is_autocast_enabled(x.device.type):
        # Asked, not copied: the list of operations that autocast casts differs from device to device.
        x = x.to(torch.softmax(x.new_empty(0), 0).dtype)
    shape = x.shape
    if x.dim() == 0:
        x = x.reshape(1)

    spans: RowSpans | None = None
    allowed: Tensor | None = None
    if isinstance(mask, Mask | RowSpans):
        spans = _plan(mask, x)
        if spans.dense is not None or dim != x.dim() - 1:
            allowed, spans = _expanded(spans, x), None
    elif mask is not None:
        allowed = _check_tensor_mask(mask, x)

    size = None if torch.compiler.is_compiling() or x.is_meta else x.numel() * max(x.element_size(), 4)
    name = backends.choose(
        "masked_softmax",
        x.device.type,
        x.dtype,
        requested=backend,
        reference_bytes=None if size is None else _SCORE_SIZED_TENSORS_OF_REFERENCE * size,
    )
    if name == backends.REFERENCE:
        if spans is not None:
            allowed = _expanded(spans, x)
        weights, lse = reference.masked_softmax(x, allowed, dim)
    else:
        allowed = None if allowed is None else allowed.expand(x.shape)
        weights, lse = registration.masked_softmax(x, allowed, spans, dim, return_lse, name)
    weights = weights.reshape(shape)
    return (weights, lse) if return_lse else weights


def _check_dim(x: Tensor, dim: int) -> int:
    """The dimension, not negative."""
    if isinstance(dim, bool):
        raise TypeError("dim is a bool: expected an int")
    try:
        dim = operator.index(dim)
    except TypeError:
        raise TypeError(f"dim is a {type(dim).__name__}: expected an int") from None
    n_dims = max(x.dim(), 1)
    if not -n_dims <= dim < n_dims:
        raise IndexError(f"dim is {dim}: x has shape {tuple(x.shape)}, expected -{n_dims} to {n_dims - 1}")
    return dim % n_dims


# ---- masks of queries and keys --------------------------------------------------------------------------------------


def _plan(mask: Mask | RowSpans, x: Tensor) -> RowSpans:
    """The plan for the last two dimensions of x, checked against its shape."""
    shape = tuple(x.shape)
    if x.dim() < 2:
        raise ValueError(f"x has shape {shape}: a mask of queries and keys needs scores (..., q_len, k_len)")
    q_len, k_len = x.shape[-2:]
    batch = x.shape[0] if x.dim() > 2 else 1
    if isinstance(mask, RowSpans):
        spans = mask
        if spans.q_len != q_len or spans.k_len != k_len:
            raise ValueError(
                f"mask is a plan for {spans.q_len} queries and {spans.k_len} keys, x has shape {shape}: plan it with "
                f"mask.spans({q_len}, {k_len})"
            )
        if spans.batch not in (1, batch):
            raise ValueError(
                f"mask is a plan for a batch of {spans.batch}, x has shape {shape}: expected ({spans.batch}, ..., "
                f"q_len, k_len){_fix_of_batch(x, spans.batch)}"
            )
        if spans.start.device != x.device:
            raise ValueError(
                f"mask is a plan on {spans.start.device}, x is on {x.device}: plan it with device=x.device"
            )
    else:
        for layout in mask.layouts:
            if layout.tensor is not None and layout.kind != "cu_seqlens" and layout.batch() not in (1, batch):
                raise ValueError(
                    f"mask, {mask}, is for a batch of {layout.batch()}, x has shape {shape}: expected "
                    f"({layout.batch()}, ..., q_len, k_len){_fix_of_batch(x, layout.batch())}"
                )
        # Packed scores (heads, total, total) have no batch.
        is_packed = x.dim() == 3 and any(layout.kind == "cu_seqlens" for layout in mask.layouts)
        spans = mask.spans(q_len, k_len, batch=1 if is_packed else batch, device=x.device, grad=False)
    if spans.dense is not None:
        heads = x.shape[1] if x.dim() > 3 else 1
        if spans.dense.shape[0] not in (1, batch) or spans.dense.shape[1] not in (1, heads):
            raise ValueError(
                f"mask holds a dense mask with shape {tuple(spans.dense.shape)}, x has shape {shape}: expected "
                f"({batch} or 1, {heads} or 1, {q_len}, {k_len})"
            )
    return spans


def _fix_of_batch(x: Tensor, batch: int) -> str:
    if x.dim() > 2 and batch > 0 and x.shape[0] % batch == 0:
        return f"; where that dimension is batch * heads, pass x.unflatten(0, ({batch}, {x.shape[0] // batch}))"
    return ""


def _expanded(spans: RowSpans, x: Tensor) -> Tensor:
    """The plan as a bool tensor that broadcasts to x."""
    allowed = spans.to_dense()
    if x.dim() == 2:
        return allowed[0, 0]
    if x.dim() == 3:
        return allowed[:, 0]
    return allowed[(slice(None), slice(None), *[None] * (x.dim() - 4))]


# ---- masks that are tensors -----------------------------------------------------------------------------------------


def _check_tensor_mask(mask: Tensor, x: Tensor) -> Tensor:
    """The mask as bool; it broadcasts to x."""
    check_tensor("mask", mask, "of bool or 0/1 integers, a mask of maskops.masks, a RowSpans or None")
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(
            f"mask has dtype {mask.dtype}: expected bool or 0/1 integers, where True (1) is visible. A mask that is "
            f"added to the scores goes into x: masked_softmax(x + mask, None)"
        )
    if mask.dtype != torch.bool and mask.dtype not in INTEGERS:
        raise TypeError(f"mask has dtype {mask.dtype}: expected bool or 0/1 integers, where True (1) is visible")
    if mask.device != x.device:
        raise ValueError(f"mask is on {mask.device}, x on {x.device}: put them on one device")
    if not _broadcasts(tuple(mask.shape), tuple(x.shape)):
        raise ValueError(_cannot_broadcast(mask, x))
    if mask.dtype != torch.bool:
        if values_can_be_read([mask], mask.device):
            check_mask_values("mask", mask)
        mask = mask != 0
    return mask


def _broadcasts(sizes: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether a tensor of ``sizes`` can be expanded to ``target``."""
    return len(sizes) <= len(target) and all(
        size in (1, full) for size, full in zip(reversed(sizes), reversed(target), strict=False)
    )


def _cannot_broadcast(mask: Tensor, x: Tensor) -> str:
    """What is wrong with the shape of a mask, and the reshape that helps."""
    sizes, target = tuple(mask.shape), tuple(x.shape)
    message = f"mask has shape {sizes}, x has shape {target}: a mask must broadcast to x without enlarging it"
    try:
        result = tuple(torch.broadcast_shapes(sizes, target))
    except RuntimeError:
        pass
    else:
        message += f", and these two give {result}"
    fits = _fitting_shape(sizes, target)
    if fits is None:
        return message
    for fix, longer, shorter in (("squeeze", sizes, fits), ("unsqueeze", fits, sizes)):
        for place in range(len(longer)):
            if longer[place] == 1 and (*longer[:place], *longer[place + 1 :]) == shorter:
                return f"{message}. Use mask.{fix}({place}), shape {fits}"
    alternative = ", or masks.key_padding(mask)" if len(sizes) == 2 and sizes[1] == target[-1] else ""
    return f"{message}. Use mask.reshape{fits}{alternative}"


def _fitting_shape(sizes: tuple[int, ...], target: tuple[int, ...]) -> tuple[int, ...] | None:
    """A shape with the same elements in the same order that does broadcast to ``target``; None if there is none.

    The dimensions above 1 go, in order, to dimensions of the target of their size; where there is a choice, the last
    ones to the back and the first of several to the front, as keys and batch lie.
    """
    wide = tuple(size for size in sizes if size != 1)
    fitting = [
        places
        for places in itertools.combinations(range(len(target)), len(wide))
        if all(target[place] == size for place, size in zip(places, wide, strict=True))
    ]
    if not fitting:
        return None
    front = min(places[0] for places in fitting) if len(wide) > 1 else None
    best = max(places for places in fitting if front is None or places[0] == front)
    fits = [1] * len(target)
    for place, size in zip(best, wide, strict=True):
        fits[place] = size
    return tuple(fits)
