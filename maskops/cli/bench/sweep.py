"""Documents with a chosen fill factor: real text, cut to lengths whose mean is a given share of the longest."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


def lengths_with_fill(fill: float, count: int, longest: int) -> tuple[int, ...]:
    """`count` lengths from 2 to `longest` with mean `fill * longest`, spread along a power curve, in mixed order.

    Args:
        fill: In (0, 1]; the mean comes as close as whole tokens and the one document of full length allow.
        count: How many documents.
        longest: The longest of them, in tokens.
    """

    def along(exponent: float) -> list[int]:
        shares = [((index + 1) / count) ** exponent for index in range(count)]
        return [max(2, round(longest * share)) for share in shares]

    low, high = 0.0, 64.0
    for _ in range(50):
        middle = (low + high) / 2
        if sum(along(middle)) > fill * count * longest:
            low = middle
        else:
            high = middle
    lengths = along(high if fill < 1.0 else 0.0)
    # Neighbours of a real batch are not sorted: take every third, wrapping around.
    order = sorted(range(count), key=lambda index: (index % 3, index))
    return tuple(lengths[index] for index in order)


def cut_documents(documents: Sequence[Tensor], lengths: Sequence[int]) -> tuple[Tensor, ...]:
    """The text of all documents in a row, cut into pieces of these lengths."""
    text = torch.cat(list(documents))
    repeats = -(-sum(lengths) // len(text))
    return tuple(text.repeat(repeats)[: sum(lengths)].tensor_split(list(accumulate(lengths))[:-1]))
