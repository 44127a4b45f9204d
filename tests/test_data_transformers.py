"""Batches in transformers: packed and padded give what each sequence alone gives, in its models and its Trainer."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from maskops import data, masks

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when it is imported; everything here is made from configurations
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

SHAPE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}


def documents() -> data.Documents:
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(3, 32, (length,), generator=generator) for length in (5, 0, 9, 1, 12, 3, 2, 7)]
    labels = [torch.where(torch.arange(len(x)) < len(x) // 3, -100, x) for x in sequences]
    return data.prepare(sequences, labels, bos=0, eos=2)


def language_model(attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).double()
    model.set_attn_implementation(attention)
    return model


def loss_of_each_alone(model: Any) -> tuple[torch.Tensor, int]:
    """Sum of the losses of every target, each document by itself, and how many targets there are."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    found = documents()
    for tokens, labels in zip(found.sequences, found.labels or (), strict=True):
        logits = model(tokens[None]).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")
        count += int((labels[1:] != -100).sum())
    return total, count


DOUBLE = {"mask_dtype": torch.float64}
COLLATORS = {
    "packed": data.PackedCollator(output="transformers"),
    "packed, with room": data.PackedCollator(60, 12, 15, output="transformers"),
    "packed, dense": data.PackedCollator(
        60, output="transformers", options={"attention_mask": "dense", "use_cache": True, **DOUBLE}
    ),
    "right": data.PaddedCollator(2, output="transformers"),
    "left": data.PaddedCollator(2, side="left", multiple_of=8, output="transformers"),
    "left, dense": data.PaddedCollator(
        2, side="left", output="transformers", options={"attention_mask": "dense", "shift_labels": True, **DOUBLE}
    ),
}


# The eager softmax is in float32, where the lowest float64 is -inf: rows of left padding would be NaN.
PAIRS = [
    (how, attention) for how in COLLATORS for attention in ("eager", "sdpa") if (how, attention) != ("left", "eager")
]


@pytest.mark.parametrize(("how", "attention"), PAIRS)
def test_losses_and_gradients_are_those_of_each_document(how: str, attention: str) -> None:
    """The pad token is EOS, whose label and attention stay."""
    model = language_model(attention)
    parameters = list(model.parameters())
    total, count = loss_of_each_alone(model)
    found = documents()
    inputs = COLLATORS[how]([found[number] for number in range(len(found))])
    assert isinstance(inputs, dict)
    loss = model(**inputs).loss  # in float32, whatever the model
    torch.testing.assert_close(loss.double(), total / count, rtol=1e-6, atol=0)
    expected = torch.autograd.grad(total / count, parameters)
    for mine, other in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["Bert", "Roberta"])
def test_packed_encoders(name: str) -> None:
    """transformers detects no packing in encoders; RoBERTa's positions begin at 2, those of padding are 1."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SHAPE)
    model = getattr(transformers, f"{name}Model")(config).double().eval()
    sequences = [tokens for tokens in documents().sequences if len(tokens)]
    expected = torch.cat([model(tokens[None]).last_hidden_state[0] for tokens in sequences])
    start = 2 if name == "Roberta" else 0
    packed = data.PackedCollator(len(expected) + 3, position_start=start)(sequences)
    assert isinstance(packed, data.PackedBatch)
    inputs = packed.transformers_inputs(labels=None, attention_mask="dense", pattern=masks.full(), **DOUBLE)
    torch.testing.assert_close(model(**inputs).last_hidden_state[0, : len(expected)], expected)
    for side in ("right", "left"):
        padded = packed.to_padded(padding_value=1, side=side)  # type: ignore[call-overload]
        values = model(**padded.transformers_inputs(labels=None)).last_hidden_state
        torch.testing.assert_close(padded.to_packed(values), expected)


ONE_STEP = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 1,
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}
"""A training step over two micro-batches, of which nothing is left but what it logged."""


@pytest.mark.parametrize("how", ["packed, with room", "left"])
def test_trainer_logs_the_mean_over_all_targets(how: str, tmp_path: Path) -> None:
    """One step over two micro-batches of unequal numbers of targets."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = language_model()
    total, count = loss_of_each_alone(model)
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path),
            **ONE_STEP,
            remove_unused_columns=False,
        ),
        train_dataset=documents(),
        data_collator=COLLATORS[how],
    )
    trainer.train()
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert abs(logged - float(total.detach()) / count) < 1e-4 * logged  # Trainer rounds what it logs


@pytest.mark.grid  # for its imports, which take longer than the rest of this file
@pytest.mark.parametrize("how", ["packed, with room", "left"])
def test_sft_trainer_logs_the_mean_over_all_targets(how: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    words = {"<bos>": 0, "<pad>": 1, "<eos>": 2, **{f"word {number}": number for number in range(3, 32)}}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>")),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
    )
    model = language_model()
    total, count = loss_of_each_alone(model)
    found = documents()
    rows = [{name: found[number][name].tolist() for name in ("input_ids", "labels")} for number in range(len(found))]
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            **ONE_STEP,
            bf16=False,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        data_collator=COLLATORS[how],
        processing_class=tokenizer,
    )
    trainer.train()
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert abs(logged - float(total.detach()) / count) < 1e-4 * logged


def test_classes_of_sequences() -> None:
    """A classifier over the last real token, with padding that is EOS."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SHAPE, "pad_token_id": 0}, num_labels=3)
    model = transformers.LlamaForSequenceClassification(config).double().eval()
    items = [{"input_ids": tokens, "label": n % 3} for n, tokens in enumerate(documents().sequences)]
    inputs = data.PaddedCollator(0, output="transformers")(items)
    assert isinstance(inputs, dict)
    alone = [model(item["input_ids"][None], labels=torch.tensor([item["label"]])).loss for item in items]
    torch.testing.assert_close(model(**inputs).loss, torch.stack(alone).mean())
