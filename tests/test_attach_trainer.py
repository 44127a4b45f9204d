"""Attached models in trainers: what is logged is the mean over all targets of a step, however its documents lie."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import maskops
from maskops import data

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when it is imported; everything here is made from configurations
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
from tests.transformers_models import SERVED, VOCABULARY  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

ONE_STEP = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 8,
    "max_steps": 1,
    "learning_rate": 0.0,  # nothing is learned, so that tests can share a model
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "remove_unused_columns": False,
}
"""A training step over two micro-batches of unequal numbers of targets."""


@functools.cache
def language_model(name: str) -> Any:
    """Shared by the tests, which leave it as it was; without dropout."""
    return SERVED[name].build(**({"dropout": 0.0} if name == "opt" else {}))


@functools.cache
def documents() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randint(4, VOCABULARY, (length,), generator=generator) for length in (5, 2, 9, 1, 12, 3, 2, 7))


@functools.cache
def truth(name: str) -> tuple[float, float]:
    """The mean over all targets, from each document alone through the model as it is, and the norm of its gradient."""
    model = language_model(name)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for tokens in documents():
        if len(tokens) > 1:
            scored = model(tokens[None], use_cache=False).logits[0].double()
            total = total + F.cross_entropy(scored[:-1], tokens[1:], reduction="sum")
            count += len(tokens) - 1
    loss = total / count
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return loss.item(), torch.stack([g.norm() for g in gradients if g is not None]).norm().item()


def padded_by_transformers(side: str) -> Any:
    """What a tokenizer's padding does with labels of first tokens: it leaves them, also behind padding."""

    def collate(items: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        width = max(len(item["input_ids"]) for item in items)
        left = side == "left"

        def pad(values: list[int], filling: int) -> list[int]:
            room = [filling] * (width - len(values))
            return room + values if left else values + room

        ids = torch.tensor([pad(item["input_ids"], 0) for item in items])
        mask = torch.tensor([pad([1] * len(item["input_ids"]), 0) for item in items])
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    return collate


COLLATORS = {
    "flattened": lambda: transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True),
    "packed": lambda: data.PackedCollator(output="transformers"),
    "packed, with room": lambda: data.PackedCollator(60, 12, 15, output="transformers"),
    "padded right": lambda: data.PaddedCollator(0, output="transformers"),
    "padded left": lambda: data.PaddedCollator(0, side="left", output="transformers"),
    "padded by transformers": lambda: padded_by_transformers("right"),
}


def trainer(model: Any, collate: Any, folder: Path, **arguments: Any) -> Any:
    rows = [{"input_ids": tokens.tolist()} for tokens in documents()]
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(output_dir=str(folder), **{**ONE_STEP, **arguments}),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collate,
    )


def logged(model: Any, collate: Any, folder: Path, **arguments: Any) -> dict[str, float]:
    one = trainer(model, collate, folder, **arguments)
    one.train()
    return next(entry for entry in one.state.log_history if "loss" in entry)


@pytest.mark.parametrize("fuse", [False, True], ids=["logits", "fused"])
@pytest.mark.parametrize("how", COLLATORS)
def test_trainer_logs_the_mean_over_all_targets(how: str, fuse: bool, tmp_path: Path) -> None:
    model = language_model("llama")
    mean, norm = truth("llama")
    with maskops.attach(model, probe=False, fuse_lm_head=fuse):
        entry = logged(model, COLLATORS[how](), tmp_path)
    assert abs(entry["loss"] - mean) < 1e-6 * mean
    assert abs(entry["grad_norm"] - norm) < 1e-4 * norm


@pytest.mark.parametrize("name", ["gpt-oss", "opt"])
def test_where_transformers_itself_logs_another_loss(name: str, tmp_path: Path) -> None:
    """Models that make their masks without a look at position ids let packed documents see one another."""
    model = language_model(name)
    mean, norm = truth(name)
    collate = COLLATORS["flattened"]()
    stock = logged(model, collate, tmp_path)
    with maskops.attach(model, probe=False):
        entry = logged(model, collate, tmp_path)
    assert abs(entry["loss"] - mean) < 1e-6 * mean
    assert abs(stock["loss"] - mean) > 1e-3 * mean
    assert abs(entry["grad_norm"] - norm) < 1e-4 * norm < abs(stock["grad_norm"] - norm)


def test_evaluation_has_its_logits(tmp_path: Path) -> None:
    """Nothing is fused outside of training: metrics are computed from the logits."""
    seen: list[tuple[int, ...]] = []

    def metrics(predicted: Any) -> dict[str, float]:
        seen.append(predicted.predictions.shape)
        return {}

    model = language_model("llama")
    with maskops.attach(model, probe=False, fuse_lm_head=True):
        one = trainer(model, COLLATORS["padded right"](), tmp_path)
        one.compute_metrics = metrics
        loss = one.evaluate()["eval_loss"]
    assert seen == [(8, 12, VOCABULARY)]
    assert abs(loss - truth("llama")[0]) < 1e-6 * loss


def test_label_smoothing_is_trainers_own(tmp_path: Path) -> None:
    """Trainer keeps the labels from the model then and scores the logits, which are there though the head is fused."""
    model = language_model("llama")
    collate = COLLATORS["padded right"]()
    expected = logged(model, collate, tmp_path, label_smoothing_factor=0.1)["loss"]
    with maskops.attach(model, probe=False, fuse_lm_head=True):
        loss = logged(model, collate, tmp_path, label_smoothing_factor=0.1)["loss"]
    assert abs(loss - expected) < 1e-5 * expected and abs(loss - truth("llama")[0]) > 1e-3 * loss


@pytest.mark.grid  # for its imports, which take longer than the rest of this file
@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("fuse", [False, True], ids=["logits", "fused"])
def test_sft_trainer_packs(name: str, fuse: bool, tmp_path: Path) -> None:
    """TRL packs, and scores hidden states by itself, past the loss of the model; the attention is that of maskops."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"word {number}": number for number in range(3, VOCABULARY)}}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>")),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
    )
    model = language_model(name)
    mean, norm = truth(name)
    with maskops.attach(model, probe=False, fuse_lm_head=fuse):
        one = trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(
                output_dir=str(tmp_path),
                **{**ONE_STEP, "per_device_train_batch_size": 1},
                bf16=False,
                packing=True,
                max_length=21,
                gradient_checkpointing=False,
            ),
            train_dataset=datasets.Dataset.from_list([{"input_ids": tokens.tolist()} for tokens in documents()]),
            processing_class=tokenizer,
        )
        one.train()
    del model.forward  # TRL's own, which it leaves on the model
    entry = next(entry for entry in one.state.log_history if "loss" in entry)
    assert len(one.train_dataset) == 2
    assert abs(entry["loss"] - mean) < 1e-6 * mean
    assert abs(entry["grad_norm"] - norm) < 1e-4 * norm
