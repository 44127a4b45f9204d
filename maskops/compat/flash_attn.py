"""flash-attn 2's functions on maskops: same names, arguments, order, defaults and layouts.

What differs from flash-attn, everywhere: any head_dim, float32 and float64 as well, value_dim may differ from head_dim;
the lse of a row that sees no key is -inf (there +inf) and its gradient is honoured (there dropped); slopes of ALiBi get
gradients; results are always deterministic; ``max_seqlen_q`` and ``max_seqlen_k`` are taken and not needed, so a wrong
one changes nothing. Names and defaults are those of flash-attn 2.8; its argument order is not that of 3 and 4.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from maskops.checks import check_tensor
from maskops.compat.arguments import check_dimensions, pattern_of, softcap_of
from maskops.layouts import values_can_be_read
from maskops.ops.attention.api import attention, varlen_attention

Result = Tensor | tuple[Tensor, Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Attention over a batch of sequences of one length, in flash-attn's layout.

    Args:
        q: (batch, q_len, heads, head_dim).
        k: (batch, k_len, kv_heads, head_dim); ``heads`` is a multiple of ``kv_heads``.
        v: (batch, k_len, kv_heads, value_dim).
        dropout_p: probability with which a weight is dropped, in [0, 1).
        softmax_scale: None for ``1 / sqrt(head_dim)``.
        causal: query i sees the keys up to i + k_len - q_len: aligned to the bottom right.
        window_size: (left, right) keys around i + k_len - q_len that query i sees; negative = unbounded. Under
            ``causal`` the right one is 0.
        softcap: ``softcap * tanh(score / softcap)``; 0 or less for none.
        alibi_slopes: (heads,) or (batch, heads): ``-slope * |i + k_len - q_len - j|`` is added to the score.
        deterministic: taken; results are always deterministic.
        return_attn_probs: also return the lse and the third result.

    Returns:
        out (batch, q_len, heads, value_dim). With ``return_attn_probs`` the three values (out, softmax_lse, S_dmask):
        softmax_lse float32 (batch, heads, q_len); S_dmask, as in flash-attn, is empty without dropout and otherwise
        (batch, heads, q_len, k_len): the weights before dropout, negative where they were dropped.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or value.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_dimensions(name, x, 4, "(batch, length, heads, head_dim)")
    mask = pattern_of(causal, window_size)

    def run(value: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
        out, lse = attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            value.transpose(1, 2),
            mask,
            alibi_slopes=alibi_slopes,
            softcap=softcap_of(softcap),
            softmax_scale=softmax_scale,
            dropout_p=dropout,
            return_lse=True,
        )
        return out.transpose(1, 2), lse

    def one_hot_keys() -> Tensor:
        return torch.eye(k.shape[1], dtype=v.dtype, device=v.device)[None, :, None].expand(*k.shape[:3], -1)

    def by_row(weights: Tensor) -> Tensor:
        return weights.transpose(1, 2)

    return _results(run, v, dropout_p, return_attn_probs, one_hot_keys, by_row)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """``flash_attn_func`` of keys and values in one tensor.

    Args:
        q: (batch, q_len, heads, head_dim).
        kv: (batch, k_len, 2, kv_heads, head_dim).
        dropout_p: as in ``flash_attn_func``, like all that follow.
        softmax_scale: see there.
        causal: see there.
        window_size: see there.
        softcap: see there.
        alibi_slopes: see there.
        deterministic: see there.
        return_attn_probs: see there.

    Returns:
        As ``flash_attn_func``.
    """
    k, v = _unpacked("kv", kv, 5, 2, "(batch, length, 2, kv_heads, head_dim)")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """``flash_attn_func`` of queries, keys and values in one tensor.

    Args:
        qkv: (batch, length, 3, heads, head_dim).
        dropout_p: as in ``flash_attn_func``, like all that follow.
        softmax_scale: see there.
        causal: see there.
        window_size: see there.
        softcap: see there.
        alibi_slopes: see there.
        deterministic: see there.
        return_attn_probs: see there.

    Returns:
        As ``flash_attn_func``.
    """
    q, k, v = _unpacked("qkv", qkv, 5, 3, "(batch, length, 3, heads, head_dim)")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """Attention over packed sequences, each of which sees only itself.

    Rows of q after ``cu_seqlens_q[-1]`` give 0 (in flash-attn they are not written), and what lies behind the last
    sequence reaches no result and no gradient.

    Args:
        q: (total_q, heads, head_dim).
        k: (total_k, kv_heads, head_dim), or with ``block_table`` (blocks, block_size, kv_heads, head_dim).
        v: as k, with value_dim.
        cu_seqlens_q: int32 or int64 (batch + 1,), cumulative lengths from 0.
        cu_seqlens_k: the same for keys.
        max_seqlen_q: not needed.
        max_seqlen_k: not needed.
        dropout_p: as in ``flash_attn_func``.
        softmax_scale: see there.
        causal: aligned to the bottom right inside each sequence.
        window_size: likewise.
        softcap: see there.
        alibi_slopes: (heads,) or (batch, heads); distances are those inside each sequence.
        deterministic: see there.
        return_attn_probs: see there.
        block_table: int32 or int64 (batch, blocks of a sequence): key j of sequence s lies in block
            ``block_table[s, j // block_size]`` at ``j % block_size``. Any block size. The blocks are gathered, so that
            gradients reach them.

    Returns:
        out (total_q, heads, value_dim). With ``return_attn_probs`` the three values (out, softmax_lse, S_dmask):
        softmax_lse float32 (heads, total_q); S_dmask is empty without dropout and otherwise (batch, heads, longest
        query sequence, longest key sequence), 0 where a sequence is shorter.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or value.
    """
    check_dimensions("q", q, 3, "(total_q, heads, head_dim)")
    if block_table is not None:
        k, v = _gathered(k, v, cu_seqlens_k, block_table)
    for name, x in (("k", k), ("v", v)):
        check_dimensions(name, x, 3, "(total_k, kv_heads, head_dim), or with block_table (blocks, block_size, ...)")
    check_tensor("cu_seqlens_q", cu_seqlens_q, "(batch + 1,)")
    check_tensor("cu_seqlens_k", cu_seqlens_k, "(batch + 1,)")
    mask = pattern_of(causal, window_size)

    def run(value: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
        return varlen_attention(
            q,
            k,
            value,
            cu_seqlens_q,
            cu_seqlens_k,
            mask,
            alibi_slopes=alibi_slopes,
            softcap=softcap_of(softcap),
            softmax_scale=softmax_scale,
            dropout_p=dropout,
            return_lse=True,
        )

    def one_hot_keys() -> Tensor:
        place, longest = _place_in_sequence(cu_seqlens_k, k.shape[0])
        hot = place.unsqueeze(1) == torch.arange(longest, device=k.device)
        return hot.to(v.dtype).unsqueeze(1).expand(-1, k.shape[1], -1)

    def by_row(weights: Tensor) -> Tensor:
        longest = int((cu_seqlens_q[1:] - cu_seqlens_q[:-1]).max()) if cu_seqlens_q.shape[0] > 1 else 0
        place = cu_seqlens_q[:-1, None] + torch.arange(longest, device=q.device)
        place = torch.where(place < cu_seqlens_q[1:, None], place, q.shape[0])  # one more row, of zeros
        padded = torch.cat((weights, weights.new_zeros(1, *weights.shape[1:])))
        return padded[place].transpose(1, 2)

    return _results(run, v, dropout_p, return_attn_probs, one_hot_keys, by_row)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """``flash_attn_varlen_func`` of keys and values in one tensor.

    Args:
        q: (total_q, heads, head_dim).
        kv: (total_k, 2, kv_heads, head_dim).
        cu_seqlens_q: as in ``flash_attn_varlen_func``, like all that follow.
        cu_seqlens_k: see there.
        max_seqlen_q: see there.
        max_seqlen_k: see there.
        dropout_p: see there.
        softmax_scale: see there.
        causal: see there.
        window_size: see there.
        softcap: see there.
        alibi_slopes: see there.
        deterministic: see there.
        return_attn_probs: see there.

    Returns:
        As ``flash_attn_varlen_func``.
    """
    k, v = _unpacked("kv", kv, 4, 2, "(total_k, 2, kv_heads, head_dim)", dimension=1)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | Tensor | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """``flash_attn_varlen_func`` of queries, keys and values in one tensor.

    Args:
        qkv: (total, 3, heads, head_dim).
        cu_seqlens: int32 or int64 (batch + 1,).
        max_seqlen: not needed.
        dropout_p: as in ``flash_attn_varlen_func``, like all that follow.
        softmax_scale: see there.
        causal: see there.
        window_size: see there.
        softcap: see there.
        alibi_slopes: see there.
        deterministic: see there.
        return_attn_probs: see there.

    Returns:
        As ``flash_attn_varlen_func``.
    """
    q, k, v = _unpacked("qkv", qkv, 4, 3, "(total, 3, heads, head_dim)", dimension=1)
    check_tensor("cu_seqlens", cu_seqlens, "(batch + 1,)")
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


# ---- arguments -------------------------------------------------------------------------------------------------------


def _unpacked(
    name: str, packed: Tensor, dimensions: int, parts: int, shape: str, dimension: int = 2
) -> tuple[Tensor, ...]:
    check_dimensions(name, packed, dimensions, shape)
    if packed.shape[dimension] != parts:
        raise ValueError(f"{name} has shape {tuple(packed.shape)}: expected {shape}")
    return packed.unbind(dimension)


# ---- pages -----------------------------------------------------------------------------------------------------------


def check_block_table(block_table: Tensor, lengths: Tensor, blocks: int, block_size: int) -> None:
    """Raises for a table with too few blocks for a length, or a block that is not there; reads values if it may."""
    check_tensor("block_table", block_table, "(batch, blocks of a sequence)")
    if block_table.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"block_table is {block_table.dtype}: expected int32 or int64")
    if block_table.dim() != 2 or block_table.shape[0] != lengths.shape[0]:
        raise ValueError(
            f"block_table has shape {tuple(block_table.shape)}: expected (batch, blocks of a sequence), with batch "
            f"{lengths.shape[0]}"
        )
    if not values_can_be_read([block_table, lengths], block_table.device):
        return
    room = block_table.shape[1] * block_size
    if bool((lengths > room).any()):
        at = int((lengths > room).nonzero()[0, 0])
        raise ValueError(
            f"block_table has {block_table.shape[1]} blocks of {block_size} keys for sequence {at}, whose length is "
            f"{int(lengths[at])}"
        )
    used = torch.arange(block_table.shape[1], device=block_table.device) * block_size < lengths[:, None]
    wrong = (used & ((block_table < 0) | (block_table >= blocks))).nonzero()
    if wrong.shape[0]:
        row, column = (int(x) for x in wrong[0])
        raise ValueError(
            f"block_table[{row}, {column}]={int(block_table[row, column])}: expected 0 to {blocks - 1}, k has {blocks} "
            f"blocks"
        )


def _gathered(k: Tensor, v: Tensor, cu_seqlens_k: Tensor, block_table: Tensor) -> tuple[Tensor, Tensor]:
    """Paged keys and values as packed ones, (total_k, kv_heads, head_dim)."""
    for name, x in (("k", k), ("v", v)):
        check_dimensions(name, x, 4, "(blocks, block_size, kv_heads, head_dim), because block_table is given")
    if k.shape[:2] != v.shape[:2]:
        raise ValueError(f"k has shape {tuple(k.shape)}, v {tuple(v.shape)}: expected the same blocks of the same size")
    check_dimensions("cu_seqlens_k", cu_seqlens_k, 1, "(batch + 1,)")
    blocks, block_size = k.shape[:2]
    check_block_table(block_table, cu_seqlens_k[1:] - cu_seqlens_k[:-1], blocks, block_size)
    # Without a look at values the room of the table bounds the total; what lies behind the last key is not read.
    room = block_table.numel() * block_size
    readable = values_can_be_read([cu_seqlens_k], k.device)
    total = max(0, min(int(cu_seqlens_k[-1]), room)) if readable else room
    if blocks == 0 or block_table.numel() == 0:
        return k.flatten(0, 1)[:0], v.flatten(0, 1)[:0]
    key = torch.arange(total, device=k.device)
    sequence = torch.searchsorted(cu_seqlens_k.long(), key, right=True).sub(1).clamp(0, block_table.shape[0] - 1)
    place = key - cu_seqlens_k.long()[sequence]
    block = block_table.long()[sequence, (place // block_size).clamp(max=block_table.shape[1] - 1)]
    index = block.clamp(0, blocks - 1) * block_size + place % block_size
    return k.flatten(0, 1).index_select(0, index), v.flatten(0, 1).index_select(0, index)


# ---- results ---------------------------------------------------------------------------------------------------------


def _place_in_sequence(cu_seqlens: Tensor, total: int) -> tuple[Tensor, int]:
    """Place of each packed token in its sequence (after the last one: beyond every length), and the longest length."""
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    longest = int(lengths.max()) if lengths.shape[0] else 0
    token = torch.arange(total, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens.long(), token, right=True) - 1
    place = token - cu_seqlens.long()[sequence.clamp(min=0)]
    return torch.where(token < cu_seqlens[-1], place, longest), longest


def _results(
    run: Callable[[Tensor, float], tuple[Tensor, Tensor]],
    v: Tensor,
    dropout_p: float,
    return_attn_probs: bool,
    one_hot_keys: Callable[[], Tensor],
    by_row: Callable[[Tensor], Tensor],
) -> Result:
    """The output, or the three values that callers of ``return_attn_probs`` unpack.

    Args:
        run: attention over other values with some dropout: output and lse.
        v: the values.
        dropout_p: as given.
        return_attn_probs: as given.
        one_hot_keys: values which make the output of a row its weights: key j has a 1 at its place.
        by_row: brings weights in the layout of the output into (batch, heads, q_len, k_len).
    """
    if not return_attn_probs:
        return run(v, dropout_p)[0]
    if not dropout_p:
        return (*run(v, 0.0), v.new_empty(0))
    # The same state of the generator drops the same weights, and one-hot values read out which.
    state = _generator_state(v.device)
    out, lse = run(v, dropout_p)
    with torch.no_grad():
        after = _generator_state(v.device)
        _set_generator_state(v.device, state)
        kept = run(one_hot_keys(), dropout_p)[0]
        _set_generator_state(v.device, after)
        weights = run(one_hot_keys(), 0.0)[0]
        return out, lse, by_row(torch.where(kept != 0, weights, -weights))


def _generator_state(device: torch.device) -> Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def _set_generator_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)
