"""maskops.cross_entropy(grad_buffer=...): where the gradient is written, when, and who notices memory used again."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import maskops
from maskops import extension
from tests.cross_entropy_oracle import DTYPES, IGNORE, instruction_set, needs_extension, problem

pytestmark = pytest.mark.processor

CASES: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "sequence mean": {"reduction": "sequence_mean", "cu_seqlens": torch.tensor([0, 3, 7])},
    "weights": {"token_weights": torch.linspace(0.0, 2.0, 8), "num_items": 3},
    "scale": {"logit_scale": 0.37},
    "extras": {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 9.0},
    "classes": {"class_weights": torch.linspace(0.5, 2.0, 700), "label_smoothing": 0.2},
    "rows": {"reduction": "none"},
    "entropy": {"return_entropy": True},
    "shift": {"shift": True},
}


def scalar(result: Any) -> Tensor:
    if isinstance(result, Tensor):
        return result.sum()
    entropy: Tensor = result.entropy
    return result.loss + entropy.sum()


@pytest.fixture(autouse=True)
def on_the_processor() -> Any:
    needs_extension()
    with maskops.use_backend("cpu", fallback="error"):
        yield


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_buffer_holds_the_gradient(dtype: torch.dtype, options: dict[str, Any]) -> None:
    logits, target = problem((8,), 700, dtype)
    weight = logits.requires_grad_()
    rounding = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    for name in extension.instruction_sets():
        with instruction_set(name):
            loss = scalar(maskops.cross_entropy(weight * 1, target, **options))
            (expected,) = torch.autograd.grad(loss, weight)
            for inside in (False, True):
                x = weight * 1
                buffer = x if inside else torch.full_like(weight, float("nan"), requires_grad=False)
                held: list[Tensor] = []
                x.register_hook(held.append)
                ours = scalar(maskops.cross_entropy(x, target, grad_buffer=buffer, **options))
                torch.testing.assert_close(ours, loss, rtol=0.0, atol=0.0)
                (grad,) = torch.autograd.grad(ours, weight)
                assert held[0].data_ptr() == buffer.data_ptr()
                torch.testing.assert_close(grad, expected, rtol=rounding, atol=rounding * float(expected.abs().max()))
                assert bool((grad[target == IGNORE] == 0).all()) or "shift" in options


def test_the_forward_pass_writes_it_and_the_backward_pass_only_scales() -> None:
    logits, target = problem((6,), 300)
    x, buffer = logits.requires_grad_(), torch.empty(6, 300)
    (expected,) = torch.autograd.grad(maskops.cross_entropy(x, target), x)
    loss = maskops.cross_entropy(x, target, grad_buffer=buffer)
    torch.testing.assert_close(buffer, expected, rtol=2e-5, atol=0.0)
    written = buffer.clone()
    (grad,) = torch.autograd.grad(loss * 2, x)
    assert grad.data_ptr() == buffer.data_ptr() and torch.equal(grad, written * 2)
    with torch.no_grad():
        maskops.cross_entropy(x, target, grad_buffer=buffer)
    assert torch.equal(buffer, written * 2)


RISING = {
    "steep": torch.linspace(-40.0, 600.0, 20_011),
    "gentle": torch.linspace(0.0, 90.0, 20_011),
    "noise": 10.0 * torch.randn(20_011, generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("rising", RISING.values(), ids=RISING.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_rows_with_rising_logits(dtype: torch.dtype, rising: Tensor) -> None:
    """References rise so often that the runs of kept exponentials are folded into one, with labels on either side.

    In place, the label's block still holds logits then: folding must leave it alone.
    """
    target = torch.tensor([0, 40, 300, 4000, 12_000, 20_010])
    leaf = rising.to(dtype).repeat(len(target), 1).requires_grad_()
    exact = leaf.detach().double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(exact, target, reduction="sum")
    (expected,) = torch.autograd.grad(loss, exact)
    rounding = 1e-4 if dtype == torch.float32 else 8e-3  # of logits up to 600, and of the gradient
    for name in extension.instruction_sets():
        for inside in (False, True):
            x = leaf * 1
            buffer = x if inside else torch.empty_like(leaf, requires_grad=False)
            with instruction_set(name):
                plain = maskops.cross_entropy(x, target, reduction="sum")
                ours = maskops.cross_entropy(x, target, reduction="sum", grad_buffer=buffer)
            assert torch.equal(ours, plain)
            torch.testing.assert_close(ours.detach().double(), loss.detach(), rtol=1e-6, atol=0.0)
            torch.testing.assert_close(buffer.detach().double(), expected, rtol=rounding, atol=1e-30)


def test_a_nan_stays_one() -> None:
    """Rounding the bits of this one to bfloat16 would carry into its sign and leave nothing."""
    logits, target = problem((2,), 300, torch.bfloat16)
    incoming = torch.tensor([0x7FFFFFFF, 0], dtype=torch.int32).view(torch.float32)
    target[:] = 3
    for name in extension.instruction_sets():
        with instruction_set(name):
            x = logits.clone().requires_grad_()
            losses = maskops.cross_entropy(x, target, reduction="none", grad_buffer=torch.empty_like(logits))
            (grad,) = torch.autograd.grad(losses, x, incoming)
            assert bool(grad[0].isnan().all()) and bool((grad[1] == 0).all())


def test_the_operators_refuse_memory_that_cannot_hold_it() -> None:
    logits, target = problem((6,), 50)
    nothing, ones, memory = torch.empty(0), torch.ones(6), torch.zeros(7 * 50)
    for buffer in (
        memory[:294].view(6, 49),
        memory[:300].view(6, 50).double(),
        logits.new_empty(50, 6).t(),
        logits[:5],
    ):
        with pytest.raises((RuntimeError, ValueError), match="a buffer for the gradient must have"):
            torch.ops.maskops.cross_entropy_both_into(
                ones, nothing, nothing, nothing, logits, target, nothing, nothing, buffer, False, IGNORE, 0.0, 0.0, 0.0,
                1.0, False, False,
            )  # fmt: skip
    inside = memory[:300].view(6, 50)
    with pytest.raises((RuntimeError, ValueError), match="share no memory with them"):
        torch.ops.maskops.cross_entropy_both_into(
            ones, nothing, nothing, nothing, inside, target, nothing, nothing, memory[50:].view(6, 50), False,
            IGNORE, 0.0, 0.0, 0.0, 1.0, False, False,
        )  # fmt: skip


def test_large_gradients_stream_past_the_caches() -> None:
    for dtype, rows, vocabulary in ((torch.float32, 90, 100_000), (torch.bfloat16, 180, 100_001)):
        logits, target = problem((rows,), vocabulary, dtype)
        target[:4] = torch.tensor([0, vocabulary - 1, 5, IGNORE])
        some = [0, 1, 2, 3, 4, 5, 6, 7, rows - 1]
        x, buffer = logits.requires_grad_(), torch.empty_like(logits, requires_grad=False)
        maskops.cross_entropy(x, target, reduction="sum", grad_buffer=buffer)
        y = logits.detach()[some].requires_grad_()
        (part,) = torch.autograd.grad(maskops.cross_entropy(y, target[some], reduction="sum"), y)
        rounding = 2e-5 if dtype == torch.float32 else 8e-3
        torch.testing.assert_close(buffer[some], part, rtol=rounding, atol=0.0)


def test_reused_memory_is_noticed() -> None:
    logits, target = problem((6,), 50)
    x, buffer = logits.requires_grad_(), torch.empty(6, 50)
    first = maskops.cross_entropy(x, target, grad_buffer=buffer)
    second = maskops.cross_entropy(x * 2, target, grad_buffer=buffer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.backward()
    torch.autograd.grad(second, x, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()
    squashed = (x * 1).sigmoid()  # sigmoid saves its result
    loss = maskops.cross_entropy(squashed, target, grad_buffer=squashed)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_double_backward_is_refused() -> None:
    logits, target = problem((6,), 50)
    x = logits.requires_grad_()
    loss = maskops.cross_entropy(x, target, grad_buffer=torch.empty(6, 50))
    (grad,) = torch.autograd.grad(loss * 1, x, create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward in a kernel"):
        grad.sum().backward()


def test_it_is_an_allowance() -> None:
    """Transforms, other backends, a target that needs a gradient and rows that overlap leave it alone."""
    logits, target = problem((6,), 50)
    x, buffer = logits.requires_grad_(), torch.full((6, 50), 7.0)

    def loss(x: Tensor, target: Tensor = target) -> Tensor:
        return maskops.cross_entropy(x, target, grad_buffer=buffer)  # type: ignore[return-value]

    (expected,) = torch.autograd.grad(maskops.cross_entropy(x, target), x)
    assert torch.equal(torch.func.grad(loss)(x.detach()), expected)
    with maskops.use_backend("reference"):
        torch.testing.assert_close(torch.autograd.grad(loss(x), x)[0], expected)
    soft = torch.rand(6, 50).requires_grad_()
    torch.autograd.grad(loss(x, soft), [x, soft])
    assert bool((buffer == 7.0).all())
    shared = x[:1].expand(6, 50)
    torch.autograd.grad(maskops.cross_entropy(shared, target, grad_buffer=shared), x)


@pytest.mark.parametrize(
    ("buffer", "error", "words"),
    [
        (torch.empty(6, 49), ValueError, r"grad_buffer has shape \(6, 49\): expected that of logits"),
        (
            torch.empty(6, 50, dtype=torch.bfloat16),
            TypeError,
            "grad_buffer has dtype bfloat16: expected that of logits",
        ),
        (torch.empty(50, 6).t(), ValueError, "grad_buffer has strides"),
        (torch.empty(6, 50, requires_grad=True), ValueError, "grad_buffer requires a gradient"),
        (torch.empty(6, 50, device="meta"), ValueError, "grad_buffer is on meta"),
        (torch._neg_view(torch.empty(6, 50)), ValueError, "grad_buffer is a view that negates"),
        (torch.inference_mode()(torch.empty)(6, 50), ValueError, "grad_buffer was made in inference mode"),
        ([0.0], TypeError, "grad_buffer: expected a tensor like the logits, or None, got list"),
    ],
)
def test_other_buffers_are_refused(buffer: Any, error: type[Exception], words: str) -> None:
    logits, target = problem((6,), 50)
    with pytest.raises(error, match=words):
        maskops.cross_entropy(logits.requires_grad_(), target, grad_buffer=buffer)


def test_memory_that_overlaps_with_the_logits_is_refused() -> None:
    memory = torch.zeros(7 * 50)
    logits, target = memory[:300].view(6, 50).requires_grad_(), torch.zeros(6, dtype=torch.int64)
    with pytest.raises(ValueError, match="grad_buffer shares a part of its memory with logits"):
        maskops.cross_entropy(logits, target, grad_buffer=memory[50:].view(6, 50))


@pytest.mark.parametrize("factor", [math.inf, math.nan])
@pytest.mark.parametrize("over_logits", [False, True])
def test_skipped_rows_stay_zero_whatever_arrives(factor: float, over_logits: bool) -> None:
    leaf = torch.randn(3, 9, requires_grad=True)
    logits = leaf * 1.0
    buffer = logits if over_logits else torch.empty(3, 9)
    loss = maskops.cross_entropy(logits, torch.tensor([1, IGNORE, 4]), ignore_index=IGNORE, grad_buffer=buffer)
    (gradient,) = torch.autograd.grad(loss * factor, logits)
    assert (gradient[1] == 0.0).all() and not gradient[[0, 2]].isfinite().any()


def test_logits_that_are_no_rows_of_memory_are_left_alone() -> None:
    """A copy is made of columns apart, and what a view negates lies in no memory."""
    values, labels = torch.randn(6, 11), torch.arange(6)
    for logits in (values.mT.contiguous().mT, torch._neg_view(-values)):
        logits = logits.requires_grad_()
        loss = maskops.cross_entropy(logits, labels, grad_buffer=logits)
        plain = values.clone().requires_grad_()
        expected = maskops.cross_entropy(plain, labels)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(
            *(torch.autograd.grad(x, y)[0] for x, y in ((loss, logits), (expected, plain))), rtol=1e-6, atol=1e-7
        )
        assert torch.equal(logits.detach(), values)


def test_memory_that_targets_are_read_from_or_that_splits_elements_is_refused() -> None:
    logits, soft = torch.randn(6, 11, requires_grad=True), torch.rand(6, 11)
    with pytest.raises(ValueError, match="grad_buffer shares memory with target"):
        maskops.cross_entropy(logits, soft, grad_buffer=soft)
    split = torch.frombuffer(bytearray(6 * 11 * 4 + 4), dtype=torch.float32, offset=1, count=6 * 11).reshape(6, 11)
    with pytest.raises(ValueError, match="grad_buffer begins in the middle of an element"):
        maskops.cross_entropy(logits, torch.arange(6), grad_buffer=split)


def test_several_gradients_at_once_share_no_memory() -> None:
    logits, labels = torch.randn(6, 11, requires_grad=True), torch.arange(6)
    loss = maskops.cross_entropy(logits, labels, grad_buffer=torch.empty(6, 11))
    (batched,) = torch.autograd.grad(loss, logits, torch.tensor([1.0, 2.0, -3.0]), is_grads_batched=True)
    (single,) = torch.autograd.grad(maskops.cross_entropy(logits, labels), logits)
    torch.testing.assert_close(batched, torch.stack([single, 2 * single, -3 * single]), rtol=1e-5, atol=1e-7)


def test_losses_do_not_depend_on_the_row_whose_gradient_is_written_meanwhile() -> None:
    """That row's label cuts the loops of the next one; what they add up to is added as without it."""
    logits, target = problem((64,), 9000)
    nothing, ones = torch.empty(0), torch.ones(64)
    for name in extension.instruction_sets():
        with instruction_set(name):
            arguments = (logits, target, nothing, nothing)
            numbers = (False, IGNORE, 0.0, 0.0, 0.0, 1.0)
            plain = torch.ops.maskops.cross_entropy_forward(*arguments, *numbers, False, False)[0]
            both = torch.ops.maskops.cross_entropy_both_into(
                ones, nothing, nothing, nothing, *arguments, torch.empty_like(logits), *numbers, False, False
            )[0]
        assert torch.equal(both, plain)
