"""The backward pass of span attention: which kernels run, on what, and in which memory.

Terms of rows, then the gradient of q over the work items and those of k and v over the key tiles, each recomputing P;
a kernel of its own for the gradient of a bias. Nothing waits for the device: grids and memory follow from shapes.
"""

from typing import Any

import torch
from torch import Tensor

from maskops.ops.attention.registration import empty_in_order
from maskops.ops.attention.triton_kernels.arguments import Problem, chosen, problem_of, strides_of
from maskops.ops.attention.triton_kernels.backward_bias import grad_bias_kernel, grad_slopes_kernel
from maskops.ops.attention.triton_kernels.backward_products import grad_keys_kernel, grad_queries_kernel
from maskops.ops.attention.triton_kernels.backward_rows import renewed_sums_kernel, row_terms_kernel
from maskops.ops.triton_language import architecture, launch
from maskops.spans import TILE_ROWS, transposed_bounds
from maskops.tuning import Config, config

ENOUGH_PROGRAMS = 264
"""Programs that occupy a large device twice. Not the device at hand: bits follow from how a sum is split."""

ROWS_OF_A_SPLIT = 1024
"""Fewer rows are not worth a program of their own for a tile of keys, and the float32 gradients that it leaves."""

_ROWS_OF_TERMS = 64


class Backward:
    """A call: its problem, and what its kernels take beyond that, by the names of their parameters.

    Attributes:
        problem: sizes and the arguments of the forward pass.
        values: arguments of every kernel.
    """

    def __init__(self, problem: Problem, grad_out: Tensor, grad_lse: Tensor, key_tiles: Tensor) -> None:
        self.problem = problem
        values = problem.values
        n_spans, plan_batch, q_len = problem.n_spans, problem.plan_batch, problem.q_len
        # Room for a whole tile behind the last row.
        padded_rows = -(-q_len // TILE_ROWS) * TILE_ROWS + TILE_ROWS
        batch_heads = problem.batch * problem.heads
        has_sums = values["HAS_BIAS"] or values["HAS_ALIBI"]
        has_grad_lse = grad_lse.numel() > 0
        has_shares = values["HAS_SINKS"] and has_grad_lse
        terms = grad_out.new_empty(
            4 if has_shares else 3 if has_sums else 2, batch_heads, padded_rows, dtype=torch.float32
        )
        row_start, row_end = (values["START"].new_empty(n_spans, plan_batch, padded_rows) for _ in range(2))
        self.values: dict[str, Any] = {
            **values,
            "GRAD_OUT": grad_out,
            **strides_of("grad_out", grad_out),
            "GRAD_LSE": grad_lse,
            "TERMS": terms,
            "term_stride": terms.stride(0),
            "padded_rows": padded_rows,
            "ROW_START": row_start,
            "ROW_END": row_end,
            "row_span_stride": row_start.stride(0),
            "ROW_SINKS": terms.new_empty(batch_heads if values["HAS_SINKS"] else 0, padded_rows),
            "KEY_TILES": key_tiles,
            "key_tiles_span_stride": key_tiles.stride(0),
            "key_tiles_batch_stride": key_tiles.stride(1),
            "HAS_GRAD_LSE": has_grad_lse,
            "HAS_SHARES": has_shares,
            "WIDE": values["WIDE"] or grad_out.stride(2) * TILE_ROWS >= 2**31,
        }

    def config(self, kernel: str) -> Config:
        """The row of the tuning table."""
        width = max(self.problem.width, self.problem.value_width)
        return config(kernel, architecture(self.values["Q"].device), self.problem.element, width)

    def fill_terms(self, out: Tensor, lse: Tensor) -> None:
        """The terms of rows, from what the forward pass left."""
        more = {"OUT": out, **strides_of("out", out), "FORWARD_LSE": lse}
        blocks = self.values["padded_rows"] // _ROWS_OF_TERMS * self.problem.batch * self.problem.heads
        arguments = chosen(row_terms_kernel, self.values, **more, BLOCK_M=_ROWS_OF_TERMS)
        launch(row_terms_kernel, (blocks,), out, (), **arguments, num_warps=4, num_stages=1)
        if self.values["HAS_BIAS"] or self.values["HAS_ALIBI"]:
            tuned = self.config("attention_backward_dq")
            units = self.problem.units(tuned.blocks["BLOCK_M"])
            arguments = chosen(renewed_sums_kernel, self.values, **more)
            launch(renewed_sums_kernel, (units,), out, (), **arguments, **tuned.launch())

    def queries_arguments(self, grad_q: Tensor, wants_slopes: bool) -> dict[str, Any]:
        """Arguments of the kernel of the gradient of q, but for blocks."""
        terms = self.values["TERMS"]
        row_slopes = terms.new_empty(terms.shape[1:] if wants_slopes else (0,))
        more = {"GRAD_Q": grad_q, **strides_of("grad_q", grad_q), "ROW_SLOPES": row_slopes}
        return chosen(grad_queries_kernel, self.values, **more, WANTS_SLOPES=wants_slopes)

    def grad_queries(self, wants_slopes: bool) -> tuple[Tensor, Tensor]:
        """The gradient of q, and what each row adds to that of its slope."""
        q = self.values["Q"]
        grad_q = empty_in_order(q, self.problem.width)
        tuned = self.config("attention_backward_dq")
        arguments = self.queries_arguments(grad_q, wants_slopes)
        launch(
            grad_queries_kernel, (self.problem.units(tuned.blocks["BLOCK_M"]),), q, (), **arguments, **tuned.launch()
        )
        return grad_q, arguments["ROW_SLOPES"]

    def keys_arguments(self, grad_k: Tensor, grad_v: Tensor, row_parts: int = 1) -> dict[str, Any]:
        """Arguments of the kernel of the gradients of k and v, (parts, batch, heads, keys, width), but for blocks."""
        values = self.values
        more: dict[str, Any] = {"parts": grad_k.shape[0], "row_parts": row_parts}
        for name, grad in (("grad_k", grad_k), ("grad_v", grad_v)):
            more |= {name.upper(): grad, **strides_of(name, grad[0]), f"{name}_part_stride": grad.stride(0)}
        return chosen(grad_keys_kernel, values, **more)

    def grad_keys(self) -> tuple[Tensor, Tensor]:
        """The gradients of k and v."""
        problem, k, v = self.problem, self.values["K"], self.values["V"]
        grad_k, grad_v = empty_in_order(k, problem.width), empty_in_order(v, problem.value_width)
        tuned = self.config("attention_backward_dkdv")
        tiles = -(-problem.k_len // tuned.blocks["BLOCK_N"]) * problem.kv_heads * problem.batch
        # Few tiles: the heads of a group, and then many rows, are split between programs, and what these leave is
        # added up.
        head_parts = largest_divisor(problem.heads // problem.kv_heads, ENOUGH_PROGRAMS // tiles)
        row_parts = max(1, min(ENOUGH_PROGRAMS // (tiles * head_parts), problem.q_len // ROWS_OF_A_SPLIT))
        parts = head_parts * row_parts
        of_parts = (grad_k[None], grad_v[None])
        if parts > 1:
            of_parts = (
                k.new_empty(parts, *grad_k.shape, dtype=torch.float32),
                k.new_empty(parts, *grad_v.shape, dtype=torch.float32),
            )
        arguments = self.keys_arguments(*of_parts, row_parts)
        launch(grad_keys_kernel, (tiles * parts,), k, (), **arguments, **tuned.launch())
        if parts > 1:
            grad_k.copy_(of_parts[0].sum(0))
            grad_v.copy_(of_parts[1].sum(0))
        return grad_k, grad_v

    def bias_arguments(self, grad_bias: Tensor) -> dict[str, Any]:
        """Arguments of the kernel of the gradient of the bias, (parts, of its sizes), but for blocks."""
        parts, batches, heads, rows, keys = grad_bias.shape
        return chosen(
            grad_bias_kernel,
            self.values,
            GRAD_BIAS=grad_bias,
            grad_bias_part_stride=grad_bias.stride(0),
            parts=parts,
            batches=self.problem.batch,
            bias_batches=batches,
            bias_heads=heads,
            SUMS_ROWS=rows < self.problem.q_len,
            SUMS_KEYS=keys < self.problem.k_len,
        )

    def grad_bias(self) -> Tensor:
        """The gradient of the bias."""
        problem = self.problem
        bias: Tensor = self.values["BIAS"]
        tuned = self.config("attention_backward_dkdv")
        row_tiles = -(-problem.q_len // tuned.blocks["BLOCK_M"])
        key_tiles = -(-problem.k_len // tuned.blocks["BLOCK_N"])
        batches, heads, rows, keys = bias.shape
        tiles = (
            batches * heads * (1 if rows < problem.q_len else row_tiles) * (1 if keys < problem.k_len else key_tiles)
        )
        shares = problem.batch * problem.heads * row_tiles * key_tiles // tiles
        parts = max(1, min(2 * ENOUGH_PROGRAMS // tiles, shares))
        dtype = torch.float32 if parts > 1 else bias.dtype
        grad_bias = bias.new_empty(parts, *bias.shape, dtype=dtype)
        launch(grad_bias_kernel, (tiles * parts,), bias, (), **self.bias_arguments(grad_bias), **tuned.launch())
        return grad_bias[0] if parts == 1 else grad_bias.sum(0).to(bias.dtype)

    def _of_rows(self, row_sums: Tensor) -> Tensor:
        """(batch, heads, q_len) of (batch * heads, padded rows)."""
        return row_sums.view(self.problem.batch, self.problem.heads, -1)[:, :, : self.problem.q_len]

    def grad_slopes(self, row_slopes: Tensor) -> Tensor:
        """The gradient of the slopes from what each row adds to it."""
        problem = self.problem
        slopes: Tensor = self.values["SLOPES"]
        sequences = slopes.shape[0]
        if sequences == 1:
            return self._of_rows(row_slopes).sum((0, 2), dtype=torch.float64).float()[None]
        if not self.values["BY_SEQUENCE"]:
            return self._of_rows(row_slopes).sum(2, dtype=torch.float64).float()
        ordinals = self.values["POSITIONS"][2]
        # Rows outside every sequence are put behind the last. Minima and maxima do not depend on an order.
        index = torch.where(ordinals < 0, sequences, ordinals.clamp(max=sequences - 1)).long()
        row = torch.arange(problem.q_len, dtype=torch.int32, device=index.device).expand_as(index)
        sizes = (index.shape[0], sequences + 1)
        first_row = row.new_full(sizes, problem.q_len).scatter_reduce(1, index, row, "amin")
        last_row = row.new_zeros(sizes).scatter_reduce(1, index, row + 1, "amax")
        grad_slopes = slopes.new_empty(slopes.shape)
        arguments = chosen(
            grad_slopes_kernel,
            self.values,
            ROW_SLOPES=row_slopes,
            ORDINALS=index,
            FIRST_ROW=first_row,
            LAST_ROW=last_row,
            GRAD_SLOPES=grad_slopes,
            ordinals_stride=index.stride(0),
            sequences_stride=sequences + 1,
            batches=problem.batch,
            BLOCK_M=_ROWS_OF_TERMS,
        )
        launch(grad_slopes_kernel, (sequences * problem.heads,), slopes, (), **arguments, num_warps=2, num_stages=1)
        return grad_slopes

    def grad_sinks(self) -> Tensor:
        """The gradient of the sinks."""
        return self._of_rows(self.values["ROW_SINKS"]).sum((0, 2), dtype=torch.float64).float()[None]


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of a number that is no more than the limit, or 1."""
    return next(divisor for divisor in range(min(number, max(limit, 1)), 0, -1) if number % divisor == 0)


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    start: Tensor,
    end: Tensor,
    key_valid: Tensor,
    tiles: Tensor,
    tile_count: Tensor,
    key_tiles: Tensor,
    order: Tensor,
    positions: Tensor,
    dense: Tensor,
    bias: Tensor,
    alibi_slopes: Tensor,
    sinks: Tensor,
    seed: Tensor,
    slopes_by_sequence: bool,
    softmax_scale: float,
    softcap: float,
    dropout_p: float,
    wants_bias: bool,
    wants_alibi_slopes: bool,
    wants_sinks: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator ``attention_backward_triton``; arguments as in ``registration``."""
    problem = problem_of(
        q, k, v, start, end, key_valid, tiles, tile_count, order, positions, dense, bias, alibi_slopes, sinks, seed,
        slopes_by_sequence, softmax_scale, softcap, dropout_p,
    )  # fmt: skip
    extras = ((bias, wants_bias), (alibi_slopes, wants_alibi_slopes), (sinks, wants_sinks))
    if 0 in (problem.batch, problem.heads, problem.q_len, problem.k_len):  # no pair: nothing arrives anywhere
        zeros = [empty_in_order(x, x.shape[3]).zero_() for x in (q, k, v)]
        others = [x.new_zeros(x.shape) if is_wanted else x.new_empty(0, dtype=torch.float32) for x, is_wanted in extras]
        return zeros[0], zeros[1], zeros[2], others[0], others[1], others[2]
    check_gradients(problem, grad_out, grad_lse, out, lse)
    if key_tiles.numel() == 0:  # a plan that was made without a gradient
        key_tiles = transposed_bounds(start.long(), end.long(), key_valid != 0, dense.numel() > 0)
    call = Backward(problem, grad_out, grad_lse.contiguous(), key_tiles.contiguous())
    call.fill_terms(out, lse.contiguous())
    wants_bias, wants_alibi_slopes, wants_sinks = (is_wanted and x.numel() > 0 for x, is_wanted in extras)
    grad_q, row_slopes = call.grad_queries(wants_alibi_slopes)
    grad_k, grad_v = call.grad_keys()
    absent = q.new_empty(0, dtype=torch.float32)
    return (
        grad_q,
        grad_k,
        grad_v,
        call.grad_bias() if wants_bias else absent,
        call.grad_slopes(row_slopes) if wants_alibi_slopes else absent,
        call.grad_sinks() if wants_sinks else absent,
    )


def check_gradients(problem: Problem, grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """Checks what the kernels rely on for their memory accesses.

    Raises:
        ValueError: a tensor does not belong to the call.
    """
    rows = (problem.batch, problem.heads, problem.q_len)
    for name, x in (("grad_out", grad_out), ("out", out)):
        if x.shape != (*rows, problem.value_width) or (x.shape[3] > 1 and x.stride(3) != 1):
            raise ValueError(
                f"attention: {name} must be {(*rows, problem.value_width)} with a contiguous last dimension"
            )
    for name, x in (("lse", lse), ("grad_lse", grad_lse)):
        if x.dtype != torch.float32 or (x.shape != rows and (x is lse or x.numel() > 0)):
            raise ValueError(f"attention: {name} must be float32 {rows}")
