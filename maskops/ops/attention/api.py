"""Public functions of span attention: arguments, checks, choice of the backend."""

from __future__ import annotations

import contextlib
import math
import numbers
from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from maskops import backend as backends
from maskops import masks
from maskops.checks import autocast_dtype, check_scale_and_softcap, has_autocast
from maskops.layouts import VARLEN
from maskops.masks import Mask
from maskops.ops.attention import direct, reference, registration
from maskops.ops.scalars import scalar
from maskops.spans import RowSpans

if TYPE_CHECKING:
    from typing_extensions import Unpack

    class _Keywords(TypedDict, total=False):
        bias: Tensor | None
        alibi_slopes: Tensor | None
        sinks: Tensor | None
        softcap: float
        softmax_scale: float | None
        dropout_p: float
        backend: str | None


_HALVES_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
_DTYPES = (*_HALVES_AND_SINGLE, torch.float64)
# Scores, their exponentials and the weights, which autograd keeps.
_SCORE_SIZED_TENSORS_OF_REFERENCE = 3


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | RowSpans | None = None,
    *,
    return_lse: Literal[False] = False,
    **keywords: Unpack[_Keywords],
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | RowSpans | None = None,
    *,
    return_lse: Literal[True],
    **keywords: Unpack[_Keywords],
) -> tuple[Tensor, Tensor]: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | RowSpans | None = None,
    *,
    return_lse: bool,
    **keywords: Unpack[_Keywords],
) -> Tensor | tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | RowSpans | None = None,
    *,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a batch, in which each query row sees one span (or a few) of keys.

    For batch element b, query head h of the group that shares key head g, query row i and key j::

        score[i, j] = softmax_scale * <q[b, h, i], k[b, g, j]>
        score[i, j] = softcap * tanh(score[i, j] / softcap)                          if softcap > 0
        score[i, j] = score[i, j] + bias[b, h, i, j] - alibi_slopes[b, h] * |diag[i] - j|
        score[i, j] = -inf                                                           where the mask hides j from i
        lse[i]      = log sum_j exp(score[i, j])
        out[i]      = sum_j dropout(exp(score[i, j] - lse[i])) v[b, g, j] * sigmoid(lse[i] - sinks[h])

    A row without any visible key (a bias of -inf can make one) gets out 0, lse -inf and gradients 0, whatever the
    incoming gradient holds. Keys that no row sees and rows that see no key are never read into a result, even where
    they hold NaN. Only pairs that the mask allows cost anything, on every backend but the reference.

    Args:
        q: (batch, heads, q_len, head_dim), float32, bfloat16, float16 or float64. Any strides; a copy is made only
            where the last dimension is not contiguous.
        k: (batch, kv_heads, k_len, head_dim), same dtype and device; ``heads`` is a multiple of ``kv_heads``: query
            head h uses key head ``h // (heads // kv_heads)``.
        v: (batch, kv_heads, k_len, value_dim).
        mask: a ``masks.Mask``, planned at each call; or a ``RowSpans``, planned once with ``mask.spans(...)`` and used
            in every layer; None for no mask. Patterns are aligned to the bottom right: the last query row of a
            sequence sees its last key under ``masks.causal()``. diag[i] is the key aligned with row i.
        bias: added to the scores, broadcastable to (batch, heads, q_len, k_len), floating. Differentiable. A -inf hides
            a pair, but, unlike the mask, it does not keep what the key holds out of the arithmetic: k and v must be
            finite there.
        alibi_slopes: (heads,) or (batch, heads), floating; ALiBi's penalty per key of distance. Differentiable.
        sinks: (heads,), floating: one learnable logit a head that takes part in the softmax and has no value. The lse
            excludes it, so that merging parts stays exact. Differentiable.
        softcap: 0 for none.
        softmax_scale: None for ``1 / sqrt(head_dim)``.
        dropout_p: probability with which a weight is dropped, in [0, 1). Which ones depends on a seed drawn from
            torch's generator of the device, the sequence, the head and the places of row and key in the sequence:
            never on padding, packing, the backend or the number of threads. The weight of row place i and key place j
            (of a sequence's first key) in head h of sequence s is dropped where word j % 4 of Philox4x32-7 with the key
            ``seed`` and the counter (j // 4, i, h, s) is below ``dropout_p * 2**32``.
        return_lse: also return the lse; gradients that arrive at it are honoured.
        backend: name of a backend, which then serves the call or raises; None or ``"auto"`` for the choice of
            ``maskops.use_backend`` or the environment variable ``MASKOPS_BACKEND``, else the fastest that serves it.

    Returns:
        out (batch, heads, q_len, value_dim) in q's dtype and dimension order, dense: for q the transposed view of a
        (batch, q_len, heads, head_dim) tensor, ``out.transpose(1, 2).flatten(2)`` copies nothing. With
        ``return_lse``, the pair (out, lse); lse is (batch, heads, q_len), natural logarithm, float32, float64 for
        float64 inputs.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value, or the named backend refuses the call.

    Under autocast q, k, v and bias are cast as in ``scaled_dot_product_attention``. float32 and below accumulate in
    float32.

    Source: FlashAttention, Dao et al., arXiv 2205.14135, algorithms 1 and 4; FlashAttention-2, Dao, arXiv 2307.08691,
    section 3.1. ALiBi: Press et al., arXiv 2108.12409, section 3. Softcap: Gemma 2, arXiv 2408.00118, section 2.
    Sinks: gpt-oss model card, arXiv 2508.10925, section 2.2. Philox: Salmon et al., SC 2011, section 3.3 and table 2.
    """
    outputs: Tensor | tuple[Tensor, Tensor] | None = direct.attention(
        q, k, v, mask, bias, alibi_slopes, sinks, softcap, softmax_scale, dropout_p, backend, return_lse
    )
    if outputs is not None:
        return outputs
    q, k, v = _cast_and_check(q, k, v, 4, "(batch, heads, length, head_dim)")
    if q.shape[0] != k.shape[0] or q.shape[0] != v.shape[0]:
        raise ValueError(f"q, k and v have batch sizes {q.shape[0]}, {k.shape[0]} and {v.shape[0]}: they must be equal")
    _check_heads_and_lengths(q.shape[1], k.shape[1], v.shape[1], k.shape[2], v.shape[2], q.shape[3], k.shape[3])
    out, lse = _attention(
        q,
        k,
        v,
        mask,
        bias,
        alibi_slopes,
        sinks,
        softcap,
        softmax_scale,
        dropout_p,
        backend,
        packed=False,
        sequences=q.shape[0],
    )
    return (out, lse) if return_lse else out


@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    mask: Mask | RowSpans | None = None,
    *,
    return_lse: Literal[False] = False,
    **keywords: Unpack[_Keywords],
) -> Tensor: ...


@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    mask: Mask | RowSpans | None = None,
    *,
    return_lse: Literal[True],
    **keywords: Unpack[_Keywords],
) -> tuple[Tensor, Tensor]: ...


@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    mask: Mask | RowSpans | None = None,
    *,
    return_lse: bool,
    **keywords: Unpack[_Keywords],
) -> Tensor | tuple[Tensor, Tensor]: ...


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    mask: Mask | RowSpans | None = None,
    *,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over packed sequences, each of which sees only itself. The formula is that of ``attention``.

    The longest length is never needed. Tokens past the last offset belong to no sequence: their outputs are 0, and
    what they hold reaches no result and no gradient. Empty sequences are legal.

    Args:
        q: (total_q, heads, head_dim), float32, bfloat16, float16 or float64.
        k: (total_k, kv_heads, head_dim), same dtype and device.
        v: (total_k, kv_heads, value_dim).
        cu_seqlens_q: integer (sequences + 1,), cumulative lengths from 0: sequence s holds the rows
            ``[cu_seqlens_q[s], cu_seqlens_q[s + 1])``.
        cu_seqlens_k: the same for keys; None where they are those of the queries.
        mask: with offsets, a pattern that holds inside each sequence (``masks.causal()``) or None. Without offsets,
            a ``RowSpans`` of the packed rows, planned once with
            ``(masks.documents(cu_seqlens=...) & pattern).spans(total_q, total_k)``. Exactly one of both.
        bias: as in ``attention``, broadcastable to (1, heads, total_q, total_k).
        alibi_slopes: (heads,), or (sequences, heads) with a row for each sequence, empty ones counted.
        sinks: (heads,).
        softcap: as in ``attention``.
        softmax_scale: as in ``attention``.
        dropout_p: as in ``attention``.
        return_lse: as in ``attention``.
        backend: as in ``attention``.

    Returns:
        out (total_q, heads, value_dim), in q's dtype; with ``return_lse`` the pair (out, lse), lse (heads, total_q).

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value (the values of offsets are checked on the CPU, and
            on a GPU under ``maskops.validate()``), or the named backend refuses the call.

    Source: as ``attention``.
    """
    outputs: Tensor | tuple[Tensor, Tensor] | None = direct.varlen_attention(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        mask,
        bias,
        alibi_slopes,
        sinks,
        softcap,
        softmax_scale,
        dropout_p,
        backend,
        return_lse,
    )
    if outputs is not None:
        return outputs
    q, k, v = _cast_and_check(q, k, v, 3, "(total, heads, head_dim)")
    _check_heads_and_lengths(q.shape[1], k.shape[1], v.shape[1], k.shape[0], v.shape[0], q.shape[2], k.shape[2])
    if isinstance(mask, RowSpans):
        if cu_seqlens_q is not None or cu_seqlens_k is not None:
            raise ValueError(
                "mask is a RowSpans, which already holds the sequences: leave out cu_seqlens_q and cu_seqlens_k"
            )
        plan: Mask | RowSpans = mask
        sequences = None
    elif cu_seqlens_q is None:
        raise ValueError("varlen_attention needs cu_seqlens_q, or a RowSpans of the packed rows as mask")
    else:
        _check_mask_type(mask, 1, q.shape[0], k.shape[0])
        _check_offsets("cu_seqlens_q", cu_seqlens_q, q.device)
        if cu_seqlens_k is not None:
            _check_offsets("cu_seqlens_k", cu_seqlens_k, q.device)
        sequences = cu_seqlens_q.shape[0] - 1
        plan = masks.packed_rows(cu_seqlens_q, cu_seqlens_k, VARLEN)
        if mask is not None:
            plan = plan & mask
    # Packed is the batch = 1 case of padded: the same memory, seen as (1, heads, total, head_dim).
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out, lse = _attention(
        q,
        k,
        v,
        plan,
        bias,
        alibi_slopes,
        sinks,
        softcap,
        softmax_scale,
        dropout_p,
        backend,
        packed=True,
        sequences=sequences,
    )
    out, lse = out.squeeze(0).transpose(0, 1), lse.squeeze(0)
    return (out, lse) if return_lse else out


def _cast_and_check(q: Tensor, k: Tensor, v: Tensor, dimensions: int, shape: str) -> tuple[Tensor, Tensor, Tensor]:
    """Checks types, dtypes and devices; casts under autocast, which leaves float64 alone."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}: expected a tensor {shape}")
        if x.dim() != dimensions:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: expected {dimensions} dimensions, {shape}")
        if not x.is_floating_point():
            raise TypeError(f"{name} is {x.dtype}: expected float32, bfloat16, float16 or float64")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}: they must be on one device")
    if (dtype := autocast_dtype(q.device.type)) is not None:
        q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
    if q.dtype not in _DTYPES:
        raise TypeError(f"q is {q.dtype}: expected float32, bfloat16, float16 or float64")
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}: they must have one dtype")
    return q, k, v


def _check_heads_and_lengths(
    heads: int, k_heads: int, v_heads: int, k_len: int, v_len: int, q_dim: int, k_dim: int
) -> None:
    if q_dim != k_dim or q_dim == 0:
        raise ValueError(f"q and k have head_dim {q_dim} and {k_dim}: they must be equal, and at least 1")
    if k_heads != v_heads or k_len != v_len:
        raise ValueError(
            f"k has {k_heads} heads and {k_len} keys, v has {v_heads} heads and {v_len} keys: they must be equal"
        )
    if (heads % k_heads if k_heads else heads) != 0:
        raise ValueError(f"q has {heads} heads, k and v have {k_heads}: expected a multiple of the heads of k")


def _check_mask_type(mask: object, batch: int, q_len: int, k_len: int) -> None:
    if mask is None or isinstance(mask, Mask | RowSpans):
        return
    if not isinstance(mask, Tensor):
        fix = "; of a batch give batch.spans(pattern)" if hasattr(mask, "spans") else ""
        raise TypeError(f"mask is a {type(mask).__name__}: expected a mask of maskops.masks, a RowSpans or None{fix}")
    shape = tuple(mask.shape)
    if mask.is_floating_point():
        raise TypeError(f"mask is a {mask.dtype} tensor with shape {shape}: to add it to the scores use bias=mask")
    if mask.dim() == 2 and (shape == (batch, k_len) or shape != (q_len, k_len)):
        raise TypeError(f"mask has shape {shape}: for padding use masks.padding(mask)")
    if mask.dim() == 1:
        fix = "masks.padding(mask.unsqueeze(0))" if mask.dtype == torch.bool else "masks.padding(lengths)"
        raise TypeError(f"mask has shape {shape}: for padding use {fix}")
    wrapped = "mask" if mask.dim() == 4 else "mask[None, None]" if mask.dim() == 2 else "mask.unsqueeze(1)"
    raise TypeError(
        f"mask has shape {shape}: for one bool per query and key use masks.dense({wrapped}), (batch|1, heads|1, q_len, "
        f"k_len)"
    )


def _check_offsets(name: str, offsets: Tensor, device: torch.device) -> None:
    if not isinstance(offsets, Tensor) or offsets.dtype not in (torch.int32, torch.int64):
        kind = offsets.dtype if isinstance(offsets, Tensor) else type(offsets).__name__
        raise TypeError(f"{name} is {kind}: expected an int32 or int64 tensor of cumulative lengths")
    if offsets.dim() != 1 or offsets.shape[0] == 0:
        raise ValueError(f"{name} has shape {tuple(offsets.shape)}: expected (sequences + 1,)")
    if offsets.device != device:
        raise ValueError(f"{name} is on {offsets.device}, q on {device}: they must be on one device")


def _check_fit(spans: RowSpans, batch: int, heads: int, q_len: int, k_len: int, device: torch.device) -> None:
    if spans.q_len != q_len or spans.k_len != k_len:
        raise ValueError(
            f"mask is a plan for {spans.q_len} queries and {spans.k_len} keys, q and k have {q_len} and {k_len}: "
            f"plan it with mask.spans({q_len}, {k_len})"
        )
    if spans.batch not in (1, batch):
        raise ValueError(f"mask is a plan for a batch of {spans.batch}, q has a batch of {batch}")
    if spans.start.device != device:
        raise ValueError(f"mask is a plan on {spans.start.device}, q is on {device}: plan it with device=q.device")
    if spans.dense is not None and (spans.dense.shape[0] not in (1, batch) or spans.dense.shape[1] not in (1, heads)):
        raise ValueError(
            f"mask holds a dense mask with shape {tuple(spans.dense.shape)}: expected ({batch} or 1, {heads} or 1, "
            f"{q_len}, {k_len})"
        )


def _check_bias(bias: Tensor, sizes: tuple[int, int, int, int], device: torch.device) -> Tensor:
    """Returns the bias with four dimensions."""
    if not isinstance(bias, Tensor) or not bias.is_floating_point():
        kind = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
        raise TypeError(f"bias is {kind}: expected a floating tensor; for a bool mask use mask=masks.dense(...)")
    if bias.dim() > 4 or any(
        size not in (1, full) for size, full in zip(reversed(bias.shape), reversed(sizes), strict=False)
    ):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}: expected one that broadcasts to (batch, heads, "
            f"q_len, k_len) = {sizes}"
        )
    _check_device("bias", bias, device)
    return bias[(None,) * (4 - bias.dim())]


def _check_per_head(name: str, x: Tensor, allowed: tuple[tuple[int, ...], ...], device: torch.device) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(
            f"{name} is {x.dtype if isinstance(x, Tensor) else type(x).__name__}: expected a floating tensor"
        )
    if tuple(x.shape) not in allowed:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: expected {' or '.join(map(str, allowed))}")
    _check_device(name, x, device)


def _check_slopes(slopes: Tensor, heads: int, sequences: int | None, device: torch.device) -> None:
    rows = sequences
    if rows is None:  # any number that the plan does not exceed
        rows = slopes.shape[0] if isinstance(slopes, Tensor) and slopes.dim() == 2 else 1
    _check_per_head("alibi_slopes", slopes, ((heads,), (rows, heads)), device)


def _check_ordinals(slopes: Tensor, positions: Tensor) -> None:
    """Whether every sequence of a packed plan has its row of slopes; where the values may be read."""
    if torch.compiler.is_compiling() or positions.is_meta or isinstance(positions, FakeTensor):
        return
    if (positions.device.type == "cpu" or backends.validating()) and positions.numel():
        sequences = int(positions[2].max()) + 1
        if sequences > slopes.shape[0]:
            raise ValueError(
                f"alibi_slopes has shape {tuple(slopes.shape)}: expected ({slopes.shape[1]},) or one row for each of "
                f"the {sequences} sequences of the plan"
            )


def _check_device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, q on {device}: they must be on one device")


def _check_numbers(softcap: float, softmax_scale: float | None, dropout_p: float) -> None:
    for name, number in (("softcap", softcap), ("softmax_scale", softmax_scale), ("dropout_p", dropout_p)):
        if not isinstance(number, numbers.Real) and not (name == "softmax_scale" and number is None):
            raise TypeError(f"{name} is a {type(number).__name__}: expected a float")
    check_scale_and_softcap(softmax_scale, softcap)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}: expected a probability in [0, 1)")


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | RowSpans | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    softcap: float,
    softmax_scale: float | None,
    dropout_p: float,
    backend: str | None,
    packed: bool,
    sequences: int | None,
) -> tuple[Tensor, Tensor]:
    """Both public functions, on checked (batch, heads, length, head_dim) tensors.

    ``sequences`` is how many rows two-dimensional slopes must have, None where only the plan's values know.
    """
    batch, heads, q_len, head_dim = q.shape
    k_len = k.shape[2]
    device = q.device
    _check_numbers(softcap, softmax_scale, dropout_p)
    if dropout_p == 0:
        dropout_p = 0.0  # a constant, also in compiled code, which may take the default for an unknown float
    _check_mask_type(mask, batch, q_len, k_len)
    if bias is not None:
        bias = _check_bias(bias, (batch, heads, q_len, k_len), device)
        if bias.dtype != torch.float64 and (dtype := autocast_dtype(device.type)) is not None:
            bias = bias.to(dtype)
    if alibi_slopes is not None:
        _check_slopes(alibi_slopes, heads, sequences, device)
    if sinks is not None:
        _check_per_head("sinks", sinks, ((heads,),), device)

    needs_positions = alibi_slopes is not None or dropout_p > 0
    if isinstance(mask, RowSpans):
        spans = mask
        _check_fit(spans, batch, heads, q_len, k_len, device)
        if needs_positions and spans.positions is None:
            raise ValueError(
                f"{'alibi_slopes' if alibi_slopes is not None else 'dropout_p'} needs the positions of rows, which "
                f"this RowSpans lacks: plan it with mask.spans(..., positions=True)"
            )
        if packed and alibi_slopes is not None and alibi_slopes.dim() == 2:
            assert spans.positions is not None
            _check_ordinals(alibi_slopes, spans.positions)
    else:
        needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        spans = (masks.full() if mask is None else mask).spans(
            q_len,
            k_len,
            batch=batch,
            device=device,
            grad=needs_grad and backends.needs_key_tiles("attention", device.type, backend),
            positions=needs_positions,
        )
        _check_fit(spans, batch, heads, q_len, k_len, device)

    used = {
        "dense mask": spans.dense is not None,
        "bias": bias is not None,
        "alibi_slopes": alibi_slopes is not None,
        "sinks": sinks is not None,
        "dropout": dropout_p > 0,
        "wide heads": max(head_dim, v.shape[3]) > backends.WIDEST_HEADS,
    }
    name = backends.choose(
        "attention",
        device.type,
        q.dtype,
        tuple(feature for feature, is_used in used.items() if is_used),
        requested=backend,
        reference_bytes=None if torch.compiler.is_compiling() or q.is_meta else lambda: _reference_bytes(q, spans),
    )
    scale = 1.0 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    scale_of_kernel = scale if softmax_scale is None else scalar(softmax_scale)
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    by_sequence = packed and alibi_slopes is not None and alibi_slopes.dim() == 2
    # Drawn from torch's generator, so that manual_seed and fork_rng reach it; a tensor, so that it costs no sync.
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=device) if dropout_p > 0 else None
    if name != backends.REFERENCE:
        features = registration.Features(
            bias=bias if bias is None or bias.dtype in _HALVES_AND_SINGLE else bias.float(),
            # Views: one tensor in two roles would be refused by Dynamo.
            alibi_slopes=None if alibi_slopes is None else alibi_slopes.float()[(None,) * (2 - alibi_slopes.dim())],
            sinks=None if sinks is None else sinks.float()[None],
            seed=seed,
            slopes_by_sequence=by_sequence,
            softmax_scale=scale_of_kernel,
            softcap=scalar(softcap, neutral=0.0),
            dropout_p=scalar(dropout_p, neutral=0.0),
        )
        return registration.span_attention(q, k, v, spans, features, name)
    with torch.autocast(device.type, enabled=False) if has_autocast(device.type) else contextlib.nullcontext():
        out, lse = reference.attention(
            q,
            k,
            v,
            spans,
            softmax_scale=float(scale),
            softcap=float(softcap),
            bias=bias,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            dropout_p=float(dropout_p),
            seed=seed,
            slopes_by_sequence=by_sequence,
        )
    return registration.in_order_of(out, q), lse


def _reference_bytes(q: Tensor, spans: RowSpans) -> int:
    scores = int(spans.cost()) * q.shape[1] * (q.shape[0] if spans.batch == 1 else 1)
    return _SCORE_SIZED_TENSORS_OF_REFERENCE * scores * max(q.element_size(), 4)
