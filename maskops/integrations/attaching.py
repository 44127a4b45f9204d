"""The door to maskops inside transformers, which is imported when it is first asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from maskops.integrations.transformers.attach import Attachment


def attach(
    model: nn.Module,
    *,
    loss: bool = True,
    fuse_lm_head: bool = False,
    probe: bool = True,
    backend: str | None = None,
) -> Attachment:
    """Let a model of transformers compute its attention with maskops; see ``integrations.transformers.attach``."""
    from maskops.integrations.transformers import attach as implementation

    return implementation.attach(model, loss=loss, fuse_lm_head=fuse_lm_head, probe=probe, backend=backend)
