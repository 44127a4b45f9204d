"""What attach() refuses, and calls that an attached model refuses: the reason, what to do, and nothing left behind."""

from typing import Any

import pytest
import torch

from tests import transformers_models as models

transformers = models.transformers

import maskops  # noqa: E402
from maskops.integrations.transformers import refusals  # noqa: E402
from maskops.integrations.transformers.mixers import token_mixers  # noqa: E402
from maskops.integrations.transformers.report import REFUSED, RIGHT, AttachError  # noqa: E402
from tests.test_attach_probe import state  # noqa: E402

OWN_CODE = "computes attention in its own code and never calls transformers' attention interface"
TABLE = "picks its attention from a table of its own"
HYBRIDS = ("lfm2", "jamba")


@pytest.mark.parametrize("probe", [True, False])
@pytest.mark.parametrize(
    ("name", "reason", "instead"),
    [
        ("bloom", f"its BloomAttention {OWN_CODE}", "Use it as it is, with padded batches"),
        ("mpnet", f"its MPNetSelfAttention {OWN_CODE}", "Use it as it is, with padded batches"),
        ("deberta-v2", f"its DisentangledSelfAttention {OWN_CODE}", "Use it as it is, with padded batches"),
        ("gpt-j", f"it {TABLE} (GPTJ_ATTENTION_CLASSES)", "Use it as it is, with padded batches"),
        ("falcon", f"it {TABLE} (FALCON_ATTENTION_CLASSES)", "call it inside maskops.replace_sdpa()"),
    ],
)
def test_models_that_never_call_are_refused(name: str, reason: str, instead: str, probe: bool) -> None:
    model = models.FAMILIES[name].build()
    before = state(model)
    with pytest.raises(AttachError) as caught:
        maskops.attach(model, probe=probe)
    message = str(caught.value)
    assert message.startswith(f"{type(model).__name__} cannot be attached: {reason}") and instead in message
    assert state(model) == before


def test_what_is_advised_for_falcon_works() -> None:
    model = models.FAMILIES["falcon"].build("sdpa")
    parts = models.documents("falcon")
    with maskops.replace_sdpa() as report:
        found = models.run(model, "falcon", models.arrive("padded right", "falcon", parts), gradients=False)
    assert report.served["scaled_dot_product_attention"] > 0
    models.compare(found, models.alone("falcon"))


def test_sparse_attention_is_refused() -> None:
    config = transformers.DeepseekV32Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=8,
        q_lora_rank=8,
        n_routed_experts=4,
    )
    with torch.device("meta"):
        model = transformers.DeepseekV32ForCausalLM(config)
    with pytest.raises(AttachError, match=r"its DeepseekV32Indexer chooses single keys .*'eager' or 'sdpa'"):
        maskops.attach(model)


def test_a_model_that_computes_with_its_masks_gets_dense_ones() -> None:
    config = transformers.DogeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4
    )
    model = transformers.DogeForCausalLM(config).eval()
    ids = torch.tensor([[7, 8, 9, 10, 11, 12, 13]])
    with torch.no_grad():
        expected = torch.cat([model(ids[:, :4]).logits, model(ids[:, 4:]).logits], 1)
        with maskops.attach(model) as attachment:
            assert attachment.report.proven and all(
                proof.verdict == RIGHT for proof in attachment.report.arrivals.values()
            )
            assert any("it gets dense ones" in note for note in attachment.report.notes)
            found = model(ids, attention_mask=torch.tensor([[1, 1, 1, 1, 2, 2, 2]])).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    with maskops.attach(model, probe=False), pytest.raises(AttributeError, match=r"computes with .* probe=True"):
        model(ids)


def test_a_model_that_makes_its_own_masks_refuses_packed_batches() -> None:
    options = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = transformers.LayoutLMModel(transformers.LayoutLMConfig(vocab_size=64, **options)).eval()
    with maskops.attach(model) as attachment:
        proof = attachment.report.arrivals["packed by cu_seq_lens"]
        assert (proof.verdict, proof.reason) == (
            REFUSED,
            "its code makes attention masks of its own, which know no documents",
        )
        assert attachment.report.arrivals["padded right"].verdict == RIGHT and attachment.report.proven
        with pytest.raises(ValueError, match="LayoutLMModel does not take packed batches: its code makes"):
            model(torch.tensor([[7, 8, 9, 10]]), cu_seq_lens_q=torch.tensor([0, 2, 4]), cu_seq_lens_k=None)


def _encoder_decoder(name: str) -> Any:
    options = {"vocab_size": 64, "d_model": 32, "decoder_start_token_id": 0, "pad_token_id": 0}
    if name == "switch":
        return transformers.SwitchTransformersForConditionalGeneration(
            transformers.SwitchTransformersConfig(
                d_kv=8, d_ff=32, num_layers=1, num_decoder_layers=1, num_heads=4, num_experts=2, **options
            )
        ).eval()
    sizes = {f"{part}_{size}": count for part in ("encoder", "decoder") for size, count in _SIZES.items()}
    return transformers.PegasusXForConditionalGeneration(
        transformers.PegasusXConfig(block_size=4, num_global_tokens=2, **sizes, **options)
    ).eval()


_SIZES = {"layers": 1, "ffn_dim": 32, "attention_heads": 4}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("switch", "its code makes the masks of its SwitchTransformersAttention by itself, which know no documents"),
        ("pegasus-x", "encoder_last_hidden_state differs"),  # blocks of its own code
    ],
)
def test_an_encoder_that_makes_its_own_masks_refuses_packed_batches_of_either_side(name: str, reason: str) -> None:
    model = _encoder_decoder(name)
    ids = {"input_ids": torch.tensor([[7, 8, 9, 10]]), "decoder_input_ids": torch.tensor([[7, 8, 9]])}
    segments, offsets = torch.tensor([[1, 1, 2, 2]]), torch.tensor([0, 2, 4])
    packed: list[dict[str, Any]] = [
        {**ids, "cu_seq_lens_q": torch.tensor([0, 1, 3]), "cu_seq_lens_k": offsets},
        {**ids, "cu_seq_lens_k": offsets},
        {**ids, "attention_mask": segments},
        {**ids, "decoder_attention_mask": torch.tensor([[1, 1, 2]])},
    ]
    with torch.no_grad(), maskops.attach(model) as attachment:
        report = attachment.report
        assert report.arrivals["padded right"].verdict == RIGHT and report.proven
        assert report.arrivals["packed by cu_seq_lens"].verdict == REFUSED
        assert report.arrivals["packed by cu_seq_lens"].reason.startswith(reason)
        for batch in packed:
            with pytest.raises(ValueError, match=f"does not take packed batches: {reason}"):
                model(**batch)
        model(**ids, attention_mask=torch.tensor([[1, 1, 1, 0]]), decoder_attention_mask=torch.tensor([[1, 1, 0]]))


def test_two_models_that_are_put_together_are_served_packed() -> None:
    options = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
    encoder = transformers.BertConfig(**options, num_hidden_layers=1)
    decoder = transformers.BertConfig(**options, num_hidden_layers=1, is_decoder=True, add_cross_attention=True)
    model = transformers.EncoderDecoderModel(
        encoder=transformers.BertModel(encoder), decoder=transformers.BertLMHeadModel(decoder)
    ).eval()
    before = state(model), encoder._attn_implementation
    with maskops.attach(model) as attachment:
        assert {proof.verdict for proof in attachment.report.arrivals.values()} == {"not taken", RIGHT}
        assert all(layer.called == layer.ran for layer in attachment.report.layers)
    assert (state(model), encoder._attn_implementation) == before


def test_an_encoder_with_a_static_cache_is_told_what_to_do() -> None:
    model = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4
        )
    ).eval()
    cache = transformers.StaticCache(model.config, max_cache_len=16)
    with torch.no_grad(), maskops.attach(model, probe=False):
        with pytest.raises(ValueError, match=r"BertSelfAttention attends to 16 keys.*config\.is_decoder=True"):
            model(torch.tensor([[7, 8, 9, 10]]), past_key_values=cache)


@pytest.mark.parametrize("name", HYBRIDS)
def test_layers_with_a_state_are_served_padded_and_refuse_packed_batches(name: str) -> None:
    model = models.FAMILIES[name].build()
    parts, before = models.documents(name), state(model)
    with maskops.attach(model) as attachment:
        report = attachment.report
        verdicts = {way: proof.verdict for way, proof in report.arrivals.items()}
        assert verdicts == {
            "packed by position_ids": REFUSED,
            "packed by cu_seq_lens": REFUSED,
            "padded right": RIGHT,
            "padded left": RIGHT,
            "cached step": RIGHT,
        }
        recurrent = [layer for layer in report.layers if layer.recurrent]
        assert len(recurrent) == 1 and recurrent[0].kind in report.arrivals["packed by cu_seq_lens"].reason
        assert any("refused with an error; give padded ones" in note for note in report.notes)
        for way in models.arrivals(name):
            rows = models.cut(parts, models.WRAPPED_WIDTH) if way.startswith("wrapped") else parts
            batch = models.arrive(way, name, rows)
            if way.startswith("padded"):
                models.compare(models.run(model, name, batch, gradients=False), models.alone(name))
            else:
                with pytest.raises(ValueError, match=f"does not take packed batches: .*{recurrent[0].kind}"):
                    models.run(model, name, batch, gradients=False)
    assert state(model)[1:] == before[1:]


def test_one_document_with_positions_is_no_packed_batch() -> None:
    model = models.FAMILIES["lfm2"].build()
    part = models.documents("lfm2", (6,))[0]
    positions = torch.arange(6)[None]
    with maskops.attach(model), torch.no_grad():
        plain = model(part.tokens[None]).logits
        told = model(part.tokens[None], position_ids=positions, attention_mask=torch.ones_like(positions)).logits
        cached = model(part.tokens[None, :4], use_cache=True)
        rest = model(part.tokens[None, 4:], position_ids=positions[:, 4:], past_key_values=cached.past_key_values)
    torch.testing.assert_close(told, plain)
    torch.testing.assert_close(rest.logits, plain[:, 4:], rtol=0, atol=1e-5)


def test_layers_with_a_state_refuse_packed_batches_without_a_proof() -> None:
    model = models.FAMILIES["jamba"].build()
    with maskops.attach(model, probe=False) as attachment:
        assert any("packed batches are refused" in note for note in attachment.report.notes)
        batch = models.arrive("packed by position_ids", "jamba", models.documents("jamba"))
        with pytest.raises(ValueError, match="as far as is known: no probe showed otherwise"):
            models.run(model, "jamba", batch, gradients=False)


def test_a_mixed_attention_layer_counts_as_one_with_a_state() -> None:
    class ShortConvolution(torch.nn.Conv1d):
        pass

    class InnerAttention(torch.nn.Linear):
        pass

    class OuterAttention(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner, self.norm = inner, torch.nn.LayerNorm(2)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolved = OuterAttention(ShortConvolution(1, 1, 3))
            self.plain = OuterAttention(InnerAttention(2, 2))
            self.lstm = torch.nn.LSTM(2, 2)

    found = [(mixer.name, mixer.recurrent) for mixer in token_mixers(Model())]
    assert found == [("convolved", True), ("plain.inner", False), ("lstm", True)]


@pytest.fixture(scope="module")
def llava() -> Any:
    text = models.FAMILIES["llama"].build().config
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=5)
    return transformers.LlavaForConditionalGeneration(config).eval()


def test_a_vision_tower_keeps_its_attention(llava: Any) -> None:
    own = llava.model.vision_tower.config._attn_implementation
    assert list(refusals.towers(llava)) == ["model.vision_tower"]
    images = torch.randn(1, 3, 8, 8)
    ids = torch.cat([torch.tensor([[7, 8]]), torch.full((1, 4), 5), torch.tensor([[9, 10, 11]])], 1)
    with torch.no_grad():
        expected = llava(input_ids=ids, pixel_values=images).logits
    before = state(llava)
    with maskops.attach(llava) as attachment:
        report = attachment.report
        assert llava.model.vision_tower.config._attn_implementation == own != "maskops"
        assert llava.model.language_model.config._attn_implementation == "maskops"
        assert report.proven and not report.layers[0].ran and report.layers[-1].called
        assert "model.vision_tower (CLIPVisionModel) keeps its own attention" in str(report)
        assert "not run" in str(report)
        with torch.no_grad():
            torch.testing.assert_close(llava(input_ids=ids, pixel_values=images).logits, expected, rtol=0, atol=1e-5)
    assert state(llava)[1:] == before[1:]


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # gpt2 does not ask its attention, and would answer ()
def test_attention_weights_are_refused(name: str) -> None:
    model = models.FAMILIES[name].build()
    ids = models.documents(name)[0].tokens[None]
    with maskops.attach(model, probe=False):
        with pytest.raises(ValueError, match=r"output_attentions.*detach the model for this call"):
            model(ids, output_attentions=True)
        assert model(ids, output_attentions=False).logits.isfinite().all()
    model.config.output_attentions = True
    with pytest.raises(AttachError, match=r"output_attentions.*config\.output_attentions = False"):
        maskops.attach(model)
    model.config.output_attentions = False


def test_other_things_than_models_are_refused() -> None:
    with pytest.raises(AttachError, match="Linear is no PreTrainedModel of transformers and holds none"):
        maskops.attach(torch.nn.Linear(2, 2))
    model = models.FAMILIES["llama"].build()
    with maskops.attach(model, probe=False), pytest.raises(AttachError, match="attached already: detach it first"):
        maskops.attach(model)
