"""Gradients of maskops.cross_entropy beside their values: twice, in place, refused, compiled, registered."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import maskops
from tests.cross_entropy_oracle import (
    BACKENDS,
    DTYPES,
    IGNORE,
    MASK,
    RETURNS,
    WEIGHTS,
    needs_extension,
    problem,
)
from tests.served import each_of

pytestmark = pytest.mark.devices

backend = each_of(BACKENDS)


def test_float64() -> None:
    with maskops.use_backend("reference"):
        logits, target = problem((4, 3), 11, torch.float64)
        logits.requires_grad_()
        loss = maskops.cross_entropy(logits, target)
        assert loss.dtype == torch.float64
        torch.testing.assert_close(loss, F.cross_entropy(logits.reshape(-1, 11), target.reshape(-1)))

        def scored(x: Tensor) -> tuple[Tensor, ...]:
            options = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 4.0, "return_lse": True}
            return tuple(maskops.cross_entropy(x, target, **options, return_entropy=True, return_logprobs=True)[:4])

        assert torch.autograd.gradcheck(scored, (logits,))
        assert torch.autograd.gradgradcheck(lambda x: scored(x)[0], (logits,))


def test_backward_twice(backend: str) -> None:
    logits, target = problem((6,), 50)
    logits.requires_grad_()
    loss = maskops.cross_entropy(logits, target, label_smoothing=0.1)
    first = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    second = torch.autograd.grad(loss, logits)[0]
    assert torch.equal(first, second)


@pytest.mark.processor
def test_large_gradients_stream_past_the_caches() -> None:
    """Above 32 MiB other stores are used: aligned ones, with ragged ends, whatever the alignment of a row."""
    needs_extension()
    for dtype, rows, vocabulary in ((torch.float32, 85, 100_003), (torch.bfloat16, 170, 100_003)):
        logits, target = problem((rows,), vocabulary, dtype)
        target[:4] = torch.tensor([0, vocabulary - 1, 5, IGNORE])
        some = [0, 1, 2, 3, 4, 5, 6, 7, rows - 1]
        with maskops.use_backend("cpu", fallback="error"):
            x = logits.requires_grad_()
            (whole,) = torch.autograd.grad(maskops.cross_entropy(x, target, reduction="sum"), x)
            y = logits.detach()[some].requires_grad_()
            (part,) = torch.autograd.grad(maskops.cross_entropy(y, target[some], reduction="sum"), y)
        assert torch.equal(whole[some], part)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inplace_backward(backend: str, dtype: torch.dtype) -> None:
    weight, target = problem((6,), 50, dtype)
    weight.requires_grad_()
    expected = torch.autograd.grad(maskops.cross_entropy(weight * 2, target), weight)[0]
    logits = weight * 2
    address = logits.data_ptr()
    held: list[Tensor] = []
    logits.register_hook(held.append)
    before = logits.detach().clone()
    loss = maskops.cross_entropy(logits, target, inplace_backward=True)
    assert torch.equal(logits.detach(), before)
    assert torch.equal(torch.autograd.grad(loss, weight, retain_graph=True)[0], expected)
    if backend != "reference":
        assert held[0].data_ptr() == address
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, weight)
    else:
        assert torch.equal(logits.detach(), before)


def test_inplace_backward_of_rows_that_share_memory(backend: str) -> None:
    row, _ = problem((1,), 30)
    row.requires_grad_()
    target = torch.tensor([1, 2, 3])
    loss = maskops.cross_entropy(row.expand(3, 30), target, inplace_backward=True)
    expected = torch.autograd.grad(F.cross_entropy(row.expand(3, 30), target), row, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, row)[0], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.processor
def test_another_op_that_saved_the_logits_notices_an_inplace_backward() -> None:
    needs_extension()
    logits, target = problem((6,), 50)
    logits = (logits.requires_grad_() * 1).sigmoid()  # sigmoid saves its result
    with maskops.use_backend("cpu", fallback="error"):
        loss = maskops.cross_entropy(logits, target, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.processor
def test_double_backward_is_refused() -> None:
    needs_extension()
    logits, target = problem((6,), 50)
    logits.requires_grad_()
    with maskops.use_backend("cpu", fallback="error"):
        (grad,) = torch.autograd.grad(maskops.cross_entropy(logits, target), logits, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no double backward in a kernel.*use_backend\('reference'\)"):
        grad.sum().backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch.func.jvp loads its decompositions
def test_functional_gradients(backend: str) -> None:
    logits, target = problem((6,), 50)
    expected = torch.autograd.grad(maskops.cross_entropy(logits.requires_grad_(), target), logits)[0]
    logits = logits.detach()
    assert torch.equal(torch.func.grad(maskops.cross_entropy)(logits, target), expected)
    if backend != "reference":  # never a tangent of 0 that nobody computed
        with pytest.raises(NotImplementedError, match="forward mode AD"):
            torch.func.jvp(lambda x: maskops.cross_entropy(x, target), (logits,), (logits,))
    else:
        _, tangent = torch.func.jvp(lambda x: maskops.cross_entropy(x, target), (logits,), (logits,))
        torch.testing.assert_close(tangent, (expected * logits).sum(), rtol=1e-4, atol=1e-5)


def test_no_gradient_asked(backend: str) -> None:
    logits, target = problem((6,), 50)
    assert not maskops.cross_entropy(logits, target).requires_grad
    with torch.no_grad():
        assert not maskops.cross_entropy(logits.requires_grad_(), target).requires_grad
    outputs = maskops.cross_entropy(logits, target, return_argmax=True)
    assert isinstance(outputs, maskops.CrossEntropyOutput)
    assert outputs.loss.requires_grad and outputs.argmax is not None and not outputs.argmax.requires_grad


COMPILED = {
    "plain": {},
    "padded": {"shift": True, "label_smoothing": 0.1, "token_weights": WEIGHTS, "reduction": "sequence_mean"},
    "packed": {"cu_seqlens": torch.tensor([0, 5, 5, 12]), "shift": True, "reduction": "sequence_mean", "mask": MASK},
    "outputs": {**RETURNS, "num_items": torch.tensor(4), "softcap": 5.0},
    "in place": {"inplace_backward": True},
}


# What is compiled of the reference are operations of torch alone.
@pytest.mark.parametrize(
    "backend, options",
    [
        *(
            pytest.param(name, options, id=f"{name}-{key}")
            for name in BACKENDS
            if name != "reference"
            for key, options in COMPILED.items()
        ),
        pytest.param("reference", COMPILED["outputs"], id="reference-outputs"),
    ],
    indirect=["backend"],
)
def test_compiles_as_one_graph(backend: str, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    logits, target = problem((3, 5), 30)
    logits.requires_grad_()

    def scored(x: Tensor) -> Tensor:
        outputs = maskops.cross_entropy(x * 1.0, target, **options)
        return outputs if isinstance(outputs, Tensor) else outputs.loss + outputs.entropy.sum() + outputs.lse.sum()

    compiled = torch.compile(scored, fullgraph=True, backend="aot_eager")
    results = [(loss := fn(logits), *torch.autograd.grad(loss, logits)) for fn in (scored, compiled)]
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(eager, other, rtol=1e-6, atol=1e-6)


@pytest.mark.processor
def test_compiles_with_dynamic_shapes() -> None:
    """Without code generation: Inductor compiles this loss in test_torch_compile.py."""
    needs_extension()
    torch._dynamo.reset()

    def scored(x: Tensor, target: Tensor) -> Tensor:
        return maskops.cross_entropy(x, target, shift=True)

    compiled = torch.compile(scored, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (4, 7):
        logits, target = problem((2, rows), 30)
        logits.requires_grad_()
        results = [(loss := fn(logits, target), *torch.autograd.grad(loss, logits)) for fn in (scored, compiled)]
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(eager, other, rtol=1e-5, atol=1e-6)


def test_needs_no_value_of_a_tensor(backend: str) -> None:
    """Under fake tensors a look at a value would raise; so would a wait for a device."""
    with torch._subclasses.FakeTensorMode():
        logits = torch.empty(3, 5, 30, requires_grad=True)
        target = torch.empty(3, 5, dtype=torch.int64)
        soft = torch.empty(3, 5, 30, requires_grad=True)
        for scored, inputs in ((target, [logits]), (soft, [logits, soft])):
            outputs = maskops.cross_entropy(
                logits,
                scored,
                mask=target > 0,
                token_weights=torch.empty(3, 5),
                class_weights=torch.empty(30),
                cu_seqlens=torch.empty(4, dtype=torch.int32),
                num_items=torch.empty((), dtype=torch.int64),
                shift=True,
                label_smoothing=0.1,
                **RETURNS,
            )
            grads = torch.autograd.grad(outputs.loss + outputs.entropy.sum(), inputs)
            assert outputs.lse.shape == (3, 5) and all(grad.shape == (3, 5, 30) for grad in grads)


@pytest.mark.processor
@pytest.mark.parametrize("extras", [False, True])
def test_operators_are_registered_properly(extras: bool) -> None:
    needs_extension()
    logits, target = problem((6,), 30)
    numbers = (IGNORE, 0.1 if extras else 0.0, 0.01, 5.0 if extras else 0.0, 1.0)
    ops, nothing = torch.ops.maskops, torch.empty(0)
    arguments = (logits, target, nothing, nothing, False, *numbers, extras, extras)
    torch.library.opcheck(ops.cross_entropy_forward.default, arguments)
    loss, lse, logprobs, entropy, _, statistics = ops.cross_entropy_forward(*arguments)
    grads = (torch.ones_like(loss), nothing, nothing, torch.ones_like(loss) if extras else nothing)
    saved = (target, nothing, nothing, lse, logprobs, entropy, statistics, False)
    torch.library.opcheck(ops.cross_entropy_backward.default, (*grads, logits, *saved, False, *numbers))
    torch.library.opcheck(ops.cross_entropy_backward_.default, (*grads, logits.clone(), *saved, *numbers))
