"""maskops.masked_softmax inside torch: derivatives, transforms, autocast, compile, export, fake tensors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import maskops
from maskops import masks
from tests.served import AT_HOME, DEVICE, each_of
from tests.softmax_oracle import (
    HOLES,
    coins,
    needs_extension,
    noise,
)

pytestmark = pytest.mark.devices

backend = each_of(AT_HOME)


@pytest.mark.processor
def test_gradcheck_of_the_reference() -> None:
    mask = coins(2, 3, 4)
    mask[0, 1] = False

    def run(x: Tensor) -> Any:
        weights, lse = maskops.masked_softmax(x, mask, return_lse=True, backend="reference")
        return weights, lse.masked_fill(~mask.any(-1), 0.0)

    x = noise(2, 3, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(run, x) and torch.autograd.gradgradcheck(run, x)


@pytest.mark.parametrize("dim", [0, 1])
def test_second_derivative(backend: str, dim: int) -> None:
    mask = coins(4, 9)
    mask[1], mask[:, 2] = False, False

    def second(x: Tensor, where: str) -> Tensor:
        weights, lse = maskops.masked_softmax(x, mask, dim, return_lse=True, backend=where)
        squares = weights.square().sum() + lse.masked_fill(~mask.any(dim), 0.0).square().sum()
        (grad,) = torch.autograd.grad(squares, x, create_graph=True)
        (grad_of_grad,) = torch.autograd.grad(grad.square().sum(), x)
        return grad_of_grad

    actual = second(noise(4, 9).requires_grad_(), backend)
    expected = second(noise(4, 9).double().requires_grad_(), "reference")
    assert expected.abs().max() > 0.1 and torch.allclose(actual.double(), expected, atol=1e-4)


def test_gradient_of_one_result_alone(backend: str) -> None:
    x, mask = noise(3, 7).requires_grad_(), coins(3, 7)
    weights, lse = maskops.masked_softmax(x, mask, return_lse=True)
    (of_lse,) = torch.autograd.grad(lse.sum(), x, retain_graph=True)
    assert torch.allclose(of_lse, weights, atol=1e-6)
    (of_weights,) = torch.autograd.grad(weights[:, 1].sum(), x)
    assert torch.allclose(of_weights.sum(-1), torch.zeros(3), atol=1e-6)


def test_function_transforms(backend: str) -> None:
    x, mask = noise(4, 9), coins(4, 9)

    def loss(x: Tensor, mask: Tensor) -> Tensor:
        return maskops.masked_softmax(x, mask).square().sum()

    expected = torch.autograd.grad(loss(leaf := x.clone().requires_grad_(), mask), leaf)[0]
    assert torch.allclose(torch.func.grad(loss)(x, mask), expected, atol=1e-6)
    # Per-sample gradients, and the gradient of a vmapped function: neither falls back to a loop, which would warn.
    assert torch.allclose(torch.vmap(torch.func.grad(loss))(x, mask), expected, atol=1e-6)
    assert torch.allclose(torch.func.grad(lambda x: torch.vmap(loss)(x, mask).sum())(x), expected, atol=1e-6)


@pytest.mark.parametrize("in_dim", [0, 1, 2])
def test_vmap(backend: str, in_dim: int) -> None:
    x, mask = noise(3, 4, 5, 5), coins(4, 1, 5)
    plan = masks.padding(torch.tensor([5, 2, 0, 4])) & masks.causal()
    for given, dim in ((mask, -1), (mask, 0), (plan, -1), (None, 1)):
        one = torch.stack([maskops.masked_softmax(sample, given, dim) for sample in x])
        vmapped = torch.vmap(lambda x, given=given, dim=dim: maskops.masked_softmax(x, given, dim), in_dim)
        assert torch.equal(vmapped(x.movedim(0, in_dim)), one)
    weights, lse = torch.vmap(lambda m: maskops.masked_softmax(x[0], m, return_lse=True))(coins(3, 4, 5, 5))
    expected = [maskops.masked_softmax(x[0], m, return_lse=True) for m in coins(3, 4, 5, 5)]
    assert torch.equal(weights, torch.stack([pair[0] for pair in expected]))
    assert torch.equal(lse, torch.stack([pair[1] for pair in expected]))


@pytest.mark.processor
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch.func.jvp loads its decompositions
def test_forward_mode_is_refused_by_the_kernel() -> None:
    needs_extension()
    with pytest.raises(NotImplementedError, match=r"forward mode|jvp"):
        torch.func.jvp(lambda x: maskops.masked_softmax(x, None, backend="cpu"), (noise(9),), (noise(9),))


def test_autocast(backend: str) -> None:
    x = noise(3, 9).bfloat16()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert maskops.masked_softmax(x, None).dtype == torch.softmax(x, -1).dtype
        assert maskops.masked_softmax(x.float(), None).dtype == torch.float32


@pytest.fixture
def fresh_compiler() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


@pytest.mark.usefixtures("fresh_compiler")
def test_compile(backend: str) -> None:
    mask = masks.padding(torch.tensor([9, 4])) & masks.causal()

    def step(x: Tensor, visible: Tensor) -> Any:
        one = maskops.masked_softmax(x, visible, 1)
        two, lse = maskops.masked_softmax(x, mask, return_lse=True)
        return one + two, lse[0]

    for x in (noise(2, 9, 9), noise(9, 2, 9).transpose(0, 1)):
        outcomes = []
        for run in (compiled(step), step):
            leaf = x.detach().clone().requires_grad_()
            outputs = run(leaf, coins(2, 1, 9))
            (grad,) = torch.autograd.grad(sum(output.sum() for output in outputs), leaf)
            outcomes.append((*outputs, grad))
        for a, b in zip(*outcomes, strict=True):
            assert a.stride() == b.stride() and torch.allclose(a, b, atol=1e-6)


@pytest.mark.usefixtures("fresh_compiler")
def test_lengths_do_not_recompile(backend: str) -> None:
    def step(x: Tensor, lengths: Tensor) -> Any:
        weights = maskops.masked_softmax(x, masks.padding(lengths))
        return maskops.masked_softmax(weights, torch.arange(x.shape[1]) < lengths[:, None, None])

    run = compiled(step, dynamic=True)
    for length in (7, 20, 33):
        x, lengths = noise(2, length, length).requires_grad_(), torch.tensor([length, 3])
        weights = run(x, lengths)
        assert torch.allclose(weights, step(x, lengths), atol=1e-6)
        weights.sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_export(backend: str) -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, lengths: Tensor) -> Any:
            visible = torch.arange(x.shape[-1]) < lengths[:, None, None]
            return maskops.masked_softmax(x, masks.padding(lengths)), maskops.masked_softmax(x, visible, 1)

    length = torch.export.Dim("length", min=2)
    sizes = {"x": {0: torch.export.Dim("batch"), 1: length, 2: length}, "lengths": {0: torch.export.Dim("batch")}}
    program = torch.export.export(Layer(), (noise(3, 9, 9), torch.tensor([9, 3, 1])), dynamic_shapes=sizes)
    for batch, size in ((3, 9), (4, 20)):
        x, lengths = noise(batch, size, size), torch.arange(batch) + 2
        for a, b in zip(program.module()(x, lengths), Layer()(x, lengths), strict=True):
            assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.processor
def test_opcheck() -> None:
    needs_extension()
    absent = torch.empty(0, dtype=torch.int32)
    plan = (masks.padding(HOLES) & masks.causal()).spans(70, 70, grad=False)
    spans = (plan.start, plan.end, plan.key_valid)
    calls: list[tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor], int]] = [
        (noise(3, 5, 7), absent, (absent,) * 3, 1),
        (noise(5, 3, 7).transpose(0, 1), coins(3, 1, 7).expand(3, 5, 7), (absent,) * 3, 2),
        (noise(2, 3, 70, 70), absent, spans, 3),
        (noise(2, 0, 7), absent, (absent,) * 3, 1),
    ]
    for x, mask, bounds, dim in calls:
        for return_lse in (True, False):
            arguments = (x, mask, *bounds, dim, return_lse)
            torch.library.opcheck(torch.ops.maskops.masked_softmax_forward.default, arguments)
            weights, lse = torch.ops.maskops.masked_softmax_forward(*arguments)
            grad_lse = torch.ones_like(lse) if return_lse else torch.empty(0)
            backward = (noise(*x.shape), grad_lse, weights, *bounds, dim)
            torch.library.opcheck(torch.ops.maskops.masked_softmax_backward.default, backward)


@pytest.mark.processor
def test_fake_and_meta_tensors() -> None:
    x = torch.empty(2, 3, 4, 5, device="meta").transpose(1, 2)
    with maskops.use_backend("reference"):
        weights = maskops.masked_softmax(x, torch.empty(2, 1, 1, 5, dtype=torch.bool, device="meta"))
    assert weights.stride() == torch.softmax(x, -1).stride()
