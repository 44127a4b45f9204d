"""From raw token lists to a batch: padding, packing, labels and positions, with lengths as the one truth."""

from maskops.data.bins import Packing, PackingReport, Piece
from maskops.data.collators import PackedCollator, PaddedCollator
from maskops.data.cost import ModelShape, attention_work, flops
from maskops.data.doctor import Finding, Findings, check_tokenizer, ensure_pad_token
from maskops.data.labels import IGNORE_INDEX, shift_labels
from maskops.data.packed_batch import PackedBatch
from maskops.data.packers import pack
from maskops.data.padded_batch import PaddedBatch, pad
from maskops.data.pieces import PieceDataset
from maskops.data.report import PaddingReport, StrategyCost, padding_report
from maskops.data.rnn import from_packed_sequence, sequence_states, to_packed_sequence
from maskops.data.samplers import LengthBucketSampler, PackingSampler, TokenBudgetSampler
from maskops.data.streaming import StreamingPacker
from maskops.data.tokens import Documents, TokenReport, prepare

__all__ = [
    "IGNORE_INDEX",
    "Documents",
    "Finding",
    "Findings",
    "LengthBucketSampler",
    "ModelShape",
    "PackedBatch",
    "PackedCollator",
    "Packing",
    "PackingReport",
    "PackingSampler",
    "PaddedBatch",
    "PaddedCollator",
    "PaddingReport",
    "Piece",
    "PieceDataset",
    "StrategyCost",
    "StreamingPacker",
    "TokenBudgetSampler",
    "TokenReport",
    "attention_work",
    "check_tokenizer",
    "ensure_pad_token",
    "flops",
    "from_packed_sequence",
    "pack",
    "pad",
    "padding_report",
    "prepare",
    "sequence_states",
    "shift_labels",
    "to_packed_sequence",
]
