"""Mutations of generation with models of transformers: packed prefill, and the plan of one step."""

from __future__ import annotations

from tests.mutations import Mutation

_PREFILL = ("tests/test_packed_prefill.py",)
_STEP = ("tests/test_attach_generate.py",)
_GENERATION = "maskops/integrations/transformers/generation.py"
_MASKING = "maskops/integrations/transformers/masking.py"

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "keys of prompts stand at the left",
        _GENERATION,
        "self.columns = [self.width - (length - 1) for length in lengths]",
        "self.columns = [0 for length in lengths]",
        _PREFILL,
    ),
    Mutation(
        "pieces of a prompt all go to its first columns",
        _GENERATION,
        "torch.arange(piece.start, piece.stop) + self.columns",
        "torch.arange(piece.stop - piece.start) + self.columns",
        _PREFILL,
    ),
    Mutation(
        "a piece sees the keys of its own tokens alone",
        _GENERATION,
        "        if self.past:\n            document, end",
        "        if False:\n            document, end",
        _PREFILL,
    ),
    Mutation(
        "pieces start at position 0",
        _GENERATION,
        "first_positions=[piece.start for piece in row] if start else None",
        "first_positions=None",
        _PREFILL,
    ),
    Mutation(
        "beams share one row of the cache",
        _GENERATION,
        "if self.expand_size > 1",
        "if self.expand_size > 9",
        _PREFILL,
    ),
    Mutation(
        "the last token is prefilled as well",
        _GENERATION,
        "_rows([prompt.shape[0] - 1 for prompt in tokens], chunk_size, divisible=True)",
        "_rows([prompt.shape[0] for prompt in tokens], chunk_size, divisible=True)",
        _PREFILL,
    ),
    Mutation(
        "a step counts chunks from the first key that a window kept",
        _MASKING,
        "if pattern.counts_from_first and (isinstance(first, Tensor) or first > 0):",
        "if False:",
        _STEP,
    ),
    Mutation(
        "a step without padding sees what a static cache has not filled yet",
        _MASKING,
        "keys = masks.key_padding(end)",
        "keys = masks.key_padding(request.k_len)",
        _STEP,
    ),
    Mutation(
        "the mask of a static cache grows with each token",
        "maskops/integrations/transformers/attach.py",
        "if missing > 0 else attention_mask",
        "if missing > 99 else attention_mask",
        _STEP,
    ),
)
