"""Linear cross-entropy on the CPU: a chunk of rows at a time through all of the vocabulary.

A chunk's logits are one product, are scored by the kernel of cross-entropy, are overwritten by their gradient where one
is wanted, and end in two more products: the gradient of the chunk's hidden states, and its share of the gradient of the
weight. Gradients need the scores, and those need a whole row of logits: so chunks are rows, not columns.

The products are our own (csrc/cpu/matmul.cpp) and float32 whatever the inputs, which they convert while they pack them,
of any strides: nothing is copied for them. Those of torch reach less of the processor's limit, and for bfloat16 take
tens of times longer where it has no instructions for it. Where it has, and for inputs of bfloat16, the gradient of the
logits is rounded, and both products with it are torch's, in half of the time.
"""

import torch
from torch import Tensor

from maskops.ops.cross_entropy.rows import check_labels

# Logits of a chunk. Every chunk packs the weight twice and adds to its whole gradient: more rows make that cheaper and
# take more memory.
_CHUNK_BYTES = 1 << 26
_LEAST_ROWS = 128
_TILE_BYTES = 1 << 22  # of a share of the weight's gradient that is rounded at once: it stays in the caches


def _multiply(left: Tensor, right: Tensor, result: Tensor, *, row: Tensor | None = None, add: bool = False) -> None:
    """Writes ``left @ right``, plus a row or what the result holds, to a float32 matrix without gaps."""
    if result.stride(1) != 1 and result.shape[1] > 1:
        left, right, result = right.t(), left.t(), result.t()
    torch.ops.maskops.matmul_into(left, right, result.new_empty(0) if row is None else row, result, add)


def _empty(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A matrix in memory that was touched before, where it is large and there is some: without page faults."""
    matrix: Tensor = torch.ops.maskops.empty_matrix(torch.empty(0, dtype=dtype), rows, columns)
    return matrix


def _empty_like(values: Tensor, dtype: torch.dtype) -> Tensor:
    if values.dim() == 2 and values.is_contiguous():
        return _empty(values.shape[0], values.shape[1], dtype)
    if values.dim() == 2 and values.t().is_contiguous():
        return _empty(values.shape[1], values.shape[0], dtype).t()
    return torch.empty_like(values, dtype=dtype)


def multiplies_bfloat16() -> bool:
    """Whether this processor, and the library that torch multiplies with on it, have instructions for bfloat16."""
    # The capability is what ATEN_CPU_CAPABILITY may have lowered.
    capable = torch.backends.cpu.get_cpu_capability().startswith("AVX512") and torch.cpu._is_avx512_bf16_supported()
    return capable and torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def _product_reads(matrix: Tensor) -> bool:
    rows, columns = matrix.stride()
    return (columns == 1 and rows >= max(1, matrix.shape[1])) or (rows == 1 and columns >= max(1, matrix.shape[0]))


class _Rows:
    """The rows that are scored, in chunks; all others are neither read nor written."""

    def __init__(self, chosen: Tensor, vocabulary: int) -> None:
        self.count = int(chosen.sum())
        self.total = chosen.shape[0]
        self.index = None if self.count == self.total else chosen.nonzero().squeeze(1)
        most = max(_LEAST_ROWS, _CHUNK_BYTES // (4 * vocabulary))
        # Equal chunks: a small last one would be a slow product.
        n_chunks = -(-self.count // most)
        self.step = -(-self.count // n_chunks) if n_chunks else 0
        self.chunks = [slice(at * self.step, min((at + 1) * self.step, self.count)) for at in range(n_chunks)]

    def take(self, values: Tensor, chunk: slice) -> Tensor:
        return values[chunk] if self.index is None else values.index_select(0, self.index[chunk])

    def put(self, results: Tensor, values: Tensor, chunk: slice) -> None:
        if self.index is None:
            results[chunk] = values
        else:
            results.index_copy_(0, self.index[chunk], values.to(results.dtype))

    def results(self, *width: int, dtype: torch.dtype, skipped: int = 0) -> Tensor:
        """A tensor with a value, or a row, for every row; ``skipped`` is that of the rows that are not scored."""
        results = _empty(self.total, width[0], dtype) if width else torch.empty(self.total, dtype=dtype)
        return results if self.index is None else results.fill_(skipped)


class _Sum:
    """A gradient that every chunk adds to, in float32."""

    def __init__(self, like: Tensor, wanted: bool, n_chunks: int) -> None:
        self.gradient = _empty_like(like, like.dtype) if wanted else like.new_empty(0)
        if n_chunks == 0:
            self.gradient.zero_()
        # Of a single chunk nothing is left to be added: tiles of the gradient can be rounded as they come.
        self.in_tiles = like.dtype != torch.float32 and n_chunks == 1
        in_place = not wanted or self.in_tiles or n_chunks == 0 or like.dtype == torch.float32
        self.sum = self.gradient if in_place else _empty_like(like, torch.float32)
        self.started = False

    def add_product(self, left: Tensor, right: Tensor) -> None:
        """Adds ``left.T @ right``."""
        if not self.in_tiles and left.dtype == torch.float32:
            _multiply(left.t(), right, self.sum, add=self.started)
        else:
            vocabulary, width = self.sum.shape
            step = max(1, _TILE_BYTES // (4 * max(width, 1)))
            buffer = self.sum.new_empty(step if left.dtype == torch.float32 else 0, width, dtype=torch.float32)
            for begin in range(0, vocabulary, step):
                columns = left[:, begin : begin + step]
                if left.dtype == torch.float32:
                    share = buffer[: columns.shape[1]]
                    _multiply(columns.t(), right, share)
                else:
                    share = columns.t() @ right
                tile = self.sum[begin : begin + step]
                tile.copy_(tile + share if self.started else share)
        self.started = True

    def add(self, share: Tensor) -> None:
        self.sum.copy_(self.sum + share if self.started else share)
        self.started = True

    def result(self) -> Tensor:
        return self.gradient if self.sum is self.gradient else self.gradient.copy_(self.sum)


def linear_cross_entropy(
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
    """The registered operator on the CPU; registration.py says what its arguments and results are."""
    check_labels(labels, weight.shape[0], ignore_index)
    # Inside an operator, autograd and autocast would still see its tensors.
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        incoming = [grad_loss, grad_lse, grad_logprobs, grad_entropy]
        chosen = labels != ignore_index
        if not values:
            # A row whose incoming gradients are 0 has none to pass on.
            needed = [grad != 0 for grad in incoming if grad.numel()]
            chosen = chosen & torch.stack(needed).any(0) if needed else torch.zeros_like(chosen)
        vocabulary, width = weight.shape
        rows = _Rows(chosen, vocabulary)
        numbers = (ignore_index, label_smoothing, z_loss, softcap, logit_scale)
        single, gradients = torch.float32, hidden_gradient or weight_gradient or bias_gradient

        outputs = [rows.results(dtype=single) if values else hidden.new_empty(0, dtype=single) for _ in range(3)]
        outputs.append(rows.results(dtype=single) if values and entropy else hidden.new_empty(0, dtype=single))
        best = rows.results(dtype=torch.int64, skipped=-1) if values and argmax else labels.new_empty(0).long()
        outputs.append(best)
        grad_hidden = rows.results(width, dtype=hidden.dtype) if hidden_gradient else hidden.new_empty(0)
        directly = hidden_gradient and rows.index is None and hidden.dtype == single
        grad_weight = _Sum(weight, weight_gradient, len(rows.chunks))
        grad_bias = _Sum(bias, bias_gradient, len(rows.chunks))

        buffer = _empty(rows.step, vocabulary, single)
        grad_buffer = _empty(rows.step if hidden_gradient and not directly else 0, width, single)
        wide_bias = bias.float().contiguous() if bias.numel() else None
        half = torch.bfloat16
        narrow = gradients and hidden.dtype == weight.dtype == half and _product_reads(weight) and multiplies_bfloat16()
        narrow_buffer = _empty(rows.step if narrow else 0, vocabulary, half)
        for chunk in rows.chunks:
            states = rows.take(hidden, chunk)
            n = states.shape[0]
            logits = buffer[:n]
            _multiply(states, weight.t(), logits, row=wide_bias)
            targets = (rows.take(labels, chunk), class_weights, logits.new_empty(0))  # no probabilities
            if gradients:
                taken = [rows.take(grad, chunk) if grad.numel() else grad for grad in incoming]
                scores = torch.ops.maskops.cross_entropy_both_into(
                    *taken, logits, *targets, logits, False, *numbers, entropy, argmax
                )
            else:
                *scores, _ = torch.ops.maskops.cross_entropy_forward(logits, *targets, False, *numbers, entropy, argmax)
            if values:
                for result, score in zip(outputs, scores, strict=True):
                    if result.numel():
                        rows.put(result, score, chunk)
            if bias_gradient:
                grad_bias.add(logits.sum(0))
            if narrow:
                grad_of_logits = narrow_buffer[:n].copy_(logits)
                if hidden_gradient:
                    rows.put(grad_hidden, grad_of_logits @ weight, chunk)
                if weight_gradient:
                    grad_weight.add_product(grad_of_logits, states)
                continue
            if hidden_gradient:
                part_of_grad = grad_hidden[chunk] if directly else grad_buffer[:n]
                _multiply(logits, weight, part_of_grad)
                if not directly:
                    rows.put(grad_hidden, part_of_grad, chunk)
            if weight_gradient:
                grad_weight.add_product(logits, states)
        return (*outputs, grad_hidden, grad_weight.result(), grad_bias.result())
