"""maskops.linear_cross_entropy inside torch: second derivatives, transforms, autocast, compile, export."""

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.autograd import forward_ad

import maskops
from tests.linear_cross_entropy_oracle import (
    IGNORE,
    Problem,
    ramp,
)
from tests.served import AT_HOME, DEVICE, each_of

pytestmark = pytest.mark.devices

backend = each_of(AT_HOME)


@pytest.mark.processor
def test_double_backward_is_refused(on_cpu: None) -> None:
    problem = Problem()
    for reduction in ("mean", "none"):
        leaves = problem.leaves()
        loss = problem.score(leaves, reduction=reduction).sum()
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        plain = torch.autograd.grad(problem.score(leaves, reduction=reduction).sum(), leaves)
        assert all(torch.equal(a, b) for a, b in zip(grads, plain, strict=True))
        with pytest.raises(RuntimeError, match="linear_cross_entropy has no double backward in a kernel"):
            grads[0].sum().backward()


def test_the_reference_differentiates_twice() -> None:
    problem = Problem((3,), width=4, vocabulary=5, dtype=torch.float64)
    with maskops.use_backend("reference"):

        def scored(*leaves: Tensor) -> Tensor:
            result: Tensor = problem.score(list(leaves), label_smoothing=0.1, softcap=4.0)
            return result

        assert torch.autograd.gradgradcheck(scored, problem.leaves())


@pytest.mark.processor
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # what forward mode loads
def test_transforms(on_cpu: None) -> None:
    problem = Problem()
    leaves = problem.leaves()
    for reduction in ("mean", "none"):

        def total(hidden: Tensor, weight: Tensor, bias: Tensor, reduction: str = reduction) -> Tensor:
            result: Tensor = problem.score([hidden, weight, bias], reduction=reduction).sum()
            return result

        expected = torch.autograd.grad(total(*leaves), leaves)
        actual = torch.func.grad(total, argnums=(0, 1, 2))(*[leaf.detach() for leaf in leaves])
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
        found = torch.func.vmap(lambda hidden, total=total: total(hidden, *leaves[1:]))(leaves[0].expand(2, 3, 5, 16))
        torch.testing.assert_close(found, total(*leaves).expand(2))
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward mode AD"):
            total(forward_ad.make_dual(leaves[0].detach(), leaves[0].detach()), *leaves[1:])


@pytest.mark.processor
def test_autocast_changes_nothing_on_processors(backend: str) -> None:
    problem = Problem()
    for options in ({}, {"reduction": "none"}):
        leaves = problem.leaves()
        plain = problem.score(leaves, **options)
        grads = torch.autograd.grad(plain.sum(), leaves)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            under = problem.score(leaves, **options)
        under_grads = torch.autograd.grad(under.sum(), leaves)
        assert torch.equal(plain, under) and all(torch.equal(a, b) for a, b in zip(grads, under_grads, strict=True))


@pytest.mark.processor
def test_operator(on_cpu: None) -> None:
    problem = Problem((9,))
    nothing, ones = torch.empty(0), torch.ones(9)
    numbers = (IGNORE, 0.1, 0.01, 5.0, 0.7)
    weights = torch.linspace(0.5, 2.0, 33)
    tensors = (problem.hidden, problem.weight.t().contiguous().t(), problem.bias, problem.target, weights)
    operator = torch.ops.maskops.linear_cross_entropy.default
    for incoming, flags in (
        ((nothing, nothing, nothing, nothing), (True, True, True, False, False, False)),
        ((ones, nothing, ones, ones), (True, False, False, True, True, True)),
        ((ones, nothing, nothing, nothing), (False, True, True, True, False, False)),
    ):
        torch.library.opcheck(operator, (*tensors, *incoming, *numbers, *flags))


@pytest.mark.processor
def test_compile(on_cpu: None) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, scale: float) -> tuple[Tensor, ...]:
        mean = maskops.linear_cross_entropy(
            hidden, weight, target, bias=bias, softcap=5.0, logit_scale=scale, shift=True
        )
        rows = maskops.linear_cross_entropy(hidden, weight, target, reduction="none", return_entropy=True)
        assert isinstance(rows, maskops.CrossEntropyOutput) and rows.entropy is not None
        return mean, rows.loss, rows.entropy

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    for rows, scale in ((12, 0.5), (31, 2.0), (7, 1.5)):
        problem = Problem((rows,))
        runs = []
        for function in (step, compiled):
            leaves = problem.leaves()
            outputs = function(*leaves, problem.target, scale)
            total = 3.0 * outputs[0] + outputs[1].sum() + (outputs[2] * ramp(outputs[2], 1.0)).sum()
            runs.append((*outputs, *torch.autograd.grad(total, leaves)))
        for a, b in zip(*runs, strict=True):
            torch.testing.assert_close(a, b)
    assert sum(len(graph.graph.nodes) > 0 for graph in counter.graphs) == 1


def test_export(backend: str) -> None:
    class Layer(torch.nn.Module):
        def forward(self, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
            return maskops.linear_cross_entropy(hidden, weight, target, shift=True)

    problem = Problem((12,))
    rows = torch.export.Dim("rows", min=3)
    exported = torch.export.export(
        Layer(), (problem.hidden, problem.weight, problem.target), dynamic_shapes=({0: rows}, None, {0: rows})
    )
    other = Problem((29,))
    inputs = (other.hidden, other.weight, other.target)
    torch.testing.assert_close(exported.module()(*inputs), Layer()(*inputs))
