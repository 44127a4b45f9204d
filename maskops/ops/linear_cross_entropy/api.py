"""``maskops.linear_cross_entropy``: what it takes, what it refuses, and which backend computes it."""

from typing import Literal, overload

import torch
from torch import Tensor

from maskops import backend
from maskops.checks import autocast_dtype, check_tensor
from maskops.layouts import values_can_be_read
from maskops.ops.cross_entropy.api import CrossEntropyOutput
from maskops.ops.cross_entropy.arguments import (
    FLOATS,
    Reduction,
    check_class_weights,
    check_cu_seqlens,
    check_numbers,
    check_reduction,
    check_target,
    check_tokens,
    dtype_name,
)
from maskops.ops.cross_entropy.rows import Scoring, check_labels, reduce_rows, row_factors, select_rows
from maskops.ops.linear_cross_entropy import reference, registration
from maskops.ops.scalars import scalar


def _check_layer(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    tensors = {"hidden": (hidden, "(..., H)"), "weight": (weight, "(V, H)")}
    if bias is not None:
        tensors["bias"] = (bias, "(V,) or None")
    for name, (tensor, shape) in tensors.items():
        check_tensor(name, tensor, shape)
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name} has dtype {dtype_name(tensor)}: expected float32, bfloat16, float16 or float64")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden on {hidden.device}: put them on one device")
    if hidden.dim() == 0:
        raise ValueError("hidden has shape (): expected (..., H)")
    width = hidden.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != width or weight.shape[0] == 0:
        turned = weight.dim() == 2 and weight.shape[0] == width
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}: expected (V, {width}), a row for every word of the vocabulary, "
            f"since hidden has shape {tuple(hidden.shape)}{': weight.t() is that' if turned else ''}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}: expected ({weight.shape[0]},), as weight has rows")


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = ...,
    mask: Tensor | None = ...,
    token_weights: Tensor | None = ...,
    class_weights: Tensor | None = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    softcap: float = ...,
    logit_scale: float = ...,
    reduction: Reduction = ...,
    cu_seqlens: Tensor | None = ...,
    num_items: int | Tensor | None = ...,
    shift: bool = ...,
    return_lse: Literal[False] = ...,
    return_logprobs: Literal[False] = ...,
    return_entropy: Literal[False] = ...,
    return_argmax: Literal[False] = ...,
) -> Tensor: ...
@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = ...,
    mask: Tensor | None = ...,
    token_weights: Tensor | None = ...,
    class_weights: Tensor | None = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    softcap: float = ...,
    logit_scale: float = ...,
    reduction: Reduction = ...,
    cu_seqlens: Tensor | None = ...,
    num_items: int | Tensor | None = ...,
    shift: bool = ...,
    return_lse: bool = ...,
    return_logprobs: bool = ...,
    return_entropy: bool = ...,
    return_argmax: bool = ...,
) -> Tensor | CrossEntropyOutput: ...
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    class_weights: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    reduction: Reduction = "mean",
    cu_seqlens: Tensor | None = None,
    num_items: int | Tensor | None = None,
    shift: bool = False,
    return_lse: bool = False,
    return_logprobs: bool = False,
    return_entropy: bool = False,
    return_argmax: bool = False,
) -> Tensor | CrossEntropyOutput:
    r"""Cross-entropy of the logits ``hidden @ weight.T + bias``, which are never whole in memory.

    The result is that of ``maskops.cross_entropy(torch.nn.functional.linear(hidden, weight, bias), target, ...)`` with
    logits that are not rounded to the dtype of the inputs. What tokens that are skipped hold, NaN included, is never
    read, and their hidden states have a gradient of exactly 0.

    Memory: inputs, gradients, and the logits of a chunk of tokens (64 MiB, or those of 128 tokens if that is more; on a
    device 256 MiB or 512 tokens, and as much again in the dtype of 16-bit inputs where gradients are wanted).
    Where gradients of a bfloat16 or float16 weight are wanted, also a float32 sum of them while it is computed.
    Time: where the result is a single number (any reduction but ``"none"``, and no ``return_*`` except
    ``return_argmax``) and gradients are wanted, they are computed with it, in three matrix products in all, as many as
    the layer itself takes. In all other cases, for float16 inputs, and in a second backward pass through one graph, the
    backward pass computes the logits again: a fourth. Call it under ``torch.no_grad()`` where no gradients are wanted.
    On the CPU all of it is proportional to the tokens that are kept. On a device only the work between the products is:
    how many tokens are kept is not read back, so that products have the size of all, where the others are zeros.

    Args:
        hidden: (..., H), float32, bfloat16, float16 or float64: the input of the last linear layer.
        weight: (V, H), one of the same dtypes, not necessarily the same one; the weight of that layer, or an embedding
            that is tied to it. Any strides. All products are computed and summed in float32 (float64 where an input
            is), on the CPU also under autocast, which casts nothing there: nothing is gained by it. On a device
            autocast casts hidden and weight as it does for ``torch.nn.functional.linear``, and 16-bit inputs of one
            dtype are multiplied as they are and summed in float32; for that the gradient of the logits, but never the
            logits, is rounded to that dtype. So it is for bfloat16 on processors with instructions for it
            (AVX512-BF16), where what a chunk of tokens adds to the gradient of the weight is rounded, too, and summed
            in float32.
        target: (...) int64 or int32, labels in [0, V), or ``ignore_index``.
        bias: (V,) or None. A bias of -inf bans its column.
        mask: as the remaining arguments, what it is for ``maskops.cross_entropy``.
        token_weights: see there.
        class_weights: see there.
        ignore_index: see there.
        label_smoothing: see there.
        z_loss: see there.
        softcap: see there.
        logit_scale: see there.
        reduction: see there.
        cu_seqlens: see there.
        num_items: see there.
        shift: see there; no hidden states are copied.
        return_lse: see there.
        return_logprobs: see there.
        return_entropy: see there.
        return_argmax: see there.

    Returns:
        What ``maskops.cross_entropy`` returns, in float32 (float64 where an input is).

    Raises:
        TypeError: a type or dtype is wrong.
        ValueError: what ``maskops.cross_entropy`` refuses, or ``weight`` or ``bias`` do not fit.

    Tokens are scored in chunks that depend on shapes alone. On the CPU the products give the same bits for any number
    of threads; only the bfloat16 products of processors with instructions for them are torch's, whose bits may change.
    There is no double backward; ``maskops.use_backend("reference")`` has it.

    Example:
        >>> hidden, weight, target = torch.randn(2, 5, 64), torch.randn(1000, 64), torch.randint(1000, (2, 5))
        >>> loss = maskops.linear_cross_entropy(hidden, weight, target, shift=True)
    """
    _check_layer(hidden, weight, bias)
    check_tensor("target", target, "of int64 or int32 labels")
    if target.is_floating_point():
        raise TypeError(
            f"target has dtype {dtype_name(target)}: expected int64 or int32 labels. Probabilities for every token are "
            f"as large as the logits: maskops.cross_entropy(torch.nn.functional.linear(hidden, weight, bias), target)"
        )
    check_target(target, hidden, "hidden")
    check_tokens(target, mask, token_weights)
    check_numbers(target, ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    check_reduction(target, reduction, cu_seqlens, num_items, shift)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, target)
    if class_weights is not None:
        check_class_weights(class_weights, weight.shape[0], weight.device)

    layer = (hidden, weight) if bias is None else (hidden, weight, bias)
    dtypes = [tensor.dtype for tensor in layer]
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    rows = select_rows(
        target,
        mask=mask,
        token_weights=token_weights,
        ignore_index=ignore_index,
        cu_seqlens=cu_seqlens,
        shift=shift,
        dtype=dtype,
        class_weights=class_weights,
    )
    states = hidden.reshape(target.numel(), hidden.shape[-1])
    # The reference holds the logits, their exponentials, and a few temporaries of that size.
    size = None if torch.compiler.is_compiling() else 4 * dtype.itemsize * target.numel() * weight.shape[0]
    chosen = backend.choose(
        "linear_cross_entropy",
        hidden.device.type,
        torch.float64 if dtype == torch.float64 else hidden.dtype,
        reference_bytes=size,
    )
    autocast = None if backend.BACKENDS[chosen].is_at_home("cpu") else autocast_dtype(hidden.device.type)
    if autocast is not None:
        states, weight = states.to(autocast), weight.to(autocast)
        dtypes = [states.dtype, weight.dtype]
    scoring = Scoring(
        ignore_index,
        float(label_smoothing),
        float(z_loss),
        float(softcap),
        float(logit_scale),
        entropy=return_entropy,
        argmax=return_argmax,
    )
    shape = target.shape
    of_rows = return_lse or return_logprobs or return_entropy
    weights = None if class_weights is None else class_weights.detach().to(dtype).contiguous()
    inputs = registration.Inputs(
        states,
        weight,
        weight.new_empty(0) if bias is None else bias,
        rows.labels,
        weight.new_empty(0, dtype=dtype) if weights is None else weights,
    )
    # Compiled code may keep numbers open, which an operator takes as tensors.
    numbers = (scalar(label_smoothing, 0.0), scalar(z_loss, 0.0), scalar(softcap, 0.0), scalar(logit_scale, 1.0))
    if chosen != backend.REFERENCE and reduction != "none" and not of_rows and torch.float16 not in dtypes:
        # Gradients that are rounded to float16 before a loss scaler has multiplied them would underflow.
        factors = row_factors(rows, shape=shape, reduction=reduction, num_items=num_items, dtype=dtype)
        loss, argmax = registration.loss(inputs, factors, scoring, numbers, chosen)
        return CrossEntropyOutput(loss, None, None, None, argmax.reshape(shape)) if return_argmax else loss
    if chosen == backend.REFERENCE:
        if values_can_be_read([rows.labels], rows.labels.device):
            check_labels(rows.labels, weight.shape[0], ignore_index)
        results = reference.row_losses(states, weight, bias, rows.labels, scoring, weights)
    else:
        results = registration.row_losses(inputs, scoring, numbers, chosen)
    row_loss, lse, logprobs, entropy, argmax = results
    loss = reduce_rows(row_loss, rows, shape=shape, reduction=reduction, num_items=num_items)
    if not (of_rows or return_argmax):
        return loss
    return CrossEntropyOutput(
        loss,
        lse.reshape(shape) if return_lse else None,
        logprobs.reshape(shape) if return_logprobs else None,
        entropy.reshape(shape) if return_entropy else None,
        argmax.reshape(shape) if return_argmax else None,
    )
