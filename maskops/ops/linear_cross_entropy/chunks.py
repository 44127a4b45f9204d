"""Linear cross-entropy on the CPU: a chunk of rows at a time through all of the vocabulary.

A chunk's logits are one product, are scored by the kernel of cross-entropy, are overwritten by their gradient where one
is wanted, and end in two more products: the gradient of the chunk's hidden states, and its share of the gradient of the
weight. Gradients need the scores, and those need a whole row of logits: so chunks are rows, not columns.

The products are torch's. That of the logits is float32 whatever the inputs: torch would round its results to bfloat16.
So are the other two, but for inputs of bfloat16 on a processor with instructions for it: there the gradient of the
logits is rounded, and both take half of the time (elsewhere such a product takes tens of times longer). A weight of
another dtype, or one that the matrix product would have to copy, is converted tile by tile into the same small buffer.
That costs one conversion for every hundreds of multiplications, so it is not worth keeping.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from maskops.ops.cross_entropy.rows import check_labels

# Logits of a chunk. More rows make the products a little faster and take more memory; fewer than the least make them
# slow, since each reads the whole weight.
_CHUNK_BYTES = 1 << 25
_LEAST_ROWS = 128
_TILE_BYTES = 1 << 22  # of a converted weight: it stays in the caches


class _Columns:
    """The weight in tiles of columns of the logits, as float32 matrices that a product reads in place."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        vocabulary, width = weight.shape
        self.as_it_is = weight.dtype == torch.float32 and _product_reads(weight)
        step = vocabulary if self.as_it_is else max(1, _TILE_BYTES // (4 * max(width, 1)))
        self.tiles = [slice(begin, min(begin + step, vocabulary)) for begin in range(0, vocabulary, step)]
        self.buffer = weight.new_empty((0 if self.as_it_is else min(step, vocabulary), width), dtype=torch.float32)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Columns of the logits, and the part (columns, H) of the weight that makes them, good until the next one."""
        for tile in self.tiles:
            part = self.weight[tile]
            yield tile, part if self.as_it_is else self.buffer[: part.shape[0]].copy_(part)


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

    def results(self, *shape: int, dtype: torch.dtype, skipped: int = 0) -> Tensor:
        """A tensor with a value, or a row, for every row; ``skipped`` is that of the rows that are not scored."""
        if self.index is None:
            return torch.empty(self.total, *shape, dtype=dtype)
        return torch.full((self.total, *shape), skipped, dtype=dtype)


class _Sum:
    """A gradient that every chunk adds to, in float32."""

    def __init__(self, like: Tensor, wanted: bool, n_chunks: int) -> None:
        self.gradient = torch.empty_like(like) if wanted else like.new_empty(0)
        if n_chunks == 0:
            self.gradient.zero_()
        # Of a single chunk nothing is left to be added: tiles of the gradient can be rounded as they come.
        self.in_tiles = like.dtype != torch.float32 and n_chunks == 1
        in_place = not wanted or self.in_tiles or n_chunks == 0 or like.dtype == torch.float32
        self.sum = self.gradient if in_place else torch.empty_like(like, dtype=torch.float32)
        self.started = False

    def add_product(self, left: Tensor, right: Tensor, tiles: list[slice]) -> None:
        """Adds ``left.T @ right``, where a tile is a part of the columns of ``left``."""
        if self.in_tiles:
            for tile in tiles:
                self.gradient[tile] = left[:, tile].t() @ right
        elif left.dtype != self.sum.dtype:
            for tile in tiles:
                share = left[:, tile].t() @ right
                self.sum[tile] = self.sum[tile] + share if self.started else share
        else:
            torch.addmm(self.sum, left.t(), right, beta=int(self.started), out=self.sum)
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
        rows, columns = _Rows(chosen, vocabulary), _Columns(weight)
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

        buffer = torch.empty(rows.step, vocabulary)
        grad_buffer = torch.empty(rows.step if hidden_gradient and not directly else 0, width)
        wide_bias = bias.float()
        half = torch.bfloat16
        narrow = gradients and hidden.dtype == weight.dtype == half and _product_reads(weight) and multiplies_bfloat16()
        narrow_buffer = torch.empty((rows.step if narrow else 0, vocabulary), dtype=half)
        for chunk in rows.chunks:
            states = rows.take(hidden, chunk)
            x = states.float()
            n = x.shape[0]
            logits = buffer[:n]
            for tile, part in columns:
                if bias.numel():
                    torch.addmm(wide_bias[tile], x, part.t(), out=logits[:, tile])
                else:
                    torch.mm(x, part.t(), out=logits[:, tile])
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
                    grad_weight.add_product(grad_of_logits, states, columns.tiles)
                continue
            if hidden_gradient:
                part_of_grad = grad_hidden[chunk] if directly else grad_buffer[:n]
                for tile, part in columns:
                    torch.addmm(part_of_grad, logits[:, tile], part, beta=int(tile.start > 0), out=part_of_grad)
                if not directly:
                    rows.put(grad_hidden, part_of_grad, chunk)
            if weight_gradient:
                grad_weight.add_product(logits, x, columns.tiles)
        return (*outputs, grad_hidden, grad_weight.result(), grad_bias.result())
