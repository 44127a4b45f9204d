"""Token ids, labels and lengths as users have them: lists, tensors and arrays become tensors of integers."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from maskops.checks import INTEGERS
from maskops.data.labels import IGNORE_INDEX

Tokens = Tensor | Sequence[int]
"""Token ids or labels of one sequence; arrays of integers are taken as well."""


def integer(name: str, value: object) -> int:
    """An integer of any sign, or an error that names the argument."""
    try:
        return operator.index(value)  # type: ignore[arg-type]  # what it refuses is what is checked
    except TypeError:
        raise TypeError(f"{name} is {value!r}: expected an integer") from None


def _from_array(array: Any) -> Tensor | None:
    """int64 tensor of an array of integers, in one copy and not token by token; None if it is something else."""
    if getattr(getattr(array, "dtype", None), "kind", None) not in ("i", "u"):
        return None
    tensor: Tensor = torch.as_tensor(array.astype("int64"))
    return tensor


def _from_items(name: str, items: list[Any]) -> Tensor:
    # Without a dtype, so that floats are seen and not truncated; of an empty list torch would make floats.
    try:
        return torch.tensor(items) if items else torch.zeros(0, dtype=torch.int64)
    except (TypeError, ValueError) as error:
        first = type(items[0]).__name__
        raise TypeError(f"{name} is a list of {first}, expected a list or a tensor of token ids") from error


def token_ids(name: str, sequence: Tokens) -> Tensor:
    """int64 (length,) of a list, a tensor or an array of integers; errors call it ``name``."""
    if isinstance(sequence, Tensor):
        tensor = sequence
    elif isinstance(sequence, (str, bytes, dict)) or not isinstance(sequence, Iterable):
        raise TypeError(f"{name} is {type(sequence).__name__}, expected a list or a tensor of token ids")
    else:
        array = _from_array(sequence)
        tensor = _from_items(name, list(sequence)) if array is None else array
        if not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool:
            tensor = tensor.to(torch.int64)  # also the uint16 in which token ids are often stored
    if tensor.dim() != 1:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected (length,)")
    if tensor.dtype not in INTEGERS and tensor.shape[0]:  # torch.tensor([]) is float32
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected integers")
    return tensor.to(torch.int64)


def token_lists(sequences: Iterable[Tokens], labels: Iterable[Tokens] | None) -> tuple[list[Tensor], list[Tensor]]:
    """Sequences and their labels (none: an empty list) as int64 tensors that agree in length."""
    tokens = [token_ids(f"sequences[{number}]", sequence) for number, sequence in enumerate(sequences)]
    if labels is None:
        return tokens, []
    targets = [token_ids(f"labels[{number}]", label) for number, label in enumerate(labels)]
    if len(targets) != len(tokens):
        raise ValueError(f"labels holds {len(targets)} sequences, sequences {len(tokens)}: give labels for each")
    for number, (sequence, label) in enumerate(zip(tokens, targets, strict=True)):
        if sequence.shape != label.shape:
            raise ValueError(
                f"labels[{number}] has {label.shape[0]} labels, sequences[{number}] {sequence.shape[0]} tokens: give "
                f"one label for each token, {IGNORE_INDEX} where there is none"
            )
    return tokens, targets


def per_sequence(name: str, values: Tensor | Sequence[int | float] | None, count: int) -> Tensor | None:
    """One number for each of ``count`` sequences as a tensor (count,); integers become int64."""
    if values is None:
        return None
    tensor = values if isinstance(values, Tensor) else torch.tensor(list(values))
    if tuple(tensor.shape) != (count,):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected ({count},): one for each sequence")
    if tensor.dtype in INTEGERS or not count:
        return tensor.to(torch.int64)
    return tensor


def labels_of_sequences(values: Tensor | Sequence[Any] | None, count: int) -> Tensor | None:
    """A label for each of ``count`` sequences (count,), or one for each of them and each class (count, n_classes)."""
    if values is None:
        return None
    tensor = values if isinstance(values, Tensor) else torch.tensor(list(values))
    if tensor.dim() == 2 and tensor.shape[0] == count:
        return tensor.to(torch.int64) if tensor.dtype in INTEGERS else tensor
    return per_sequence("sequence_labels", tensor, count)


def first_positions_of(values: Tensor | Sequence[int] | None, count: int) -> Tensor | None:
    """Positions in their documents at which ``count`` sequences begin, int64 (count,); None where all are 0."""
    tensor = per_sequence("first_positions", values, count)
    if tensor is None:
        return None
    if tensor.dtype != torch.int64:
        raise TypeError(f"first_positions has dtype {tensor.dtype}, expected integers")
    if bool((tensor < 0).any()):
        at = int((tensor < 0).nonzero()[0, 0])
        raise ValueError(f"first_positions[{at}]={int(tensor[at])} is negative")
    return tensor
