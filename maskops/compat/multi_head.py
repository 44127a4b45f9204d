"""torch.nn.functional.multi_head_attention_forward on maskops: what nn.MultiheadAttention and nn.Transformer call.

Its masks stay apart (torch adds them up to one score-sized tensor in every layer), so that each of them is recognised
as spans, and read once for all layers where the layers get the same tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskops.compat.sdpa import NotServedError, attend

linear = torch.nn.functional.linear
pad = torch.nn.functional.pad

TORCH_REFUSES = "torch refuses these arguments"


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, None]:
    """torch's function of this name, argument for argument, where the weights are not wanted.

    Raises:
        NotServedError: torch has to do it itself, with the reason: the weights are wanted, keys or values are static,
            no fast backend serves the call, or torch will raise its own error about the arguments.
    """
    if need_weights:
        raise NotServedError(
            "need_weights=True returns the attention weights, which a fused kernel never holds: pass need_weights=False"
        )
    if static_k is not None or static_v is not None:
        raise NotServedError("static_k and static_v are not served")
    if (bias_k is None) != (bias_v is None) or (is_causal and attn_mask is None):
        raise NotServedError(TORCH_REFUSES)
    is_batched = query.dim() == 3
    weights = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else in_proj_weight
    q, k, v = _projections((query, key, value), weights, in_proj_bias)
    if not is_batched:
        q, k, v = (x.unsqueeze(1) for x in (q, k, v))
    q_len, batch, width = q.shape
    if width != embed_dim_to_check or width % num_heads:
        raise NotServedError(TORCH_REFUSES)

    if bias_k is not None and bias_v is not None:
        k, v = (torch.cat((x, bias.to(x.dtype).expand(1, batch, -1))) for x, bias in ((k, bias_k), (v, bias_v)))
    if add_zero_attn:
        k, v = (pad(x, (0, 0, 0, 0, 0, 1)) for x in (k, v))
    k_len = k.shape[0]

    # As in torch: without padding, is_causal says all that attn_mask says.
    is_hint = is_causal and key_padding_mask is None
    masks = []
    if attn_mask is not None and not is_hint:
        shape = (1, 1) if attn_mask.dim() == 2 else (batch, num_heads)
        masks.append(_visible(attn_mask, (*shape, q_len, key.shape[0]), k_len))
    if key_padding_mask is not None:
        masks.append(_visible(key_padding_mask, (batch, 1, 1, key.shape[0]), k_len))
    # (length, batch, heads, head_dim) in memory; the output has the same order, so that nothing is copied.
    q, k, v = (x.unflatten(-1, (num_heads, width // num_heads)).permute(1, 2, 0, 3) for x in (q, k, v))
    out = attend(q, k, v, masks, dropout_p=dropout_p if training else 0.0, is_causal=is_hint, fast_only=True)
    out = linear(out.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    return (out if is_batched else out.squeeze(1)), None


def _projections(
    inputs: tuple[Tensor, Tensor, Tensor], weights: tuple[Tensor | None, ...] | Tensor | None, bias: Tensor | None
) -> list[Tensor]:
    """Query, key and value times their weights, three or one on top of another; the same input is multiplied once."""
    if isinstance(weights, tuple):
        biases = (None, None, None) if bias is None else bias.chunk(3)
        given = [weight for weight in weights if weight is not None]
        if len(given) < len(weights):
            raise NotServedError(TORCH_REFUSES)
        return [linear(x, weight, own) for x, weight, own in zip(inputs, given, biases, strict=True)]
    if weights is None:
        raise NotServedError(TORCH_REFUSES)
    width = weights.shape[0] // 3
    results: list[Tensor] = []
    while (first := len(results)) < 3:
        last = first + 1
        while last < 3 and inputs[last] is inputs[first]:
            last += 1
        rows = slice(first * width, last * width)
        projected = linear(inputs[first], weights[rows], None if bias is None else bias[rows])
        results += projected.chunk(last - first, -1)
    return results


def _visible(mask: Tensor, shape: tuple[int, ...], k_len: int) -> Tensor:
    """A mask of nn.MultiheadAttention (bool: True = hidden) as scaled_dot_product_attention takes it, in ``shape``.

    Keys that were appended are visible for every query.
    """
    if mask.numel() != torch.Size(shape).numel() or mask.shape[-1] != shape[-1]:
        raise NotServedError(TORCH_REFUSES)
    visible = (~mask if mask.dtype == torch.bool else mask).reshape(shape)
    extra = k_len - shape[-1]
    if extra == 0:
        return visible
    return pad(visible, (0, extra), value=True if mask.dtype == torch.bool else 0.0)
