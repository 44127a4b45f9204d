"""From raw token lists to a batch: padding, packing, labels and positions, with lengths as the one truth."""

from maskops.data.collators import PackedCollator, PaddedCollator
from maskops.data.doctor import Finding, Findings, check_tokenizer, ensure_pad_token
from maskops.data.labels import IGNORE_INDEX, shift_labels
from maskops.data.packed_batch import PackedBatch
from maskops.data.padded_batch import PaddedBatch, pad
from maskops.data.rnn import from_packed_sequence, sequence_states, to_packed_sequence
from maskops.data.tokens import Documents, TokenReport, prepare

__all__ = [
    "IGNORE_INDEX",
    "Documents",
    "Finding",
    "Findings",
    "PackedBatch",
    "PackedCollator",
    "PaddedBatch",
    "PaddedCollator",
    "TokenReport",
    "check_tokenizer",
    "ensure_pad_token",
    "from_packed_sequence",
    "pad",
    "prepare",
    "sequence_states",
    "shift_labels",
    "to_packed_sequence",
]
