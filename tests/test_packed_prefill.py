"""Prompts prefilled in packed rows, from which `generate` goes on, against one prompt at a time."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import maskops
from tests.generating import DECODERS, LENGTHS, NEW, Generated, alone, compare, encoded, generate, padded, prompts
from tests.transformers_models import FAMILIES, model

transformers = pytest.importorskip("transformers", reason="transformers is an optional extra")
from transformers.cache_utils import DynamicSlidingWindowLayer, StaticSlidingWindowLayer  # noqa: E402

LONGEST = max(LENGTHS)
ROOM = LONGEST + NEW


def tokens(name: str, lengths: tuple[int, ...] = LENGTHS) -> list[torch.Tensor]:
    return [encoded(prompt) for prompt in prompts(name, lengths)]


@pytest.fixture
def llama() -> Iterator[Any]:
    alone("llama")
    with maskops.attach(model("llama"), probe=False):
        yield model("llama")


@pytest.mark.parametrize("cache", [{}, {"cache": "static", "max_length": ROOM}], ids=["dynamic", "static"])
@pytest.mark.parametrize("chunk_size", [None, 5], ids=["one row", "rows and pieces"])
@pytest.mark.parametrize("name", DECODERS)
def test_generate_goes_on_from_it(name: str, chunk_size: int | None, cache: dict[str, Any]) -> None:
    expected = alone(name)
    with maskops.attach(model(name), probe=False):
        inputs = maskops.packed_prefill(model(name), tokens(name), chunk_size=chunk_size, **cache)
        compare(generate(model(name), inputs), expected)


@pytest.mark.parametrize("chunk_size", [None, 8], ids=["one row", "rows"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_outputs(name: str, chunk_size: int | None) -> None:
    expected = alone(name)
    with maskops.attach(model(name), probe=False):
        inputs = maskops.packed_prefill(model(name), tokens(name), chunk_size=chunk_size)
        compare(generate(model(name), inputs), expected)
        compare(generate(model(name), inputs, cache_implementation="static"), expected)


def test_bert_as_a_decoder() -> None:
    torch.manual_seed(0)
    config = FAMILIES["bert"].build(is_decoder=True).config
    module, parts = transformers.BertLMHeadModel(config).eval(), prompts("bert")
    expected = [generate(module, padded("bert", [part])) for part in parts]
    with maskops.attach(module, probe=False):
        found = generate(module, maskops.packed_prefill(module, tokens("bert"), chunk_size=8))
    compare(found, Generated(*(torch.cat(tensors) for tensors in zip(*expected, strict=True))))


def test_windows_keep_what_every_prompt_still_needs() -> None:
    window, name = 6, "mistral"
    module = FAMILIES[name].build(sliding_window=window)
    parts = prompts(name)
    expected = [generate(module, padded(name, [part]), 9) for part in parts]
    with maskops.attach(module, probe=False):
        for cache in ({}, {"cache": "static", "max_length": LONGEST + 9}):
            inputs = maskops.packed_prefill(module, tokens(name), **cache)
            kinds = (DynamicSlidingWindowLayer, StaticSlidingWindowLayer)
            assert all(isinstance(layer, kinds) for layer in inputs["past_key_values"].layers)
            assert inputs["past_key_values"].layers[0].keys.shape[2] <= window
            found = generate(module, inputs, 9)
            for row, one in enumerate(expected):
                assert torch.equal(found.tokens[row], one.tokens[0])
                assert (found.logits[row] - one.logits[0]).abs().amax() <= 1e-5


def test_what_is_returned(llama: Any) -> None:
    inputs = maskops.packed_prefill(llama, tokens("llama"), pad_token_id=9)
    reference = padded("llama", prompts("llama"))
    kept = reference["attention_mask"]
    assert torch.equal(inputs["attention_mask"], kept)
    assert torch.equal(inputs["input_ids"], reference["input_ids"].masked_fill(kept == 0, 9))
    positions = (kept.cumsum(1) - 1).clamp(min=0)
    cache = llama(**reference, position_ids=positions, use_cache=True).past_key_values
    real = kept[:, None, :-1, None].bool()
    for found, expected in zip(inputs["past_key_values"].layers, cache.layers, strict=True):
        for name in ("keys", "values"):
            states = getattr(found, name)
            assert (states - getattr(expected, name)[:, :, :-1]).masked_fill(~real, 0).abs().amax() <= 1e-5
            assert not states.masked_fill(real, 0).any()


def _as_mapping(rows: list[torch.Tensor]) -> Any:
    return padded("llama", prompts("llama"), left=False)


def _as_packed_batch(rows: list[torch.Tensor]) -> Any:
    return maskops.PackedBatch.from_sequences(rows, capacity=40)


def _as_padded_batch(rows: list[torch.Tensor]) -> Any:
    return maskops.PackedBatch.from_sequences(rows).to_padded()


@pytest.mark.parametrize(
    "told",
    [
        lambda rows: [row.tolist() for row in rows],
        lambda rows: {"input_ids": [row.tolist() for row in rows]},
        lambda rows: padded("llama", prompts("llama")),
        _as_mapping,
        _as_packed_batch,
        _as_padded_batch,
    ],
    ids=["lists", "tokenizer's lists", "padded left", "padded right", "PackedBatch", "PaddedBatch"],
)
def test_every_form_of_prompts(llama: Any, told: Callable[[list[torch.Tensor]], Any]) -> None:
    compare(generate(llama, maskops.packed_prefill(llama, told(tokens("llama")))), alone("llama"))


@pytest.mark.parametrize("lengths", [(1, 1), (1,), (6,), (4, 4, 4)])
def test_prompts_of_one_token_and_of_one_length(llama: Any, lengths: tuple[int, ...]) -> None:
    with maskops.attach(FAMILIES["llama"].build(), probe=False) as attachment:
        inputs = maskops.packed_prefill(attachment.model, tokens("llama", lengths))
        found = generate(attachment.model, inputs)
    llama_alone = [generate(model("llama"), padded("llama", [part])) for part in prompts("llama", lengths)]
    for row, one in enumerate(llama_alone):
        assert torch.equal(found.tokens[row], one.tokens[0])
        assert (found.logits[row] - one.logits[0]).abs().amax() <= 1e-5


def test_caches_that_are_given_are_filled(llama: Any) -> None:
    for cache in (
        transformers.DynamicCache(),
        transformers.DynamicCache(config=llama.config),
        transformers.StaticCache(config=llama.config, max_cache_len=ROOM),
    ):
        inputs = maskops.packed_prefill(llama, tokens("llama"), cache=cache)
        assert inputs["past_key_values"] is cache
        assert int(cache.get_seq_length()) == LONGEST - 1
        compare(generate(llama, inputs), alone("llama"))


@pytest.mark.parametrize("chunk_size", [None, 6])
def test_beams_have_their_copies_of_the_cache(llama: Any, chunk_size: int | None) -> None:
    settings = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "max_new_tokens": NEW}
    settings |= {"eos_token_id": None, "pad_token_id": 0}
    expected = llama.generate(**padded("llama", prompts("llama")), **settings)
    inputs = maskops.packed_prefill(llama, tokens("llama"), expand_size=3, chunk_size=chunk_size)
    assert torch.equal(llama.generate(**inputs, **settings), expected)


def test_the_model_sees_no_padding_and_no_row_longer_than_asked_for(llama: Any) -> None:
    shapes: list[tuple[int, ...]] = []
    handle = llama.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    try:
        maskops.packed_prefill(llama, tokens("llama"))
        maskops.packed_prefill(llama, tokens("llama"), chunk_size=8)
    finally:
        handle.remove()
    assert shapes[0] == (1, sum(LENGTHS) - len(LENGTHS))
    assert [shape[0] for shape in shapes] == [1] * len(shapes)
    assert sum(shape[1] for shape in shapes[1:]) == shapes[0][1]
    assert max(shape[1] for shape in shapes[1:]) <= 8 and len(shapes) == 4


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"prompts": []}, ValueError, "prompts is empty"),
        ({"prompts": [[4, 5], []]}, ValueError, r"prompts\[1\] has no tokens"),
        ({"prompts": "text"}, TypeError, "prompts is str"),
        ({"prompts": torch.ones(2, 3).long()}, ValueError, "tokens and padding look alike"),
        ({"prompts": {"input_ids": torch.ones(2, 3).long()}}, ValueError, "no attention_mask"),
        ({"prompts": {"ids": []}}, ValueError, "expected input_ids"),
        ({"prompts": {"input_ids": [[4, 5, 6]], "attention_mask": [[1, 0, 1]]}}, ValueError, "holes"),
        ({"prompts": {"input_ids": [[4, 5]], "attention_mask": [[1, 1, 1]]}}, ValueError, "has 3 places"),
        ({"prompts": [[0.5]]}, TypeError, r"prompts\[0\]"),
        ({"cache": "static"}, ValueError, "needs max_length"),
        ({"cache": "static", "max_length": 3}, ValueError, "room for 3 tokens a row, the longest prompt has 4"),
        ({"max_length": 9}, ValueError, "size of a static cache"),
        ({"cache": "sliding"}, TypeError, "cache is 'sliding'"),
        ({"chunk_size": 0}, ValueError, "chunk_size"),
        ({"expand_size": 0}, ValueError, "expand_size"),
    ],
)
def test_bad_arguments(llama: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        maskops.packed_prefill(llama, **{"prompts": [[4, 5, 6, 7], [8]], **arguments})


def test_caches_that_cannot_take_prompts(llama: Any) -> None:
    used = maskops.packed_prefill(llama, [[4, 5, 6]])["past_key_values"]
    with pytest.raises(ValueError, match="already holds 2 tokens"):
        maskops.packed_prefill(llama, [[4, 5]], cache=used)
    pair = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
    with pytest.raises(ValueError, match="EncoderDecoderCache"):
        maskops.packed_prefill(llama, [[4, 5]], cache=pair)
    recurrent = transformers.DynamicCache(config=FAMILIES["lfm2"].build().config)
    with pytest.raises(ValueError, match="LinearAttentionLayer, which keeps more"):
        maskops.packed_prefill(llama, [[4, 5]], cache=recurrent)
    with maskops.attach(model("t5"), probe=False), pytest.raises(ValueError, match="is an encoder-decoder"):
        maskops.packed_prefill(model("t5"), [[4, 5]], cache="static", max_length=9)


def test_models_that_cannot_be_prefilled() -> None:
    module, bert = FAMILIES["llama"].build(), transformers.BertLMHeadModel(FAMILIES["bert"].build().config)
    with maskops.attach(module, probe=False):
        with pytest.raises(ValueError, match="LlamaModel has no generate"):
            maskops.packed_prefill(module.model, [[4, 5]])
        with maskops.attach(bert, probe=False), pytest.raises(ValueError, match="BertLMHeadModel attends in both"):
            maskops.packed_prefill(bert, [[4, 5]])
        module.train()
        module.activation_checkpointing_enable()
        with pytest.raises(ValueError, match=r"wrote nothing to the cache.*model\.eval"):
            maskops.packed_prefill(module, [[4, 5]])


def test_models_in_a_wrapper(llama: Any) -> None:
    compare(generate(llama, maskops.packed_prefill(torch.nn.Sequential(llama), tokens("llama"))), alone("llama"))


def test_models_that_are_not_attached_are_refused() -> None:
    with pytest.raises(ValueError, match=r"is not attached.*maskops\.attach"):
        maskops.packed_prefill(model("llama"), [[4, 5]])
