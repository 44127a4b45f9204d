"""Places of tokens in packed and left-padded batches: told to models that would count them from slots."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import maskops
from maskops.integrations.transformers import arrival, masking, positions
from tests import transformers_models as zoo


def _attached(module: Any) -> Any:
    return maskops.attach(module, probe=False, loss=False)


@pytest.mark.parametrize("name", zoo.COUNTING)
def test_models_that_count_in_other_ways(name: str) -> None:
    parts, expected = zoo.documents(name), zoo.alone(name)
    with _attached(zoo.model(name)):
        for way in zoo.arrivals(name):
            if not way.startswith("wrapped"):
                gradients = way == "packed by cu"
                found = zoo.run(zoo.model(name), name, zoo.arrive(way, name, parts), gradients=gradients)
                zoo.compare(found, expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert", "roberta", "modernbert", "bart", "m2m-100", "t5"])
def test_values_that_cannot_be_read_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done on a device, where a look at values would wait for it."""
    for module in (arrival, masking, positions):
        monkeypatch.setattr(module, "values_can_be_read", lambda tensors, device: False)
    parts, expected = zoo.documents(name), zoo.alone(name)
    with _attached(zoo.model(name)):
        for way in zoo.arrivals(name):
            if not way.startswith("wrapped"):
                found = zoo.run(zoo.model(name), name, zoo.arrive(way, name, parts), gradients=False)
                zoo.compare(found, expected)


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert", "roberta", "bart", "pegasus", "m2m-100"])
def test_packed_rows_may_be_longer_than_the_positions_of_a_model(name: str) -> None:
    option = "n_positions" if name == "gpt2" else "max_position_embeddings"
    module, parts = zoo.FAMILIES[name].build(**{option: 12}), zoo.documents(name)
    expected = zoo.one_at_a_time(module, name, parts)
    for way in ("packed by cu", "packed + tail by segments"):
        batch = zoo.arrive(way, name, parts)
        assert batch.places.shape[0] > 14
        with _attached(module):
            zoo.compare(zoo.run(module, name, batch), expected)


@pytest.mark.parametrize("name", ["gpt2", "llama4", "bert"])
def test_position_ids_of_the_caller_stay(name: str) -> None:
    module, part = zoo.model(name), zoo.documents(name)[2]
    batch = zoo.arrive("packed by cu", name, [part, part])
    given = torch.cat([torch.arange(9) + 3, torch.arange(9) * 2])[None]
    expected = [
        zoo.run(module, name, zoo.Batch({"input_ids": part.tokens[None], "position_ids": own}, torch.arange(9)))
        for own in given.split(9, dim=1)
    ]
    with _attached(module):
        found = zoo.run(module, name, zoo.Batch({**batch.inputs, "position_ids": given}, batch.places))
    assert (found.outputs - torch.cat([one.outputs for one in expected])).abs().amax() <= 1e-5


def _position_ids_of(module: nn.Module, inner: nn.Module, inputs: dict[str, Tensor]) -> list[Any]:
    """What a model inside another is told, while the outer one is attached."""
    told: list[Any] = []
    with _attached(module):
        handle = inner.register_forward_pre_hook(
            lambda _, args, kwargs: told.append(kwargs.get("position_ids")), with_kwargs=True
        )
        module(**inputs)
        handle.remove()
    return told


def test_what_is_told() -> None:
    module, parts = zoo.model("gpt2"), zoo.documents("gpt2", (3, 2))
    expected = {
        "padded right": None,
        "padded left": [[0, 1, 2], [0, 0, 1]],
        "packed by cu": [[0, 1, 2, 0, 1]],
        "packed + tail by segments": [[0, 1, 2, 0, 1, 0, 0, 0]],
    }
    for way, told in expected.items():
        (found,) = _position_ids_of(module, module.transformer, zoo.arrive(way, "gpt2", parts).inputs)
        assert (None if found is None else found.tolist()) == told, way


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["gpt2", "opt", "llama4"])
def test_left_padding_with_a_cache(name: str, cache: str) -> None:
    """A prefill and two single steps, with a mask and no position ids."""
    module, parts = zoo.model(name), zoo.documents(name, (7, 3, 5))
    ahead = [part._replace(tokens=part.tokens[:-2]) for part in parts]
    batch = zoo.arrive("padded left", name, ahead)
    mask = batch.inputs["attention_mask"]
    held = (
        transformers.DynamicCache(config=module.config)
        if cache == "dynamic"
        else transformers.StaticCache(config=module.config, max_cache_len=12)
    )
    outputs = []
    with torch.no_grad(), _attached(module):
        outputs.append(module(**batch.inputs, past_key_values=held).logits[:, -1])
        for step in (-2, -1):
            mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], dim=1)
            ids = torch.stack([part.tokens[step] for part in parts])[:, None]
            outputs.append(module(input_ids=ids, attention_mask=mask, past_key_values=held).logits[:, -1])
    expected = zoo.alone(name, (7, 3, 5)).outputs.split([7, 3, 5])
    for row, one in enumerate(expected):
        assert (torch.stack([output[row] for output in outputs]) - one[-3:]).abs().amax() <= 1e-5


def test_a_decoder_padded_on_the_left_with_a_cache() -> None:
    name = "bart"
    module, parts = zoo.model(name), zoo.documents(name, (7, 3, 5), (2, 6, 4))
    ahead = [part._replace(tokens=part.tokens[:-1]) for part in parts]
    inputs = zoo.arrive("padded left", name, ahead).inputs
    held = transformers.EncoderDecoderCache(
        transformers.DynamicCache(config=module.config), transformers.DynamicCache(config=module.config)
    )
    with torch.no_grad(), _attached(module):
        first = module(**inputs, past_key_values=held).logits[:, -1]
        inputs["decoder_attention_mask"] = nn.functional.pad(inputs["decoder_attention_mask"], (0, 1), value=1)
        inputs["decoder_input_ids"] = torch.stack([part.tokens[-1] for part in parts])[:, None]
        second = module(**inputs, past_key_values=held).logits[:, -1]
    for row, one in enumerate(zoo.alone(name, (7, 3, 5), (2, 6, 4)).outputs.split([7, 3, 5])):
        assert (torch.stack([first[row], second[row]]) - one[-2:]).abs().amax() <= 1e-5


def test_masked_tokens_that_scale_a_row_are_refused_where_documents_share_it() -> None:
    module, parts = zoo.model("esm"), zoo.documents("esm")
    parts[0].tokens[2] = 3
    expected = zoo.one_at_a_time(module, "esm", parts)
    with _attached(module):
        zoo.compare(zoo.run(module, "esm", zoo.arrive("padded left", "esm", parts)), expected)
        with pytest.raises(ValueError, match="token_dropout=True scales a row by its share of masked tokens"):
            module(**zoo.arrive("packed by cu", "esm", parts).inputs)


def _qwen2_vl() -> Any:
    config = transformers.Qwen2VLConfig(
        text_config={
            "vocab_size": 64,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        },
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4},
        image_token_id=60,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
    )
    config._attn_implementation = "eager"
    return transformers.Qwen2VLForConditionalGeneration(config).eval()


def _along_axes() -> Tensor:
    """Positions (3, 10) of a document with an image of 2 x 3 patches between three tokens and one."""
    image = torch.tensor([[3] * 6, [3, 3, 3, 4, 4, 4], [3, 4, 5, 3, 4, 5]])
    text = torch.arange(3).expand(3, 3)
    return torch.cat([text, image, torch.full((3, 1), 6)], 1)


@pytest.mark.parametrize("is_device", [False, True])
@pytest.mark.parametrize("wanted", [torch.int64, torch.int32])
def test_documents_by_positions_along_three_axes(
    is_device: bool, wanted: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image inside a document is no boundary, nor is the sound that follows its video."""
    if is_device:
        monkeypatch.setattr(arrival, "values_can_be_read", lambda tensors, device: False)
    one = torch.cat([_along_axes(), torch.arange(2, 5).expand(3, 3)], 1)  # goes back to 2, 3, 4
    rows = torch.cat([one, torch.zeros(3, 1), one, _along_axes()], 1).to(wanted)[:, None]
    found = arrival.of_tokens(rows, None, None)
    assert found is not None
    assert found.ids[0].tolist() == [0] * 13 + [1] + [2] * 13 + [3] * 10
    alone = arrival.of_tokens(one.to(wanted)[:, None], None, None)
    assert alone is None if not is_device else alone is not None and not alone.ids.any()
    kept = torch.ones(1, 37, dtype=torch.bool)
    kept[0, [5, 28]] = False
    found = arrival.of_tokens(rows.masked_fill(~kept, 0), None, kept)
    assert found is not None
    assert found.ids[kept].tolist() == [0] * 12 + [1] + [2] * 13 + [3] * 9


def test_positions_along_three_axes_that_restart_are_documents() -> None:
    module = _qwen2_vl().model.language_model
    parts = [torch.randint(1, 60, (1, 10)), torch.randint(1, 60, (1, 10)), torch.randint(1, 60, (1, 1))]
    places = [_along_axes()[:, None], _along_axes()[:, None], torch.zeros(3, 1, 1, dtype=torch.int64)]
    row, told = torch.cat(parts, 1), torch.cat(places, 2)
    with torch.no_grad():
        expected = [module(input_ids=ids, position_ids=at) for ids, at in zip(parts, places, strict=True)]
        with _attached(module):
            for options in ({}, {"attention_mask": torch.ones_like(row)}):
                found = module(input_ids=row, position_ids=told, use_cache=False, **options).last_hidden_state
                torch.testing.assert_close(
                    found, torch.cat([one.last_hidden_state for one in expected], 1), atol=1e-5, rtol=0
                )


def test_places_in_images_are_asked_for() -> None:
    module = _qwen2_vl()
    parts = zoo.documents("llama", (4, 3))
    expected = zoo.one_at_a_time(module, "llama", parts, gradients=False)
    batch = zoo.arrive("packed by cu", "llama", parts)
    with _attached(module):
        zoo.compare(zoo.run(module, "llama", batch, gradients=False), expected)
        with pytest.raises(ValueError, match=r"position_ids are missing: Qwen2VL.* counts places in images"):
            module(**batch.inputs, pixel_values=torch.zeros(4, 96), image_grid_thw=torch.tensor([[1, 2, 2]]))


def test_an_embedding_that_counts_in_no_known_way_is_refused() -> None:
    class WavePositionalEmbedding(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return torch.arange(ids.shape[1]).sin()[None, :, None]

    class Decoder(zoo.model("t5").decoder.__class__):
        """A decoder without an argument for positions."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.embed_positions = WavePositionalEmbedding()

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **keywords: Any) -> Any:
            self.embed_positions(input_ids)
            return super().forward(input_ids, attention_mask, **keywords)

    config = zoo.model("t5").decoder.config
    module = Decoder(type(config)(**{**config.to_dict(), "is_decoder": False, "use_cache": False})).eval()
    parts = zoo.documents("bert")
    with _attached(module):
        module(**zoo.arrive("padded right", "bert", parts).inputs)
        for way in ("padded left", "packed by segments"):
            with pytest.raises(ValueError, match="takes no position_ids and WavePositionalEmbedding counts positions"):
                module(**zoo.arrive(way, "bert", parts).inputs)


def test_detach_leaves_no_hook_on_embeddings() -> None:
    module = zoo.model("m2m-100")
    with _attached(module):
        hooked = [inner for inner in module.modules() if inner._forward_pre_hooks]
        assert module.model.encoder.embed_positions in hooked
    assert not any(inner._forward_pre_hooks or inner._forward_hooks for inner in module.modules())
