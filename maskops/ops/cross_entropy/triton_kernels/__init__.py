"""Cross-entropy in Triton: launches, from shapes alone, with no look at a value.

Two launches a pass: one program a row streams the logits, and a small kernel does in float64 what is done once a row.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from maskops import tuning
from maskops.ops import triton_language
from maskops.ops.cross_entropy.triton_kernels import backward, forward
from maskops.ops.triton_rows import aligned, group_of, in_step

_SCORED_ROWS = 128
"""Rows of a program of the kernels with a thread a row."""

_STATISTICS = 6


class _Rows(NamedTuple):
    """What both passes know of their rows."""

    logits: Tensor
    lead: int
    target: Tensor
    class_weights: Tensor
    probabilities: Tensor
    probability_lead: int
    probability_stride: int
    shift: bool
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float
    logit_scale: float

    @property
    def soft(self) -> bool:
        """Whether rows are scored against probabilities."""
        return self.probabilities.dim() == 2

    @property
    def has_statistics(self) -> bool:
        """Whether the backward pass needs more of a row than its outputs."""
        return self.soft or self.label_smoothing != 0.0

    def by_column(self) -> bool:
        """Whether class weights enter column by column, not with the label alone."""
        return self.class_weights.numel() > 0 and self.has_statistics

    def values(self) -> tuple[float, float, float]:
        """The argument of tanh by a logit, the cap, and z by a value."""
        if self.softcap == 0.0:
            return 0.0, 0.0, self.logit_scale
        return self.logit_scale / self.softcap, self.softcap, 1.0

    def numbers(self) -> tuple[float, ...]:
        """Smoothing, z-loss, softcap and scale, the last two in two float32 each: kernels get no float64."""
        return self.label_smoothing, self.z_loss, *_two(self.softcap), *_two(self.logit_scale)

    def probabilities_in_step(self) -> bool:
        """Whether groups begin in the same columns of the probabilities as of the logits."""
        places, strides = (self.probability_lead, self.lead), (self.probability_stride, self.logits.stride(0))
        return in_step(places, strides, group_of(self.logits.dtype))

    def features(self) -> dict[str, Any]:
        """The compile-time arguments that the kernels of both passes share."""
        return {
            "SOFTCAP": self.softcap != 0.0,
            "SMOOTHING": self.label_smoothing != 0.0,
            "SOFT": self.soft,
            "SHIFT": self.shift and self.soft,
        }


def _two(value: float) -> tuple[float, float]:
    high = torch.tensor(value, dtype=torch.float64).float().item()
    return high, value - high


def _rows(
    logits: Tensor,
    target: Tensor,
    class_weights: Tensor,
    probabilities: Tensor,
    shift: bool,
    *numbers: Any,
) -> _Rows:
    _check(logits, target, class_weights, probabilities)
    lead, stride = 0, 0
    if probabilities.dim() == 2:
        _, lead = aligned(probabilities)
        stride = probabilities.stride(0)
        lead += stride if shift else 0  # row r is scored against row r + 1
    return _Rows(logits, aligned(logits)[1], target, class_weights, probabilities, lead, stride, shift, *numbers)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"cross_entropy: {message}")


def _check(logits: Tensor, target: Tensor, class_weights: Tensor, probabilities: Tensor) -> None:
    """What only a direct call of the operators can get wrong; the kernels rely on it for their memory accesses."""
    _require(
        logits.dim() == 2 and 1 <= logits.shape[1] < 2**31 - 1,
        "logits must have 2 dimensions and 1 to 2^31 - 2 columns",
    )
    rows, vocabulary = logits.shape
    _require(vocabulary == 1 or logits.stride(1) == 1, "the columns of logits must be contiguous")
    _require(target.shape == (rows,), "target must have a label per row")
    _require(target.dtype in (torch.int32, torch.int64), "target must be int32 or int64")
    if class_weights.numel():
        _require(
            class_weights.shape == (vocabulary,)
            and class_weights.dtype == torch.float32
            and class_weights.is_contiguous(),
            "class_weights must be float32, contiguous, one per column",
        )
    if probabilities.dim() == 2:
        _require(probabilities.shape == logits.shape, "probabilities must have the shape of logits")
        _require(vocabulary == 1 or probabilities.stride(1) == 1, "the columns of probabilities must be contiguous")


def _config(device: torch.device, dtype: torch.dtype) -> tuning.Config:
    element = "single" if dtype == torch.float32 else "half"
    return tuning.config("cross_entropy", triton_language.architecture(device), element)


def _columns_of(config: tuning.Config, vocabulary: int, group: int) -> tuple[int, int]:
    """Columns of a tile, and its warps: those of the table, or fewer where a row has fewer."""
    columns, warps = config.blocks["BLOCK_V"], config.num_warps
    least = 64 * group  # two groups a lane of a warp
    while columns > least and columns // 2 >= vocabulary:
        columns //= 2
        warps = max(warps // 2, 1)
    return columns, warps


def cross_entropy_forward(
    logits: Tensor,
    target: Tensor,
    class_weights: Tensor,
    probabilities: Tensor,
    shift: bool,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    entropy: bool,
    argmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The registered operator; registration.py says what its arguments and results are."""
    numbers = (ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    rows = _rows(logits, target, class_weights, probabilities, shift, *numbers)
    n_rows, vocabulary = logits.shape

    def per_row(wanted: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
        return logits.new_empty(n_rows if wanted else 0, dtype=dtype)

    loss, lse, logprobs, uncertainty = per_row(), per_row(), per_row(), per_row(entropy)
    highest = per_row(argmax, torch.int64)
    statistics = logits.new_empty((n_rows if rows.has_statistics else 0, _STATISTICS), dtype=torch.float64)
    if n_rows == 0:
        return loss, lse, logprobs, uncertainty, highest, statistics
    sums = logits.new_empty((forward.N_SUMS, n_rows), dtype=torch.float32)
    pivots = per_row(rows.soft, torch.int32)
    config = _config(logits.device, logits.dtype)
    group = group_of(logits.dtype)
    columns, warps = _columns_of(config, vocabulary, group)
    base = aligned(logits)[0]
    probability_base = aligned(probabilities)[0] if rows.soft else probabilities
    triton_language.launch(
        forward.sum_rows,
        (n_rows,),
        logits,
        (
            base, target, class_weights, probability_base, sums, pivots, highest,
            rows.lead, logits.stride(0), target.stride(0), rows.probability_lead, rows.probability_stride,
            n_rows, vocabulary, ignore_index, *rows.values(),
        ),
        num_warps=warps,
        num_stages=config.num_stages,
        **rows.features(),
        GROUP=group,
        WEIGHTED=rows.by_column(),
        IN_STEP=rows.soft and rows.probabilities_in_step(),
        ENTROPY=entropy,
        ARGMAX=argmax,
        BLOCK_V=columns,
        STAGES=config.num_stages,
    )  # fmt: skip
    triton_language.launch(
        forward.score_rows,
        (triton.cdiv(n_rows, _SCORED_ROWS),),
        logits,
        (
            target, class_weights, probability_base, sums, pivots, loss, lse, logprobs, uncertainty, statistics,
            target.stride(0), rows.probability_lead, rows.probability_stride, n_rows, vocabulary, ignore_index,
            *rows.numbers(),
        ),
        num_warps=_SCORED_ROWS // 32,
        num_stages=1,
        **rows.features(),
        WEIGHTED=class_weights.numel() > 0,
        ENTROPY=entropy,
        ROWS=_SCORED_ROWS,
    )  # fmt: skip
    return loss, lse, logprobs, uncertainty, highest, statistics


def _backward(
    rows: _Rows,
    incoming: tuple[Tensor, Tensor, Tensor, Tensor],
    saved: tuple[Tensor, Tensor, Tensor, Tensor],
    grad_logits: Tensor,
    grad_probabilities: Tensor,
) -> None:
    """Writes the gradients; ``grad_logits`` may be the logits, ``grad_probabilities`` has no rows if not wanted."""
    logits = rows.logits
    n_rows, vocabulary = logits.shape
    lse, logprobs, entropy, statistics = saved
    for grad in incoming:
        _require(
            grad.numel() == 0 or (grad.shape == (n_rows,) and grad.dtype == torch.float32),
            "an incoming gradient must be float32 with a value per row",
        )
    for values, wanted in ((lse, True), (logprobs, True), (entropy, incoming[3].numel() > 0)):
        _require(
            values.dtype == torch.float32 and values.is_contiguous() and values.shape[0] in (n_rows, wanted * n_rows),
            "lse, logprobs, entropy and statistics must be those of the forward pass",
        )
    _require(
        statistics.dtype == torch.float64
        and statistics.is_contiguous()
        and statistics.shape == (n_rows if rows.has_statistics else 0, _STATISTICS),
        "lse, logprobs, entropy and statistics must be those of the forward pass",
    )
    if n_rows == 0:
        return
    coefficients = logits.new_empty((backward.N_COEFFICIENTS, n_rows), dtype=torch.float32)
    pivots = logits.new_empty(n_rows, dtype=torch.int32)
    group = group_of(logits.dtype)
    base = aligned(logits)[0]
    probability_base = aligned(rows.probabilities)[0] if rows.soft else rows.probabilities
    grad_base, grad_lead = aligned(grad_logits)
    has_entropy = incoming[3].numel() > 0
    triton_language.launch(
        backward.find_coefficients,
        (triton.cdiv(n_rows, _SCORED_ROWS),),
        logits,
        (
            base, rows.target, rows.class_weights, probability_base, lse, logprobs, entropy, statistics,
            *incoming, coefficients, pivots, *(grad.stride(0) for grad in incoming),
            rows.lead, logits.stride(0), rows.target.stride(0), rows.probability_lead, rows.probability_stride,
            n_rows, vocabulary, rows.ignore_index, *rows.numbers(),
        ),
        num_warps=_SCORED_ROWS // 32,
        num_stages=1,
        **rows.features(),
        LOSS=incoming[0].numel() > 0,
        LSE=incoming[1].numel() > 0,
        LOGPROBS=incoming[2].numel() > 0,
        ENTROPY=has_entropy,
        WEIGHTED=rows.class_weights.numel() > 0,
        ROWS=_SCORED_ROWS,
    )  # fmt: skip
    config = _config(logits.device, logits.dtype)
    columns, warps = _columns_of(config, vocabulary, group)
    shares = grad_probabilities.shape[0] > 0
    triton_language.launch(
        backward.write_gradients,
        (n_rows,),
        logits,
        (
            base, rows.class_weights, probability_base, coefficients, pivots, grad_base, grad_probabilities,
            rows.lead, logits.stride(0), grad_lead, grad_logits.stride(0),
            rows.probability_lead, rows.probability_stride, n_rows, vocabulary, *rows.values(),
        ),
        num_warps=warps,
        num_stages=config.num_stages,
        **rows.features(),
        GROUP=group,
        WEIGHTED=rows.by_column(),
        IN_STEP=rows.soft and rows.probabilities_in_step(),
        ENTROPY=has_entropy,
        SHARES=shares,
        SHARES_IN_STEP=shares
        and in_step((vocabulary if rows.shift else 0, rows.lead), (vocabulary, logits.stride(0)), group),
        GRAD_IN_STEP=in_step((grad_lead, rows.lead), (grad_logits.stride(0), logits.stride(0)), group),
        BLOCK_V=columns,
        STAGES=config.num_stages,
    )  # fmt: skip


def cross_entropy_backward(
    grad_loss: Tensor,
    grad_lse: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    logits: Tensor,
    target: Tensor,
    class_weights: Tensor,
    probabilities: Tensor,
    lse: Tensor,
    logprobs: Tensor,
    entropy: Tensor,
    statistics: Tensor,
    shift: bool,
    probabilities_grad: bool,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
) -> tuple[Tensor, Tensor]:
    """The registered operator; registration.py says what its arguments and results are."""
    numbers = (ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    rows = _rows(logits, target, class_weights, probabilities, shift, *numbers)
    n_rows, vocabulary = logits.shape
    grad_logits = logits.new_empty((n_rows, vocabulary))
    wanted = probabilities_grad and rows.soft
    grad_probabilities = probabilities.new_empty((n_rows if wanted else 0, vocabulary))
    incoming = (grad_loss, grad_lse, grad_logprobs, grad_entropy)
    _backward(rows, incoming, (lse, logprobs, entropy, statistics), grad_logits, grad_probabilities)
    return grad_logits, grad_probabilities


def cross_entropy_backward_(
    grad_loss: Tensor,
    grad_lse: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    logits: Tensor,
    target: Tensor,
    class_weights: Tensor,
    probabilities: Tensor,
    lse: Tensor,
    logprobs: Tensor,
    entropy: Tensor,
    statistics: Tensor,
    shift: bool,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
) -> None:
    """The registered operator; registration.py says what its arguments are."""
    numbers = (ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    rows = _rows(logits, target, class_weights, probabilities, shift, *numbers)
    _require(
        logits.shape[0] <= 1 or logits.stride(0) >= logits.shape[1],
        "rows of logits that overlap in memory cannot hold their gradients",
    )
    incoming = (grad_loss, grad_lse, grad_logprobs, grad_entropy)
    _backward(rows, incoming, (lse, logprobs, entropy, statistics), logits, logits.new_empty(0, logits.shape[1]))
