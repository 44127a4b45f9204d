"""`attach(model, unpad=True)`: padded calls run packed inside the model, and come back padded."""

import functools
from dataclasses import replace

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is an optional extra")

import maskops  # noqa: E402
from tests import transformers_models as zoo  # noqa: E402

NAMES = ("bert", "roberta", "modernbert", "distilbert", "llama", "mistral", "gemma3", "gpt2", "bart")
LENGTHS, SOURCES = (5, 1, 9, 4), (3, 7, 2, 6)


@functools.cache
def build(name, head=None):
    family = zoo.FAMILIES[name]
    return (family if head is None else replace(family, model=head)).build("eager")


def call(name, way, parts):
    batch = zoo.arrive(way, name, parts)
    inputs = dict(batch.inputs, output_hidden_states=True)
    return inputs | ({} if zoo.FAMILIES[name].kind == "encoder" else {"use_cache": False}), batch.places


def states(output):
    """Everything of an output that has a value for each token of the (decoder's) batch, layer by layer."""
    layers = output.get("hidden_states") or output.get("decoder_hidden_states")
    return [*layers, output.logits if "logits" in output else output.last_hidden_state]


class Rows:
    """Counts the rows that reach the dense layers of a model."""

    def __init__(self, model):
        kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
        layers = [module for module in model.modules() if isinstance(module, kinds)]
        self.shapes = []
        self.handles = [layer.register_forward_pre_hook(self.count) for layer in layers]

    def count(self, module, args):
        self.shapes.append(tuple(args[0].shape[:-1]))

    def remove(self):
        for handle in self.handles:
            handle.remove()


@functools.cache
def alone(name):
    """States of each document by itself, laid one after the other, and the gradients of a weighted sum of the last."""
    model, parts = build(name), zoo.documents(name, LENGTHS, SOURCES)
    outputs = []
    for part in parts:
        inputs = {"input_ids": part.tokens[None]}
        if part.source is not None:
            inputs = {"input_ids": part.source[None], "decoder_input_ids": part.tokens[None]}
        outputs.append(states(model(**inputs, output_hidden_states=True)))
    layers = [torch.cat([layer[0] for layer in of_layer]) for of_layer in zip(*outputs, strict=True)]
    return [layer.detach() for layer in layers], gradients(model, layers[-1])


def gradients(model, rows):
    loss = (rows * torch.linspace(-1, 1, rows.numel()).view_as(rows)).sum()
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {key: value for key, value in zip(parameters, found, strict=True) if value is not None}


def assert_same_gradients(got, expected):
    assert got.keys() == expected.keys()
    scale = max(float(value.norm()) for value in expected.values())
    for key, value in expected.items():
        # Those of the keys' biases are rounding errors: softmax does not see them.
        assert float((got[key] - value).norm()) <= 1e-4 * max(float(value.norm()), 1e-3 * scale), key


PADDED = ("padded right", "padded left")


@pytest.mark.parametrize(
    "name, way",
    # Packed rows of an encoder-decoder are not closed up.
    [(name, way) for name in NAMES for way in PADDED + (() if name == "bart" else ("rows by segments",))],
)
def test_padding_is_not_computed_and_comes_back_as_zeros(name, way):
    model, parts = build(name), zoo.documents(name, LENGTHS, SOURCES)
    expected, wanted = alone(name)
    inputs, places = call(name, way, parts)
    with maskops.attach(model, unpad=True, probe=False) as attachment:
        rows = Rows(model)
        output = model(**inputs)
        rows.remove()
        assert any("unpad" in note for note in attachment.report.notes)
    assert (1, sum(LENGTHS)) in rows.shapes
    got = states(output)
    for layer, one in zip(got, expected, strict=True):
        assert layer.shape[:2] == inputs["decoder_input_ids" if name == "bart" else "input_ids"].shape
        torch.testing.assert_close(layer.flatten(0, 1)[places], one, atol=1e-5, rtol=0)
    for layer in got[:-1]:
        padding = torch.ones(layer.shape[0] * layer.shape[1], dtype=torch.bool).index_fill(0, places, False)
        assert bool((layer.flatten(0, 1)[padding] == 0).all())
    assert_same_gradients(gradients(model, got[-1].flatten(0, 1)[places]), wanted)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_under_gradient_checkpointing(name):
    """Layers run again in the backward pass, outside of every call."""
    family = zoo.FAMILIES[name]
    model, parts = (
        family.build("eager", attention_dropout=0.0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        zoo.documents(name, LENGTHS),
    )
    _, wanted = alone(name)
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    batch = zoo.arrive("padded right", name, parts)
    with maskops.attach(model, unpad=True, probe=False):
        rows = Rows(model)
        output = model(**batch.inputs)
        last = output.logits if "logits" in output else output.last_hidden_state
        got = gradients(model, last.flatten(0, 1)[batch.places])
        rows.remove()
    assert rows.shapes.count((1, sum(LENGTHS))) > len(rows.shapes) / 2
    assert_same_gradients(got, wanted)


def test_whatever_has_a_value_for_each_token_moves_with_them():
    model, parts = build("bert"), zoo.documents("bert", LENGTHS)
    inputs = zoo.arrive("padded right", "bert", parts).inputs
    shape = inputs["input_ids"].shape
    told = {
        "inputs_embeds": torch.randn(*shape, 32, generator=torch.Generator().manual_seed(2)),
        "token_type_ids": torch.arange(shape[1]).expand(shape) % 2,
        "position_ids": torch.arange(shape[1])[None] + 3,
        "attention_mask": inputs["attention_mask"],
    }
    real = told["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**told).last_hidden_state[real]
        with maskops.attach(model, unpad=True, probe=False):
            torch.testing.assert_close(model(**told).last_hidden_state[real], expected, atol=1e-5, rtol=0)
            assert len(model(**told, return_dict=False)) == 2


def test_an_encoder_without_padding_beside_a_padded_decoder():
    model, parts = build("bart"), zoo.documents("bart", LENGTHS, (3, 3, 3, 3))
    inputs, places = call("bart", "padded right", parts)
    del inputs["attention_mask"]
    with torch.no_grad():
        expected = model(**inputs).logits.flatten(0, 1)[places]
        with maskops.attach(model, unpad=True, probe=False):
            torch.testing.assert_close(model(**inputs).logits.flatten(0, 1)[places], expected, atol=1e-5, rtol=0)


def test_heads_and_poolers_see_the_rows_that_they_know():
    parts = zoo.documents("bert", LENGTHS)
    inputs = zoo.arrive("padded right", "bert", parts).inputs
    for head, field in (("BertModel", "pooler_output"), ("BertForSequenceClassification", "logits")):
        model = build("bert", head)
        with torch.no_grad():
            expected = model(**inputs)[field]
            with maskops.attach(model, unpad=True, probe=False):
                got = model(**inputs)[field]
                tail = zoo.arrive("packed + tail by segments", "bert", parts).inputs
                both = model(**tail)[field]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(both, expected, atol=1e-5, rtol=0)


def test_router_logits_stay_those_of_the_batch():
    """The auxiliary loss of experts reads them beside the mask of the batch."""
    model, parts = zoo.FAMILIES["mixtral"].build("eager", output_router_logits=True), zoo.documents("mixtral", LENGTHS)
    batch = zoo.arrive("padded right", "mixtral", parts)
    labels = batch.inputs["input_ids"].masked_fill(batch.inputs["attention_mask"] == 0, -100)
    inputs = dict(batch.inputs, labels=labels, use_cache=False)
    with torch.no_grad():
        expected = model(**inputs)
        with maskops.attach(model, unpad=True, probe=False):
            got = model(**inputs)
    torch.testing.assert_close(got.aux_loss, expected.aux_loss, atol=1e-5, rtol=0)
    torch.testing.assert_close(got.loss, expected.loss, atol=1e-5, rtol=0)


def test_calls_with_a_cache_and_generation_are_left_as_they_are():
    model, parts = build("llama"), zoo.documents("llama", LENGTHS)
    inputs = zoo.arrive("padded left", "llama", parts).inputs
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        expected = model.generate(**inputs, **options)
        with maskops.attach(model, unpad=True, probe=False):
            assert model(**inputs).past_key_values.get_seq_length() == max(LENGTHS)
            assert torch.equal(model.generate(**inputs, **options), expected)


def test_relative_biases_stay_padded():
    model, parts = build("t5"), zoo.documents("t5", LENGTHS, SOURCES)
    inputs, places = call("t5", "padded right", parts)
    with torch.no_grad():
        expected = model(**inputs).logits.flatten(0, 1)[places]
        with maskops.attach(model, unpad=True, probe=False) as attachment:
            assert any("T5Stack stay padded: a learned relative bias" in note for note in attachment.report.notes)
            torch.testing.assert_close(model(**inputs).logits.flatten(0, 1)[places], expected, atol=1e-5, rtol=0)


def test_states_along_the_row_stay_padded():
    """Packed, they would run from one document into the next."""
    model = zoo.REFUSED["lfm2"].build("eager")
    batch = zoo.arrive("padded right", "lfm2", zoo.documents("lfm2", LENGTHS))
    inputs = dict(batch.inputs, use_cache=False)
    with torch.no_grad():
        expected = model(**inputs).logits.flatten(0, 1)[batch.places]
        with maskops.attach(model, unpad=True) as attachment:
            assert any("stay padded: layers carry a state" in note for note in attachment.report.notes)
            torch.testing.assert_close(model(**inputs).logits.flatten(0, 1)[batch.places], expected, atol=1e-5, rtol=0)


def test_models_that_take_no_packed_rows_are_refused():
    """Embeddings that hold the tokens beside: of a padded row, those of padding are zeros at first."""
    options = {"embedding_size": 16, "true_hidden_size": 16, "intra_bottleneck_size": 16, "num_hidden_layers": 1}
    config = transformers.MobileBertConfig(vocab_size=64, hidden_size=32, intermediate_size=32, **options)
    config.num_attention_heads = 2
    model = transformers.MobileBertModel(config)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=r"^MobileBertModel was not attached|unpad=True runs MobileBertModel"):
        maskops.attach(model, unpad=True)
    assert model.config._attn_implementation == before
    maskops.attach(model).detach()


def test_rows_with_holes_stay_as_they_are():
    model = build("llama")
    ids = torch.arange(5, 21).view(2, 8)
    mask = torch.ones_like(ids)
    mask[1, 6:] = mask[0, 4] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    with torch.no_grad():
        with maskops.attach(model, probe=False):
            expected = model(**inputs).logits
        with maskops.attach(model, probe=False, unpad=True):
            found = model(**inputs).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)


def test_masks_of_an_encoder_may_be_floats():
    model, parts = build("bart"), zoo.documents("bart", LENGTHS, SOURCES)
    inputs, _ = call("bart", "padded right", parts)
    with torch.no_grad(), maskops.attach(model, probe=False, unpad=True):
        expected = model(**inputs)
        found = model(**{**inputs, "attention_mask": inputs["attention_mask"].float()})
    assert torch.equal(states(found)[-1], states(expected)[-1])
