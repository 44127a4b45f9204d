"""Mutations of how models of transformers are told the places of tokens, and of segments in masks."""

from __future__ import annotations

from tests.mutations import Mutation

_TESTS = ("tests/test_attach_positions.py",)
_POSITIONS = "maskops/integrations/transformers/positions.py"
_ARRIVAL = "maskops/integrations/transformers/arrival.py"

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "positions of RoBERTa begin at 0",
        _POSITIONS,
        "first=0 if tokens is None else int(tokens.padding_idx) + 1",
        "first=0 if tokens is None else 0",
        _TESTS,
    ),
    Mutation(
        "places go on over documents",
        _POSITIONS,
        "torch.where(documents.ids >= 0, _slots(call, length) - start, 0)",
        "torch.where(documents.ids >= 0, _slots(call, length), 0)",
        _TESTS,
    ),
    Mutation(
        "padding on the left counts",
        _POSITIONS,
        "return (_slots(call, length) + offset - _first_kept(kept)).clamp(min=0)",
        "return (_slots(call, length) + offset + 0 * _first_kept(kept)).clamp(min=0)",
        _TESTS,
    ),
    Mutation(
        "steps of generation are told places without those of the cache",
        _POSITIONS,
        "kept.shape[1] == length else past",
        "kept.shape[1] == length else 0",
        _TESTS,
    ),
    Mutation(
        "tables that count tokens are left to themselves",
        _POSITIONS,
        'elif names[:2] == ["input_ids", "inputs_embeds"]:',
        'elif names[:2] == ["input_ids"]:',
        _TESTS,
    ),
    Mutation(
        "embeddings that count in no known way pass",
        _POSITIONS,
        "if self.places() is not None:\n            raise",
        "if False:\n            raise",
        _TESTS,
    ),
    Mutation(
        "models multiply with the numbers of segments",
        _ARRIVAL,
        "call.set(name, (mask != 0).to(mask.dtype))",
        "call.set(name, mask)",
        _TESTS,
    ),
    Mutation(
        "models inside others take the mask for segments",
        _ARRIVAL,
        "if _holds_no_segments(call, mask) or _separated(call, name, mask) is not None:\n            continue",
        "if _holds_no_segments(call, mask):\n            continue",
        _TESTS,
    ),
    Mutation(
        "documents of a decoder are those of its encoder",
        _ARRIVAL,
        'key = "decoder_attention_mask" if "decoder_attention_mask" in around.accepts else name',
        "key = name",
        _TESTS,
    ),
    Mutation(
        "positions: one row that begins in the first column stands for all",
        _POSITIONS,
        "bool(kept[:, 0].all())",
        "bool(kept[:, 0].any())",
        _TESTS,
    ),
)
