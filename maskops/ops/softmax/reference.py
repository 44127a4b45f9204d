"""The meaning of the masked softmax: plain PyTorch, differentiable any number of times."""

import math

import torch
from torch import Tensor


def masked_softmax(x: Tensor, allowed: Tensor | None, dim: int) -> tuple[Tensor, Tensor]:
    """Softmax over the allowed elements along ``dim``, and its logsumexp.

    Args:
        x: floating, computed in float32 (float64 for float64).
        allowed: bool, broadcasts to x; None for all.
        dim: the dimension, not negative.

    Returns:
        The weights in x's dtype, 0 where not allowed, and the logsumexp without ``dim``. A softmax over nothing, or
        over nothing but -inf, gives 0 and -inf. Weights of 0 pass no gradient on, whatever it holds.
    """
    scores = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if x.shape[dim] == 0:
        return x.clone(memory_format=torch.contiguous_format), scores.logsumexp(dim)
    if allowed is not None:
        scores = torch.where(allowed, scores, -math.inf)
    # The result does not depend on what is subtracted, so no gradient goes there.
    top = scores.detach().amax(dim, keepdim=True)
    is_empty = top == -math.inf
    exponentials = torch.exp(scores - top.masked_fill(is_empty, 0.0))
    total = exponentials.sum(dim, keepdim=True)
    weights = exponentials / total.masked_fill(is_empty, 1.0)
    if allowed is not None:
        # Beside a NaN everything is NaN but what is masked.
        weights = torch.where(allowed, weights, 0.0)
    weights = weights.to(x.dtype)
    # Selected, not multiplied: behind this a gradient of NaN does not pass.
    weights = torch.where(weights == 0.0, 0.0, weights)
    lse = torch.where(is_empty, -math.inf, top + total.masked_fill(is_empty, 1.0).log())
    # inf - inf is NaN, but the logsumexp of an infinite score is infinite.
    lse = torch.where(top == math.inf, math.inf, lse)
    return weights.contiguous(), lse.squeeze(dim)
