"""Losses of transformers' models: its own where that is a number, each document by itself, and without logits."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import maskops
from maskops import use_backend

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when it is imported; everything here is made from configurations
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
loss_utils = pytest.importorskip("transformers.loss.loss_utils", reason="transformers is not installed")
from maskops.integrations.transformers import loss as losses  # noqa: E402
from tests.transformers_models import SERVED, Family, documents  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

VOCABULARY = 23


def scores(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (4 * torch.randn(*shape, VOCABULARY, generator=generator)).to(dtype).requires_grad_()


def some_labels(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(VOCABULARY, shape, generator=generator)
    return labels.masked_fill(torch.rand(shape, generator=generator) < 0.3, -100)


class Config:
    num_labels = VOCABULARY


TWINS = {
    "causal": (losses.causal_lm_loss, loss_utils.ForCausalLMLoss, {"vocab_size": VOCABULARY}),
    "aligned": (losses.aligned_loss, loss_utils.ForMaskedLMLoss, {"vocab_size": VOCABULARY}),
    "classes": (losses.token_classification_loss, loss_utils.ForTokenClassification, {"config": Config}),
}
NUMBERS = {"mean": None, "int": 7, "float": 7.5, "tensor": torch.tensor(9), "row": torch.tensor([[11]])}


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("name", TWINS)
def test_losses_and_gradients_are_those_of_transformers(name: str, number: str) -> None:
    mine, theirs, arguments = TWINS[name]
    logits, labels = scores(3, 6), some_labels(3, 6)
    given = {
        **arguments,
        "num_items_in_batch": NUMBERS[number],
        "max_length_q": 6,
    }  # whatever the model was called with
    if name == "causal":
        given["ignore_index"] = -100
    expected = theirs(logits, labels, **{**given, "num_items_in_batch": NUMBERS[number]}).reshape(())
    (wanted,) = torch.autograd.grad(expected, logits)
    loss = mine(logits, labels, **given)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], wanted, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("number", [None, 0, torch.tensor(0)])
def test_nothing_to_predict_is_zero_with_gradient(name: str, number: int | Tensor | None) -> None:
    mine, _, arguments = TWINS[name]
    logits = scores(1, 4)
    loss = mine(logits, torch.full((1, 4), -100), num_items_in_batch=number, **arguments)
    assert loss.item() == 0 and not torch.autograd.grad(loss, logits)[0].any()


def each_alone(logits: Tensor, labels: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, int]:
    """Sum of losses and number of targets of documents that lie one after the other, in float64."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    rows, targets = logits.double().reshape(-1, VOCABULARY), labels.reshape(-1)
    for scored, target in zip(rows.split(lengths), targets.split(lengths), strict=True):
        if len(target) > 1:
            total = total + F.cross_entropy(scored[:-1], target[1:], reduction="sum")
            count += int((target[1:] != -100).sum())
    return total, count


@pytest.mark.parametrize("how", ["cu_seqlens", "documents", "several rows", "tail"])
def test_nothing_is_predicted_across_documents(how: str) -> None:
    """Labels of first tokens are there: only the boundaries keep them from being predicted."""
    rows, lengths = (2, (3, 0, 5, 1, 7)) if how == "several rows" else (1, (3, 0, 5, 1, 7))
    logits = scores(rows, 16 // rows)
    labels = torch.randint(VOCABULARY, (rows, 16 // rows), generator=torch.Generator().manual_seed(1))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    if how == "tail":
        lengths, offsets = (3, 0, 5), offsets[:4]
    total, count = each_alone(logits[:, :8] if how == "tail" else logits, labels.reshape(-1)[: sum(lengths)], lengths)
    given: dict[str, Any] = {"cu_seq_lens_q": offsets.to(torch.int32)}
    if how == "documents":
        given = {"documents": torch.tensor([[4] * 3 + [2] * 5 + [9] + [0] * 7])}
    loss = losses.causal_lm_loss(logits, labels, VOCABULARY, **given)
    torch.testing.assert_close(loss.double(), total / count, rtol=1e-6, atol=0)
    halved = losses.causal_lm_loss(logits, labels, VOCABULARY, num_items_in_batch=2 * count, **given)
    torch.testing.assert_close(halved.double(), total / count / 2, rtol=1e-6, atol=0)
    expected = torch.autograd.grad(total / count, logits)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], expected, rtol=1e-5, atol=1e-7)
    stock = loss_utils.ForCausalLMLoss(logits, labels, VOCABULARY)
    assert abs(stock.item() - loss.item()) > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_neither_predicts_nor_is_predicted(side: str) -> None:
    """Labels are the tokens with their padding, as of a collator that forgets it; what padding scored may be NaN."""
    logits, labels = scores(2, 7), torch.randint(VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
    real = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7]).bool()
    real = real if side == "left" else real.flip(1)
    poisoned = logits.masked_fill(~real[..., None], math.nan)
    loss = losses.causal_lm_loss(poisoned, labels, VOCABULARY, documents=torch.where(real, 0, -1))
    (total, count) = each_alone(logits[real], labels[real], (4, 7))
    torch.testing.assert_close(loss.double(), total / count, rtol=1e-6, atol=0)
    assert bool(torch.autograd.grad(loss, logits)[0].isfinite().all())


def test_shifted_labels_are_taken_as_they_are() -> None:
    logits, shifted = scores(1, 8), torch.randint(VOCABULARY, (1, 8), generator=torch.Generator().manual_seed(1))
    given = {"shift_labels": shifted, "cu_seq_lens_q": torch.tensor([0, 3, 8])}
    loss = losses.causal_lm_loss(logits, None, VOCABULARY, **given)
    torch.testing.assert_close(loss, F.cross_entropy(logits[0], shifted[0]), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="labels and shift_labels are None"):
        losses.causal_lm_loss(logits, None, VOCABULARY)


def test_dtypes() -> None:
    """bfloat16 is read as it is and scored in float32, float64 stays; narrow labels are widened."""
    labels = some_labels(2, 6)
    for dtype, result in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        logits = scores(2, 6, dtype=dtype)
        with use_backend("reference" if dtype == torch.float64 else "cpu"):
            loss = losses.causal_lm_loss(logits, labels.to(torch.int16), VOCABULARY)
        assert loss.dtype == result
        expected = F.cross_entropy(logits.double()[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1))
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
        assert torch.autograd.grad(loss, logits)[0].dtype == dtype


def test_rows_of_several_codebooks() -> None:
    """The last dimension holds one row of the vocabulary for each codebook, as in transformers' own loss."""
    logits, labels = scores(2, 5, 3), some_labels(2, 5, 3)
    joined = logits.flatten(-2)
    loss = losses.aligned_loss(joined, labels, VOCABULARY)
    torch.testing.assert_close(loss, loss_utils.ForMaskedLMLoss(joined, labels, VOCABULARY), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="target has shape"):
        losses.aligned_loss(joined, labels[:, :-1], VOCABULARY)


def test_numbers_of_items_that_are_none() -> None:
    with pytest.raises(ValueError, match=r"num_items_in_batch has shape \(2,\)"):
        losses.aligned_loss(scores(2, 3), some_labels(2, 3), VOCABULARY, torch.tensor([3, 4]))


# ---- attached models -------------------------------------------------------------------------------------------------


def variant(base: str, name: str, model: str, config: str, **options: Any) -> Family:
    return Family(name, "decoder", model, config, {**SERVED[base].options, **options})


HEADS = {
    "llama": SERVED["llama"],
    "qwen2": SERVED["qwen2"],
    "qwen3": SERVED["qwen3"],
    "mistral": SERVED["mistral"],
    "gemma2": SERVED["gemma2"],  # final_logit_softcapping=30, tied embeddings
    "gemma3": variant("gemma3", "gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", final_logit_softcapping=3.0),
    "gpt2": SERVED["gpt2"],  # tied embeddings
    "phi": SERVED["phi"],  # a bias
    "opt": dataclasses.replace(SERVED["opt"], options={**SERVED["opt"].options, "dropout": 0.0}),
    "mixtral": variant("mixtral", "mixtral", "MixtralForCausalLM", "MixtralConfig", output_router_logits=True),
    "gpt-oss": variant("gpt-oss", "gpt-oss", "GptOssForCausalLM", "GptOssConfig", output_router_logits=True),
    "cohere": variant("llama", "cohere", "CohereForCausalLM", "CohereConfig", logit_scale=0.3),
    "granite": variant("llama", "granite", "GraniteForCausalLM", "GraniteConfig", logits_scaling=3.0),
}
LENGTHS = (5, 1, 9, 4)


@functools.cache
def language_model(name: str) -> Any:
    """Shared by the tests, which leave it as it was: in training mode, without dropout."""
    model = HEADS[name].build()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


def packed(name: str = "llama") -> dict[str, Any]:
    tokens = torch.cat([document.tokens for document in documents("llama", LENGTHS)])[None]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    return {"input_ids": tokens, "position_ids": positions, "labels": tokens, "use_cache": False}


def true_mean(model: Any, parts: tuple[Tensor, ...]) -> tuple[Tensor, int]:
    """Sum of the losses of every token but the first of each document, alone, and their number."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for tokens in parts:
        scored = model(tokens[None], use_cache=False, logits_to_keep=0).logits[0].double()
        total = total + F.cross_entropy(scored[:-1], tokens[1:], reduction="sum") if len(tokens) > 1 else total
        count += len(tokens) - 1
    return total, count


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}


def check_gradients(mine: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert mine.keys() == expected.keys()
    floor = 1e-3 * max(gradient.norm().item() for gradient in expected.values())
    for name, gradient in expected.items():
        relative = (mine[name] - gradient).norm().item() / max(gradient.norm().item(), floor)
        assert relative < 1e-4, f"the gradient of {name} differs by {relative:.3g}"


@pytest.mark.parametrize("name", HEADS)
def test_packed_documents_with_and_without_logits(name: str) -> None:
    """The loss and all gradients, fused and not, are those of each document alone; labels of first tokens are there."""
    model = language_model(name)
    inputs = packed()
    total, count = true_mean(model, inputs["input_ids"][0].split(LENGTHS))
    expected = gradients(model, total / count)
    for fuse in (False, True):
        with maskops.attach(model, probe=False, fuse_lm_head=fuse):
            output = model(**inputs, num_items_in_batch=torch.tensor(2 * count))
            # Auxiliary losses of experts are added by the model, to whatever its loss function gives.
            auxiliary = 0.0 if output.get("aux_loss") is None else model.router_aux_loss_coef * output.aux_loss
            torch.testing.assert_close((output.loss - auxiliary).double(), total / count / 2, rtol=1e-5, atol=0)
            assert (output.logits is None) == fuse and ("logits" in output) != fuse
            check_gradients(gradients(model, 2 * (output.loss - auxiliary)), expected)


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite", "phi"])
def test_what_happens_to_logits_is_reported(name: str) -> None:
    words = {"gemma2": "soft cap final_logit_softcapping", "cohere": "times logit_scale", "phi": "as they are"}
    words["granite"] = "times 1 / logits_scaling"
    with maskops.attach(language_model(name), probe=False, fuse_lm_head=True) as attached:
        assert f"logits {words[name]}; " in str(attached.report)


WAYS = [
    "cu",
    "segments",
    "padded left",
    "padded right",
    "dense",
    "pairs alone",
    "additive pairs",
    "flat labels",
    "kept",
]


@pytest.mark.parametrize("way", WAYS)
def test_boundaries_of_every_arrival(way: str) -> None:
    model = language_model("llama")
    parts = packed()["input_ids"][0].split(LENGTHS)
    total, count = true_mean(model, parts)
    inputs = {"input_ids": packed()["input_ids"]}
    if way == "cu":
        offsets = torch.tensor([0, *LENGTHS]).cumsum(0).int()
        inputs |= {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
    elif way == "segments":
        inputs["attention_mask"] = torch.arange(1, 5).repeat_interleave(torch.tensor(LENGTHS))[None]
    elif way == "dense":
        batch = maskops.PackedBatch.from_sequences(list(parts))
        inputs |= {"attention_mask": batch.dense_mask(), "position_ids": batch.position_ids[None]}
    elif way.endswith(("alone", "pairs")):
        allowed = maskops.PackedBatch.from_sequences(list(parts)).dense_mask()
        smallest = torch.finfo(torch.float32).min
        inputs["attention_mask"] = allowed if way == "pairs alone" else (~allowed).float().clamp(max=1) * smallest
    elif way in ("flat labels", "kept"):
        inputs["position_ids"] = packed()["position_ids"]
    else:
        batch = maskops.PackedBatch.from_sequences(list(parts)).to_padded(padding_value=7, side=way.split()[1])
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask.long()}
    labels = inputs["input_ids"]
    if way == "flat labels":
        labels = labels[0]
    elif way == "kept":
        kept = sum(LENGTHS[1:])
        inputs["logits_to_keep"], labels = kept, labels[:, -kept:]
        total, count = true_mean(model, parts[1:])
    for fuse in (False, True):
        with maskops.attach(model, probe=False, fuse_lm_head=fuse):
            loss = model(**inputs, labels=labels, use_cache=False).loss
            torch.testing.assert_close(loss.double(), total / count, rtol=1e-5, atol=0)


def test_boundaries_are_known_where_adapters_call_the_forward_itself() -> None:
    model, inputs = language_model("llama"), packed()
    total, count = true_mean(model, inputs["input_ids"][0].split(LENGTHS))
    with maskops.attach(model, probe=False):
        loss = model.forward(**inputs).loss
        torch.testing.assert_close(loss.double(), total / count, rtol=1e-5, atol=0)
        kept = sum(LENGTHS[1:])
        some = {**inputs, "labels": inputs["labels"][:, -kept:], "logits_to_keep": kept}
        torch.testing.assert_close(model.forward(**some).loss, model(**some).loss, rtol=1e-6, atol=0)
    with maskops.attach(model, probe=False, fuse_lm_head=True), pytest.raises(RuntimeError, match="without its hooks"):
        model.forward(**inputs)


def test_shifted_labels_of_a_collator() -> None:
    model, inputs = language_model("llama"), packed()
    shifted = torch.randint(4, 64, inputs["labels"].shape, generator=torch.Generator().manual_seed(0))
    for fuse in (False, True):
        with maskops.attach(model, probe=False, fuse_lm_head=fuse):
            loss = model(**inputs, shift_labels=shifted).loss
            with torch.no_grad():
                scored = model(**{**inputs, "labels": None}).logits
            torch.testing.assert_close(loss, F.cross_entropy(scored[0], shifted[0]), rtol=1e-5, atol=0)


def test_logits_are_there_where_there_is_no_training_step() -> None:
    model, inputs = language_model("llama"), packed()
    unlabelled = {**inputs, "labels": None}
    with maskops.attach(model, probe=False, fuse_lm_head=True):
        everything = (*inputs["input_ids"].shape, 64)
        assert model(**unlabelled).logits.shape == everything
        assert model(**unlabelled, logits_to_keep=1).logits.shape == (1, 1, 64)
        assert model(**inputs, return_dict=False)[1] is None
        nothing = model(**{**inputs, "labels": torch.full_like(inputs["labels"], -100)}).loss
        assert nothing.item() == 0 and not gradients(model, nothing)["lm_head.weight"].any()
        model.eval()
        try:
            output = model(**inputs)
            assert output.logits.shape == everything
        finally:
            model.train()
        torch.testing.assert_close(model(**inputs).loss, output.loss, rtol=1e-6, atol=0)


def test_checkpointing_and_autocast() -> None:
    """Layers are computed again in the backward pass, outside of the call; autocast rounds hidden states, no logits."""
    model, inputs = language_model("llama"), packed()
    with maskops.attach(model, probe=False, fuse_lm_head=True):
        loss = model(**inputs).loss
        expected = gradients(model, loss)
        model.gradient_checkpointing_enable()
        try:
            model(**inputs).loss.backward()
            found = {name: parameter.grad for name, parameter in model.named_parameters()}
        finally:
            model.gradient_checkpointing_disable()
            model.zero_grad()
        check_gradients({name: gradient for name, gradient in found.items() if gradient is not None}, expected)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(**inputs)
        assert output.logits is None and output.loss.dtype == torch.float32
        torch.testing.assert_close(output.loss, loss, rtol=2e-2, atol=0)


def everything_of(model: Any) -> list[tuple[set[str], int, int, Any]]:
    """Names of attributes, numbers of hooks and the loss function of all modules."""
    return [
        (
            set(vars(module)),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            vars(module).get("_loss_function"),
        )
        for module in model.modules()
    ]


def own_loss(logits: Tensor, labels: Tensor, **unused: Any) -> Tensor:
    return logits.float().mean() * 0


def test_detaching_restores_every_loss() -> None:
    model = language_model("llama")
    before = everything_of(model)
    with maskops.attach(model, probe=False, fuse_lm_head=True):
        assert everything_of(model) != before
    assert everything_of(model) == before and model.loss_function is loss_utils.ForCausalLMLoss
    model.loss_function = loss_utils.ForCausalLMLoss  # set, though to what it is
    try:
        with maskops.attach(model, probe=False):
            assert isinstance(model.loss_function, losses.LossFunction)
        assert vars(model)["_loss_function"] is loss_utils.ForCausalLMLoss
        model.loss_function = own_loss
        with maskops.attach(model, probe=False) as attached:
            assert model.loss_function is own_loss and "its own, own_loss" in str(attached.report)
        assert vars(model)["_loss_function"] is own_loss
    finally:
        del model._loss_function
    with maskops.attach(model, loss=False, probe=False):
        assert model.loss_function is loss_utils.ForCausalLMLoss


OTHERS = {
    "bert": ("BertForMaskedLM", "its own, computed in BertForMaskedLM.forward"),
    "modernbert": ("ModernBertForMaskedLM", "maskops, of labels that stand where they are predicted"),
    "llama": ("LlamaForTokenClassification", "maskops, of a class for every token"),
    "qwen3": ("Qwen3ForSequenceClassification", "its own, ForSequenceClassificationLoss"),
    "t5": ("T5ForConditionalGeneration", "its own, computed in T5ForConditionalGeneration.forward"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_whose_loss_it_is(name: str) -> None:
    """What is served and what stays is reported; either way the loss and the gradients are those of before."""
    kind, words = OTHERS[name]
    model = dataclasses.replace(SERVED[name], model=kind).build(id2label={0: "a", 1: "b", 2: "c"})
    tokens = documents(name, (8,), (6,))[0].tokens[None]
    one_label = "SequenceClassification" in kind
    labels = torch.tensor([2]) if one_label else torch.where(tokens % 3 == 0, tokens % 3, -100)
    expected = model(input_ids=tokens, labels=labels).loss
    before = gradients(model, expected)
    with maskops.attach(model, probe=False) as attached:
        assert f"loss of {kind}: {words}" in str(attached.report)
        loss = model(input_ids=tokens, labels=labels).loss
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        check_gradients(gradients(model, loss), before)


def test_a_masked_language_model_without_logits() -> None:
    model = dataclasses.replace(SERVED["modernbert"], model="ModernBertForMaskedLM").build().train()
    tokens = documents("modernbert", (8,))[0].tokens[None]
    labels = torch.where(tokens % 3 == 0, tokens, -100)
    expected = model(input_ids=tokens, labels=labels).loss
    with maskops.attach(model, probe=False, fuse_lm_head=True):
        output = model(input_ids=tokens, labels=labels)
        assert output.logits is None
        torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=0)


# ---- what is not fused -----------------------------------------------------------------------------------------------


class Adapter(torch.nn.Linear):
    """A layer with something beside its weight."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input) * 1.0


def refusal(model: Any, words: str) -> None:
    before = everything_of(model)
    with pytest.raises(ValueError, match=words):
        maskops.attach(model, probe=False, fuse_lm_head=True)
    assert everything_of(model) == before
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("what", ["adapter", "hook", "replaced", "none", "processing", "meta", "own loss"])
def test_refusals(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each names its reason, and nothing is left attached."""
    model = SERVED["llama"].build()
    if what == "adapter":
        layer = Adapter(32, 64, bias=False)
        layer.weight = model.lm_head.weight
        model.lm_head = layer
        refusal(model, "the output layer is Adapter, expected torch.nn.Linear")
    elif what == "hook":
        model.lm_head.register_forward_hook(lambda layer, given, output: output * 1.001)
        refusal(model, "has hooks that look at its output")
    elif what == "replaced":
        model.lm_head.forward = model.lm_head.forward
        refusal(model, "forward method of the output layer has been replaced")
    elif what == "none":
        monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: None)
        refusal(model, "no output layer")
    elif what == "processing":
        monkeypatch.setattr(type(model), "forward", shifted_forward)
        refusal(model, "none of: nothing, a factor, a soft cap")
    elif what == "meta":
        refusal(model.to("meta"), "has no values")
    else:
        model.loss_function = own_loss
        refusal(model, "loss of LlamaForCausalLM: its own, own_loss")


def shifted_forward(self: Any, input_ids: Tensor, labels: Tensor | None = None, **given: Any) -> Any:
    logits = self.lm_head(self.model(input_ids, **given).last_hidden_state) + 0.5
    loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size, **given)
    return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


def test_fusing_needs_the_loss() -> None:
    with pytest.raises(ValueError, match="give loss=True"):
        maskops.attach(language_model("llama"), loss=False, fuse_lm_head=True)


@pytest.mark.grid  # seconds of tracing
def test_compiled_training_steps() -> None:
    """One graph for the first length, one for all others; the output layer is fused in both."""
    model = SERVED["llama"].build(num_hidden_layers=1).train()
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    before = counters["stats"]["unique_graphs"]
    with maskops.attach(model, probe=False, fuse_lm_head=True):
        compiled = torch.compile(lambda **inputs: model(**inputs), backend="eager", fullgraph=True)
        for length in (12, 9, 19, 14):
            tokens = packed()["input_ids"][:, :length].clone()
            inputs = {"input_ids": tokens, "labels": tokens.clone(), "position_ids": torch.arange(length)[None] % 7}
            output = compiled(**inputs, use_cache=False)
            assert output.logits is None
            expected = model(**inputs, use_cache=False).loss
            torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=0)
    assert counters["stats"]["unique_graphs"] - before == 2


def largest_allocation(step: Callable[[], Any]) -> int:
    """Bytes of the largest tensor that a step makes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    return max(event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")


def test_logits_are_never_whole() -> None:
    """No tensor of a training step is as large as the logits of its batch: half of them is a chunk of 64 MiB."""
    model = SERVED["llama"].build(num_hidden_layers=1, vocab_size=32768, max_position_embeddings=1024).train()
    tokens = torch.randint(4, 32768, (1, 1024), generator=torch.Generator().manual_seed(0))
    logits = 1024 * 32768 * 4

    def step() -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

    with maskops.attach(model, probe=False):
        assert largest_allocation(step) >= logits
    with maskops.attach(model, probe=False, fuse_lm_head=True):
        assert largest_allocation(step) <= 5 / 8 * logits
