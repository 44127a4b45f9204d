"""torch's cross_entropy on maskops: classes in the second dimension, labels or probabilities, class weights."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn import _reduction

from maskops import backend
from maskops.compat.sdpa import NotServedError, is_autocast
from maskops.ops.cross_entropy import api
from maskops.ops.cross_entropy.arguments import Reduction


def cross_entropy(
    input: Tensor,  # noqa: A002 - torch's name
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """``torch.nn.functional.cross_entropy``, argument for argument; the mean over no label at all is 0, not NaN.

    Raises:
        NotServedError: no fast backend serves the call, or torch will raise its own error about the arguments.
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    is_soft = target.is_floating_point()
    if target.dtype == torch.uint8:
        target = target.long()
    if (not is_soft and target.dtype != torch.int64) or reduction not in ("mean", "sum", "none") or input.dim() == 0:
        raise NotServedError("torch refuses these arguments")
    reason = backend.refusal("cross_entropy", input.device.type, input.dtype)
    if reason is not None:
        raise NotServedError(reason)
    # Classes in the second dimension: a view, which is copied only where rows of classes are not dense.
    logits, target = (
        x.movedim(1, -1) if x.dim() > 2 and moves else x for x, moves in ((input, True), (target, is_soft))
    )
    loss: Tensor = api.cross_entropy(
        logits,
        target,
        class_weights=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=cast(Reduction, reduction),
    )
    # torch's loss has the dtype of the logits, except under autocast, which computes it in float32.
    return loss if is_autocast(input.device.type) else loss.to(input.dtype)
