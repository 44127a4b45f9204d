"""The masked softmax in Triton: how tensors are walked, and which kernel does it; from shapes alone.

Rows that fit on the chip are kept there, a few to a program; longer ones are streamed twice, in 16-byte pieces.
Softmaxes along another dimension lie side by side and are computed side by side; nothing is transposed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from maskops import tuning
from maskops.ops import triton_language
from maskops.ops.softmax.triton_kernels import rows, tiles
from maskops.ops.triton_rows import aligned, group_of, in_step

_OUTER = 4
"""Outer dimensions that the kernels walk by themselves, after those that can be have been joined."""

_KEPT = 16384
"""Elements that a program keeps on the chip."""

_SMALL_TILE = 2048
"""Elements of a tile of short rows."""

_LANES = 64
_STREAMED_PLACES = 64
"""Places of a tile of lanes that are longer than a tile."""


class _Operand(NamedTuple):
    """A tensor of the common shape: where its memory begins at a multiple of 16 bytes, and its strides."""

    base: Tensor
    lead: int
    along: int
    across: int
    outer: tuple[int, ...]


class _Common(NamedTuple):
    """The common shape, seen as outer dimensions x length x lanes; lanes == 1: the softmax runs along rows.

    The first operand is dense: it is the one that is written, or laid out like it.
    """

    length: int
    lanes: int
    sizes: tuple[int, ...]
    operands: tuple[_Operand, ...]

    @property
    def outer_count(self) -> int:
        """How many softmaxes, or groups of lanes, there are."""
        count = 1
        for size in self.sizes:
            count *= size
        return count

    def is_aligned(self, operand: _Operand, group: int) -> bool:
        """Whether groups of a tile begin at multiples of 16 bytes wherever tiles begin."""
        neighbours, steps = (operand.across, operand.along) if self.lanes > 1 else (operand.along, 0)
        whole = self.lanes if self.lanes > 1 else self.length
        return neighbours == 1 and all(n % group == 0 for n in (whole, steps, operand.lead, *operand.outer))


def _merge(tensors: Sequence[Tensor | None], dim: int) -> tuple[list[int], list[list[int]], int]:
    """Sizes and strides of the outer dimensions, without those of size 1; two that all walk with one stride are one.

    Returns:
        sizes, the strides of every tensor, and how many of the dimensions lie behind the softmax.
    """
    dense = tensors[0]
    assert dense is not None
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in tensors]
    behind = 0
    for d, size in enumerate(dense.shape):
        if d == dim:
            behind = 0
        if d == dim or size == 1:
            continue
        here = [0 if tensor is None else tensor.stride(d) for tensor in tensors]
        joins = bool(sizes) and (d < dim or behind > 0)
        joins = joins and all(of_tensor[-1] == stride * size for of_tensor, stride in zip(strides, here, strict=True))
        if joins:
            sizes[-1] *= size
            for of_tensor, stride in zip(strides, here, strict=True):
                of_tensor[-1] = stride
            continue
        sizes.append(size)
        for of_tensor, stride in zip(strides, here, strict=True):
            of_tensor.append(stride)
        behind += d > dim
    return sizes, strides, behind


def _common(tensors: Sequence[Tensor | None], dim: int) -> _Common:
    """The common shape of tensors of one size; of those that are None the strides are 0."""
    sizes, strides, behind = _merge(tensors, dim)
    if len(sizes) - (behind > 0) > _OUTER:
        # More than four strides of their own: such tensors are copied.
        tensors = [None if tensor is None else tensor.contiguous() for tensor in tensors]
        sizes, strides, behind = _merge(tensors, dim)
    lanes = sizes.pop() if behind > 0 else 1
    operands = []
    for tensor, of_tensor in zip(tensors, strides, strict=True):
        across = of_tensor.pop() if behind > 0 else 0
        outer = (0,) * (_OUTER - len(of_tensor)) + tuple(of_tensor)
        if tensor is None:
            assert tensors[0] is not None
            operands.append(_Operand(tensors[0], 0, 0, 0, outer))
        else:
            operands.append(_Operand(*aligned(tensor), tensor.stride(dim), across, outer))
    dense = tensors[0]
    assert dense is not None
    return _Common(dense.shape[dim], lanes, (1,) * (_OUTER - len(sizes)) + tuple(sizes), tuple(operands))


class _Plan(NamedTuple):
    """Spans of a plan as the kernels take them, or what stands for none."""

    start: Tensor
    end: Tensor
    key_valid: Tensor
    n_spans: int = 0
    span_stride: int = 0
    batch_stride: int = 0
    key_batch_stride: int = 0
    q_len: int = 1
    rows_per_batch_element: int = 1

    @property
    def there(self) -> bool:
        """Whether there are spans."""
        return self.n_spans > 0


def _is_absent(tensor: Tensor) -> bool:
    return tensor.dim() == 1 and tensor.numel() == 0


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"masked_softmax: {message}")


def _plan(x: Tensor, dim: int, start: Tensor, end: Tensor, key_valid: Tensor) -> _Plan:
    if _is_absent(start):
        return _Plan(start, end, key_valid)
    n_dims = x.dim()
    _require(n_dims >= 2 and dim == n_dims - 1, "spans lie along the last of at least two dimensions")
    _require(
        start.dim() == 3 and end.dim() == 3 and key_valid.dim() == 2,
        "the spans have the wrong number of dimensions",
    )
    _require(
        start.dtype == torch.int32 and end.dtype == torch.int32 and key_valid.dtype == torch.uint8,
        "the spans must be int32 and key_valid uint8",
    )
    batch = 1 if n_dims == 2 else x.shape[0]
    q_len, k_len = x.shape[-2:]
    n_spans, plan_batch = start.shape[:2]
    _require(
        n_spans >= 1 and end.shape == start.shape and key_valid.shape[0] == plan_batch,
        "start, end and key_valid must agree in shape",
    )
    _require(
        plan_batch in (1, batch) and start.shape[2] == q_len and key_valid.shape[1] == k_len,
        "the spans are for other sizes than those of x",
    )
    _require(
        (q_len <= 1 or (start.stride(2) == 1 and end.stride(2) == 1))
        and start.stride()[:2] == end.stride()[:2]
        and (k_len <= 1 or key_valid.stride(1) == 1),
        "the spans must be contiguous",
    )
    shared = plan_batch == 1
    return _Plan(
        start,
        end,
        key_valid,
        n_spans,
        start.stride(0),
        0 if shared else start.stride(1),
        0 if shared else key_valid.stride(0),
        q_len,
        q_len if n_dims == 2 else x.numel() // (k_len * batch),
    )


def _power_of_2(count: int) -> int:
    """The least one that is not below ``count``."""
    return 1 << max(count - 1, 0).bit_length()


def _pieces(count: int, size: int) -> int:
    return -(-count // size)


class _Tile(NamedTuple):
    """A tile of S softmaxes with K elements each; ``stream``: they are longer."""

    softmaxes: int
    elements: int
    warps: int
    stream: bool


def _tile(common: _Common) -> _Tile:
    elements = _power_of_2(common.length)
    if common.lanes > 1:
        softmaxes = min(_LANES, _power_of_2(common.lanes))
        stream = softmaxes * elements > _KEPT
        elements = _STREAMED_PLACES if stream else elements
    else:
        softmaxes = max(1, _SMALL_TILE // elements)
        softmaxes = min(softmaxes, _power_of_2(common.outer_count))
        stream = elements > _KEPT
        elements = _KEPT // 8 if stream else elements
    warps = min(max(softmaxes * elements // 512, 1), 16)
    return _Tile(softmaxes, elements, warps, stream)


def _programs(common: _Common, tile: _Tile) -> int:
    if common.lanes > 1:
        return common.outer_count * _pieces(common.lanes, tile.softmaxes)
    return _pieces(common.outer_count, tile.softmaxes)


def _config(device: torch.device, dtype: torch.dtype) -> tuning.Config:
    element = "single" if dtype == torch.float32 else "half"
    return tuning.config("masked_softmax", triton_language.architecture(device), element)


def _streams_rows(common: _Common, operand: _Operand) -> bool:
    """Whether the kernel of long rows serves: their elements are neighbours."""
    return common.lanes == 1 and common.length > _KEPT and operand.along == 1


def masked_softmax_forward(
    x: Tensor, mask: Tensor, start: Tensor, end: Tensor, key_valid: Tensor, dim: int, return_lse: bool
) -> tuple[Tensor, Tensor]:
    """The registered operator; registration.py says what its arguments and results are."""
    has_mask = not _is_absent(mask)
    _require(0 <= dim < x.dim(), "dim is not one of x's")
    _require(not has_mask or mask.dtype == torch.bool, "mask must be bool")
    _require(not has_mask or mask.shape == x.shape, "the tensors must have the sizes of x")
    _require(not has_mask or _is_absent(start), "give a mask or spans, not both")
    weights = x.new_empty(x.shape)
    sizes = [*x.shape[:dim], *x.shape[dim + 1 :]] if return_lse else [0]
    lse = x.new_empty(sizes, dtype=torch.float32)
    if x.numel() == 0:
        return weights, lse.fill_(-torch.inf)
    plan = _plan(x, dim, start, end, key_valid)
    common = _common([weights, x, mask.view(torch.uint8) if has_mask else None], dim)
    of_weights, of_x, of_mask = common.operands
    group = group_of(x.dtype)
    spans = (
        plan.n_spans, plan.span_stride, plan.batch_stride, plan.key_batch_stride, plan.q_len,
        plan.rows_per_batch_element,
    )  # fmt: skip
    tensors = (of_x.base, of_mask.base, plan.start, plan.end, plan.key_valid, weights, lse)
    if _streams_rows(common, of_x):
        config = _config(x.device, x.dtype)
        triton_language.launch(
            rows.forward_rows,
            (common.outer_count,),
            x,
            (
                *tensors, common.length, *common.sizes[1:], of_x.lead, *of_x.outer,
                of_mask.lead, of_mask.along, *of_mask.outer, *spans,
            ),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            GROUP=group,
            MASK=has_mask,
            MASK_ALIGNED=has_mask and of_mask.along == 1 and _all_in_step(of_mask, of_x, group),
            SPANS=plan.there,
            LSE=return_lse,
            IN_STEP=_all_in_step(of_weights, of_x, group),
            BLOCK_V=config.blocks["BLOCK_V"],
            STAGES=config.num_stages,
        )  # fmt: skip
        return weights, lse
    tile = _tile(common)
    triton_language.launch(
        tiles.forward_tiles,
        (_programs(common, tile),),
        x,
        (
            *tensors, common.length, common.lanes, common.outer_count, *common.sizes[1:],
            of_x.lead, of_x.along, of_x.across, *of_x.outer,
            of_mask.lead, of_mask.along, of_mask.across, *of_mask.outer,
            of_weights.along, *of_weights.outer, *spans,
        ),
        num_warps=tile.warps,
        num_stages=2,
        GROUP=group,
        LANES=common.lanes > 1,
        ALIGNED=common.is_aligned(of_x, group) and common.is_aligned(of_weights, group),
        MASK_ALIGNED=has_mask and common.is_aligned(of_mask, group),
        MASK=has_mask,
        SPANS=plan.there,
        LSE=return_lse,
        STREAM=tile.stream,
        S=tile.softmaxes,
        K=tile.elements,
    )  # fmt: skip
    return weights, lse


def _all_in_step(a: _Operand, b: _Operand, group: int) -> bool:
    return all(in_step((a.lead, b.lead), strides, group) for strides in zip(a.outer, b.outer, strict=True))


def masked_softmax_backward(
    grad_weights: Tensor,
    grad_lse: Tensor,
    weights: Tensor,
    start: Tensor,
    end: Tensor,
    key_valid: Tensor,
    dim: int,
) -> Tensor:
    """The registered operator; registration.py says what its arguments and results are."""
    _require(0 <= dim < weights.dim(), "dim is not one of x's")
    _require(grad_weights.dtype == weights.dtype, "weights and their gradient must have one dtype")
    _require(grad_weights.shape == weights.shape, "the tensors must have the sizes of x")
    _require(weights.is_contiguous(), "weights must be those of the forward pass, dense")
    grad_x = weights.new_empty(weights.shape)
    if weights.numel() == 0:
        return grad_x
    has_lse = not _is_absent(grad_lse) or (weights.dim() == 1 and grad_lse.dim() == 0)
    _require(
        not has_lse
        or (
            grad_lse.dtype == torch.float32
            and grad_lse.is_contiguous()
            and grad_lse.shape == (*weights.shape[:dim], *weights.shape[dim + 1 :])
        ),
        "the gradient of the lse must be float32, dense and one value a softmax",
    )
    plan = _plan(weights, dim, start, end, key_valid)
    common = _common([grad_x, grad_weights], dim)
    of_result, of_grad = common.operands
    group = group_of(weights.dtype)
    spans = plan.n_spans, plan.span_stride, plan.batch_stride, plan.q_len, plan.rows_per_batch_element
    saved = aligned(weights)[0] if weights.storage_offset() % group == 0 else weights.clone()
    tensors = (saved, of_grad.base, grad_lse, plan.start, plan.end, grad_x)
    if _streams_rows(common, of_grad):
        config = _config(weights.device, weights.dtype)
        triton_language.launch(
            rows.backward_rows,
            (common.outer_count,),
            weights,
            (*tensors, common.length, *common.sizes[1:], of_grad.lead, *of_grad.outer, *spans),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            GROUP=group,
            SPANS=plan.there,
            LSE=has_lse,
            IN_STEP=_all_in_step(of_grad, of_result, group),
            BLOCK_V=config.blocks["BLOCK_V"],
            STAGES=config.num_stages,
        )
        return grad_x
    tile = _tile(common)
    triton_language.launch(
        tiles.backward_tiles,
        (_programs(common, tile),),
        weights,
        (
            *tensors, common.length, common.lanes, common.outer_count, *common.sizes[1:],
            of_grad.lead, of_grad.along, of_grad.across, *of_grad.outer,
            of_result.along, *of_result.outer, *spans,
        ),
        num_warps=tile.warps,
        num_stages=2,
        GROUP=group,
        LANES=common.lanes > 1,
        ALIGNED=common.is_aligned(of_grad, group) and common.is_aligned(of_result, group),
        SPANS=plan.there,
        LSE=has_lse,
        STREAM=tile.stream,
        S=tile.softmaxes,
        K=tile.elements,
    )  # fmt: skip
    return grad_x
