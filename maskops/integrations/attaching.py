"""The door to maskops inside transformers, which is imported when it is first asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import Cache

    from maskops.integrations.transformers.attach import Attachment
    from maskops.integrations.transformers.generation import Prompts


def attach(
    model: nn.Module,
    *,
    loss: bool = True,
    fuse_lm_head: bool = False,
    unpad: bool = False,
    probe: bool = True,
    backend: str | None = None,
) -> Attachment:
    """Let a model of transformers compute its attention with maskops; see ``integrations.transformers.attach``."""
    from maskops.integrations.transformers import attach as implementation

    return implementation.attach(model, loss=loss, fuse_lm_head=fuse_lm_head, unpad=unpad, probe=probe, backend=backend)


def packed_prefill(
    model: Any,
    prompts: Prompts,
    *,
    cache: str | Cache = "dynamic",
    max_length: int | None = None,
    chunk_size: int | None = None,
    expand_size: int = 1,
    pad_token_id: int | None = None,
) -> dict[str, Any]:
    """Run prompts through an attached model as one packed row, for ``model.generate`` to go on from.

    See ``integrations.transformers.generation``.
    """
    from maskops.integrations.transformers import generation

    return generation.packed_prefill(
        model,
        prompts,
        cache=cache,
        max_length=max_length,
        chunk_size=chunk_size,
        expand_size=expand_size,
        pad_token_id=pad_token_id,
    )
