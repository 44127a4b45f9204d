"""maskops.cross_entropy against a token-by-token oracle, on every backend: scoring, masks, reductions, layouts."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import maskops
from tests.cross_entropy_oracle import (
    BACKENDS,
    DTYPES,
    IGNORE,
    MASK,
    RETURNS,
    WEIGHTS,
    check_case,
    needs_extension,
    problem,
)
from tests.served import each_of

pytestmark = pytest.mark.devices

backend = each_of(BACKENDS)


SCORING = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing only": {"label_smoothing": 1.0},
    "z loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 5.0},
    "scale": {"logit_scale": 0.6},
    "everything": {"label_smoothing": 0.2, "z_loss": 0.05, "softcap": 7.0, "logit_scale": 1.5},
}


@pytest.mark.parametrize("scoring", SCORING.values(), ids=SCORING.keys())
@pytest.mark.parametrize("vocabulary", [1, 2, 33, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scoring(backend: str, dtype: torch.dtype, vocabulary: int, scoring: dict[str, float]) -> None:
    check_case(*problem((6,), vocabulary, dtype), **scoring)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_vocabulary(backend: str, dtype: torch.dtype) -> None:
    check_case(*problem((3,), 50257, dtype), label_smoothing=0.1, softcap=30.0)
    check_case(*problem((3,), 50257, dtype, seed=1))


@pytest.mark.parametrize("target_at", [0, 15, 16, 63, 64, 127, 128, 199])
def test_target_in_every_part_of_a_row(backend: str, target_at: int) -> None:
    logits, _ = problem((2,), 200)
    check_case(logits, torch.tensor([target_at, 199 - target_at]), label_smoothing=0.1)


@pytest.mark.parametrize("vocabulary", [33000, 70, 3])
@pytest.mark.parametrize("softcap", [30.0, 1.0])
def test_softcap_with_a_ragged_tail(backend: str, vocabulary: int, softcap: float) -> None:
    """Padding of the last block must not enter as exp(-softcap): logits near -60 show it (a bug of other kernels)."""
    logits = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(0)) - 60.0
    check_case(logits, torch.tensor([0, vocabulary - 1, vocabulary // 2]), softcap=softcap)


MASKING = {
    "labels": {},
    "bool mask": {"mask": MASK.bool()},
    "integer mask": {"mask": MASK},
    "weights": {"token_weights": WEIGHTS},
    "integer weights": {"token_weights": MASK * 2},
    "both": {"mask": MASK.bool(), "token_weights": WEIGHTS.double()},
}


REDUCTIONS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "sequence mean": {"reduction": "sequence_mean"},
    "num items": {"num_items": 7},
    "num items tensor": {"num_items": torch.tensor(5)},
}


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS.values(), ids=REDUCTIONS.keys())
@pytest.mark.parametrize("masking", MASKING.values(), ids=MASKING.keys())
def test_padded(backend: str, masking: dict[str, Any], reduction: dict[str, Any], shift: bool) -> None:
    check_case(*problem((3, 5), 10), **masking, **reduction, shift=shift)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS.values(), ids=REDUCTIONS.keys())
@pytest.mark.parametrize(
    "offsets", [[0, 5, 6, 15], [0, 0, 4, 4, 4, 12, 12], [0, 15], [0], [0, 0], [0, 1, 2, 3, 4]], ids=str
)
def test_packed(backend: str, offsets: list[int], reduction: dict[str, Any], shift: bool) -> None:
    logits, target = problem((15,), 10)
    options = {**reduction, "shift": shift, "token_weights": WEIGHTS.reshape(-1)}
    for dtype in (torch.int32, torch.int64):
        check_case(logits, target, cu_seqlens=torch.tensor(offsets, dtype=dtype), **options)
    check_case(
        logits.reshape(3, 5, 10),
        target.reshape(3, 5),
        cu_seqlens=torch.tensor(offsets),
        **{**options, "token_weights": WEIGHTS},
    )


def test_packed_equals_padded(backend: str) -> None:
    logits, target = problem((3, 6), 20)
    lengths = [6, 2, 4]
    inside = torch.arange(6) < torch.tensor(lengths)[:, None]
    padded = maskops.cross_entropy(logits, target, mask=inside, shift=True, reduction="sequence_mean")
    packed = maskops.cross_entropy(
        logits[inside], target[inside], cu_seqlens=torch.tensor([0, 6, 8, 12]), shift=True, reduction="sequence_mean"
    )
    assert padded.item() == pytest.approx(packed.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_torch(backend: str, dtype: torch.dtype) -> None:
    logits, target = problem((20,), 50, dtype)
    for reduction in ("mean", "sum", "none"):
        for smoothing in (0.0, 0.1):
            ours = maskops.cross_entropy(logits, target, reduction=reduction, label_smoothing=smoothing)
            theirs = F.cross_entropy(logits.double(), target, reduction=reduction, label_smoothing=smoothing)
            torch.testing.assert_close(ours.double(), theirs, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("ignore_index", [-1, 0, 3, 2**31 - 1])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ignore_index_and_target_dtype(backend: str, dtype: torch.dtype, ignore_index: int) -> None:
    logits, target = problem((9,), 5)
    target = target.masked_fill(target == IGNORE, ignore_index).to(dtype)
    check_case(logits, target, ignore_index=ignore_index)


@pytest.mark.parametrize("kind", ["labels", "mask", "weights", "cancelling weights", "num_items"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "sequence_mean"])
def test_nothing_to_score(backend: str, kind: str, reduction: str) -> None:
    logits, target = problem((2, 4), 9)
    target, options = target.clamp(min=0), {}
    if kind == "labels":
        target = torch.full_like(target, IGNORE)
    elif kind == "mask":
        options["mask"] = torch.zeros(2, 4, dtype=torch.bool)
    elif kind == "weights":
        options["token_weights"] = torch.zeros(2, 4)
    elif kind == "num_items":
        target = torch.full_like(target, IGNORE)
        if reduction == "mean":
            options["num_items"] = torch.tensor(0)
    elif reduction in ("mean", "sequence_mean"):
        options["token_weights"] = torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.0, 2.0, 0.0, -2.0]])
    else:
        options["token_weights"] = torch.zeros(2, 4)
    if kind != "cancelling weights":
        logits.fill_(math.nan)
    logits.requires_grad_()
    loss = maskops.cross_entropy(logits, target, reduction=reduction, **options)
    assert bool((loss == 0).all())
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert bool((grad == 0).all())


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)])
@pytest.mark.parametrize("shift", [False, True])
def test_empty_batch(backend: str, shape: tuple[int, ...], shift: bool) -> None:
    logits = torch.zeros(*shape, 7, requires_grad=True)
    target = torch.zeros(shape, dtype=torch.int64)
    for reduction in ("mean", "sum", "none", *(["sequence_mean"] if len(shape) == 2 else [])):
        outputs = maskops.cross_entropy(logits, target, shift=shift, reduction=reduction, **RETURNS)
        assert outputs.loss.shape == (shape if reduction == "none" else ())
        assert bool((outputs.loss == 0).all()) and outputs.argmax.shape == shape
        assert torch.autograd.grad(outputs.loss.sum(), logits)[0].shape == logits.shape


def test_a_single_token_without_dimensions(backend: str) -> None:
    logits = torch.randn(6)
    loss = maskops.cross_entropy(logits, torch.tensor(2), reduction="none")
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.tensor(2)))


@pytest.mark.parametrize("vocabulary", [3, 64, 200])
def test_argmax_is_the_first_of_equals(backend: str, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(3, (40, vocabulary), generator=generator).float()
    target = torch.randint(vocabulary, (40,), generator=generator)
    outputs = maskops.cross_entropy(logits, target, softcap=1e-3, return_argmax=True)
    assert isinstance(outputs, maskops.CrossEntropyOutput)
    assert torch.equal(outputs.argmax, logits.argmax(1))
    assert outputs.lse is None and outputs.logprobs is None and outputs.entropy is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_logits(backend: str, dtype: torch.dtype) -> None:
    wide, target = problem((4, 6), 50, dtype)
    target = target.clamp(max=29)
    check_case(wide[..., 7:37], target)  # one stride between rows: no copy
    check_case(wide[:, ::2, 7:37], target[:, ::2])
    check_case(wide.transpose(0, 1)[..., :30], target.transpose(0, 1))  # no single stride
    check_case(wide[..., :30].transpose(0, 2).contiguous().transpose(0, 2), target)  # columns apart
    check_case(wide[:1, :1, :30].expand(4, 6, 30), target)
    check_case(wide[0, :3, :30], target[0, ::2])  # labels apart


@pytest.mark.processor
def test_strided_logits_are_not_copied() -> None:
    needs_extension()
    wide = torch.randn(300, 1100)
    target = torch.randint(1000, (300,))
    with maskops.use_backend("cpu", fallback="error"):
        with torch.profiler.profile(profile_memory=True) as profile:
            maskops.cross_entropy(wide[:, 50:1050], target, shift=True)
    allocated = max(event.cpu_memory_usage for event in profile.events())
    assert allocated < 300 * 1000  # bytes; a copy would be 1.2 MB
