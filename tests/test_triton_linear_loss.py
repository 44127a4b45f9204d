"""maskops.linear_cross_entropy in chunks on a device: the cases of the CPU, and what only a device can break."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import maskops
from maskops.ops.linear_cross_entropy import device_chunks
from tests.linear_cross_entropy_oracle import IGNORE, MASK, RETURNS, WEIGHTS, Problem, check, gradients
from tests.served import DEVICE, running_on

pytestmark = pytest.mark.devices

SINGLE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def on_triton() -> Iterator[None]:
    with running_on("triton"):
        yield


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows a chunk, so that small problems have many."""
    monkeypatch.setattr(device_chunks, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(device_chunks, "_LEAST_ROWS", 4)


EVERYTHING: dict[str, Any] = {
    "label_smoothing": 0.2,
    "z_loss": 0.05,
    "softcap": 7.0,
    "logit_scale": 1.5,
    "class_weights": torch.linspace(2.0, 0.5, 33).double(),
}


@pytest.mark.parametrize("returns", [{}, RETURNS], ids=["loss", "all"])
@pytest.mark.parametrize(("dtype", "options"), [(SINGLE, {}), (BRAIN, EVERYTHING), (HALF, {"z_loss": 1e-2})], ids=str)
def test_scoring(dtype: torch.dtype, options: dict[str, Any], returns: dict[str, Any]) -> None:
    check(Problem((2, 3), dtype=dtype), **options, **returns)


@pytest.mark.parametrize("reduction", ["none", "sequence_mean"])
def test_masks_and_reductions(reduction: str) -> None:
    check(Problem(), reduction=reduction, mask=MASK.bool(), token_weights=WEIGHTS, shift=True)


@pytest.mark.parametrize(("dtype", "weight_dtype"), [(SINGLE, BRAIN), (HALF, SINGLE)], ids=str)
def test_dtypes_mix(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    check(Problem((6,), dtype=dtype, weight_dtype=weight_dtype))


@pytest.mark.parametrize("step", [1, 5])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    monkeypatch.setattr(device_chunks, "_LEAST_ROWS", step)
    check(Problem((6,), dtype=BRAIN, ignored=0.4), return_argmax=True)


def test_odd_sizes_and_strides() -> None:
    check(Problem((1,), 1, 1, ignored=0.0))
    problem = Problem((5,), 3, 7, BRAIN, ignored=0.0)
    problem.bias = None
    check(problem, label_smoothing=0.1)
    problem = Problem((4,))
    problem.weight = problem.weight.t().contiguous().t()
    check(problem)
    problem.weight = torch.randn(66, 32)[::2, ::2]
    check(problem)


@pytest.mark.parametrize("dtype", [BRAIN, HALF], ids=str)
def test_autocast_casts_as_in_a_linear_layer(dtype: torch.dtype) -> None:
    """Master weights in float32 are multiplied in 16 bits, as they are in the layer that this replaces."""
    problem = Problem((6,))
    for options in ({}, {"reduction": "none", "return_lse": True}):
        leaves = problem.leaves()
        with torch.autocast(DEVICE, dtype=dtype):
            found = problem.score(leaves, **options)
        hidden, weight, bias = leaves
        expected = problem.score([hidden.to(dtype), weight.to(dtype), bias], **options)
        for x, y in zip(*([x] if isinstance(x, Tensor) else x[:2] for x in (found, expected)), strict=True):
            assert x.dtype == SINGLE and torch.equal(x, y)
            grads = [torch.autograd.grad(z.sum(), leaves, retain_graph=True) for z in (x, y)]
            assert all(a.dtype == SINGLE and torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_layer_without_inputs_scores_its_bias() -> None:
    problem = Problem((3,), width=0, ignored=0.0)
    leaves = problem.leaves()
    loss = problem.score(leaves)
    torch.testing.assert_close(loss, problem.explicit(leaves))
    assert [grad.shape for grad in torch.autograd.grad(loss, leaves)] == [(3, 0), (33, 0), (33,)]


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_no_tokens(shape: tuple[int, ...]) -> None:
    problem = Problem(shape, dtype=HALF)
    leaves = problem.leaves()
    loss = problem.score(leaves)
    assert loss == 0 and all(bool((grad == 0).all()) for grad in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
def test_nothing_to_score(dtype: torch.dtype) -> None:
    problem = Problem((5,), dtype=dtype)
    problem.hidden.fill_(math.nan)
    problem.target.fill_(IGNORE)
    leaves = problem.leaves()
    loss = problem.score(leaves)
    assert loss == 0 and all(bool((grad == 0).all()) for grad in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("returns", [{}, RETURNS], ids=["loss", "all"])
def test_skipped_tokens_are_never_read(returns: dict[str, Any]) -> None:
    problem = Problem(dtype=BRAIN)
    skipped = (problem.target == IGNORE) | (MASK == 0) | (WEIGHTS == 0)
    options = {"mask": MASK, "token_weights": WEIGHTS, "label_smoothing": 0.1, **returns}
    results = []
    for value in (0.0, math.nan):
        problem.hidden[skipped] = value
        leaves = problem.leaves()
        outputs = problem.score(leaves, **options)
        results.append((*(outputs if returns else [outputs]), *gradients(outputs, leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert bool((results[1][-3][skipped] == 0).all())


def test_incoming_gradients_of_skipped_tokens_are_never_read() -> None:
    for dtype in (SINGLE, HALF):
        problem = Problem((6,), dtype=dtype)
        leaves = problem.leaves()
        outputs = problem.score(leaves, reduction="none", **RETURNS)
        poison = torch.where(problem.target == IGNORE, math.nan, 1.0)
        for grad in torch.autograd.grad(outputs[:4], leaves, [poison] * 4):
            assert bool(grad.isfinite().all())


def test_a_weight_that_is_not_finite_leaves_skipped_tokens_alone() -> None:
    problem = Problem((5,), ignored=0.0)
    problem.target[2] = IGNORE
    problem.weight[4, 3] = math.inf
    leaves = problem.leaves()
    (grad,) = torch.autograd.grad(problem.score(leaves), leaves[:1])
    assert bool((grad[2] == 0).all()) and not bool(grad[0].isfinite().all())


@pytest.mark.parametrize("scale", [2.0**-24, 2.0**20])
def test_gradients_in_float16_do_not_underflow(scale: float) -> None:
    """Gradients of logits are far below what float16 holds, those of the layer are not."""
    problem = Problem((4,), dtype=HALF, ignored=0.0)
    problem.hidden, problem.weight = problem.hidden * 8, problem.weight * (2.0**-6)
    found = []
    for factor in (1.0, scale):
        leaves = problem.leaves()
        losses = problem.score(leaves, reduction="none")
        grads = torch.autograd.grad(losses, leaves, torch.full((4,), factor))
        found.append([grad.float() for grad in grads])
    for plain, scaled in zip(*found, strict=True):
        # What is left of float16's precision among the smallest numbers it has.
        tiny = 2.0**-24 if scale < 1.0 else 0.0
        finite = scaled.isfinite()
        assert bool(finite.any())
        torch.testing.assert_close(scaled[finite], (plain * scale)[finite], rtol=2e-3, atol=tiny)


def test_no_look_at_a_value() -> None:
    """Fake tensors have none to look at; every shape follows from shapes."""
    absent = torch.empty(0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for dtype in (SINGLE, HALF):
            hidden, weight = torch.empty(9, 16, dtype=dtype), torch.empty(33, 16, dtype=dtype)
            layer = (hidden, weight, torch.empty(33, dtype=dtype), torch.empty(9, dtype=torch.int64))
            incoming = (torch.empty(9), absent, absent, absent)
            scoring = (IGNORE, 0.1, 0.0, 0.0, 1.0, True, True)
            for values in (True, False):
                results = device_chunks.linear_cross_entropy(
                    "triton", *layer, absent, *incoming, *scoring, values, True, True, True
                )
                assert [tuple(grad.shape) for grad in results[5:]] == [(9, 16), (33, 16), (33,)]


@pytest.mark.processor
def test_labels_outside_the_vocabulary() -> None:
    problem = Problem((4,), ignored=0.0)
    problem.target[1] = 40
    with pytest.raises(ValueError, match="row 1 of the logits is scored against is 40, outside"):
        maskops.linear_cross_entropy(problem.hidden, problem.weight, problem.target)
