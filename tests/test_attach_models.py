"""Models of transformers against their own eager attention, one document at a time, in every way a batch arrives."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import maskops
from tests import transformers_models as zoo

_MATRIX = [(name, way) for name in zoo.SERVED for way in zoo.arrivals(name)]
_DECODERS = [name for name, family in zoo.SERVED.items() if family.kind == "decoder"]


def _attached(name: str) -> Any:
    return maskops.attach(zoo.model(name), probe=False, loss=False)


def _check(name: str, way: str, *, lengths: Sequence[int] = (5, 1, 9, 4), **options: Any) -> None:
    """Outputs and gradients of an attached model, against the documents one at a time."""
    parts, width = zoo.documents(name, lengths), None
    if way.startswith("wrapped"):
        width = zoo.WRAPPED_WIDTH
        parts = zoo.cut(parts, width)
    expected = zoo.alone(name, lengths, width=width)
    with _attached(name):
        found = zoo.run(zoo.model(name), name, zoo.arrive(way, name, parts), **options)
    zoo.compare(found, expected)


@pytest.mark.parametrize(("name", "way"), _MATRIX, ids=[f"{name}: {way}" for name, way in _MATRIX])
def test_outputs_and_gradients_are_those_of_one_document_at_a_time(name: str, way: str) -> None:
    _check(name, way)


@pytest.mark.parametrize("name", zoo.SERVED)
def test_padding_on_the_right_is_what_transformers_gets_right(name: str) -> None:
    batch = zoo.arrive("padded right", name, zoo.documents(name))
    zoo.compare(zoo.run(zoo.model(name), name, batch, gradients=False), zoo.alone(name))


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gemma3", "bert", "roberta", "modernbert"])
def test_a_packed_default_call_is_wrong_without_maskops(name: str) -> None:
    batch = zoo.arrive("packed by position_ids", name, zoo.documents(name))
    found = zoo.run(zoo.model(name, "sdpa"), name, batch, gradients=False)
    assert (found.outputs - zoo.alone(name).outputs).abs().amax() > 1e-2
    with pytest.raises(AssertionError, match="outputs differ"):
        zoo.compare(found, zoo.alone(name))


def test_a_wrong_gradient_is_seen() -> None:
    expected = zoo.alone("bert")
    name, gradient = next(iter(expected.gradients.items()))
    wrong = expected._replace(gradients={**expected.gradients, name: gradient * 1.001})
    with pytest.raises(AssertionError, match=f"the gradient of {name} differs by 0.001"):
        zoo.compare(wrong, expected)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "llama4"])
def test_packed_calls_with_and_without_an_empty_cache(name: str, use_cache: bool) -> None:
    _check(name, "packed by position_ids", use_cache=use_cache)
    _check(name, "packed by cu", use_cache=use_cache)


@pytest.mark.parametrize("way", ["packed by cu", "rows by cu", "packed + tail by cu"])
@pytest.mark.parametrize("name", ["mistral", "gemma3", "roberta", "modernbert", "bart"])
def test_documents_without_tokens(name: str, way: str) -> None:
    batch = zoo.arrive(way, name, zoo.documents(name))
    for side in "qk":
        cu_seqlens = batch.inputs[f"cu_seq_lens_{side}"]
        # Documents without a token at the very begin, twice within and at the end.
        again = torch.tensor([0, 2, 2, len(cu_seqlens) - 1])
        batch.inputs[f"cu_seq_lens_{side}"] = cu_seqlens[torch.cat([torch.arange(len(cu_seqlens)), again]).sort()[0]]
    with _attached(name):
        found = zoo.run(zoo.model(name), name, batch)
    zoo.compare(found, zoo.alone(name))


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt-oss", "phi3", "modernbert", "llama4"])
def test_windows_and_chunks_much_smaller_than_documents(name: str) -> None:
    for way in ("packed by position_ids", "packed by cu", "padded left", "rows by segments"):
        _check(name, way, lengths=(40, 3, 21, 30))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert", "roberta", "bart", "gemma2"])
def test_embeddings_in_place_of_tokens(name: str) -> None:
    module, parts = zoo.model(name), zoo.documents(name)
    embed = module.get_input_embeddings()
    for way in ("padded left", "packed by cu", "packed + tail by segments"):
        batch = zoo.arrive(way, name, parts)
        for key in ("input_ids", "decoder_input_ids"):
            if key in batch.inputs:
                batch.inputs[key.replace("input_ids", "inputs_embeds")] = embed(batch.inputs.pop(key)).detach()
        with _attached(name):
            found = zoo.run(module, name, batch, gradients=False)
        zoo.compare(found, zoo.alone(name))


@pytest.mark.parametrize("name", ["bert", "electra", "minilm"])
def test_token_types_of_packed_documents(name: str) -> None:
    module, parts = zoo.model(name), zoo.documents(name)
    types = [torch.arange(len(part.tokens)) % 2 for part in parts]
    expected = torch.cat(
        [
            module(input_ids=part.tokens[None], token_type_ids=kind[None]).last_hidden_state[0]
            for part, kind in zip(parts, types, strict=True)
        ]
    )
    for way in ("packed by cu", "packed by position_ids", "rows by segments"):
        batch = zoo.arrive(way, name, parts)
        batch.inputs["token_type_ids"] = torch.zeros_like(batch.inputs["input_ids"])
        batch.inputs["token_type_ids"].view(-1)[batch.places] = torch.cat(types)
        with _attached(name):
            found = zoo.run(module, name, batch, gradients=False)
        assert (found.outputs - expected).abs().amax() <= 1e-5
