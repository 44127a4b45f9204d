"""`maskops.attach`: what it does to a model, that the result is right, and that `detach` undoes it exactly."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is an optional extra")

import maskops  # noqa: E402
from tests import transformers_models as zoo  # noqa: E402

NAMES = ("llama", "mistral", "bert", "t5", "gpt2")


def _alone(model, part):
    """Outputs of one document by itself, (length, width)."""
    inputs = {"input_ids": part.tokens[None]}
    if part.source is not None:
        inputs = {"input_ids": part.source[None], "decoder_input_ids": part.tokens[None]}
    return _outputs(model(**inputs))[0]


def _outputs(result):
    return result.logits if "logits" in result else result.last_hidden_state


def _state(model):
    """Everything of a model that attaching may touch, by identity where it is an object."""
    modules = {}
    for name, module in model.named_modules():
        attributes = {key: id(value) for key, value in vars(module).items()}
        hooks = [tuple(vars(module)[key]) for key in vars(module) if key.endswith(("_hooks", "_kwargs", "_called"))]
        modules[name] = (attributes, hooks)
    return modules, model.config._attn_implementation_internal


@pytest.mark.parametrize("name", NAMES)
def test_every_way_in_is_right(name):
    model, parts = zoo.FAMILIES[name].build("eager"), zoo.documents(name)
    with torch.no_grad():
        expected = torch.cat([_alone(model, part) for part in parts])
        with maskops.attach(model, probe=False):
            for way in ("padded right", "packed by position_ids", "packed + tail by cu", "rows by segments"):
                if way not in zoo.arrivals(name):
                    continue
                batch = zoo.arrive(way, name, parts)
                if name in ("bert", "gpt2") and "position" not in way and "right" not in way:
                    continue  # learned positions that nobody told restart nowhere
                got = _outputs(model(**batch.inputs)).flatten(0, 1)[batch.places]
                torch.testing.assert_close(got, expected, atol=1e-5, rtol=0, msg=lambda text, way=way: f"{way}: {text}")


@pytest.mark.parametrize("name", NAMES)
def test_detach_restores_the_model(name):
    model = zoo.FAMILIES[name].build("sdpa")
    before = _state(model)
    attachment = maskops.attach(model, probe=False)
    assert model.config._attn_implementation == "maskops"
    attachment.detach()
    assert _state(model) == before
    attachment.detach()
    assert _state(model) == before
