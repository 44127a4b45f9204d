"""Prompts, and what models of `transformers_models` generate: alone with their own attention, or in a batch."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.transformers_models import SERVED, Document, documents, lay, model

LENGTHS = (7, 1, 12, 3)
NEW = 6
DECODERS = tuple(name for name, family in SERVED.items() if family.kind == "decoder")


class Generated(NamedTuple):
    """What was generated from some prompts.

    Attributes:
        tokens: (prompts, new tokens) int64.
        logits: (prompts, new tokens, vocabulary) float32.
    """

    tokens: Tensor
    logits: Tensor


def prompts(name: str, lengths: Sequence[int] = LENGTHS) -> list[Document]:
    """Prompts of these lengths, the same ones each time; encoder-decoders read them in the encoder."""
    return documents(name, lengths, lengths)


def encoded(prompt: Document) -> Tensor:
    """The tokens that `generate` is given."""
    return prompt.tokens if prompt.source is None else prompt.source


def padded(name: str, parts: Sequence[Document], *, left: bool = True) -> dict[str, Tensor]:
    """input_ids and attention_mask of prompts, a row each."""
    grid = lay([encoded(part) for part in parts], [[row] for row in range(len(parts))], left=left)
    return {"input_ids": grid.ids, "attention_mask": grid.kept}


def generate(module: Any, inputs: dict[str, Any], new: int = NEW, **options: Any) -> Generated:
    """Greedy, unless told otherwise, and never ended by a token; fails where logits are not finite."""
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": new, **options}
    output = module.generate(**inputs, **settings, output_logits=True, return_dict_in_generate=True)
    logits = torch.stack(output.logits, 1)
    assert logits.isfinite().all()
    assert output.sequences.shape[1] >= new
    return Generated(output.sequences[:, -new:], logits)


@functools.cache
def alone(name: str, lengths: tuple[int, ...] = LENGTHS, new: int = NEW) -> Generated:
    """One prompt at a time through the model's own eager attention."""
    module = model(name)
    parts = [generate(module, padded(name, [prompt]), new) for prompt in prompts(name, lengths)]
    return Generated(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def compare(found: Generated, expected: Generated) -> None:
    """Fails unless the tokens are equal and the logits agree to 1e-5 absolute."""
    assert torch.equal(found.tokens, expected.tokens)
    error = (found.logits - expected.logits).abs().amax().item()
    assert error <= 1e-5, f"logits differ by {error:.3g}"
