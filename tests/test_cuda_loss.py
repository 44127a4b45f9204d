"""maskops.cross_entropy on the backend `cuda`, emulated where there is no device, by the cases of every backend."""

import contextlib
import ctypes
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import maskops
from maskops import backend as backends
from maskops import extension
from tests import test_cross_entropy as common
from tests import test_cross_entropy_numerics as numerics
from tests import test_cross_entropy_targets as targets
from tests.cross_entropy_oracle import (
    DTYPES,
    IGNORE,
    MASK,
    WEIGHTS,
    check_case,
    distributions,
    gradients,
    problem,
)
from tests.served import DEVICE, running_on
from tools import emulation

NAME = "cuda"
pytestmark = pytest.mark.devices


@pytest.fixture(autouse=True)
def backend() -> Iterator[str]:
    if reasons := backends.BACKENDS[NAME].refusals_of(DEVICE):
        pytest.skip(f"{NAME}: {'; '.join(reasons)}")
    with running_on(NAME):
        yield NAME


@contextlib.contextmanager
def capability(major: int) -> Iterator[None]:
    """Emulates a device without clusters, whose rows stay in memory where one pass over them is enough."""
    if not extension.cuda_is_emulated():
        pytest.skip("the capability of a device cannot be chosen")
    library = ctypes.CDLL(str(emulation.library()))
    library.maskops_emulate_capability(major, 0)
    try:
        yield
    finally:
        library.maskops_emulate_capability(9, 0)


@pytest.mark.parametrize("scoring", common.SCORING.values(), ids=common.SCORING.keys())
@pytest.mark.parametrize("vocabulary", [1, 33, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scoring(dtype: torch.dtype, vocabulary: int, scoring: dict[str, float]) -> None:
    check_case(*problem((6,), vocabulary, dtype), **scoring)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scoring_without_clusters(dtype: torch.dtype) -> None:
    with capability(8):
        for vocabulary in (1, 33, 5000):
            for scoring in ({}, common.SCORING["everything"]):
                check_case(*problem((6,), vocabulary, dtype), **scoring)
        logits, _ = problem((6,), 333, dtype)
        check_case(logits, distributions(logits), class_weights=targets.factors(333), label_smoothing=0.1)


@pytest.mark.parametrize("major", [8, 9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_label_anywhere_in_rows_of_any_alignment(dtype: torch.dtype, major: int) -> None:
    """Rows begin and end inside of aligned vectors, and the label is in the first, the last, or any other."""
    with capability(major) if major == 8 else contextlib.nullcontext():
        for vocabulary, first in ((7, 0), (7, 3), (23, 1)):
            logits, _ = problem((vocabulary,), vocabulary + 3, dtype)
            check_case(logits[:, first : first + vocabulary], torch.arange(vocabulary), z_loss=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_vocabulary(backend: str, dtype: torch.dtype) -> None:
    common.test_large_vocabulary(backend, dtype)


def test_softcap_with_a_ragged_tail(backend: str) -> None:
    common.test_softcap_with_a_ragged_tail(backend, 70, 30.0)
    common.test_softcap_with_a_ragged_tail(backend, 3, 1.0)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("masking", common.MASKING.values(), ids=common.MASKING.keys())
def test_padded(masking: dict[str, Any], shift: bool) -> None:
    for reduction in ({}, {"reduction": "none"}, {"reduction": "sequence_mean"}, {"num_items": torch.tensor(5)}):
        check_case(*problem((3, 5), 10), **masking, **reduction, shift=shift)


@pytest.mark.parametrize("shift", [False, True])
def test_packed(backend: str, shift: bool) -> None:
    for offsets in ([0, 5, 6, 15], [0, 0, 4, 4, 4, 12, 12]):
        common.test_packed(backend, offsets, {"reduction": "sequence_mean"}, shift)


@pytest.mark.parametrize("ignore_index", [-1, 3, 2**31 - 1])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ignore_index_and_target_dtype(backend: str, dtype: torch.dtype, ignore_index: int) -> None:
    common.test_ignore_index_and_target_dtype(backend, dtype, ignore_index)


def test_nothing_to_score(backend: str) -> None:
    for kind in ("labels", "num_items"):
        common.test_nothing_to_score(backend, kind, "mean")
    for shape in ((0,), (3, 0)):
        common.test_empty_batch(backend, shape, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_logits(backend: str, dtype: torch.dtype) -> None:
    common.test_strided_logits(backend, dtype)


@pytest.mark.parametrize("vocabulary", [3, 64, 200])
def test_argmax_is_the_first_of_equals(backend: str, vocabulary: int) -> None:
    common.test_argmax_is_the_first_of_equals(backend, vocabulary)


# ---- where floating point is hard -----------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", numerics.TRANSFORMS.values(), ids=numerics.TRANSFORMS.keys())
@pytest.mark.parametrize(
    ("dtype", "vocabulary"), [(torch.float32, 100), (torch.bfloat16, 20_011), (torch.float16, 100)]
)
def test_confident_rows(backend: str, dtype: torch.dtype, vocabulary: int, transform: dict[str, float]) -> None:
    numerics.test_confident_rows_keep_their_relative_accuracy(backend, dtype, vocabulary, transform)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_confident_distributions(backend: str, dtype: torch.dtype) -> None:
    targets.test_confident_distributions_keep_their_relative_accuracy(backend, dtype)


@pytest.mark.parametrize("value", numerics.POISON)
def test_skipped_rows_are_never_read(backend: str, value: float) -> None:
    numerics.test_skipped_rows_are_never_read(backend, torch.bfloat16, value)
    numerics.test_skipped_rows_are_never_read(backend, torch.float32, value)
    numerics.test_incoming_gradients_of_skipped_rows_are_never_read(backend)
    numerics.test_tokens_after_the_last_sequence_are_never_read(backend)
    for shift in (False, True):
        targets.test_skipped_probabilities_are_never_read(backend, shift, value)


def test_rows_without_an_incoming_gradient_are_not_read_in_backward() -> None:
    logits, target = problem((4,), 40)
    logits[1] = math.nan
    logits.requires_grad_()
    losses = maskops.cross_entropy(logits, target.clamp(min=0), reduction="none")
    (grad,) = torch.autograd.grad(losses[0] + losses[2], logits)
    assert bool((grad[[1, 3]] == 0).all()) and bool((grad[[0, 2]] != 0).all())


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_banned_columns(backend: str, softcap: float) -> None:
    numerics.test_banned_columns(backend, softcap)
    numerics.test_a_banned_target_has_infinite_loss(backend)
    for weighted in (False, True):
        targets.test_banned_columns(backend, weighted, softcap, 0.2)
    targets.test_a_banned_column_with_a_probability_costs_infinitely(backend)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_kept_row_does_not_hide_what_is_not_finite(backend: str, value: float) -> None:
    for at in (0, 50, 99):
        numerics.test_a_kept_row_does_not_hide_what_is_not_finite(backend, at, value)
    numerics.test_a_nan_with_any_payload_is_not_hidden(backend)


@pytest.mark.parametrize("offset", [-3e38, -1e4, 0.0, 1e4, 3e38])
def test_extreme_logits(backend: str, offset: float) -> None:
    numerics.test_extreme_logits(backend, offset)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    logits, target = problem((64,), 300)
    whole = maskops.cross_entropy(logits, target, reduction="none")
    for row in (0, 17, 63):
        alone = maskops.cross_entropy(logits[row : row + 1].clone(), target[row : row + 1], reduction="none")
        assert torch.equal(alone, whole[row : row + 1])


# ---- class weights and probabilities --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["probabilities", "class weights", "both"])
@pytest.mark.parametrize("scoring", targets.SCORING.values(), ids=targets.SCORING.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_target_scoring(backend: str, dtype: torch.dtype, scoring: dict[str, float], kind: str) -> None:
    for vocabulary in (1, 333):
        targets.test_scoring(backend, dtype, vocabulary, scoring, kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_mix(backend: str, dtype: torch.dtype) -> None:
    for target_dtype in (*DTYPES, torch.float64):
        targets.test_dtypes_mix(backend, dtype, target_dtype)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("kind", ["probabilities", "class weights", "both"])
def test_masks_and_reductions(backend: str, kind: str, shift: bool) -> None:
    for layout in ("padded", "packed"):
        for reduction in ({}, {"reduction": "none"}):
            targets.test_masks_and_reductions(backend, kind, reduction, shift, layout)


def test_target_strides(backend: str) -> None:
    targets.test_strides(backend)


def test_gradients_of_one_input(backend: str) -> None:
    targets.test_gradients_of_one_input(backend)
    for shift in (False, True):
        targets.test_empty_batch(backend, (3, 0), shift)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inplace_backward(backend: str, dtype: torch.dtype) -> None:
    """The same bits as out of place; rows longer than what a block takes of them otherwise."""
    for target_grad in (False, True):
        targets.test_inplace_backward(backend, target_grad)
    x, _ = problem((3,), 33_000, dtype)
    target = torch.tensor([5, 17_000, 32_990])  # where the first, a later and the last part of a row would be
    for banned in (False, True):
        if banned:
            x.scatter_(1, target[:, None], -math.inf)
        grads = []
        for inplace in (False, True):
            leaf = x.clone().requires_grad_()
            logits = leaf * 1
            loss = maskops.cross_entropy(logits, target, label_smoothing=0.1, inplace_backward=inplace)
            (grad,) = torch.autograd.grad(loss, logits)
            assert (grad.data_ptr() == logits.data_ptr()) == inplace
            grads.append(grad)
        assert torch.equal(*grads)


@pytest.mark.parametrize("scoring", [{}, {"label_smoothing": 0.2, "z_loss": 0.05, "softcap": 7.0, "logit_scale": 1.5}])
@pytest.mark.parametrize("vocabulary", [41, 3000, 60_000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_passes_at_once(dtype: torch.dtype, vocabulary: int, scoring: dict[str, float]) -> None:
    """The same bits as one pass after the other, on chip and where a row is too long for that."""
    wide, target = problem((5,), vocabulary + 3, dtype)
    target = target.clamp(max=vocabulary - 1)
    weights, nothing = torch.linspace(0.5, 2.0, vocabulary), torch.zeros(0)
    some = torch.tensor([1.0, 0.0, -2.0, 0.5, 0.25]).masked_fill(target == IGNORE, math.nan)
    numbers = (
        IGNORE,
        *(scoring.get(name, 0.0) for name in ("label_smoothing", "z_loss", "softcap")),
        scoring.get("logit_scale", 1.0),
    )
    results = []
    for first in (0, 1):
        for at_once in (True, False):
            logits = wide.clone()[:, first : first + vocabulary]
            incoming = (some, some * 0.5, nothing, some * 0.25 if scoring else nothing)
            if at_once:
                outputs = operators().cross_entropy_both__cuda(
                    *incoming, logits, target, weights, *numbers, bool(scoring), bool(scoring)
                )
            else:
                *outputs, statistics = operators().cross_entropy_forward_cuda(
                    logits, target, weights, nothing, False, *numbers, bool(scoring), bool(scoring)
                )
                _, lse, logprobs, entropy, _ = outputs
                operators().cross_entropy_backward__cuda(
                    *incoming, logits, target, weights, nothing, lse, logprobs, entropy, statistics, False, *numbers
                )
            assert bool((logits[target == IGNORE] == 0).all()) and bool((logits[target != IGNORE] != 0).any())
            results.append((*outputs, logits))
        for ours, expected in zip(*results[-2:], strict=True):
            assert torch.equal(ours, expected)


# ---- what nobody checks ---------------------------------------------------------------------------------------------


def operators() -> Any:
    return torch.ops.maskops


def test_labels_outside_of_the_vocabulary_are_followed_nowhere() -> None:
    """The operators themselves, below the check of values: such a row is NaN, all others are as ever."""
    logits, _ = problem((6,), 40)
    nothing = torch.zeros(0)
    weights = torch.linspace(0.5, 2.0, 40)
    for dtype, far in ((torch.int32, 2**31 - 1), (torch.int64, 2**62)):
        target = torch.tensor([3, 40, -7, far, IGNORE, 39], dtype=dtype)
        kept = torch.tensor([3, 0, 0, 0, IGNORE, 39], dtype=dtype)
        for smoothing in (0.0, 0.1):
            numbers = (False, IGNORE, smoothing, 0.1, 0.0, 1.0)
            outside = torch.tensor([False, True, True, True, False, False])
            results = []
            for labels in (target, kept):
                outputs = operators().cross_entropy_forward_cuda(logits, labels, weights, nothing, *numbers, True, True)
                loss, lse, logprobs, entropy, argmax, statistics = outputs
                ones = torch.ones(6)
                saved = (lse, logprobs, entropy, statistics)
                grad, _ = operators().cross_entropy_backward_cuda(
                    ones,
                    nothing,
                    nothing,
                    nothing,
                    logits,
                    labels,
                    weights,
                    nothing,
                    *saved,
                    False,
                    False,
                    *numbers[1:],
                )
                results.append((loss, lse, logprobs, argmax, grad))
            for actual, expected in zip(*results, strict=True):
                assert torch.equal(actual[~outside], expected[~outside])
            loss, lse, logprobs, argmax, grad = results[0]
            assert bool(loss[outside].isnan().all()) and bool(logprobs[outside].isnan().all())
            assert bool(grad[outside].isnan().all())
            torch.testing.assert_close(lse[outside], logits[outside].logsumexp(1))
            assert torch.equal(argmax[outside], logits[outside].argmax(1))


def test_labels_are_checked_where_values_are_read() -> None:
    logits, target = problem((6,), 40)
    target[2] = 40
    with maskops.validate(), pytest.raises(ValueError, match="row 2 of the logits is scored against is 40, outside"):
        maskops.cross_entropy(logits, target)


def test_saved_statistics_are_not_trusted() -> None:
    """They name a column: one outside of the vocabulary is not read, whatever it is."""
    logits, _ = problem((4,), 40)
    target, labels = distributions(logits), torch.zeros(4, dtype=torch.int64)
    nothing = torch.zeros(0)
    _, lse, logprobs, entropy, _, statistics = operators().cross_entropy_forward_cuda(
        logits, labels, nothing, target, False, IGNORE, 0.0, 0.0, 0.0, 1.0, False, False
    )
    statistics[:, 4] = torch.tensor([-1.0, 40.0, math.nan, 1e300])
    grad, target_grad = operators().cross_entropy_backward_cuda(
        torch.ones(4), nothing, nothing, nothing, logits, labels, nothing, target, lse, logprobs, entropy, statistics,
        False, True, IGNORE, 0.0, 0.0, 0.0, 1.0,
    )  # fmt: skip
    assert grad.shape == target_grad.shape == logits.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_under_shift_the_last_row_is_skipped_whatever_its_label(dtype: torch.dtype) -> None:
    """There are no probabilities behind the last ones, and the first ones get no gradient."""
    logits, _ = problem((4,), 40, dtype)
    labels, nothing = torch.zeros(4, dtype=torch.int64), torch.zeros(0)
    target = distributions(logits)
    loss, lse, logprobs, entropy, _, statistics = operators().cross_entropy_forward_cuda(
        logits, labels, nothing, target, True, IGNORE, 0.0, 0.0, 0.0, 1.0, False, False
    )
    assert loss[3] == 0 and lse[3] == 0 and bool((loss[:3] != 0).all())
    grad, target_grad = operators().cross_entropy_backward_cuda(
        torch.ones(4), nothing, nothing, nothing, logits, labels, nothing, target, lse, logprobs, entropy, statistics,
        True, True, IGNORE, 0.0, 0.0, 0.0, 1.0,
    )  # fmt: skip
    assert bool((grad[3] == 0).all()) and bool((target_grad[0] == 0).all())
    assert bool((grad[:3] != 0).any(1).all()) and bool((target_grad[1:] != 0).any(1).all())


def test_bad_shapes_are_refused() -> None:
    logits, target = problem((4,), 40)
    nothing = torch.zeros(0)
    numbers = (False, IGNORE, 0.0, 0.0, 0.0, 1.0, False, False)
    for wrong, message in (
        ((logits, target[:3], nothing, nothing), "target must have a label per row"),
        ((logits, target.float(), nothing, nothing), "target must be int32 or int64"),
        ((logits.t(), target.repeat(10), nothing, nothing), "columns of logits must be contiguous"),
        ((logits, target, torch.ones(39), nothing), "class_weights must be float32, contiguous, one per column"),
        ((logits, target, nothing, logits[:2]), "probabilities must have the shape of logits"),
        ((logits.double(), target, nothing, nothing), "take float32, bfloat16 and float16"),
    ):
        with pytest.raises(ValueError, match=message):
            operators().cross_entropy_forward_cuda(*wrong, *numbers)


def test_rows_are_the_same_alone_and_among_others() -> None:
    """Weights, masks and probabilities of all rows together against one row at a time."""
    logits, _ = problem((5,), 77)
    target = distributions(logits)
    grads: list[Tensor] = []
    x = logits.clone().requires_grad_()
    whole = maskops.cross_entropy(x, target, reduction="none")
    (grad,) = torch.autograd.grad(whole.sum(), x)
    for row in range(5):
        alone = logits[row : row + 1].requires_grad_()
        loss = maskops.cross_entropy(alone, target[row : row + 1], reduction="none")
        torch.testing.assert_close(loss, whole[row : row + 1], rtol=1e-6, atol=0.0)
        grads.append(torch.autograd.grad(loss.sum(), alone)[0])
    torch.testing.assert_close(torch.cat(grads), grad, rtol=1e-6, atol=1e-9)


def test_masks_and_weights_follow_gradients_of_both() -> None:
    logits, _ = problem((3, 5), 20)
    target = distributions(logits)
    options: dict[str, Any] = {"mask": MASK.bool(), "token_weights": WEIGHTS, "class_weights": targets.factors(20)}
    x, t = logits.requires_grad_(), target.requires_grad_()
    outputs = maskops.cross_entropy(
        x, t, **options, return_lse=True, return_logprobs=True, return_entropy=True, return_argmax=True
    )
    skipped = ~(MASK.bool() & (WEIGHTS != 0))
    for grad in gradients(outputs, x, t):
        assert bool((grad[skipped] == 0).all()) and bool(grad.isfinite().all())
