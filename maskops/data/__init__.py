"""From raw token lists to a batch: padding, packing, labels and positions, with lengths as the one truth."""

from maskops.data.labels import IGNORE_INDEX, shift_labels
from maskops.data.packed_batch import PackedBatch
from maskops.data.padded_batch import PaddedBatch, pad

__all__ = [
    "IGNORE_INDEX",
    "PackedBatch",
    "PaddedBatch",
    "pad",
    "shift_labels",
]
