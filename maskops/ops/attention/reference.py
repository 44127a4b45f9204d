"""The meaning of span attention, in plain PyTorch: differentiable by autograd, any number of times, in any dtype.

It computes in float32 (float64 for float64 inputs), sequence by sequence: a block holds the rows of one segment, a
maximal run of rows whose keys overlap, and the keys they span. Where values are unknown (tracing, fake tensors) the
whole problem is one dense block.

Masked values are always replaced before they are used (``torch.where`` on the inputs), never multiplied by zero
afterwards: 0 * NaN is NaN, and the gradient of a product with zero is NaN as well where the other factor is not finite.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from maskops.spans import RowSpans

_LOW_32_BITS = 0xFFFFFFFF


class _Block(NamedTuple):
    """Rows ``[row, row_end)`` of a batch element and the hull ``[key, key_end)`` of their keys."""

    row: int
    row_end: int
    key: int
    key_end: int


def _has_unknown_values(x: Tensor) -> bool:
    """Whether values cannot be read: of fake and meta tensors, and under vmap, where there are many."""
    return isinstance(x, FakeTensor) or x.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(x)


def _segments(start: Tensor, end: Tensor) -> list[_Block]:
    """Cuts the rows of one batch element where the keys of neighbouring rows do not overlap. Reads values."""
    rows = start.shape[1]
    seen = end > start
    first = torch.where(seen, start, torch.iinfo(start.dtype).max).amin(0)
    last = torch.where(seen, end, 0).amax(0)
    index = torch.arange(rows, device=start.device)
    used = index[seen.any(0)]
    if used.numel() == 0:
        return [_Block(0, rows, 0, 0)]
    first, last = first[used], last[used]
    apart = (last[:-1] <= first[1:]) | (last[1:] <= first[:-1])
    cuts = (apart.nonzero().flatten() + 1).tolist()
    rows_used, firsts, lasts = used.tolist(), first.tolist(), last.tolist()
    begins = [0, *(rows_used[cut] for cut in cuts), rows]
    inside = [0, *cuts, len(rows_used)]
    return [
        _Block(row, row_end, min(firsts[a:b]), max(lasts[a:b]))
        for row, row_end, a, b in zip(begins, begins[1:], inside, inside[1:], strict=False)
    ]


def _key_pieces(x: Tensor, blocks: list[_Block]) -> list[Tensor]:
    """The keys of each block. One split where the blocks follow one another: its backward is a single concatenation."""
    sizes = []
    position = 0
    for block in blocks:
        if block.key < position:
            return [x[:, :, block.key : block.key_end] for block in blocks]
        sizes += [block.key - position, block.key_end - block.key]
        position = block.key_end
    return list(x.split([*sizes, x.shape[2] - position], dim=2)[1::2])


def _slice(x: Tensor, batch: slice, block: _Block) -> Tensor:
    """The part of a tensor that broadcasts to (batch, heads, q_len, k_len) which belongs to a block."""
    if x.shape[0] > 1:
        x = x[batch]
    if x.shape[2] > 1:
        x = x[:, :, block.row : block.row_end]
    if x.shape[3] > 1:
        x = x[:, :, :, block.key : block.key_end]
    return x


def _visible(spans: RowSpans, batch: slice, block: _Block) -> Tensor:
    """The mask of a block: bool, broadcastable to (batch, heads, rows, keys)."""
    batch = batch if spans.start.shape[1] > 1 else slice(None)
    start = spans.start[:, batch, block.row : block.row_end, None]
    end = spans.end[:, batch, block.row : block.row_end, None]
    keys = torch.arange(block.key, block.key_end, device=start.device)
    visible = ((keys >= start) & (keys < end)).any(0)
    visible = visible & spans.key_valid[batch, None, block.key : block.key_end].bool()
    visible = visible[:, None]
    return visible if spans.dense is None else visible & _slice(spans.dense, batch, block)


def philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-7 (Salmon et al., SC 2011, section 3.3), in int64 arithmetic that runs on every device.

    Seven rounds are the fewest that pass BigCrush (table 2 there).

    Args:
        seed: int64, 0-dim: the two key words, the low one first.
        counter: four int64 tensors that broadcast together; their low 32 bits count.

    Returns:
        Four int64 tensors in [0, 2**32).
    """
    key_0, key_1 = seed & _LOW_32_BITS, (seed >> 32) & _LOW_32_BITS
    word_0, word_1, word_2, word_3 = (word & _LOW_32_BITS for word in counter)
    for _ in range(7):
        # The products wrap around in int64, which leaves the 64 bits of the unsigned product.
        product_0, product_2 = word_0 * 0xD2511F53, word_2 * 0xCD9E8D57
        word_0, word_1, word_2, word_3 = (
            ((product_2 >> 32) & _LOW_32_BITS) ^ word_1 ^ key_0,
            product_2 & _LOW_32_BITS,
            ((product_0 >> 32) & _LOW_32_BITS) ^ word_3 ^ key_1,
            product_0 & _LOW_32_BITS,
        )
        key_0, key_1 = (key_0 + 0x9E3779B9) & _LOW_32_BITS, (key_1 + 0xBB67AE85) & _LOW_32_BITS
    return word_0, word_1, word_2, word_3


def _positions(spans: RowSpans, batch: slice, batch_size: int, block: _Block) -> tuple[Tensor, Tensor, Tensor]:
    """Per row of a block, (batch, 1, rows, 1): the key aligned with it, its sequence's first key and ordinal."""
    assert spans.positions is not None
    positions = spans.positions.long()
    shared = positions.shape[1] == 1
    rows = positions[:, slice(None) if shared else batch, None, block.row : block.row_end, None]
    diagonal, first, ordinal = rows[0], rows[1], rows[2]
    if shared and batch_size > 1:
        # One plan for the whole batch: its batch elements are different sequences all the same.
        element = torch.arange(batch_size, device=positions.device)[batch].view(-1, 1, 1, 1)
        ordinal = ordinal + element * (positions[2].amax() + 1)
    return diagonal, first, ordinal


def _kept(
    seed: Tensor, dropout_p: float, heads: int, block: _Block, positions: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """Which scores dropout keeps, (batch, heads, rows, keys): a matter of places in a sequence alone, not of layout."""
    diagonal, first, ordinal = positions
    key = torch.arange(block.key, block.key_end, device=seed.device)
    head = torch.arange(heads, device=seed.device)[:, None, None]
    # Four consecutive keys of a sequence share one draw, a word each.
    place = (key - first) & _LOW_32_BITS
    words = philox(seed, (place >> 2, diagonal - first, head, ordinal))
    word = torch.stack(torch.broadcast_tensors(*words)).gather(0, (place & 3).expand_as(words[0])[None])[0]
    return word >= math.ceil(dropout_p * 2**32)


class _Extras(NamedTuple):
    """The arguments that change scores, as they are for the whole problem."""

    spans: RowSpans
    softmax_scale: float
    softcap: float
    bias: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    dropout_p: float
    seed: Tensor | None
    slopes_by_sequence: bool
    batch_size: int


def _block_attention(
    q: Tensor, k: Tensor, v: Tensor, batch: slice, block: _Block, extras: _Extras
) -> tuple[Tensor, Tensor]:
    """Attention of the rows of one block over its keys: out (batch, heads, rows, Dv), lse (batch, heads, rows)."""
    size, heads, rows, head_dim = q.shape
    kv_heads, keys, v_dim = k.shape[1], k.shape[2], v.shape[3]
    if keys == 0:
        return q.new_zeros(size, heads, rows, v_dim), q.new_full((size, heads, rows), -math.inf)
    group = heads // kv_heads if kv_heads else 0

    visible = _visible(extras.spans, batch, block)
    bias = None
    if extras.bias is not None:
        bias = _slice(extras.bias.to(q.dtype), batch, block)
        visible = visible & (bias != -math.inf)
        bias = torch.where(visible, bias, 0.0)
    row_used = visible.any(-1, keepdim=True)
    key_used = visible.any(-2)
    if key_used.shape[1] > 1:
        key_used = key_used.reshape(key_used.shape[0], kv_heads, group, keys).any(2)
    key_used = key_used[..., None]
    q, k, v = torch.where(row_used, q, 0.0), torch.where(key_used, k, 0.0), torch.where(key_used, v, 0.0)

    # Query heads of a group share their keys: rows of one matrix product, so that dK and dV sum over the group.
    scores = q.reshape(size, kv_heads, group * rows, head_dim) @ k.transpose(-1, -2)
    scores = scores.reshape(size, heads, rows, keys) * extras.softmax_scale
    if extras.softcap:
        scores = extras.softcap * torch.tanh(scores / extras.softcap)
    if bias is not None:
        scores = scores + bias
    positions = None
    if extras.spans.positions is not None:
        positions = _positions(extras.spans, batch, extras.batch_size, block)
    if extras.alibi_slopes is not None:
        assert positions is not None
        slopes = extras.alibi_slopes.to(q.dtype)
        if slopes.dim() == 1:
            slopes = slopes[None, :, None, None]
        elif extras.slopes_by_sequence:
            # (batch, 1, rows, 1) ordinals to (batch, heads, rows, 1) slopes; rows outside every sequence have -1.
            ordinals = positions[2].squeeze(3).squeeze(1).clamp(0, slopes.shape[0] - 1)
            slopes = slopes[ordinals].transpose(1, 2)[..., None]
        else:
            slopes = slopes[batch, :, None, None]
        distance = (positions[0] - torch.arange(block.key, block.key_end, device=q.device)).abs()
        scores = scores - slopes * distance
    scores = torch.where(visible, scores, -math.inf)

    # The shift cancels in the output and in the lse, so it carries no gradient.
    shift = torch.where(row_used, scores.detach().amax(-1, keepdim=True), 0.0)
    weights = torch.exp(scores - shift)
    total = torch.where(row_used, weights.sum(-1, keepdim=True), 1.0)
    lse = shift + torch.log(total)
    weights = weights / total
    if extras.dropout_p:
        assert extras.seed is not None and positions is not None
        kept = _kept(extras.seed, extras.dropout_p, heads, block, positions)
        weights = torch.where(kept, weights / (1.0 - extras.dropout_p), 0.0)
    out = (weights.reshape(size, kv_heads, group * rows, keys) @ v).reshape(size, heads, rows, v_dim)
    if extras.sinks is not None:
        out = out * torch.sigmoid(lse - extras.sinks.to(q.dtype)[None, :, None, None])
    return torch.where(row_used, out, 0.0), torch.where(row_used, lse, -math.inf).squeeze(-1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: RowSpans,
    *,
    softmax_scale: float,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    slopes_by_sequence: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of q (B, Hq, Sq, D) over k (B, Hkv, Sk, D) and v (B, Hkv, Sk, Dv) under a plan.

    The arguments are those of ``maskops.attention``, checked there; ``bias`` has four dimensions, and ``seed`` is an
    int64 0-dim tensor, needed for dropout. ALiBi and dropout need ``spans.positions``. With ``slopes_by_sequence`` the
    first dimension of two-dimensional ``alibi_slopes`` counts the sequences of the plan instead of batch elements.

    Returns:
        out (B, Hq, Sq, Dv) in q's dtype, and the natural-log normaliser without sinks, lse (B, Hq, Sq), float32, or
        float64 for float64 inputs. Rows without a key have out 0 and lse -inf.
    """
    inputs = [x for x in (q, k, v, bias, alibi_slopes, sinks) if x is not None]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch_size, _, rows, _ = q.shape
    extras = _Extras(
        spans, softmax_scale, softcap, bias, alibi_slopes, sinks, dropout_p, seed, slopes_by_sequence, batch_size
    )
    working = (q.to(dtype), k.to(dtype), v.to(dtype))
    if torch.compiler.is_compiling() or any(_has_unknown_values(x) for x in (q, spans.start)):
        out, lse = _block_attention(*working, slice(None), _Block(0, rows, 0, k.shape[2]), extras)
        return out.to(q.dtype), lse

    # A plan with one batch element serves them all at once.
    shared = spans.start.shape[1] == 1 or batch_size == 0
    elements = [slice(None)] if shared else [slice(i, i + 1) for i in range(batch_size)]
    outs, lses = [], []
    parts_of_elements = zip(*([x] if shared else x.split(1) for x in working), strict=True)
    for element, parts in zip(elements, parts_of_elements, strict=True):
        index = element.start or 0
        blocks = _segments(spans.start[:, index], spans.end[:, index]) if batch_size else [_Block(0, rows, 0, 0)]
        pieces = zip(
            parts[0].split([block.row_end - block.row for block in blocks], dim=2),
            _key_pieces(parts[1], blocks),
            _key_pieces(parts[2], blocks),
            blocks,
            strict=True,
        )
        results = [
            _block_attention(q_rows, k_rows, v_rows, element, block, extras) for q_rows, k_rows, v_rows, block in pieces
        ]
        outs.append(torch.cat([result[0] for result in results], dim=2))
        lses.append(torch.cat([result[1] for result in results], dim=2))
    out, lse = torch.cat(outs), torch.cat(lses)
    if torch.is_grad_enabled() and not out.requires_grad and any(x.requires_grad for x in inputs):
        # No row sees a key: the outputs are constants, and callers may still ask for their (zero) gradients.
        nothing = out.new_zeros(()).bool()
        zero = sum(torch.where(nothing, x.sum(), 0.0) for x in inputs)
        out, lse = out + zero, lse + zero
    return out.to(q.dtype), lse
