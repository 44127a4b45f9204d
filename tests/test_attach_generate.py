"""`generate` of attached models, many prompts at a time, against one at a time with the model's own eager attention."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import maskops
from tests.generating import DECODERS, NEW, Generated, alone, compare, encoded, generate, padded, prompts
from tests.transformers_models import FAMILIES, model

transformers = pytest.importorskip("transformers", reason="transformers is an optional extra")


@pytest.fixture
def attached(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The shared model of a family while maskops is attached to it; its expected tokens were made before."""
    alone(request.param)
    with maskops.attach(model(request.param), probe=False):
        yield model(request.param)


def families(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("attached, name", [(name, name) for name in names], indirect=["attached"], ids=names)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@families(*DECODERS)
def test_left_padding(attached: Any, name: str, cache: str) -> None:
    compare(generate(attached, padded(name, prompts(name)), cache_implementation=cache), alone(name))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@families("lfm2", "jamba")
def test_recurrent_layers_between(attached: Any, name: str, cache: str) -> None:
    compare(generate(attached, padded(name, prompts(name)), cache_implementation=cache), alone(name))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@families("t5", "bart")
def test_encoder_decoders(attached: Any, name: str, left: bool, cache: str) -> None:
    inputs = padded(name, prompts(name), left=left)
    compare(generate(attached, inputs, cache_implementation=cache), alone(name))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["mistral", "gemma3", "gpt-oss"])
def test_the_window_is_crossed_while_generating(name: str, cache: str) -> None:
    module = FAMILIES[name].build(sliding_window=9)
    parts = prompts(name)
    expected = [generate(module, padded(name, [part]), 10) for part in parts]
    with maskops.attach(module, probe=False):
        found = generate(module, padded(name, parts), 10, cache_implementation=cache)
    compare(found, Generated(*(torch.cat(tensors) for tensors in zip(*expected, strict=True))))


@families("llama", "mistral", "gpt2")
def test_without_a_cache(attached: Any, name: str) -> None:
    compare(generate(attached, padded(name, prompts(name)), use_cache=False), alone(name))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@families("llama", "gemma3", "gpt-oss")
def test_prefill_in_chunks(attached: Any, name: str, cache: str) -> None:
    inputs = padded(name, prompts(name))
    compare(generate(attached, inputs, prefill_chunk_size=5, cache_implementation=cache), alone(name))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "t5"])
def test_beam_search(name: str, cache: str) -> None:
    module, parts = model(name), prompts(name)
    settings = {"num_beams": 3, "do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
    settings |= {"return_dict_in_generate": True, "output_scores": True}
    expected = [module.generate(**padded(name, [part]), **settings) for part in parts]
    with maskops.attach(module, probe=False):
        found = module.generate(**padded(name, parts), **settings, cache_implementation=cache)
    for row, one in enumerate(expected):
        assert torch.equal(found.sequences[row, -NEW:], one.sequences[0, -NEW:])
        assert abs(found.sequences_scores[row] - one.sequences_scores[0]) <= 1e-5


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_assisted_decoding_rolls_the_cache_back(name: str) -> None:
    module, assistant = model(name), FAMILIES[name].build(num_hidden_layers=1)
    inputs = padded(name, prompts(name)[2:3])
    options: list[dict[str, Any]] = [{"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3}]
    expected = [generate(module, inputs, 12, **option).tokens for option in options]
    with maskops.attach(module, probe=False), maskops.attach(assistant, probe=False):
        found = [generate(module, inputs, 12, **option).tokens for option in options]
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-oss"])
def test_a_conversation_goes_on_with_the_filled_cache(name: str, cache: str) -> None:
    module, parts = model(name), prompts(name)
    answers, turn = alone(name).tokens, torch.arange(5, 9)
    whole = [torch.cat([encoded(part), answer, turn]) for part, answer in zip(parts, answers, strict=True)]
    expected = [
        generate(module, {"input_ids": row[None], "attention_mask": torch.ones(1, len(row)).long()}) for row in whole
    ]
    config = module.config
    filled = {
        "dynamic": lambda: transformers.DynamicCache(config=config),
        "static": lambda: transformers.StaticCache(config=config, max_cache_len=40),
    }[cache]()
    inputs = padded(name, parts)
    with maskops.attach(module, probe=False):
        first = generate(module, {**inputs, "past_key_values": filled}).tokens
        more = torch.cat([first, turn.expand(len(parts), -1)], 1)
        ids = torch.cat([inputs["input_ids"], more], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
        found = generate(module, {"input_ids": ids, "attention_mask": mask, "past_key_values": filled})
    compare(found, Generated(*(torch.cat(tensors) for tensors in zip(*expected, strict=True))))


def test_compiled_steps_with_a_static_cache_are_one_graph() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compilation = transformers.CompileConfig(fullgraph=True, backend=backend, mode=None)
    compilation._compile_all_devices = True  # else processors are left out
    expected, module = alone("llama"), FAMILIES["llama"].build()
    torch._dynamo.reset()
    with maskops.attach(module, probe=False):
        inputs = padded("llama", prompts("llama"))
        found = generate(module, inputs, cache_implementation="static", compile_config=compilation)
    assert len(graphs) == 1
    compare(found, expected)


@pytest.mark.parametrize("cache", ["dynamic", "static", "dynamic, every key kept"])
@pytest.mark.parametrize("name", ["llama", "mistral", "llama4"])
def test_a_step_in_which_a_row_is_padding(name: str, cache: str) -> None:
    module = model(name)
    inputs = padded(name, prompts(name))
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    step = {
        "input_ids": torch.full((4, 1), 7),
        "position_ids": positions[:, -1:] + 1,
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1),
    }
    step["attention_mask"][0, -1] = 0

    def logits() -> torch.Tensor:
        empty = {
            "dynamic": lambda: transformers.DynamicCache(config=module.config),
            "static": lambda: transformers.StaticCache(config=module.config, max_cache_len=20),
            "dynamic, every key kept": transformers.DynamicCache,
        }[cache]()
        with torch.no_grad():
            filled = module(**inputs, position_ids=positions, past_key_values=empty, use_cache=True).past_key_values
            return module(**step, past_key_values=filled, use_cache=True).logits

    expected = logits()
    with maskops.attach(module, probe=False):
        found = logits()
    assert (found - expected)[1:].abs().amax() <= 1e-5
    assert found[0].isfinite().all()


@families("llama", "gemma2", "gpt2")
def test_padding_holds_finite_numbers_in_every_layer(attached: Any, name: str) -> None:
    output = attached(**padded(name, prompts(name)), output_hidden_states=True)
    assert all(states.isfinite().all() for states in output.hidden_states)
