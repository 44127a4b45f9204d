"""Operator schemas of the key/value cache and their fake kernels.

The C++ extension registers implementations for these schemas; it never repeats them. An absent tensor is an empty one
of one dimension, so that a table of no pages is present. A cache is inference: the operators have no gradients.
"""

import torch
from torch import Tensor

from maskops.ops.attention.registration import empty_in_order
from maskops.ops.calls import run
from maskops.ops.operators import define, define_direct, name_of
from maskops.ops.scalars import call
from maskops.spans import RowSpans

_library = torch.library.Library("maskops", "FRAGMENT")
# The output's strides follow those of q, and the caches are used in place, so Inductor must hand inputs over as they
# were traced.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

NOTHING = torch.empty(0, device="cpu")
"""An argument that is absent, on the processor."""


def _append_fake(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    block_table: Tensor,
    batch_index: Tensor,
) -> None:
    return None


def _decode_fake(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    leftpad: Tensor,
    block_table: Tensor,
    batch_index: Tensor,
    start: Tensor,
    end: Tensor,
    key_valid: Tensor,
    dense: Tensor,
    diagonal: Tensor,
    alibi_slopes: Tensor,
    sinks: Tensor,
    softmax_scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    return empty_in_order(q, v_cache.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


define(
    _library, "decode", "append_kv",
    "(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor lengths, Tensor block_table, "
    "Tensor batch_index) -> ()",
    _append_fake, _TAGS,
)  # fmt: skip
define(
    _library, "decode", "decode_forward",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor leftpad, Tensor block_table, "
    "Tensor batch_index, Tensor start, Tensor end, Tensor key_valid, Tensor dense, Tensor diagonal, "
    "Tensor alibi_slopes, Tensor sinks, float softmax_scale, float softcap) -> (Tensor, Tensor)",
    _decode_fake, _TAGS,
)  # fmt: skip
# The output alone, of queries that see their whole sequence in a cache without pages (direct.py, which alone calls it).
define_direct(
    _library, "decode_direct(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, float softmax_scale) -> Tensor"
)


def append(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    block_table: Tensor | None,
    batch_index: Tensor | None,
    backend: str,
) -> None:
    """Runs the registered op of a backend that appends k and v (B, kv_heads, new, width), their rows contiguous."""
    absent = lengths.new_empty(0)
    run(
        getattr(torch.ops.maskops, name_of("append_kv", backend)),
        k_cache,
        v_cache,
        k,
        v,
        lengths,
        absent if block_table is None else block_table,
        absent if batch_index is None else batch_index,
    )


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    leftpad: Tensor | None,
    block_table: Tensor | None,
    batch_index: Tensor | None,
    spans: RowSpans | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    softmax_scale: float | Tensor,
    softcap: float | Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Runs the registered op of a backend that attends.

    Args:
        q: (B, H, Sq, D), any strides with a contiguous last dimension.
        k_cache: contiguous or paged, as v_cache.
        v_cache: of the same shape but for the last dimension.
        lengths: integers (B,), as leftpad and batch_index.
        leftpad: keys before it are not there.
        block_table: integers (B, pages).
        batch_index: rows of the cache.
        spans: a plan over the whole capacity; None where every query sees every key in use.
        alibi_slopes: (H,) or (B, H); needs ``spans.positions``.
        sinks: (H,).
        softmax_scale: factor of the scores; this number and the next as ``scalars.scalar`` gives them.
        softcap: 0 for none.
        backend: name of the backend, one that is a kernel.

    Returns:
        out (B, H, Sq, Dv) in q's dimension order, lse (B, H, Sq) float32.
    """
    absent = lengths.new_empty(0)
    start = end = key_valid = dense = diagonal = slopes = absent
    if spans is not None:
        start, end, key_valid = spans.start, spans.end, spans.key_valid
        if spans.dense is not None:
            dense = spans.dense if spans.dense.stride(3) == 1 else spans.dense.contiguous()
    if alibi_slopes is not None:
        assert spans is not None
        diagonal = spans.diag
        slopes = alibi_slopes.to(torch.float32).reshape(-1, alibi_slopes.shape[-1]).contiguous()
    outputs: tuple[Tensor, Tensor] = call(
        name_of("decode_forward", backend),
        q,
        k_cache,
        v_cache,
        lengths,
        absent if leftpad is None else leftpad,
        absent if block_table is None else block_table,
        absent if batch_index is None else batch_index,
        start,
        end,
        key_valid,
        dense,
        diagonal,
        slopes,
        absent if sinks is None else sinks.to(torch.float32).contiguous(),
        softmax_scale,
        softcap,
    )
    return outputs
