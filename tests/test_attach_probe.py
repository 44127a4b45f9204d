"""The probe of attach(): what is right is proven layer by layer, what lies is named, and the model stays as it was."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests import transformers_models as models

transformers = models.transformers

import maskops  # noqa: E402
from maskops.integrations.transformers import attach as attaching  # noqa: E402
from maskops.integrations.transformers.masking import mask_function  # noqa: E402
from maskops.integrations.transformers.probe_batches import LONGEST_WINDOW  # noqa: E402
from maskops.integrations.transformers.report import NOT_TAKEN, RIGHT, AttachError, Report  # noqa: E402

Function = Callable[..., Any]

WAYS = {"packed by position_ids", "packed by cu_seq_lens", "padded right", "padded left", "cached step"}


def state(model: torch.nn.Module) -> list[object]:
    """All that an attachment or a probe could leave in a model."""
    kept: list[object] = [torch.get_rng_state().tolist()]
    for module in model.modules():
        values = {name: id(value) for name, value in vars(module).items()}
        contents = {name: list(value) for name, value in vars(module).items() if isinstance(value, dict)}
        implementation = getattr(getattr(module, "config", None), "_attn_implementation_internal", None)
        kept.append((values, contents, module.training, implementation))
    kept += [(parameter.requires_grad, parameter.grad, parameter.data_ptr()) for parameter in model.parameters()]
    return kept


def failed(model: torch.nn.Module) -> Report:
    """The report of an attach() that must fail, and leaves the model as it was."""
    before = state(model)
    with pytest.raises(AttachError) as caught:
        maskops.attach(model)
    assert state(model) == before
    report = caught.value.report
    assert report is not None and not report.proven
    assert str(report) in str(caught.value) and "The model is as it was before" in str(caught.value)
    return report


def wrong_layers(report: Report) -> set[str]:
    return {layer.name for layer in report.layers if any(layer.wrong(way) for way in report.arrivals)}


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-oss", "deepseek-v3", "modernbert"])
def test_a_right_model_is_proven_in_every_way_and_stays_as_it_was(name: str) -> None:
    model = models.FAMILIES[name].build().train()
    model.requires_grad_(False)
    before = state(model)
    attachment = maskops.attach(model)
    report = attachment.report
    assert report.proven and not report.failures()
    ways = WAYS if models.FAMILIES[name].kind == "decoder" else WAYS - {"cached step"}
    assert {way for way, proof in report.arrivals.items() if proof.verdict == RIGHT} == ways
    for layer in report.layers:
        assert layer.ran == layer.called > 0 and layer.errors.keys() == ways
        assert max(layer.errors.values()) <= layer.tolerance <= 5e-5
    assert all(proof.error is not None and proof.error < 1e-5 for proof in report.arrivals.values())
    attachment.detach()
    assert state(model) == before


def test_encoders_and_decoders_of_different_lengths_are_proven_with_their_cross_attention() -> None:
    report = maskops.attach(models.FAMILIES["t5"].build()).report
    assert report.proven
    assert report.arrivals["packed by position_ids"].verdict == NOT_TAKEN
    crossing = [layer for layer in report.layers if "EncDecAttention" in layer.name]
    assert len(crossing) == 2 and all(layer.errors.keys() == WAYS - {"packed by position_ids"} for layer in crossing)


PAIR = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
SIDE = PAIR | {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
SIDE |= {"hidden_size": 16, "intermediate_size": 16, "sliding_window": 4}
T5 = PAIR | {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 2}
BART = PAIR | {"d_model": 16, "max_position_embeddings": 64}
BART |= {f"{side}_{size}": 1 for side in ("encoder", "decoder") for size in ("layers", "attention_heads")}
BART |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
CLASSIFIERS = {"T5": T5, "Bart": BART, "PLBart": BART, "T5Gemma": PAIR | {"encoder": SIDE, "decoder": dict(SIDE)}}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_that_make_the_ids_of_their_decoder_are_proven(name: str) -> None:
    config = getattr(transformers, name + "Config")(**CLASSIFIERS[name])
    model = getattr(transformers, name + "ForSequenceClassification")(config).eval()
    with maskops.attach(model) as attachment:
        report = attachment.report
        assert report.proven, report
        ways = {"packed by cu_seq_lens", "padded right", "padded left"}
        assert {report.arrivals[way].verdict for way in ways} == {RIGHT}, report


def without(**replaced: object) -> Function:
    """An attention function that loses arguments."""

    def lie(function: Function) -> Function:
        def lying(module: Any, query: Any, key: Any, value: Any, mask: Any = None, **keywords: Any) -> Any:
            return function(module, query, key, value, mask, **{**keywords, **replaced})

        return lying

    return lie


def without_mask(function: Function) -> Function:
    def lying(module: Any, query: Any, key: Any, value: Any, _: Any = None, **keywords: Any) -> Any:
        return function(module, query, key, value, None, **keywords)

    return lying


def zeros_in_the_second_layer(function: Function) -> Function:
    def lying(module: Any, *args: Any, **keywords: Any) -> Any:
        out, weights = function(module, *args, **keywords)
        return (out * 0 if module.layer_idx == 1 else out), weights

    return lying


def not_a_number(function: Function) -> Function:
    def lying(module: Any, *args: Any, **keywords: Any) -> Any:
        out, weights = function(module, *args, **keywords)
        return out * float("nan"), weights

    return lying


SECOND, BOTH = {"model.layers.1.self_attn"}, {"model.layers.0.self_attn", "model.layers.1.self_attn"}


@pytest.mark.parametrize(
    ("name", "lie", "layers"),
    [
        pytest.param("gpt-oss", without(s_aux=None), BOTH, id="sinks"),
        pytest.param("gemma2", without(softcap=None), BOTH, id="softcap"),
        pytest.param("llama", without(scaling=1.0), BOTH, id="scale"),
        pytest.param("llama", without_mask, BOTH, id="mask"),
        pytest.param("llama", zeros_in_the_second_layer, SECOND, id="one layer"),
        pytest.param("llama", not_a_number, BOTH, id="NaN"),
        pytest.param("t5", without(position_bias=None), None, id="position bias"),
    ],
)
def test_attention_that_lies_is_named(
    name: str, lie: Function, layers: set[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attaching, "attention_function", lie(attaching.attention_function))
    report = failed(models.FAMILIES[name].build())
    expected = {layer.name for layer in report.layers if "SelfAttention" in layer.name} if layers is None else layers
    assert wrong_layers(report) == expected
    for layer in expected:
        assert any(failure.startswith(layer) for failure in report.failures())


def test_a_mask_that_drops_the_window_is_named_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def whole(*args: Any, **keywords: Any) -> Any:
        causal = transformers.masking_utils.causal_mask_function
        return mask_function(*args, **{**keywords, "mask_function": causal, "local_size": None})

    monkeypatch.setattr(attaching, "mask_function", whole)
    report = failed(models.FAMILIES["gemma3"].build())
    assert wrong_layers(report) == {"model.layers.0.self_attn"}  # layer 1 has no window


def test_attention_that_loses_the_padding_is_named_by_the_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    def alone(*args: Any, **keywords: Any) -> Any:
        return mask_function(*args, **{**keywords, "attention_mask": None})

    monkeypatch.setattr(attaching, "mask_function", alone)
    report = failed(models.FAMILIES["llama"].build())
    wrong = {way for layer in report.layers for way in report.arrivals if layer.wrong(way)}
    # A causal mask hides padding on the right by itself, and positions that restart show where padding ends.
    assert "cached step" in wrong and "padded right" not in wrong


def test_a_layer_that_never_calls_is_named() -> None:
    model = models.FAMILIES["llama"].build()
    attention = model.model.layers[1].self_attn
    attention.forward = lambda hidden_states, **_: (attention.o_proj(attention.q_proj(hidden_states)), None)
    original = attaching.PARTS
    other = models.FAMILIES["llama"].build()

    def swap(installation: Any, _: Any) -> None:
        installation.set_attribute(other.model.layers[1].self_attn, "forward", attention.forward)

    attaching.PARTS = (*original, swap)
    try:
        report = failed(other)
    finally:
        attaching.PARTS = original
    assert wrong_layers(report) == SECOND
    assert any("model.layers.1.self_attn (LlamaAttention) never called maskops" in text for text in report.failures())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_proven_and_a_dropped_sink_still_found(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.FAMILIES["gpt-oss"].build().to(dtype)
    with maskops.attach(model) as attachment:
        assert attachment.report.proven, str(attachment.report)
        assert attachment.report.dtype == str(dtype).removeprefix("torch.")
    monkeypatch.setattr(attaching, "attention_function", without(s_aux=None)(attaching.attention_function))
    assert wrong_layers(failed(model)) == BOTH


def test_an_error_of_the_outputs_alone_is_found_in_low_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(call: Any, output: Any) -> Any:
        return type(output)(**{**output, "logits": output.logits * 1.16}) if call.parent is None else None

    def install(installation: Any, _: Any) -> None:
        installation.steps.after.append(scaled)

    model = models.FAMILIES["llama"].build().to(torch.bfloat16)
    assert maskops.attach(model).report.proven
    model = models.FAMILIES["llama"].build().to(torch.bfloat16)
    monkeypatch.setattr(attaching, "PARTS", (*attaching.PARTS, install))
    assert any("logits differs by 0.16" in text for text in failed(model).failures())


def test_a_cap_that_hardly_shows_is_still_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    # As initialised, scores are about 0.1: a cap of 50 changes them by less than float32 can tell.
    model = models.FAMILIES["gemma2"].build(attn_logit_softcapping=50.0)
    model.apply(model._init_weights)
    with maskops.attach(model) as attachment:
        assert attachment.report.proven, str(attachment.report)
    monkeypatch.setattr(attaching, "attention_function", without(softcap=None)(attaching.attention_function))
    assert wrong_layers(failed(model)) == BOTH


def test_windows_are_exceeded_or_told() -> None:
    mistral = models.FAMILIES["mistral"]
    near = maskops.attach(mistral.build(sliding_window=LONGEST_WINDOW, max_position_embeddings=256)).report
    assert min(near.lengths) > LONGEST_WINDOW and near.proven and "not reached" not in str(near)
    far = maskops.attach(mistral.build(sliding_window=4096)).report
    assert max(far.lengths) < 20 and far.proven and far.to_dict()["unreached"] == [4096]
    assert "proven up to the window of 4096 tokens, which was not tested" in str(far).splitlines()[0]
    assert any("window of 4096 tokens was not reached" in note for note in far.notes)


def test_special_tokens_stay_out_of_the_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()
    model = models.FAMILIES["llama"].build(eos_token_id=[30, 31, 32], bos_token_id=33)
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.update(args[0].flatten().tolist()))
    maskops.attach(model)
    assert seen and not seen & {30, 31, 32, 33} and model.config.pad_token_id in seen


def test_the_report_is_a_table_and_plain_data() -> None:
    report = maskops.attach(models.FAMILIES["gemma3"].build()).report
    text = str(report)
    assert "maskops is attached to Gemma3ForCausalLM (float32, cpu): proven" in text
    assert "model.layers.*.self_attn (2 layers)" in text and "outputs of the model" in text
    assert all(way in text for way in WAYS) and "WRONG" not in text
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["proven"] is True and data["lengths"] == list(report.lengths)
    assert {layer["name"] for layer in data["layers"]} == BOTH
    assert data["arrivals"]["padded left"]["verdict"] == "right"


class Lending(torch.nn.Module):
    """Wraps a model as PEFT does: what it lacks it takes from the model inside."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.inner = model

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "inner" else getattr(self.inner, name)


def test_a_wrapper_that_lends_the_attributes_of_its_model_is_proven() -> None:
    wrapped = Lending(models.FAMILIES["llama"].build())
    assert wrapped.main_input_name == "input_ids"
    with maskops.attach(wrapped) as handle:
        assert handle.report.proven


def unproven(model: torch.nn.Module, **options: Any) -> str:
    """Why nothing was proven of a model that was attached all the same."""
    with maskops.attach(model, **options) as attachment:
        report = attachment.report
    assert not report.proven and not report.layers
    assert f"unproven: {report.unproven}" in str(report)
    return report.unproven


def test_what_cannot_be_probed_says_so() -> None:
    llama = models.FAMILIES["llama"]
    assert unproven(llama.build(), probe=False) == "probe=False"
    with torch.device("meta"):
        assert "meta device" in unproven(transformers.LlamaForCausalLM(llama.build().config))
    compiled = llama.build()
    compiled.compile()
    assert "compiled" in unproven(compiled)
    assert "compiled" in unproven(torch.compile(llama.build()))
    offloaded = llama.build()
    offloaded.hf_device_map = {"model.embed_tokens": 0, "model.layers": "cpu"}
    assert "offloaded" in unproven(offloaded)
    two = torch.nn.ModuleList([llama.build(), models.FAMILIES["bert"].build()])
    assert "LlamaForCausalLM, BertModel" in unproven(two)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    assert "its input is pixel_values" in unproven(transformers.ViTModel(config))


def test_sharded_models_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class FSDPModule:  # what fully_shard() puts among the bases of a model's class
        pass

    model = models.FAMILIES["llama"].build()
    layer = model.model.layers[0]
    layer.__class__ = type("FSDPLayer", (FSDPModule, type(layer)), {})
    assert "FSDP" in unproven(model)


def test_a_model_inside_a_wrapper_is_proven() -> None:
    model = models.FAMILIES["llama"].build()
    with maskops.attach(torch.nn.Sequential(model)) as attachment:
        assert attachment.report.proven and attachment.report.model == "LlamaForCausalLM"


def test_autocast_and_gradients_around_attach_change_nothing() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad():
        report = maskops.attach(models.FAMILIES["llama"].build()).report
    assert report.proven and report.dtype == "float32" and report.tolerance < 1e-4
