"""The attention function of transformers' attention interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from maskops import masks
from maskops.compat import recognise
from maskops.masks import Mask
from maskops.ops.attention.api import attention
from maskops.ops.plan.registration import derive_plan
from maskops.spans import RowSpans

_REFUSED = {
    "indices": "keys chosen by an indexer",
    "block_indices": "blocks of keys chosen by an indexer",
    "cache": "a paged cache of continuous batching",
    "head_mask": "a mask of heads",
    "layer_head_mask": "a mask of heads",
    "output_attentions": "attention weights, which are never made",
}


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: RowSpans | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    backend: str | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """What ``AttentionInterface`` calls in every layer.

    Args:
        module: the attention module; ``is_causal`` is read from it where there is neither a mask nor the argument.
        query: (batch, heads, q_len, head_dim), any strides.
        key: (batch, kv_heads, k_len, head_dim).
        value: (batch, kv_heads, k_len, value_dim).
        attention_mask: the plan that ``mask_function`` made; or bool (batch|1, heads|1, q_len, k_len), True = attend;
            or a floating mask of that shape, added to the scores, in which -inf and the smallest finite number hide a
            key (a gradient reaches it); or None: ``is_causal`` and ``sliding_window`` then say what a query sees.
        scaling: factor of the scores; None for ``head_dim ** -0.5``.
        dropout: probability with which weights are dropped.
        is_causal: whether queries see no later keys, aligned to the bottom right; only without a mask.
        sliding_window: a query sees keys less than this far away; only without a mask, which otherwise holds it.
        softcap: scores become ``softcap * tanh(score / softcap)``; None for none.
        s_aux: (heads,) logits that take part in the softmax and have no value.
        sinks: another name for ``s_aux``.
        position_bias: added to the scores, broadcastable to (batch, heads, q_len, k_len); a gradient reaches it.
        backend: name of a backend of maskops.
        **keywords: what else a model hands to its attention; what would change the result and cannot be served raises.

    Returns:
        (batch, q_len, heads, value_dim), contiguous, in the dtype of value; and None for the weights.

    Raises:
        ValueError: an argument that maskops cannot serve, by name.
    """
    for name, meaning in _REFUSED.items():
        if keywords.get(name) is not None and keywords[name] is not False:
            raise ValueError(
                f"maskops does not serve {name} ({meaning}), which {type(module).__name__} asks for: use the "
                "implementation 'eager' or 'sdpa' for this model or call"
            )
    if s_aux is not None and sinks is not None:
        raise ValueError("s_aux and sinks are two names of one argument: give one of them")
    if query.dtype != value.dtype or key.dtype != value.dtype:
        # Adapters and rotary embeddings in float32 leave q and k wider than v, which has the dtype of the model.
        query, key = query.to(value.dtype), key.to(value.dtype)
    mask: RowSpans | Mask | None
    bias = position_bias
    if attention_mask is None:
        mask = _mask_of_module(module, query, key, is_causal, sliding_window, keywords)
    elif isinstance(attention_mask, RowSpans):
        mask = attention_mask
    else:
        mask, added = _read_mask(attention_mask, query, key.shape[2], dropout > 0)
        bias = added if bias is None else bias if added is None else bias + added
    if isinstance(mask, RowSpans) and mask.k_len != key.shape[2]:
        raise ValueError(
            f"{type(module).__name__} attends to {key.shape[2]} keys, and its model made a mask for {mask.k_len}: "
            "encoders make theirs without the slots of a static cache. Call it without past_key_values, or build it as "
            "a decoder (config.is_decoder=True)"
        )
    if isinstance(mask, RowSpans) and mask.positions is None and dropout > 0:
        mask = _with_positions(mask, query.shape[0])
    out = attention(
        query,
        key,
        value,
        mask,
        bias=bias if bias is None else bias.to(query.dtype),
        sinks=s_aux if sinks is None else sinks,
        softcap=softcap or 0.0,
        softmax_scale=scaling,
        dropout_p=dropout,
        backend=backend,
    )
    return out.transpose(1, 2).contiguous(), None


def _mask_of_module(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    is_causal: bool | None,
    sliding_window: int | None,
    keywords: dict[str, Any],
) -> Mask | None:
    """The mask of a layer that was handed none: its causality, its window, and offsets of packed sequences."""
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    mask = None
    if sliding_window is not None:
        mask = masks.sliding_window(sliding_window - 1, 0 if is_causal else sliding_window - 1)
    elif is_causal:
        mask = masks.causal()
    cu_seqlens = keywords.get("cu_seq_lens_q")
    if cu_seqlens is None:
        return mask
    if query.shape[0] != 1:
        raise ValueError(
            f"cu_seq_lens_q describes one packed row, {type(module).__name__} has a batch of {query.shape[0]} and no "
            "mask: give the rows one after the other as a batch of 1"
        )
    of_keys = keywords.get("cu_seq_lens_k")
    packed = masks.documents(cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens if of_keys is None else of_keys)
    return packed if mask is None else packed & mask


def _read_mask(
    mask: Tensor, query: Tensor, k_len: int, positions: bool
) -> tuple[RowSpans | Mask | None, Tensor | None]:
    """A 4-D mask as spans or a dense mask, and what is to be added to the scores."""
    batch, _, q_len, _ = query.shape
    if mask.dim() != 4 or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise TypeError(
            f"attention_mask has shape {tuple(mask.shape)} and dtype {mask.dtype}: expected a plan of maskops, or bool "
            "(True = attend) or floating (added to the scores) with four dimensions (batch|1, heads|1, q_len, k_len)"
        )
    # Masks of static caches may be longer than the keys that a layer hands over.
    mask = mask[:, :, :, :k_len]
    if recognise.can_be_read(mask):
        reading = recognise.read([mask], q_len, k_len, batch=batch, is_causal=False, positions=positions)
        if reading.plan is not None:
            return reading.plan, None
    if mask.dtype == torch.bool:
        return masks.dense(mask.expand(mask.shape[0], mask.shape[1], q_len, k_len)), None
    allowed = mask > torch.finfo(mask.dtype).min
    dense = masks.dense(allowed.detach().expand(mask.shape[0], mask.shape[1], q_len, k_len))
    return dense, mask.masked_fill(~allowed, 0.0)


def _with_positions(spans: RowSpans, batch: int) -> RowSpans:
    """A plan that was made without positions, counted as ``masks.dense`` counts: a row of the batch is a sequence."""
    device = spans.start.device
    row = torch.arange(spans.q_len, device=device) + (spans.k_len - spans.q_len)
    element = torch.arange(batch, device=device)[:, None]
    positions = torch.stack(torch.broadcast_tensors(row, torch.zeros_like(element), element)).to(torch.int32)
    start, end = (x.expand(-1, batch, -1) for x in (spans.start, spans.end))
    return derive_plan(
        start,
        end,
        spans.k_len,
        key_holes=(spans.key_valid == 0).expand(batch, -1),
        dense=spans.dense,
        grad=spans.key_tiles is not None,
        order=spans.order is not None,
        positions=positions,
        bits=spans.dense_bits is not None,
    )
