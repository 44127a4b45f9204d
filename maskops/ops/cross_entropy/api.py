"""``maskops.cross_entropy``: what it takes, what it refuses, and which backend computes it."""

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from maskops import backend
from maskops.checks import check_tensor
from maskops.layouts import values_can_be_read
from maskops.ops.cross_entropy import direct, reference, registration
from maskops.ops.cross_entropy.arguments import (
    FLOATS,
    Reduction,
    check_class_weights,
    check_cu_seqlens,
    check_nothing_to_ignore,
    check_numbers,
    check_probabilities,
    check_reduction,
    check_target,
    check_tokens,
    dtype_name,
)
from maskops.ops.cross_entropy.gradient_memory import check_grad_buffer, memory_of
from maskops.ops.cross_entropy.rows import Scoring, check_labels, reduce_rows, row_factors, select_rows
from maskops.ops.scalars import scalar


class CrossEntropyOutput(NamedTuple):
    """What ``maskops.cross_entropy`` returns when any ``return_*`` is set; what was not asked for is None.

    Attributes:
        loss: 0-dim, or the tokens' shape (that of the logits without V) under ``reduction="none"``.
        lse: logsumexp of the row (natural log, after scale and softcap), the tokens' shape, 0 in skipped rows.
        logprobs: log-probability of the label, or its mean under the probabilities of the target, the tokens' shape,
            0 in skipped rows.
        entropy: of the row's distribution, in nats, the tokens' shape, 0 in skipped rows.
        argmax: int64, the first column with the largest logit, the tokens' shape, -1 in skipped rows.
    """

    loss: Tensor
    lse: Tensor | None
    logprobs: Tensor | None
    entropy: Tensor | None
    argmax: Tensor | None


def _check_logits(logits: Tensor) -> None:
    check_tensor("logits", logits, "(..., V)")
    if logits.dtype not in FLOATS:
        raise TypeError(f"logits has dtype {dtype_name(logits)}: expected float32, bfloat16, float16 or float64")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}: expected (..., V) with at least one column")


def _matrix(values: Tensor) -> Tensor:
    """(..., V) as rows with contiguous columns, without a copy where that can be."""
    matrix = values.reshape(-1, values.shape[-1])
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


@overload
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
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
    inplace_backward: bool = ...,
    grad_buffer: Tensor | None = ...,
) -> Tensor: ...
@overload
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
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
    inplace_backward: bool = ...,
    grad_buffer: Tensor | None = ...,
) -> Tensor | CrossEntropyOutput: ...
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
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
    inplace_backward: bool = False,
    grad_buffer: Tensor | None = None,
) -> Tensor | CrossEntropyOutput:
    r"""Cross-entropy between logits and labels that skips masked tokens: they are neither computed nor read.

    With ``z = softcap(logit_scale * logits)`` and ``lse = logsumexp(z)`` over the vocabulary, the loss of a token is

        (1 - label_smoothing) * (lse - z[target]) + label_smoothing * (lse - mean(z)) + z_loss * lse ** 2

    and, with a weight ``w[c]`` and a target probability ``t[c]`` for every column,

        (1 - label_smoothing) * sum(w * t * (lse - z)) + label_smoothing * mean(w * (lse - z)) + z_loss * lse ** 2

    It is computed without cancellation: where the probability of the label approaches 1, the loss and the gradient of
    the label's logit keep a relative error below 1e-6 in float32 (and from the logits as given in bfloat16 and
    float16).

    A token is kept where ``target != ignore_index`` and its mask is true and its weight is not 0. The logits (and
    target probabilities) of all other tokens may hold anything, NaN included: they reach no result, and their gradient
    is exactly 0. So is, with a ``cu_seqlens``, that of tokens after the last sequence.

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64. Any strides; nothing is copied where the last dimension
            is contiguous and the leading ones have one stride between rows. Computed in float32 (float64 for float64).
            A logit of -inf is a banned column: probability 0, also under ``softcap``; label smoothing takes the mean
            over the other columns, entropy ignores it, its gradient is 0. It adds nothing where its weight or target
            probability is 0, and makes the loss infinite where they are not.
        target: (...) int64 or int32, labels in [0, V), or ``ignore_index``. Or (..., V) float32, bfloat16, float16 or
            float64, probabilities, as in ``torch.nn.functional.cross_entropy``: they are not checked, and may sum to
            anything. They get a gradient.
        mask: (...) bool or 0/1 integers; True keeps a token.
        token_weights: (...) numbers that multiply the loss of each token. Constants: a gradient for them is refused.
        class_weights: (V,) numbers, factors of the classes' shares of the loss (``weight`` in torch's function), and,
            of labels, in the denominators of the means, too; neither of the z-loss nor of the other outputs. Constants.
        ignore_index: the label of tokens to skip; may lie inside the vocabulary.
        label_smoothing: share in [0, 1] of the loss that goes to the mean over the vocabulary (Szegedy et al. 2016).
        z_loss: factor of ``lse ** 2``, which keeps the normaliser near 0 (PaLM, Chowdhery et al. 2022, section 5).
        softcap: ``softcap * tanh(z / softcap)`` after the scale (Gemma 2, section 2); 0 for none.
        logit_scale: factor of the logits, > 0: an inverse temperature.
        reduction: ``"mean"``: sum(weight * loss) / sum(weight) over kept tokens, 0 where the denominator is 0.
            ``"sum"``. ``"none"``: weight * loss of every token, 0 for skipped ones. ``"sequence_mean"``: the mean, over
            the sequences that have a kept token, of the mean inside each. In the denominators of both means the weight
            is token_weights * class_weights[target]; with target probabilities token_weights alone, as in torch.
        cu_seqlens: (n_sequences + 1,) int32 or int64, offsets of packed sequences in the flattened tokens, starting
            with 0. Without it the last dimension of the tokens runs along a sequence.
        num_items: replaces the whole denominator of ``"mean"``, class weights included, for gradient accumulation: an
            int or a 0-dim tensor, which is not read on the host.
        shift: scores position i against the target of position i + 1 of the same sequence; the last position of every
            sequence is skipped. ``mask`` and ``token_weights`` belong to the target and shift along. No logits and no
            probabilities are copied. Packed sequences need ``cu_seqlens`` here: without it the last token of each is
            scored against the first of the next, and nothing can tell. Padding on the left stands before the first
            token and would be scored against it: give ``shift_labels`` of a batch of ``maskops.data`` instead.
        return_lse: also return the normaliser of every token.
        return_logprobs: also return the log-probability of every label; sum(t * (z - lse)) for probabilities t.
        return_entropy: also return the entropy of every distribution.
        return_argmax: also return the most likely column of every token.
        inplace_backward: allow the backward pass to write the gradient over the storage of ``logits`` (it is an
            allowance: compiled code and backends that cannot do it ignore it). The logits are lost then, ``.grad`` of
            logits that are a leaf shares their memory, and a second backward pass, or one of another op that saved
            the logits, raises autograd's error about a modified variable. A target that needs a gradient voids it.
        grad_buffer: memory for the gradient, contiguous, of the logits' shape, dtype and device, for training loops
            that keep it from step to step: large new memory takes longer to get than the gradient to compute (without
            it, memory of a freed gradient is used again; see ``maskops.extension.release_memory``). Or
            ``logits`` itself. An allowance as well, on the terms of ``inplace_backward``. Where the loss is a single
            number, no ``return_*`` but ``return_argmax`` is set and the logits are not float16, the forward pass writes
            the gradient already, in one pass over the logits: whatever was in the buffer, or the logits, is lost then,
            and the backward pass multiplies the buffer by the gradient of the loss, unless that is 1 (``num_items``
            says the same without a pass). One buffer serves one loss at a time: a backward pass whose buffer another
            loss has written to raises autograd's error about a modified variable. ``.grad`` of leaf logits is the
            buffer itself: clear it before the buffer serves the next loss.

    Returns:
        The loss, float32 (float64 for float64 logits): 0-dim, or the tokens' shape for ``"none"``. With any
        ``return_*``, a ``CrossEntropyOutput``; its lse, logprobs and entropy are differentiable, unweighted, and 0 for
        skipped tokens (argmax: -1).

    Raises:
        TypeError: a type or dtype is wrong.
        ValueError: a shape, device or number is wrong, or ``mask`` holds other values than 0 and 1, or ``cu_seqlens``
            is not ascending from 0 or ends beyond the tokens, or the label of a kept token is outside the vocabulary.
            Values are checked on the CPU, and on other devices under ``maskops.validate()``; where they are not, no
            memory outside of the tensors is touched. Compiled code checks labels, not the values of ``mask`` and
            ``cu_seqlens``.

    The kernels have no double backward; ``maskops.use_backend("reference")`` has.

    Example:
        >>> logits, target = torch.randn(2, 5, 100), torch.randint(100, (2, 5))
        >>> loss = maskops.cross_entropy(logits, target, mask=torch.ones(2, 5, dtype=torch.bool), shift=True)
    """
    alone: Tensor | None = direct.cross_entropy(
        logits,
        target,
        ignore_index,
        reduction,
        mask,
        token_weights,
        class_weights,
        cu_seqlens,
        num_items,
        grad_buffer,
        shift,
        inplace_backward,
        return_lse,
        return_logprobs,
        return_entropy,
        return_argmax,
        label_smoothing,
        z_loss,
        softcap,
        logit_scale,
    )
    if alone is not None:
        return alone
    _check_logits(logits)
    if grad_buffer is not None:
        check_grad_buffer(grad_buffer, logits)
    check_tensor("target", target, "of int64 or int32 labels, or of probabilities like the logits")
    soft = target.is_floating_point()
    labels = target
    if soft:
        check_probabilities(target, logits)
        labels = target.new_zeros(target.shape[:-1], dtype=torch.int64)  # any label that is not ignored
    else:
        check_target(target, logits, "logits")
    check_tokens(labels, mask, token_weights)
    check_numbers(labels, ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    if soft:
        check_nothing_to_ignore(ignore_index)
    check_reduction(labels, reduction, cu_seqlens, num_items, shift)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, labels)
    if class_weights is not None:
        check_class_weights(class_weights, logits.shape[-1], logits.device)

    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = select_rows(
        labels,
        mask=mask,
        token_weights=token_weights,
        ignore_index=ignore_index,
        cu_seqlens=cu_seqlens,
        shift=shift,
        dtype=dtype,
        class_weights=None if soft else class_weights,
    )
    shape = labels.shape
    matrix = _matrix(logits)
    probabilities = _matrix(target) if soft else None
    weights = None if class_weights is None else class_weights.detach().to(dtype).contiguous()

    # The reference holds the logits in the wide dtype, their exponentials, and a few temporaries of that size.
    reference_bytes = None if torch.compiler.is_compiling() else 4 * dtype.itemsize * logits.numel()
    chosen = backend.choose("cross_entropy", logits.device.type, logits.dtype, reference_bytes=reference_bytes)
    scoring = Scoring(
        ignore_index,
        float(label_smoothing),
        float(z_loss),
        float(softcap),
        float(logit_scale),
        entropy=return_entropy,
        argmax=return_argmax,
    )
    # The kernels of processors read the labels before anything else and check them then.
    if chosen != "cpu" and values_can_be_read([rows.labels], rows.labels.device):
        check_labels(rows.labels, matrix.shape[1], ignore_index)
    if chosen == backend.REFERENCE:
        if probabilities is not None and shift:
            probabilities = probabilities.roll(-1, 0)
        results = reference.row_losses(matrix, rows.labels, scoring, class_weights=weights, probabilities=probabilities)
    else:
        if probabilities is not None and probabilities.dtype == torch.float64:
            probabilities = probabilities.to(dtype)
        # Compiled code may keep numbers open, which an operator takes as tensors.
        opened = (scalar(label_smoothing, 0.0), scalar(z_loss, 0.0), scalar(softcap, 0.0), scalar(logit_scale, 1.0))
        memory = memory_of(grad_buffer if chosen == "cpu" else None, inplace_backward, logits, matrix, target)
        of_rows = reduction == "none" or return_lse or return_logprobs or return_entropy
        # Gradients that are rounded to float16 before a loss scaler has multiplied them would underflow.
        if memory.buffer is not None and not of_rows and matrix.dtype != torch.float16:
            targets = () if probabilities is None else (probabilities,)
            if registration.needs_logits_gradient_alone(matrix, *targets):
                factors = row_factors(rows, shape=shape, reduction=reduction, num_items=num_items, dtype=dtype)
                loss, argmax = registration.loss_into(
                    matrix,
                    rows.labels,
                    factors,
                    scoring,
                    opened,
                    memory.buffer,
                    class_weights=weights,
                    probabilities=probabilities,
                    shift=shift,
                )
                return CrossEntropyOutput(loss, None, None, None, argmax.reshape(shape)) if return_argmax else loss
        results = registration.row_losses(
            matrix,
            rows.labels,
            scoring,
            opened,
            memory,
            chosen,
            class_weights=weights,
            probabilities=probabilities,
            shift=shift,
        )
    row_loss, lse, logprobs, entropy, argmax = results

    loss = reduce_rows(row_loss, rows, shape=shape, reduction=reduction, num_items=num_items)
    if not (return_lse or return_logprobs or return_entropy or return_argmax):
        return loss
    return CrossEntropyOutput(
        loss,
        lse.reshape(shape) if return_lse else None,
        logprobs.reshape(shape) if return_logprobs else None,
        entropy.reshape(shape) if return_entropy else None,
        argmax.reshape(shape) if return_argmax else None,
    )
