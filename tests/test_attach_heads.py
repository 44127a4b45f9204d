"""Heads on packed rows: one output a document, equal to that of the document by itself, and its gradients too."""

import functools
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

transformers = pytest.importorskip("transformers", reason="transformers is an optional extra")

import maskops  # noqa: E402
from maskops.integrations import pool  # noqa: E402
from tests import transformers_models as zoo  # noqa: E402

LENGTHS = (5, 4, 1, 8)  # two rows of nine tokens
LABELS = torch.tensor([0, 2, 1, 1])
WAYS = (
    "packed by cu",
    "packed by position_ids",
    "packed by segments",
    "packed + tail by cu",
    "packed + tail by position_ids and mask",
    "rows by cu",
    "rows by position_ids",
    "rows by segments",
)
CLASSIFIERS = {
    "bert": ("bert", "Bert", {}),
    "roberta": ("roberta", "Roberta", {}),
    "xlm-roberta": ("roberta", "XLMRoberta", {}),
    "distilbert": ("distilbert", "DistilBert", {}),
    "electra": ("electra", "Electra", {}),
    "modernbert cls": ("modernbert", "ModernBert", {"classifier_pooling": "cls"}),
    "modernbert mean": ("modernbert", "ModernBert", {"classifier_pooling": "mean"}),
    "llama": ("llama", "Llama", {}),
    "gpt2": ("gpt2", "GPT2", {}),
    "qwen2": ("qwen2", "Qwen2", {}),
    "mistral": ("mistral", "Mistral", {}),
    "gemma2": ("gemma2", "Gemma2", {}),
}
PAIRS = {"t5": "T5", "bart": "Bart"}


@functools.cache
def build(family, head, attention="eager", **options):
    """A model of a family of the zoo with another head; the tests of a process share it."""
    prefix = {"roberta": "Roberta"}.get(family)
    config = head.split("For")[0] + "Config" if prefix and not head.startswith(prefix) else zoo.FAMILIES[family].config
    return replace(zoo.FAMILIES[family], model=head, config=config).build(attention, **options)


def classifier(name, **options):
    if name in PAIRS:
        return build(name, PAIRS[name] + "ForSequenceClassification", num_labels=3, **options)
    family, head, special = CLASSIFIERS[name]
    return build(family, head + "ForSequenceClassification", num_labels=3, **special, **options)


def documents(name, lengths=LENGTHS):
    family = name if name in PAIRS else CLASSIFIERS[name][0]
    parts = zoo.documents(family, lengths, lengths)
    for part in parts if name in PAIRS else ():
        part.tokens[-1] = 2  # these heads read the end-of-sequence token
    return parts


def arrive(way, name, parts):
    """The arguments of a call; the classifiers of encoder-decoders take the ids of the encoder alone."""
    if name in PAIRS:
        parts = [part._replace(source=part.tokens) for part in parts]
    inputs = zoo.arrive(way, name if name in PAIRS else CLASSIFIERS[name][0], parts).inputs
    inputs = {key: value for key, value in inputs.items() if name not in PAIRS or not key.startswith("decoder")}
    # The zoo puts a sequence between rows, for padding there: here there is none, and it would be a document.
    return {key: value.unique_consecutive() if key.startswith("cu") else value for key, value in inputs.items()}


def gradients(model, loss):
    parameters = {key: value for key, value in model.named_parameters() if value.requires_grad}
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {key: value for key, value in zip(parameters, found, strict=True) if value is not None}


def assert_same_gradients(got, expected):
    assert got.keys() == expected.keys()
    scale = max(float(value.norm()) for value in expected.values())
    for key, value in expected.items():
        # Those of the keys' biases are rounding errors: softmax does not see them.
        assert float((got[key] - value).norm()) <= 1e-4 * max(float(value.norm()), 1e-3 * scale), key


@functools.cache
def alone(name):
    """Logits, mean loss and gradients, one document at a time with the model's own eager attention."""
    model, parts = classifier(name), documents(name)
    outputs = [
        model(input_ids=part.tokens[None], labels=label[None]) for part, label in zip(parts, LABELS, strict=True)
    ]
    loss = torch.stack([output.loss for output in outputs]).mean()
    return torch.cat([output.logits for output in outputs]).detach(), loss.detach(), gradients(model, loss)


@pytest.mark.parametrize("name", ["bert", "roberta", "llama", "t5"])
def test_forwards_called_without_hooks_give_a_row_a_document_or_raise(name):
    """As wrappers with adapters call them. BERT's pooler is a module and still handed the documents."""
    model, parts, logits = classifier(name), documents(name), alone(name)[0]
    packed, padded = arrive("packed by cu", name, parts), arrive("padded right", name, parts)
    with torch.no_grad(), maskops.attach(model, probe=False):
        torch.testing.assert_close(model.forward(**padded).logits, logits, rtol=0, atol=1e-5)
        if name == "bert":
            torch.testing.assert_close(model.forward(**packed).logits, logits, rtol=0, atol=1e-5)
            return
        with pytest.raises(ValueError, match=r"its forward was called without its hooks.*call the model inside"):
            model.forward(**packed)
        assert model.base_model(**packed) is not None  # not the business of a classifier


@pytest.mark.parametrize("name", [*CLASSIFIERS, *PAIRS])
def test_classifiers_give_one_row_for_each_document(name):
    logits, loss, expected = alone(name)
    model, parts = classifier(name), documents(name)
    ways = [way for way in WAYS if name not in PAIRS or "position" not in way]
    with maskops.attach(model, probe=False):
        for way in ways:
            with torch.set_grad_enabled(way in ways[:2]):
                output = model(**arrive(way, name, parts), labels=LABELS)
            torch.testing.assert_close(
                output.logits, logits, atol=1e-5, rtol=0, msg=lambda text, way=way: f"{way}: {text}"
            )
            torch.testing.assert_close(output.loss, loss, atol=1e-5, rtol=0)
            if way in ways[:2]:
                assert_same_gradients(gradients(model, output.loss), expected)


def packed(parts, *, empty=False, **options):
    """One row with offsets; with ``empty`` a document without tokens in the middle."""
    sequences = [part.tokens for part in parts]
    if empty:
        sequences.insert(2, sequences[0][:0])
    batch = maskops.PackedBatch.from_sequences(sequences, **options)
    return {"input_ids": batch.input_ids[None], "cu_seq_lens_q": batch.cu_seqlens, "cu_seq_lens_k": batch.cu_seqlens}


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert mean", "llama", "gpt2", "t5", "bart"])
def test_documents_without_tokens_keep_their_row(name):
    """Offsets are host shapes: nobody has to count. The row is finite, and a label of -100 keeps it from the loss."""
    logits, loss, expected = alone(name)
    model, labels = classifier(name), torch.tensor([0, 2, -100, 1, 1])
    with maskops.attach(model, probe=False):
        output = model(**packed(documents(name), empty=True), labels=labels)
    torch.testing.assert_close(output.logits[[0, 1, 3, 4]], logits, atol=1e-5, rtol=0)
    assert bool(output.logits[2].isfinite().all())
    torch.testing.assert_close(output.loss, loss, atol=1e-5, rtol=0)
    assert_same_gradients(gradients(model, output.loss), expected)


@pytest.mark.parametrize("name", ["bert", "modernbert mean", "llama", "gpt2"])
def test_classifiers_of_embeddings(name):
    """Without ids nothing tells a head where padding is: it reads the last column, or the first."""
    logits, _, _ = alone(name)
    model = classifier(name)
    with maskops.attach(model, probe=False):
        inputs = packed(documents(name), capacity=21)
        embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
        output = model(inputs_embeds=embeds, **inputs)
    torch.testing.assert_close(output.logits, logits, atol=1e-5, rtol=0)


def test_one_label_is_regression_and_a_row_of_labels_is_several():
    model, parts = build("bert", "BertForSequenceClassification", num_labels=1), documents("bert")
    targets = torch.tensor([0.5, -1.0, 2.0, 0.0])
    try:
        with maskops.attach(model, probe=False), torch.no_grad():
            output = model(**packed(parts), labels=targets)
            torch.testing.assert_close(output.loss, (output.logits[:, 0] - targets).square().mean())
            assert model(**packed(parts), labels=targets, return_dict=False)[1].shape == (4, 1)
    finally:
        model.config.problem_type = None
    several = classifier("bert")
    with maskops.attach(several, probe=False), torch.no_grad():
        several.config.problem_type = "multi_label_classification"
        try:
            output = several(**packed(parts), labels=torch.eye(4)[:, :3])
        finally:
            several.config.problem_type = "single_label_classification"
    expected = torch.nn.functional.binary_cross_entropy_with_logits(output.logits, torch.eye(4)[:, :3])
    torch.testing.assert_close(output.loss, expected)


def test_labels_of_another_number_of_documents_are_refused():
    model, parts = classifier("bert"), documents("bert")
    with maskops.attach(model, probe=False):
        with pytest.raises(
            ValueError, match=r"labels has shape \(1,\), expected \(4, ...\): the batch holds 4 documents"
        ):
            model(**packed(parts), labels=LABELS[:1])
        assert model(**packed(parts), labels=LABELS).logits.shape == (4, 3)  # and the next call is served


@pytest.mark.parametrize("name", [*CLASSIFIERS, *PAIRS])
def test_padding_on_either_side(name):
    logits, loss, expected = alone(name)
    model, parts = classifier(name), documents(name)
    with maskops.attach(model, probe=False):
        for way in ("padded right", "padded left"):
            with torch.set_grad_enabled(way == "padded left"):
                output = model(**arrive(way, name, parts), labels=LABELS)
            torch.testing.assert_close(output.logits, logits, atol=1e-5, rtol=0)
            torch.testing.assert_close(output.loss, loss, atol=1e-5, rtol=0)
        assert_same_gradients(gradients(model, output.loss), expected)


def test_single_documents_are_left_to_the_head():
    model, parts = classifier("llama"), documents("llama")
    with maskops.attach(model, probe=False), torch.no_grad():
        one = model(input_ids=parts[0].tokens[None], position_ids=torch.arange(5)[None])
        all_kept = model(input_ids=parts[0].tokens[None], attention_mask=torch.ones(1, 5, dtype=torch.int64))
    torch.testing.assert_close(one.logits, alone("llama")[0][:1], atol=1e-5, rtol=0)
    torch.testing.assert_close(all_kept.logits, one.logits, atol=1e-5, rtol=0)


def test_nothing_waits_for_the_device():
    """Fake tensors raise where a value would be read: offsets with an integer for the longest, and masks of bool."""
    with FakeTensorMode():
        family = replace(zoo.FAMILIES["bert"], model="BertForSequenceClassification")
        config = transformers.BertConfig(vocab_size=64, **family.options, num_labels=3)
        model = transformers.BertForSequenceClassification(config)
        cu_seqlens, labels = torch.empty(5, dtype=torch.int32), torch.empty(4, dtype=torch.int64)
        told = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": 9}
        with maskops.attach(model, probe=False):
            packed_row = model(input_ids=torch.empty(1, 18, dtype=torch.int64), **told, labels=labels)
            ids, mask = torch.empty(4, 9, dtype=torch.int64), torch.empty(4, 9, dtype=torch.bool)
            padded = model(input_ids=ids, attention_mask=mask, labels=labels)
            assert packed_row.logits.shape == padded.logits.shape == (4, 3)
            (packed_row.loss + padded.loss).backward()


@pytest.mark.parametrize("name", ["roberta", "llama"])
def test_a_packed_batch_brings_its_labels(name):
    """With room for more sequences and tokens: sequences that are not there have a row and no part in the loss."""
    logits, loss, _ = alone(name)
    model, parts = classifier(name), documents(name)
    batch = maskops.PackedBatch.from_sequences(
        [part.tokens for part in parts],
        sequence_labels=LABELS,
        capacity=24,
        max_sequences=6,
        position_start=zoo.FAMILIES[name].first_position,
    )
    inputs = batch.transformers_inputs(labels="sequences", use_cache=None if name == "roberta" else False)
    with maskops.attach(model) as attachment, torch.no_grad():
        output = model(**inputs)
        assert any(f"one output or label a document in {type(model).__name__}" in x for x in attachment.report.notes)
    torch.testing.assert_close(output.logits[:4], logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.loss, loss, atol=1e-5, rtol=0)
    assert output.logits.shape == (6, 3)


@pytest.mark.parametrize("name, head", [("bert", "Bert"), ("roberta", "Roberta"), ("bert", "Albert")])
def test_poolers_give_one_row_for_each_document(name, head):
    options = {"embedding_size": 16} if head == "Albert" else {}
    family = replace(zoo.FAMILIES[name], model=f"{head}Model", config=f"{head}Config")
    model, parts = family.build("eager", **options), zoo.documents(name, LENGTHS)
    expected = torch.cat([model(input_ids=part.tokens[None]).pooler_output for part in parts])
    direction = torch.linspace(-1, 1, expected.numel()).view_as(expected)
    wanted = gradients(model, (expected * direction).sum())
    with maskops.attach(model, probe=False):
        for way in ("packed by cu", "rows by segments", "padded left"):
            output = model(**zoo.arrive(way, name, parts).inputs)
            torch.testing.assert_close(output.pooler_output, expected, atol=1e-5, rtol=0)
            assert_same_gradients(gradients(model, (output.pooler_output * direction).sum()), wanted)
        empty = model(**packed(parts, empty=True)).pooler_output
        torch.testing.assert_close(empty[[0, 1, 3, 4]], expected, atol=1e-5, rtol=0)


def test_next_sentence_heads_follow_the_pooler():
    model, parts = build("bert", "BertForPreTraining"), documents("bert")
    labels, following = [part.tokens for part in parts], torch.tensor([0, 1, 1, 0])
    alone = [
        model(input_ids=part.tokens[None], labels=part.tokens[None], next_sentence_label=label[None])
        for part, label in zip(parts, following, strict=True)
    ]
    with maskops.attach(model, probe=False), torch.no_grad():
        output = model(**packed(parts), labels=torch.cat(labels)[None], next_sentence_label=following)
    expected = torch.cat([one.seq_relationship_logits for one in alone])
    torch.testing.assert_close(output.seq_relationship_logits, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        output.prediction_logits, torch.cat([one.prediction_logits for one in alone], 1), atol=1e-5, rtol=0
    )


def test_a_pooler_that_is_not_understood_is_refused():
    class Mean(torch.nn.Module):
        def forward(self, hidden_states):
            return hidden_states[0].mean(0, keepdim=True)

    model, parts = zoo.FAMILIES["bert"].build(), documents("bert")
    model.pooler = Mean()
    with maskops.attach(model, probe=False), pytest.raises(ValueError, match="BertModel pools in a way of its own"):
        model(**packed(parts))


@pytest.mark.parametrize("name, head", [("bert", "Bert"), ("distilbert", "DistilBert"), ("llama", "Llama")])
def test_token_classification_is_a_matter_of_tokens(name, head):
    model, parts = build(name, f"{head}ForTokenClassification", num_labels=3), documents(name)
    labels = [part.tokens % 3 for part in parts]
    labels[0] = labels[0].clone().index_fill(0, torch.tensor([1]), -100)
    alone = [model(input_ids=part.tokens[None], labels=y[None]) for part, y in zip(parts, labels, strict=True)]
    counts = torch.tensor([float((y != -100).sum()) for y in labels])
    loss = (torch.stack([one.loss for one in alone]) * counts).sum() / counts.sum()
    expected = gradients(model, loss)
    with maskops.attach(model, probe=False):
        output = model(**packed(parts), labels=torch.cat(labels)[None])
    torch.testing.assert_close(output.logits[0], torch.cat([one.logits[0] for one in alone]), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.loss, loss, atol=1e-5, rtol=0)
    assert_same_gradients(gradients(model, output.loss), expected)


@pytest.mark.parametrize(
    "name, head", [("bert", "Bert"), ("modernbert", "ModernBert"), ("llama", "Llama"), ("bart", "Bart")]
)
def test_places_of_answers_are_counted_inside_each_document(name, head):
    """The last document's answer lies behind its end, as of a document that was cut: it is ignored."""
    model, parts = build(name, f"{head}ForQuestionAnswering"), zoo.documents(name, LENGTHS, LENGTHS)
    begins, ends = torch.tensor([1, 0, 0, 9]), torch.tensor([3, 3, 0, 9])
    alone = [
        model(input_ids=part.tokens[None], start_positions=begin[None], end_positions=end[None])
        for part, begin, end in zip(parts, begins, ends, strict=True)
    ]
    loss = torch.stack([one.loss for one in alone[:3]]).mean()
    expected = gradients(model, loss)
    with maskops.attach(model, probe=False):
        output = model(**packed(parts), start_positions=begins, end_positions=ends)
        with pytest.raises(ValueError, match=r"start_positions has shape \(1,\), expected \(4, ...\)"):
            model(**packed(parts), start_positions=begins[:1], end_positions=ends[:1])
        values = model(**packed(parts), start_positions=begins[:, None], end_positions=ends[:, None], return_dict=False)
    torch.testing.assert_close(
        output.start_logits[0], torch.cat([one.start_logits[0] for one in alone]), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(output.loss, loss, atol=1e-5, rtol=0)
    torch.testing.assert_close(values[0], output.loss)
    assert next(iter(output)) == "loss"
    assert_same_gradients(gradients(model, output.loss), expected)


def test_multiple_choice_is_refused_when_packed_and_right_when_not():
    model = build("bert", "BertForMultipleChoice")
    ids = torch.randint(4, 64, (2, 3, 5), generator=torch.Generator().manual_seed(0))
    places = torch.arange(5).expand(2, 3, 5)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with maskops.attach(model, probe=False):
            torch.testing.assert_close(model(input_ids=ids, position_ids=places).logits, expected, atol=1e-5, rtol=0)
            for told in ({"cu_seq_lens_q": torch.tensor([0, 5])}, {"position_ids": places % 3}):
                with pytest.raises(ValueError, match="BertForMultipleChoice: a packed row does not say which"):
                    model(input_ids=ids, **told)


@pytest.mark.parametrize("how", ["mean", "cls", "last", "max", "weighted_mean"])
def test_sentence_embeddings_of_packed_and_padded_batches_are_equal(how):
    model, parts = zoo.model("minilm"), zoo.documents("minilm")
    batch = maskops.PackedBatch.from_sequences([part.tokens for part in parts])
    padded = zoo.arrive("padded right", "minilm", parts).inputs
    with torch.no_grad():
        expected = pool(model(**padded).last_hidden_state, padded["attention_mask"], how)
        with maskops.attach(model, probe=False):
            got = pool(model(**packed(parts)).last_hidden_state, batch, how)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)


def test_a_padded_batch_compiles_to_one_graph_with_a_mask_of_integers():
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4
    )
    model = transformers.BertModel(config).eval()
    ids, mask = torch.arange(5, 17).view(2, 6), torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    with torch.no_grad(), maskops.attach(model, probe=False):
        expected = model(input_ids=ids, attention_mask=mask).pooler_output
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        found = compiled(input_ids=ids, attention_mask=mask).pooler_output
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        with pytest.raises(RuntimeError, match="cu_seq_lens_q only"):
            compiled(input_ids=ids, attention_mask=mask + mask.cumsum(1) // 3)
