"""The meaning of masked cross-entropy, row by row, in plain PyTorch: differentiable by autograd, any number of times.

It computes in float32, or in float64 for float64 logits. Skipped rows are replaced before they are used, never
multiplied by zero afterwards: 0 * NaN is NaN, forwards and backwards.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from maskops.ops.cross_entropy.rows import Scoring, wide_dtype


def row_losses(
    logits: Tensor,
    labels: Tensor,
    scoring: Scoring,
    *,
    class_weights: Tensor | None = None,
    probabilities: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Scores every row of logits (N, V) against its label (N,), skipping the rows whose label is ``ignore_index``.

    A logit of -inf is a banned column: it has probability 0, it stays -inf under ``softcap``, label smoothing spreads
    over the other columns only, and it adds nothing to the entropy. ``argmax`` is that of the logits, the first of
    equals.

    Args:
        class_weights: (V,): factors of the columns' shares of the loss.
        probabilities: (N, V): rows are scored against these; their labels then only say whether they are skipped.

    Returns:
        loss, lse, logprobs, entropy, argmax: one value per row, 0 (argmax: -1) in skipped rows; the last two are empty
        where they were not asked for.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    wide = wide_dtype(dtype, logits.device)  # one value a row is cheap
    ignore_index, label_smoothing, z_loss, softcap, logit_scale, entropy, argmax = scoring
    kept = labels != ignore_index
    # Labels outside the vocabulary are an error that the caller reports; here they must only not be followed.
    index = torch.where(kept, labels, 0).long().clamp(0, logits.shape[1] - 1)[:, None]
    x = torch.where(kept[:, None], logits.to(dtype), 0.0)
    if probabilities is not None:
        index = x.detach().argmax(1, keepdim=True)

    def capped(z: Tensor) -> Tensor:
        return torch.where(z == -math.inf, z, softcap * torch.tanh(z / softcap)) if softcap else z

    # The label's own term (without a label, that of the largest logit) stays out of the sums over columns. With
    # d = sum over j != y of e^(z_j - z_y) the loss is log1p(d), which keeps its relative accuracy where the probability
    # of the label approaches 1 and lse - z_y cancels. The maximum is subtracted before the scale is applied: an error
    # of z is a relative one of the loss.
    at_label = capped(x.gather(1, index).squeeze(1).to(wide) * logit_scale)
    values, factor = (capped(x * logit_scale), 1.0) if softcap else (x, logit_scale)
    others = values.scatter(1, index, -math.inf)
    top = others.detach().amax(1).clamp(min=torch.finfo(dtype).min)
    depth = (others - top[:, None]) * factor
    exponentials = torch.exp(depth)
    top = top.to(wide) * factor
    total = exponentials.sum(1).to(wide)
    nothing = total == 0
    lse_of_others = torch.where(nothing, -math.inf, top + torch.log(torch.where(nothing, 1.0, total)))
    # From the threshold on, the rest of log1p(e^x) = x + log1p(e^-x) is below the resolution of float64.
    nll = F.softplus(lse_of_others - at_label, threshold=40.0)
    nll = torch.where(at_label < math.inf, nll, math.nan)
    lse = torch.logaddexp(lse_of_others, at_label)

    def cross(coefficients: Tensor) -> Tensor:
        """sum of a_j (lse - z_j) = a_y nll + sum over j != y of a_j ((lse - top) - depth_j); 0 * inf counts as 0."""
        rest = coefficients.scatter(1, index, 0.0)
        absent = (rest == 0) & (depth == -math.inf)
        rest = torch.where(absent, 0.0, rest)
        part = (rest * torch.where(absent, 0.0, depth)).sum(1).to(wide)
        own = coefficients.gather(1, index).squeeze(1).to(wide)
        of_label = own * torch.where((own == 0) & (nll == math.inf), 0.0, nll)
        return rest.sum(1).to(wide) * (lse - top) - part + of_label

    weights = torch.ones_like(x) if class_weights is None else class_weights.to(dtype).expand_as(x)
    if probabilities is not None:
        target = torch.where(kept[:, None], probabilities.to(dtype), 0.0)
        loss, logprobs = cross(weights * target), -cross(target)
    elif class_weights is not None:
        weight = weights.gather(1, index).squeeze(1).to(wide)
        loss, logprobs = torch.where(weight == 0, 0.0, weight * nll), -nll
    else:
        loss, logprobs = nll, -nll
    if label_smoothing:
        allowed = values > -math.inf
        smoothed = label_smoothing * cross(torch.where(allowed, weights, 0.0)) / allowed.sum(1)
        # 0 * inf where the label is banned.
        share = loss if label_smoothing < 1.0 else torch.where(loss == math.inf, 0.0, loss)
        loss = smoothed + (1.0 - label_smoothing) * share
    if z_loss:
        loss = loss + z_loss * lse.square()
    if entropy:
        # lse - z_j = (lse - top) - depth_j, weighed by the probabilities; the label's is nll.
        moment = (exponentials * torch.where(depth == -math.inf, 0.0, depth)).sum(1).to(wide)
        uncertainty = (total * (lse - top) - moment) * torch.exp(top - lse)
        uncertainty = uncertainty + torch.exp(-nll) * torch.where(nll == math.inf, 0.0, nll)

    def result(row: Tensor) -> Tensor:
        return torch.where(kept, row, 0.0).to(dtype)

    return (
        result(loss),
        result(lse),
        result(logprobs),
        result(uncertainty) if entropy else loss.new_empty(0, dtype=dtype),
        torch.where(kept, x.argmax(1), -1) if argmax else labels.new_empty(0, dtype=torch.int64),
    )
