"""Packing: cumulative lengths, and moving tokens between padded and packed.

A packed tensor holds the tokens of all sequences one after the other, ``(total, ...)``; ``cu_seqlens``, int32
``(n_sequences + 1,)``, says where each begins. It may be longer than its tokens (a capacity), and ``cu_seqlens`` may be
padded with its last value: shapes then do not depend on the data, and nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskops.backend import moves_rows
from maskops.checks import INTEGERS, check_mask_values, check_tensor
from maskops.layouts import values_can_be_read
from maskops.ops.packing import registration

__all__ = [
    "cu_seqlens_from_lengths",
    "cu_seqlens_from_mask",
    "cu_seqlens_from_position_ids",
    "pad_input",
    "unpad_input",
]


def _values_can_be_read(tensor: Tensor) -> bool:
    """Whether a check may look at values: on the CPU always, elsewhere only under maskops.validate()."""
    return values_can_be_read([tensor], tensor.device)


def _check_mask(name: str, mask: Tensor, shape: tuple[int, ...] | None = None) -> None:
    check_tensor(name, mask, "(batch, length)")
    if mask.dim() != 2 or (shape is not None and tuple(mask.shape) != shape):
        expected = "(batch, length)" if shape is None else str(shape)
        raise ValueError(f"{name} has shape {tuple(mask.shape)}, expected {expected}")
    if mask.dtype != torch.bool and mask.dtype not in INTEGERS:
        raise TypeError(f"{name} has dtype {mask.dtype}, expected bool or 0/1 integers, 1 = a real token")
    if _values_can_be_read(mask):
        check_mask_values(name, mask)


def cu_seqlens_from_lengths(lengths: Tensor) -> Tensor:
    """Cumulative lengths, int32 (n_sequences + 1,), starting at 0.

    Args:
        lengths: integers (n_sequences,); zeros are legal.
    """
    check_tensor("lengths", lengths, "(n_sequences,)")
    if lengths.dim() != 1:
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}, expected (n_sequences,)")
    if lengths.dtype not in INTEGERS:
        raise TypeError(f"lengths has dtype {lengths.dtype}, expected integers")
    if _values_can_be_read(lengths):
        negative = (lengths < 0).nonzero()
        if negative.shape[0]:
            at = int(negative[0, 0])
            raise ValueError(f"lengths[{at}]={int(lengths[at])} is negative")
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def cu_seqlens_from_mask(attention_mask: Tensor) -> Tensor:
    """Cumulative counts of the real tokens of each row, int32 (batch + 1,), as ``unpad_input`` packs them.

    Args:
        attention_mask: bool or 0/1 integers (batch, length); padding left, right or in between.
    """
    _check_mask("attention_mask", attention_mask)
    return cu_seqlens_from_lengths((attention_mask != 0).sum(1, dtype=torch.int32))


def cu_seqlens_from_position_ids(position_ids: Tensor, *, capacity: int | None = None) -> Tensor:
    """Cumulative lengths of one packed row from positions that restart at each sequence.

    A sequence continues where a position is one more than the one before, and ends elsewhere; it may begin at any
    position, such as RoBERTa's 2, or in the middle of a document that was cut.

    Args:
        position_ids: integers (L,) or (1, L).
        capacity: sequences that the result has room for; it is then (capacity + 1,), padded with its last value, and
            nothing waits for the device. Without it the size depends on the data.

    Returns:
        int32 (n_sequences + 1,) or (capacity + 1,).

    Raises:
        ValueError: more than one row; on the CPU or under ``maskops.validate()`` also positions that jump forwards,
            which could be a new sequence or a gap in one, and more sequences than ``capacity``.
    """
    check_tensor("position_ids", position_ids, "(L,) or (1, L)")
    if position_ids.dim() not in (1, 2) or (position_ids.dim() == 2 and position_ids.shape[0] != 1):
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)}, expected (L,) or (1, L): cu_seqlens describes one "
            "packed row; flatten the batch first"
        )
    if position_ids.dtype not in INTEGERS:
        raise TypeError(f"position_ids has dtype {position_ids.dtype}, expected integers")
    positions = position_ids.reshape(-1).to(torch.int64)
    length = positions.shape[0]
    step = positions[1:] - positions[:-1]
    begins = torch.nn.functional.pad(step != 1, (1 if length else 0, 0), value=True)
    readable = _values_can_be_read(position_ids)
    if readable and bool((step > 1).any()):
        at = int((step > 1).nonzero()[0, 0]) + 1
        raise ValueError(
            f"position_ids jumps from {int(positions[at - 1])} to {int(positions[at])} at index {at}: that neither "
            "continues a sequence nor restarts one; give cu_seqlens instead"
        )
    if capacity is None:
        ends = torch.nn.functional.pad(begins.nonzero().flatten(), (0, 1), value=length)
        return ends.to(torch.int32)
    if readable and int(begins.sum()) > capacity:
        raise ValueError(f"position_ids holds {int(begins.sum())} sequences, more than capacity={capacity}")
    slot = torch.where(begins, begins.to(torch.int64).cumsum(0) - 1, capacity).clamp(max=capacity)
    bounds = positions.new_full((capacity + 1,), length)
    index = torch.where(begins, torch.arange(length, device=positions.device), length)
    return bounds.scatter_reduce(0, slot, index, "amin").to(torch.int32)


def unpad_input(
    hidden_states: Tensor,
    attention_mask: Tensor,
    unused_mask: Tensor | None = None,
    *,
    capacity: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Gather the real tokens of a padded batch into a packed tensor. flash-attn 2's signature and results.

    Differentiable: gradients of padding are exactly 0, whatever it holds.

    Args:
        hidden_states: (batch, length, ...), any dtype.
        attention_mask: bool or 0/1 integers (batch, length), 1 = a real token.
        unused_mask: the same, 1 = allocated but not used: kept in the packed tensor, not counted in ``seqused``.
        capacity: tokens that the packed tensor has room for. Shapes are then static and nothing waits for the device:
            the rest of ``hidden`` is 0, the rest of ``indices`` is ``batch * length`` (which ``pad_input`` drops) and
            ``max_seqlen_in_batch`` is ``length``. ``batch * length`` always suffices; where the tokens do not fit, the
            CPU and ``maskops.validate()`` raise, elsewhere the last ones are dropped.

    Returns:
        hidden (total, ...), indices int64 (total,) into ``batch * length``, cu_seqlens int32 (batch + 1,),
        max_seqlen_in_batch int, seqused int32 (batch,).

    Raises:
        TypeError: a type or dtype is wrong.
        ValueError: a shape is wrong; on the CPU or under ``maskops.validate()`` also masks with other values than 0 and
            1, such as document ids, and tokens that do not fit ``capacity``.
    """
    check_tensor("hidden_states", hidden_states, "(batch, length, ...)")
    if hidden_states.dim() < 2:
        raise ValueError(f"hidden_states has shape {tuple(hidden_states.shape)}, expected (batch, length, ...)")
    batch, length = hidden_states.shape[:2]
    _check_mask("attention_mask", attention_mask, (batch, length))
    if unused_mask is not None:
        _check_mask("unused_mask", unused_mask, (batch, length))
    if capacity is not None and capacity < 0:
        raise ValueError(f"capacity={capacity}: expected 0 or more")
    if _moved_by_kernels(hidden_states, attention_mask):
        return _unpad_by_kernels(hidden_states, attention_mask, unused_mask, capacity)
    real = attention_mask != 0
    kept = real if unused_mask is None else real | (unused_mask != 0)
    seqused = real.sum(1, dtype=torch.int32)
    lengths = kept.sum(1, dtype=torch.int32)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    flat = hidden_states.flatten(0, 1)
    if capacity is None:
        indices = kept.flatten().nonzero().flatten()
        longest = int(lengths.max()) if batch else 0
        return flat.index_select(0, indices), indices, cu_seqlens, longest, seqused

    tokens = batch * length
    if _values_can_be_read(attention_mask) and int(cu_seqlens[-1]) > capacity:
        raise ValueError(f"attention_mask keeps {int(cu_seqlens[-1])} tokens, more than capacity={capacity}")
    order = kept.flatten().to(torch.int64).cumsum(0) - 1
    slot = torch.where(kept.flatten(), order, capacity).clamp(max=capacity)
    index = torch.arange(tokens, device=flat.device)
    indices = torch.full((capacity + 1,), tokens, dtype=torch.int64, device=flat.device)
    indices = indices.scatter_reduce(0, slot, index, "amin")[:capacity]
    # Empty places read one more row, a zero; select, because a product would let NaN of the padding through.
    padded = torch.cat((flat, flat.new_zeros(1, *flat.shape[1:])))
    return padded.index_select(0, indices), indices, cu_seqlens.clamp(max=capacity), length, seqused


def _moved_by_kernels(*tensors: Tensor) -> bool:
    """Whether the CUDA half of the extension moves these rows; torch operations do the same elsewhere."""
    functorch = torch._C._functorch
    if not moves_rows(tensors[0].device.type) or any(x.device != tensors[0].device for x in tensors):
        return False
    return torch.compiler.is_compiling() or not any(functorch.is_functorch_wrapped_tensor(x) for x in tensors)


def _unpad_by_kernels(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None, capacity: int | None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """``unpad_input`` in two launches for the indices and one for the tokens."""
    batch, length = attention_mask.shape
    flat = hidden_states.flatten(0, 1)
    tokens = batch * length
    if capacity is None:
        indices, cu_seqlens, seqused = registration.unpad_index(attention_mask, unused_mask, tokens)
        longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max()) if batch else 0
        indices = indices[: int(cu_seqlens[-1])]
        return registration.gather_rows(flat, indices), indices, cu_seqlens, longest, seqused
    if _values_can_be_read(attention_mask):
        kept = attention_mask != 0
        count = int((kept if unused_mask is None else kept | (unused_mask != 0)).sum())
        if count > capacity:
            raise ValueError(f"attention_mask keeps {count} tokens, more than capacity={capacity}")
    indices, cu_seqlens, seqused = registration.unpad_index(attention_mask, unused_mask, capacity)
    return registration.gather_rows(flat, indices), indices, cu_seqlens, length, seqused


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Scatter packed tokens back into a padded batch, 0 elsewhere. flash-attn 2's signature. Differentiable.

    Args:
        hidden_states: (total, ...).
        indices: int64 or int32 (total,) as ``unpad_input`` returns them; ``batch * seqlen`` drops the token. On the
            CPU a ValueError names one that lies outside.
        batch: batch of the result.
        seqlen: length of the result.

    Returns:
        (batch, seqlen, ...).
    """
    check_tensor("hidden_states", hidden_states, "(total, ...)")
    check_tensor("indices", indices, "(total,)")
    if indices.dim() != 1 or hidden_states.dim() < 1 or indices.shape[0] != hidden_states.shape[0]:
        raise ValueError(
            f"indices has shape {tuple(indices.shape)}, hidden_states {tuple(hidden_states.shape)}: expected (total,) "
            "and (total, ...)"
        )
    if indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"indices has dtype {indices.dtype}, expected int64 or int32")
    tokens = batch * seqlen
    if _values_can_be_read(indices):
        outside = ((indices < 0) | (indices > tokens)).nonzero()
        if outside.shape[0]:
            at = int(outside[0, 0])
            raise ValueError(
                f"indices[{at}]={int(indices[at])}: expected 0 to {tokens}, batch * seqlen, for batch={batch} and "
                f"seqlen={seqlen}"
            )
    rest = hidden_states.shape[1:]
    if _moved_by_kernels(hidden_states, indices):
        return registration.scatter_rows(hidden_states, indices, tokens).reshape(batch, seqlen, *rest)
    output = hidden_states.new_zeros(tokens + 1, *rest).index_copy(0, indices.to(torch.int64), hidden_states)
    return output[:tokens].reshape(batch, seqlen, *rest)
