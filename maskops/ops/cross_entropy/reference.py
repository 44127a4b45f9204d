"""The meaning of masked cross-entropy, row by row, in plain PyTorch: differentiable by autograd, any number of times.

It computes in float32, or in float64 for float64 logits. Skipped rows are replaced before they are used, never
multiplied by zero afterwards: 0 * NaN is NaN, forwards and backwards.
"""

import math

import torch
from torch import Tensor

from maskops.ops.cross_entropy.rows import Scoring


def row_losses(
    logits: Tensor,
    labels: Tensor,
    scoring: Scoring,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Scores every row of logits (N, V) against its label (N,), skipping the rows whose label is ``ignore_index``.

    A logit of -inf is a banned column: it has probability 0, it stays -inf under ``softcap``, label smoothing spreads
    over the other columns only, and it adds nothing to the entropy. ``argmax`` is that of the logits, the first of
    equals.

    Returns:
        loss, lse, logprobs, entropy, argmax: one value per row, 0 (argmax: -1) in skipped rows; the last two are empty
        where they were not asked for.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    ignore_index, label_smoothing, z_loss, softcap, logit_scale, entropy, argmax = scoring
    kept = labels != ignore_index
    # Labels outside the vocabulary are an error that the caller reports; here they must only not be followed.
    index = torch.where(kept, labels, 0).long().clamp(0, logits.shape[1] - 1)
    x = torch.where(kept[:, None], logits.to(dtype), 0.0)
    z = x * logit_scale
    if softcap:
        z = torch.where(z == -math.inf, z, softcap * torch.tanh(z / softcap))
    lse = torch.logsumexp(z, 1)
    nll = lse - z.gather(1, index[:, None]).squeeze(1)
    loss = nll
    if label_smoothing:
        allowed = z > -math.inf
        mean = torch.where(allowed, z, 0.0).sum(1) / allowed.sum(1)
        loss = (1.0 - label_smoothing) * nll + label_smoothing * (lse - mean)
    if z_loss:
        loss = loss + z_loss * lse.square()
    uncertainty = loss.new_empty(0)
    if entropy:
        logprobs = z - lse[:, None]
        uncertainty = -(torch.exp(logprobs) * torch.where(z == -math.inf, 0.0, logprobs)).sum(1)
        uncertainty = torch.where(kept, uncertainty, 0.0)
    return (
        torch.where(kept, loss, 0.0),
        torch.where(kept, lse, 0.0),
        torch.where(kept, -nll, 0.0),
        uncertainty,
        torch.where(kept, x.argmax(1), -1) if argmax else labels.new_empty(0, dtype=torch.int64),
    )
