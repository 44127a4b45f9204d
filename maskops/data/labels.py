"""Labels: which token each position learns to predict. The only place where labels are shifted.

Labels are kept aligned with their tokens; position ``i`` is scored against the label of position ``i + 1``, provided
that both belong to one sequence. Which sequence a position belongs to is given by ``sequence_ids``, so that one
definition serves packed rows and both sides of padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskops.checks import INTEGERS, check_tensor

IGNORE_INDEX = -100
"""Label of tokens that have no target."""


def _checked(labels: Tensor, sequence_ids: Tensor) -> tuple[Tensor, Tensor]:
    for name, tensor in (("labels", labels), ("sequence_ids", sequence_ids)):
        check_tensor(name, tensor, "(..., length)")
        if tensor.dtype not in INTEGERS:
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected integers")
    if labels.dim() == 0 or labels.shape != sequence_ids.shape:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}, sequence_ids {tuple(sequence_ids.shape)}: expected (..., length) "
            "for both, one label and one sequence number for each token"
        )
    # Narrow dtypes hold neither the label of no target nor the number of no sequence.
    return labels.to(torch.int64), sequence_ids.to(torch.int64)


def shift_labels(labels: Tensor, sequence_ids: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """The label of the next token of the same sequence; nothing is predicted across a boundary.

    Args:
        labels: integers (..., length), aligned with the tokens.
        sequence_ids: integers, same shape: the sequence of each token, negative = padding. Sequences are contiguous.
        ignore_index: what positions without a target hold: the last of each sequence, and padding.

    Returns:
        int64, same shape: what ``logits`` of the same position are scored against.
    """
    labels, sequence_ids = _checked(labels, sequence_ids)
    ids = torch.nn.functional.pad(sequence_ids, (0, 1), value=-1)
    following = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return torch.where((ids[..., :-1] == ids[..., 1:]) & (ids[..., :-1] >= 0), following, ignore_index)


def without_first_tokens(labels: Tensor, sequence_ids: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Labels for a model that shifts them itself, by one place and without a look at boundaries.

    The first token of every sequence, which nothing can predict, and padding are ignored; shifting the result by one
    then gives exactly ``shift_labels``.

    Args:
        labels: integers (..., length), aligned with the tokens.
        sequence_ids: integers, same shape: the sequence of each token, negative = padding.
        ignore_index: the label of no target.

    Returns:
        int64, same shape.
    """
    labels, sequence_ids = _checked(labels, sequence_ids)
    before = torch.nn.functional.pad(sequence_ids, (1, 0), value=-1)[..., :-1]
    return torch.where((before == sequence_ids) & (sequence_ids >= 0), labels, ignore_index)
