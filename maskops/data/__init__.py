"""From raw token lists to a batch: padding, packing, labels and positions, with lengths as the one truth."""

from maskops.data.doctor import Finding, Findings, check_tokenizer, ensure_pad_token
from maskops.data.labels import IGNORE_INDEX, shift_labels
from maskops.data.packed_batch import PackedBatch
from maskops.data.padded_batch import PaddedBatch, pad

__all__ = [
    "IGNORE_INDEX",
    "Finding",
    "Findings",
    "PackedBatch",
    "PaddedBatch",
    "check_tokenizer",
    "ensure_pad_token",
    "pad",
    "shift_labels",
]
