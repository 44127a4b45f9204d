"""Models of transformers against their own eager attention, one document at a time, in every way a batch arrives."""

import pytest

from tests import transformers_models as zoo


@pytest.mark.parametrize("name", sorted(zoo.SERVED))
def test_padding_on_the_right_is_what_transformers_gets_right(name: str) -> None:
    batch = zoo.arrive("padded right", name, zoo.documents(name))
    zoo.compare(zoo.run(zoo.model(name), name, batch), zoo.alone(name))


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gemma3", "bert", "roberta", "modernbert"])
def test_a_packed_default_call_is_wrong_without_maskops(name: str) -> None:
    batch = zoo.arrive("packed by position_ids", name, zoo.documents(name))
    found = zoo.run(zoo.model(name, "sdpa"), name, batch, gradients=False)
    assert (found.outputs - zoo.alone(name).outputs).abs().amax() > 1e-2
    with pytest.raises(AssertionError, match="outputs differ"):
        zoo.compare(found, zoo.alone(name))
