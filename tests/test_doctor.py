"""The pad doctor on tokenizers and models of transformers, and on things that only look like them."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskops import check_tokenizer, data, ensure_pad_token
from maskops.data import Finding

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

WORDS = ("<unk>", "<s>", "</s>", "the", "cat", "sat", "on", "a", "mat")
UNK, BOS, EOS = 0, 1, 2


class Plain:
    """What a tokenizer has to have, and nothing else."""

    def __init__(self, size: int = 9, pad: int | None = None, eos: int | None = EOS, side: str = "left") -> None:
        self.size, self.pad_token_id, self.eos_token_id, self.padding_side = size, pad, eos, side

    def __len__(self) -> int:
        return self.size


def tokenizer_of(*, words: tuple[str, ...] = WORDS, side: str = "right", **special: str) -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", **special}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, padding_side=side, **named)


def model_of(kind: str, *, tied: bool = False, vocabulary: int = len(WORDS), **changes: Any) -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    special = {"bos_token_id": BOS, "eos_token_id": EOS, "vocab_size": vocabulary, "tie_word_embeddings": tied}
    if kind.startswith("GPT2"):
        config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, **{**special, **changes})
    elif kind.startswith("T5"):
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
        config = transformers.T5Config(**sizes, **{**special, **changes})
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.LlamaConfig(num_key_value_heads=1, **sizes, **{**special, **changes})
    return getattr(transformers, kind)(config).eval()


def test_a_tokenizer_alone() -> None:
    assert check_tokenizer(Plain(pad=3)) == [] and str(check_tokenizer(Plain(pad=3))) == ""
    assert check_tokenizer(Plain()).codes == ["no_pad_token"]
    assert check_tokenizer(Plain(pad=EOS)).codes == ["pad_is_eos"]
    assert check_tokenizer(Plain(pad=9)).codes == ["pad_outside_vocabulary"]
    assert check_tokenizer(Plain(pad=-1)).codes == ["pad_outside_vocabulary"]
    assert check_tokenizer(Plain(pad=3, side="right")) == []
    assert check_tokenizer(Plain(pad=3, side="right"), generation=True).codes == ["padding_side_right"]
    assert check_tokenizer(Plain(pad=3), generation=True) == []
    unknown = Plain(pad=0)
    unknown.unk_token_id = 0  # type: ignore[attr-defined]
    assert check_tokenizer(unknown).codes == ["pad_is_unk"]
    gaps = Plain(size=3, pad=7)
    gaps.get_vocab = lambda: {"a": 0, "b": 5, "<pad>": 7}  # type: ignore[attr-defined]
    assert check_tokenizer(gaps) == []


def test_findings_are_lines_with_a_fix() -> None:
    found = check_tokenizer(Plain(), generation=True)
    found += check_tokenizer(Plain(pad=EOS, side="right"), generation=True)
    assert [str(finding) for finding in found] == str(found).splitlines()
    for finding in found:
        assert isinstance(finding, Finding)
        assert str(finding) == f"{finding.code}: {finding.problem}. Fix: {finding.fix}"
    assert "ensure_pad_token" in found[0].fix and 'padding_side = "left"' in found[-1].fix


def test_what_is_no_tokenizer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"tokenizer: expected .* got dict without pad_token_id and eos_token_id"):
        check_tokenizer({})

    class Processor:
        tokenizer = Plain()

    assert check_tokenizer(Processor()).codes == ["no_pad_token"]


def test_a_plain_module_with_an_embedding() -> None:
    """Such as the model of a tutorial on LSTMs."""
    lstm = nn.Sequential(nn.Embedding(9, 4), nn.LSTM(4, 4))
    assert check_tokenizer(Plain(pad=3), lstm).codes == ["padding_idx_missing"]
    assert check_tokenizer(Plain(pad=3), nn.Sequential(nn.Embedding(9, 4, padding_idx=3))) == []
    assert check_tokenizer(Plain(pad=3), nn.Sequential(nn.Embedding(9, 4, padding_idx=5))).codes == [
        "padding_idx_differs"
    ]
    assert check_tokenizer(Plain(size=12, pad=3), nn.Embedding(9, 4, padding_idx=3)).codes == ["embedding_too_small"]
    assert check_tokenizer(Plain(size=12, pad=10), nn.Embedding(9, 4, padding_idx=3)).codes == [
        "pad_outside_embedding",
        "padding_idx_differs",
    ]
    eos = check_tokenizer(Plain(pad=EOS), nn.Embedding(9, 4, padding_idx=EOS))
    assert eos.codes == ["pad_is_eos", "padding_idx_is_eos"]
    assert check_tokenizer(Plain(pad=EOS), nn.Embedding(9, 4)).codes == ["pad_is_eos"]
    ambiguous = nn.ModuleList([nn.Embedding(9, 4), nn.Embedding(100, 4)])
    assert check_tokenizer(Plain(pad=3), ambiguous) == []
    changes = ensure_pad_token(Plain(pad=3), lstm)
    assert changes == ["Embedding.padding_idx: None -> 3"] and lstm[0].padding_idx == 3
    assert ensure_pad_token(Plain(pad=3), lstm) == []


def test_disagreement_with_the_model() -> None:
    tokenizer = tokenizer_of(words=(*WORDS, "<pad>"), pad_token="<pad>", side="left")
    size = len(tokenizer)
    assert check_tokenizer(tokenizer, model_of("LlamaForCausalLM", vocabulary=size, pad_token_id=9)) == []
    other = model_of("LlamaForCausalLM", vocabulary=size, pad_token_id=5, bos_token_id=7, eos_token_id=[7, 8])
    codes = check_tokenizer(tokenizer, other).codes
    assert codes[0] == "padding_idx_differs"
    assert {f"config_{name}_differs" for name in ("pad", "eos", "bos")} <= set(codes)
    assert {f"generation_config_{name}_differs" for name in ("pad", "eos", "bos")} <= set(codes)
    several = model_of("LlamaForCausalLM", vocabulary=size, pad_token_id=9, eos_token_id=[7, EOS])
    assert check_tokenizer(tokenizer, several) == []
    missing = check_tokenizer(tokenizer, model_of("LlamaForSequenceClassification", vocabulary=size))
    assert missing.codes == ["padding_idx_missing", "config_without_pad"]
    assert "batches of more than one sequence" in missing[1].problem


def test_a_fix_uses_names_that_a_user_has() -> None:
    for module in (
        nn.Embedding(9, 4),
        nn.Sequential(nn.Linear(2, 2), nn.Embedding(9, 4)),
        model_of("LlamaForCausalLM"),
    ):
        found = check_tokenizer(Plain(pad=3, size=9), module)
        finding = next(finding for finding in found if finding.code == "padding_idx_missing")
        exec(finding.fix.split(", or ")[0], {"model": module})
        assert "padding_idx_missing" not in check_tokenizer(Plain(pad=3, size=9), module).codes


def test_a_classifier_does_not_pool_the_end_that_is_padding() -> None:
    tokenizer = tokenizer_of(pad_token="</s>")
    for kind in ("LlamaForSequenceClassification", "GPT2ForSequenceClassification"):
        model = model_of(kind, pad_token_id=EOS, num_labels=3)
        # What this is about: the logits are those of the token before the end.
        rows = torch.tensor([[3, 4, EOS], [5, 6, EOS]])
        assert torch.allclose(model(rows).logits, model(rows[:, :2]).logits, atol=1e-6)
        assert check_tokenizer(tokenizer, model).codes[:2] == ["pad_is_eos", "classifier_pools_before_eos"]
        ensure_pad_token(tokenizer_of(), model, strategy="new")
        assert not torch.allclose(model(rows).logits, model(rows[:, :2]).logits, atol=1e-6)
    codes = check_tokenizer(tokenizer, model_of("T5ForSequenceClassification", pad_token_id=EOS)).codes
    assert "classifier_pools_before_eos" not in codes  # which pools at the end-of-sequence token itself
    causal = model_of("LlamaForCausalLM", pad_token_id=EOS)
    assert "classifier_pools_before_eos" not in check_tokenizer(tokenizer, causal).codes


def test_the_side_matters_to_decoders_alone() -> None:
    tokenizer = tokenizer_of(words=(*WORDS, "<pad>"), pad_token="<pad>")
    decoder = model_of("LlamaForCausalLM", vocabulary=10, pad_token_id=9)
    assert check_tokenizer(tokenizer, decoder).codes == ["padding_side_right"]
    assert check_tokenizer(tokenizer, decoder, generation=False) == []
    classifier = model_of("LlamaForSequenceClassification", vocabulary=10, pad_token_id=9)
    assert check_tokenizer(tokenizer, classifier) == []
    translator = model_of("T5ForConditionalGeneration", vocabulary=10, pad_token_id=9)
    assert "padding_side_right" not in check_tokenizer(tokenizer, translator).codes


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_a_new_token_gets_the_mean_of_the_others(kind: str, tied: bool) -> None:
    tokenizer, model = tokenizer_of(), model_of(kind, tied=tied)
    old_input = model.get_input_embeddings().weight.detach().clone()
    old_output = model.get_output_embeddings().weight.detach().clone()
    changes = ensure_pad_token(tokenizer, model, strategy="new")
    assert check_tokenizer(tokenizer, model, generation=False) == []
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|pad|>", 9)
    assert model.config.vocab_size == 10
    weights = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (weights[0] is weights[1]) == tied
    for weight, old in zip(weights, (old_input, old_output), strict=True):
        assert torch.equal(weight[:9], old)
        torch.testing.assert_close(weight[9], old.mean(0))
    assert any("mean of the others" in line for line in changes)
    assert ensure_pad_token(tokenizer, model, strategy="new") == []
    assert ensure_pad_token(tokenizer, model) == [] and tokenizer.pad_token_id == 9


def test_a_vocabulary_with_room_is_not_resized() -> None:
    """Rows that fill the vocabulary up were never trained: no part of the mean."""
    tokenizer, model = tokenizer_of(), model_of("LlamaForCausalLM", vocabulary=16)
    with torch.no_grad():
        model.get_input_embeddings().weight[9:] = 1e6
    old = model.get_input_embeddings().weight.detach().clone()
    ensure_pad_token(tokenizer, model, strategy="new")
    weight = model.get_input_embeddings().weight
    assert weight.shape[0] == 16 and torch.equal(weight[10:], old[10:])
    torch.testing.assert_close(weight[9], old[:9].mean(0))


def test_a_token_that_is_there_for_it_is_used() -> None:
    tokenizer, model = tokenizer_of(words=(*WORDS, "<pad>", "last")), model_of("LlamaForCausalLM", vocabulary=11)
    old = model.get_input_embeddings().weight.detach().clone()
    ensure_pad_token(tokenizer, model, strategy="new")
    assert tokenizer.pad_token_id == 9 and len(tokenizer) == 11
    assert torch.equal(model.get_input_embeddings().weight, old)
    named = tokenizer_of()
    ensure_pad_token(named, strategy="new", token="mat")
    assert named.pad_token == "mat"
    with pytest.raises(ValueError, match=r"token='</s>' is the eos_token"):
        ensure_pad_token(tokenizer_of(), strategy="new", token="</s>")


def test_pad_is_eos_where_it_is_asked_for() -> None:
    tokenizer, model = tokenizer_of(), model_of("LlamaForCausalLM", pad_token_id=EOS)
    assert model.get_input_embeddings().padding_idx == EOS
    ensure_pad_token(tokenizer, model, strategy="eos")
    assert check_tokenizer(tokenizer, model, generation=False).codes == ["pad_is_eos"]
    assert model.get_input_embeddings().padding_idx is None  # or the end of a sequence would never be learned
    assert model.config.pad_token_id == model.generation_config.pad_token_id == EOS
    assert ensure_pad_token(tokenizer, model, strategy="eos") == []
    ensure_pad_token(tokenizer, model, strategy="new")
    assert tokenizer.pad_token_id == 9 and check_tokenizer(tokenizer, model, generation=False) == []


def test_the_real_end_keeps_its_label_and_its_attention() -> None:
    """With pad == eos, where a collator that compares ids loses both."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizer = tokenizer_of()
    ensure_pad_token(tokenizer, strategy="eos")
    rows = [[3, 4, 5, EOS], [7, 4, EOS]]
    theirs = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)([{"input_ids": row} for row in rows])
    assert (theirs["labels"] == EOS).sum() == 0  # what this is about
    for side in ("right", "left"):
        batch = data.pad(rows, pad_token_id=tokenizer.pad_token_id, side=side)
        ours = batch.transformers_inputs()
        assert ours["attention_mask"].sum() == 7
        assert torch.equal((ours["input_ids"] == EOS).sum(1), torch.tensor([1, 2]))
        assert torch.equal((ours["labels"] == EOS).sum(1), torch.tensor([1, 1]))
        assert torch.equal((batch.shift_labels == EOS).sum(1), torch.tensor([1, 1]))


def test_encoder_and_decoder_agree_on_padding_idx() -> None:
    tokenizer, model = tokenizer_of(), model_of("T5ForConditionalGeneration", tied=True)
    ensure_pad_token(tokenizer, model, strategy="new")
    assert {module.padding_idx for module in model.modules() if isinstance(module, nn.Embedding)} >= {9}
    assert check_tokenizer(tokenizer, model) == []
    shared = model.get_input_embeddings().weight
    assert all(m.padding_idx == 9 for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is shared)


def test_modules_around_one_weight_agree() -> None:
    encoder, decoder = nn.Embedding(9, 4), nn.Embedding(9, 4, padding_idx=5)
    decoder.weight = encoder.weight
    model = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    model.get_input_embeddings = lambda: encoder
    ensure_pad_token(Plain(pad=3), model)
    assert (encoder.padding_idx, decoder.padding_idx) == (3, 3)


def test_a_known_token_that_means_something_else_is_not_taken() -> None:
    class Other(Plain):
        unk_token_id = 4

        def get_vocab(self) -> dict[str, int]:
            return {"<pad>": 4, "</s>": EOS}

        def add_special_tokens(self, tokens: dict[str, str]) -> None:
            assert tokens == {"pad_token": "<|pad|>"}
            self.pad_token_id, self.size = self.size, self.size + 1

    assert ensure_pad_token(Other(), strategy="new") == ["tokenizer.pad_token_id: None -> 9"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("strategy", ["eos", "new"])
@pytest.mark.parametrize("kind", ["LlamaForSequenceClassification", "GPT2ForSequenceClassification"])
def test_classification_of_a_batch(kind: str, strategy: Any, side: str) -> None:
    """Each sequence is pooled at its last token, as if it were alone."""
    tokenizer, model = tokenizer_of(side=side), model_of(kind)
    texts = ["the cat sat on a mat", "a cat", "mat"]
    ends = "" if strategy == "eos" else " </s>"
    with pytest.raises(ValueError, match="Asking to pad but the tokenizer does not have a padding token"):
        tokenizer(texts, padding=True)
    with pytest.raises(ValueError, match="Cannot handle batch sizes > 1"):
        model(torch.zeros(2, 3, dtype=torch.int64))
    ensure_pad_token(tokenizer, model, strategy=strategy)
    batch = tokenizer([text + ends for text in texts], padding=True, return_tensors="pt", return_token_type_ids=False)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        together = model(**batch, position_ids=positions).logits
        for row, text in zip(together, texts, strict=True):
            alone: Tensor = model(torch.tensor([tokenizer(text + ends)["input_ids"]])).logits
            torch.testing.assert_close(row, alone[0])


def test_what_cannot_be_ensured() -> None:
    with pytest.raises(ValueError, match=r"strategy is 'end': expected \"eos\" or \"new\""):
        ensure_pad_token(Plain(), strategy="end")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no end-of-sequence token to pad with"):
        ensure_pad_token(Plain(eos=None))
    with pytest.raises(TypeError, match="Plain has no add_special_tokens"):
        ensure_pad_token(Plain(), strategy="new")
    with pytest.raises(TypeError, match=r"Sequential has an embedding of 9 rows, 10 are needed"):
        ensure_pad_token(tokenizer_of(), nn.Sequential(nn.Embedding(9, 4)), strategy="new")
    plain = Plain()
    assert ensure_pad_token(plain) == ["tokenizer.pad_token_id: None -> 2"] and plain.pad_token_id == EOS
