"""The meaning of linear cross-entropy in plain PyTorch: the logits as a whole, then cross-entropy's own reference.

Hidden states of skipped rows are replaced before they are used: their logits would be skipped too, but the gradient of
the weight multiplies them by zeros, and 0 * NaN is NaN.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

from maskops.checks import has_autocast
from maskops.ops.cross_entropy import reference
from maskops.ops.cross_entropy.rows import Scoring


def row_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scoring: Scoring,
    class_weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Scores ``hidden @ weight.T + bias``, computed in float32 (float64 where an input is), as cross-entropy does.

    Args:
        hidden: (N, H).
        weight: (V, H).
        bias: (V,) or None.
        labels: (N,); rows that hold ``scoring.ignore_index`` are skipped.
        scoring: how a row is scored.
        class_weights: (V,) or None: factors of the columns' shares of the loss.

    Returns:
        loss, lse, logprobs, entropy, argmax: one value per row, 0 (argmax: -1) in skipped rows; the last two are empty
        where they were not asked for.
    """
    inputs = (hidden, weight) if bias is None else (hidden, weight, bias)
    dtype = torch.float64 if torch.float64 in [x.dtype for x in inputs] else torch.float32
    hidden = torch.where((labels != scoring.ignore_index)[:, None], hidden.to(dtype), 0.0)
    device = hidden.device.type
    known = has_autocast(device)
    with torch.autocast(device, enabled=False) if known else contextlib.nullcontext():
        logits = F.linear(hidden, weight.to(dtype), None if bias is None else bias.to(dtype))
    return reference.row_losses(logits, labels, scoring, class_weights=class_weights)
