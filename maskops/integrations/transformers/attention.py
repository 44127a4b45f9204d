"""The attention function of transformers' attention interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from maskops import masks
from maskops.compat import recognise
from maskops.masks import Mask
from maskops.ops.attention.api import attention
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
    q_len, k_len = query.shape[2], key.shape[2]
    mask: RowSpans | Mask | None
    bias = position_bias
    if attention_mask is None:
        mask = _mask_of_module(module, q_len, k_len, is_causal, sliding_window)
    elif isinstance(attention_mask, RowSpans):
        mask = attention_mask
    else:
        mask, added = _read_mask(attention_mask, query, k_len, dropout > 0)
        bias = added if bias is None else bias if added is None else bias + added
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
    module: nn.Module, q_len: int, k_len: int, is_causal: bool | None, sliding_window: int | None
) -> Mask | None:
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if is_causal:
        return masks.causal() if sliding_window is None else masks.sliding_window(sliding_window - 1, 0)
    return None if sliding_window is None else masks.sliding_window(sliding_window - 1, sliding_window - 1)


def _read_mask(
    mask: Tensor, query: Tensor, k_len: int, positions: bool
) -> tuple[RowSpans | Mask | None, Tensor | None]:
    """A 4-D mask as spans or a dense mask, and what is to be added to the scores."""
    batch, _, q_len, _ = query.shape
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
    row = torch.arange(spans.q_len, device=spans.start.device) + (spans.k_len - spans.q_len)
    element = torch.arange(batch, device=spans.start.device)[:, None]
    row, zero, element = torch.broadcast_tensors(row, torch.zeros_like(element), element)
    return spans._replace(positions=torch.stack((row, zero, element)).to(torch.int32))
