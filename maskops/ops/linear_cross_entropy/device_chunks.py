"""Linear cross-entropy on a device: a chunk of rows at a time, with no look at a value.

As on the CPU (chunks.py), a chunk's logits are one product, are scored and overwritten by their gradient by the kernels
of cross-entropy, and end in two more products. What differs: how many rows are kept is known to the device alone. Rows
are put in an order in which those that are kept come first, the number of chunks follows from the number of all rows,
and the chunks that have no row left to score find rows of zeros. Their products take their time: what a masked row
saves here is the rest, not the product.

The products are cuBLAS's, in the dtype of the inputs where hidden and weight share one, else in float32; they are
summed in float32, and so are logits and the gradient of the weight. Gradients of logits are rounded to that dtype,
multiplied by a power of two before that so that float16 holds them.
"""

import torch
from torch import Tensor

from maskops.layouts import values_can_be_read
from maskops.ops.cross_entropy.rows import check_labels
from maskops.ops.operators import name_of

# Logits of a chunk, in float32. More rows make better products and take more memory.
_CHUNK_BYTES = 1 << 28
_LEAST_ROWS = 512


def product(out: Tensor, left: Tensor, right: Tensor, *, accumulate: bool = False) -> Tensor:
    """``left @ right`` into ``out``, or added to it; summed in float32 whatever the dtype of the two, which they share.

    Args:
        out: float32, or of the dtype of the two.
    """
    beta = 1 if accumulate else 0
    if left.dtype == out.dtype:
        return torch.addmm(out, left, right, beta=beta, out=out)
    if left.is_cuda:
        if not accumulate:
            return torch.mm(left, right, out_dtype=out.dtype, out=out)
        return torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    # torch's products on the processor have no output of another dtype.
    return torch.addmm(out, left.to(out.dtype), right.to(out.dtype), beta=beta, out=out)


def _readable(matrix: Tensor) -> Tensor:
    """The matrix, copied once where every product would copy it."""
    rows, columns = matrix.stride()
    as_it_is = (columns == 1 and rows >= max(1, matrix.shape[1])) or (rows == 1 and columns >= max(1, matrix.shape[0]))
    return matrix if as_it_is else matrix.contiguous()


def _exponent(incoming: list[Tensor], kept: Tensor) -> Tensor:
    """A power of two by which the incoming gradients of kept rows come near 1, float32, 0-dim."""
    largest = [torch.where(kept, grad, 0.0).abs().amax() for grad in incoming if grad.numel()]
    if not largest:
        return torch.ones((), device=kept.device)
    bound = torch.stack(largest).amax()
    bound = torch.where(bound.isfinite() & (bound > 0.0), bound, 1.0)
    return torch.exp2(-torch.log2(bound).floor().clamp(-100.0, 100.0))


class _Rows:
    """All rows, those that are kept first, in equal chunks."""

    def __init__(self, kept: Tensor, vocabulary: int) -> None:
        total = kept.shape[0]
        # A stable sort of one bit: every row has a place of its own, so nothing is written twice or not at all.
        self.order = torch.argsort(kept.logical_not().to(torch.uint8), stable=True)
        most = max(_LEAST_ROWS, _CHUNK_BYTES // (4 * vocabulary))
        n_chunks = -(-total // most)
        self.step = -(-total // n_chunks) if n_chunks else 0
        self.chunks = [slice(at, min(at + self.step, total)) for at in range(0, total, max(self.step, 1))]

    def take(self, values: Tensor, chunk: slice) -> Tensor:
        return values.index_select(0, self.order[chunk]) if values.numel() else values

    def put(self, results: Tensor, values: Tensor, chunk: slice) -> None:
        results.index_copy_(0, self.order[chunk], values.to(results.dtype))


def linear_cross_entropy(
    backend: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    class_weights: Tensor,
    grad_loss: Tensor,
    grad_lse: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    entropy: bool,
    argmax: bool,
    values: bool,
    hidden_gradient: bool,
    weight_gradient: bool,
    bias_gradient: bool,
) -> tuple[Tensor, ...]:
    """The registered operator on the kernels of a backend; registration.py says what the other arguments are."""
    vocabulary, width = weight.shape
    if values_can_be_read([labels], labels.device):
        check_labels(labels, vocabulary, ignore_index)
    forward = getattr(torch.ops.maskops, name_of("cross_entropy_forward", backend))
    backward = getattr(torch.ops.maskops, name_of("cross_entropy_backward_", backend))
    both = torch.ops.maskops.cross_entropy_both__cuda if backend == "cuda" else None  # reads a chunk's logits once
    # Inside an operator, autograd and autocast would still see its tensors.
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        single, total = torch.float32, labels.shape[0]
        incoming = [grad_loss, grad_lse, grad_logprobs, grad_entropy]
        kept = labels != ignore_index
        if not values:
            # A row whose incoming gradients are 0 has none to pass on.
            needed = [grad != 0 for grad in incoming if grad.numel()]
            kept = kept & torch.stack(needed).any(0) if needed else torch.zeros_like(kept)
            labels = labels.masked_fill(~kept, ignore_index)
        rows = _Rows(kept, vocabulary)
        numbers = (ignore_index, label_smoothing, z_loss, softcap, logit_scale)
        gradients = hidden_gradient or weight_gradient or bias_gradient

        def results(wanted: bool, dtype: torch.dtype = single) -> Tensor:
            return hidden.new_empty(total if wanted else 0, dtype=dtype)

        outputs = [results(values), results(values), results(values), results(values and entropy)]
        outputs.append(results(values and argmax, torch.int64))
        grad_hidden = hidden.new_empty(hidden.shape if hidden_gradient else (0,))
        grad_weight = torch.empty_like(weight) if weight_gradient else weight.new_empty(0)
        grad_bias = torch.empty_like(bias) if bias_gradient else bias.new_empty(0)

        dtype = hidden.dtype if hidden.dtype == weight.dtype else single
        matrix = _readable(weight).to(dtype)
        wide_bias = bias.float()
        buffer = hidden.new_empty((rows.step, vocabulary), dtype=single)
        narrow = hidden.new_empty((rows.step if gradients and dtype != single else 0, vocabulary), dtype=dtype)
        part = hidden.new_empty((rows.step if hidden_gradient else 0, width), dtype=single)
        # The layout of the weight, so that a float32 gradient is summed where it ends up.
        in_place = weight_gradient and weight.dtype == single and grad_weight.is_contiguous()
        sums = grad_weight if in_place else hidden.new_empty(weight.shape if weight_gradient else (0, 0), dtype=single)
        bias_sums = wide_bias.new_zeros(vocabulary if bias_gradient else 0)
        scale = _exponent(incoming, kept) if gradients and dtype == torch.float16 else None
        if not rows.chunks:
            sums.zero_()

        for number, chunk in enumerate(rows.chunks):
            chosen = rows.take(kept, chunk)[:, None]
            x = rows.take(hidden, chunk) if width else hidden[chunk]
            # Of rows that are not scored nothing is read into a product, not even times 0.
            x = torch.where(chosen, x, 0.0).to(dtype)
            n = x.shape[0]
            logits = product(buffer[:n], x, matrix.t())
            if bias.numel():
                logits.add_(wide_bias)
            targets = (rows.take(labels, chunk), class_weights, logits.new_empty(0))  # no probabilities
            taken = [rows.take(grad, chunk) for grad in incoming] if gradients else []
            if gradients and both is not None:
                scores = both(*taken, logits, *targets[:2], *numbers, entropy, argmax)
            else:
                *scores, statistics = forward(logits, *targets, False, *numbers, entropy, argmax)
                _, lse, logprobs, uncertainty, _ = scores
                if gradients:
                    backward(*taken, logits, *targets, lse, logprobs, uncertainty, statistics, False, *numbers)
            if values:
                for result, score in zip(outputs, scores, strict=True):
                    if result.numel():
                        rows.put(result, score, chunk)
            if not gradients:
                continue
            grad = logits
            if bias_gradient:
                bias_sums += logits.sum(0)
            if scale is not None:
                grad = narrow[:n].copy_(logits.mul_(scale))
            elif dtype != single:
                grad = narrow[:n].copy_(logits)
            if hidden_gradient:
                of_rows = product(part[:n], grad, matrix)
                of_rows = of_rows if scale is None else of_rows.div_(scale)
                # A weight that is not finite would make them NaN.
                rows.put(grad_hidden, torch.where(chosen, of_rows, 0.0), chunk)
            if weight_gradient:
                product(sums, grad.t(), x, accumulate=number > 0)
        if weight_gradient:
            sums = sums if scale is None else sums.div_(scale)
            grad_weight = sums if in_place else grad_weight.copy_(sums)
        if bias_gradient:
            grad_bias.copy_(bias_sums)
        return (*outputs, grad_hidden, grad_weight, grad_bias)
