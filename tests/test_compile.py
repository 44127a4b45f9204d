"""Span attention under torch.compile, fake tensors and opcheck."""

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import maskops
from maskops import backend as choice
from maskops import masks
from maskops.ops.attention import registration
from tests.served import AT_HOME

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(params=AT_HOME)
def backend(request: pytest.FixtureRequest) -> str:
    """A backend that runs here."""
    name = str(request.param)
    if (reason := maskops.backends()[name]) != "available":
        pytest.skip(f"{name}: {reason}")
    return name


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """Forgets what other tests compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compiled without code generation: what can break here is tracing, fakes and autograd, not Inductor."""
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def assert_same(function: Callable[..., Any], inputs: tuple[Tensor, ...], **options: Any) -> None:
    """Outputs, their strides and gradients are the same, compiled and eager."""
    results, strides = [], []
    for run in (compiled(function, **options), function):
        leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
        outputs = run(*leaves)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        # The lse of a row that sees nothing is -inf, which a sum must not meet.
        grads = torch.autograd.grad(sum(x.nan_to_num(neginf=0.0).sum() for x in outputs), wanted)
        results.append([*outputs, *grads])
        strides.append([x.stride() for x in outputs])
    assert strides[0] == strides[1]
    for traced, eager in zip(*results, strict=True):
        assert torch.allclose(traced, eager, atol=1e-6)


def test_first_call_of_a_fresh_process() -> None:
    """Sequences, one tensor in all roles, one tensor for both offsets. The default compiler: test_torch_compile.py."""
    program = """
        import torch
        import maskops
        from maskops import masks

        @torch.compile(fullgraph=True, backend="aot_eager")
        def step(x, offsets):
            return maskops.varlen_attention(x, x, x, offsets, offsets, mask=masks.causal(), return_lse=True)

        x = torch.randn(20, 4, 8, requires_grad=True)
        offsets = torch.tensor([0, 3, 3, 18])
        out, lse = step(x, offsets)
        (grad,) = torch.autograd.grad(out.sum() + lse[:, :18].sum(), x)
        out_, lse_ = maskops.varlen_attention(x, x, x, offsets, mask=masks.causal(), return_lse=True)
        (grad_,) = torch.autograd.grad(out_.sum() + lse_[:, :18].sum(), x)
        assert torch.allclose(out, out_, atol=1e-6) and torch.allclose(grad, grad_, atol=1e-5)
        print("same")
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, cwd=REPOSITORY, timeout=300
    )
    assert result.stdout.strip() == "same", result.stderr


def test_masks(backend: str) -> None:
    def step(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Any:
        mask = masks.padding(lengths) & (masks.causal() & (masks.sliding_window(5, 0) | masks.prefix(2)))
        return maskops.attention(q, k, v, mask, softcap=3.0, return_lse=True, backend=backend)

    q = torch.randn(2, 17, 4, 8).transpose(1, 2).requires_grad_()
    k, v = (torch.randn(2, 2, 17, 8, requires_grad=True) for _ in range(2))
    assert_same(step, (q, k, v, torch.tensor([17, 6])))


def test_aliases(backend: str) -> None:
    """One tensor in two roles or in three, and for both offsets."""
    x = torch.randn(1, 2, 9, 4, requires_grad=True)
    y = torch.randn(1, 2, 9, 4, requires_grad=True)
    offsets = torch.tensor([0, 4, 9])

    def step(x: Tensor, y: Tensor, offsets: Tensor) -> Any:
        roles = ((x, x, x), (x, y, y), (x, y, x), (x, x, y))
        row = x[0].transpose(0, 1)
        packed = maskops.varlen_attention(row, row, row, offsets, offsets, backend=backend)
        return (*(maskops.attention(q, k, v, masks.causal(), backend=backend) for q, k, v in roles), packed)

    assert_same(step, (x, y, offsets))


def test_plan_as_an_input(backend: str) -> None:
    plan = (masks.documents(cu_seqlens=torch.tensor([0, 4, 9])) & masks.causal()).spans(9, 9)

    def step(x: Tensor) -> Any:
        return maskops.attention(x, x, x, plan, backend=backend)

    assert_same(step, (torch.randn(1, 2, 9, 4, requires_grad=True),))


def test_lengths_do_not_recompile(backend: str) -> None:
    def step(x: Tensor, offsets: Tensor) -> Any:
        return maskops.varlen_attention(x, x, x, offsets, mask=masks.causal(), backend=backend)

    run = compiled(step, dynamic=True)
    for total in (20, 57, 300):
        x = torch.randn(total, 2, 8, requires_grad=True)
        offsets = torch.tensor([0, total // 3, total // 2, total - 1])
        out = run(x, offsets)
        assert torch.allclose(out, step(x, offsets), atol=1e-6)
        out.sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_features(backend: str) -> None:
    def step(x: Tensor, bias: Tensor, slopes: Tensor, sinks: Tensor) -> Any:
        return maskops.attention(
            x, x, x, masks.causal(), bias=bias, alibi_slopes=slopes, sinks=sinks, return_lse=True, backend=backend
        )

    sizes = ((2, 2, 9, 4), (1, 2, 9, 9), (2,), (2,))
    assert_same(step, tuple(torch.randn(size, requires_grad=True) for size in sizes))


def test_one_tensor_in_several_features(backend: str) -> None:
    def step(x: Tensor, y: Tensor) -> Any:
        return maskops.attention(x, x, x, masks.causal(), bias=x, alibi_slopes=y, sinks=y, backend=backend)

    assert_same(step, (torch.randn(2, 3, 4, 4, requires_grad=True), torch.rand(3, requires_grad=True)))


def test_dense_masks(backend: str) -> None:
    def step(x: Tensor, allowed: Tensor) -> Any:
        return maskops.attention(x, x, x, masks.dense(allowed) & masks.causal(), return_lse=True, backend=backend)

    assert_same(step, (torch.randn(2, 2, 9, 4, requires_grad=True), torch.rand(2, 1, 9, 9) < 0.5))


def test_dropout(backend: str) -> None:
    def step(x: Tensor) -> Any:
        return maskops.attention(x, x, x, dropout_p=0.5, backend=backend)

    x = torch.zeros(1, 2, 40, 40)
    weights = compiled(step)(x.index_fill(3, torch.tensor([0]), 1.0))
    assert weights[..., 1:].eq(0).all() and 0.5 < float(weights[..., 0].mean()) < 1.5


def test_backend_is_chosen_while_tracing() -> None:
    def step(x: Tensor) -> Any:
        return maskops.attention(x, x, x, masks.causal())

    x = torch.randn(1, 2, 9, 4)
    with maskops.use_backend("reference"):
        run = compiled(step)
        inside = run(x)
    assert torch.equal(inside, maskops.attention(x, x, x, masks.causal(), backend="reference"))
    # The choice was compiled in.
    assert torch.equal(run(x), inside)


def test_fallback_warns_while_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_warned", set())

    def step(x: Tensor) -> Any:
        return maskops.attention(x, x, x)

    with pytest.warns(maskops.BackendFallbackWarning, match="float64"):
        compiled(step)(torch.randn(1, 2, 9, 4, dtype=torch.float64))


def operator_inputs() -> dict[str, tuple[Any, ...]]:
    """Arguments of the forward op: contiguous, transposed, packed, grouped, expanded, empty, with features."""

    def arguments(q: Tensor, k: Tensor, v: Tensor, mask: masks.Mask, **features: Any) -> tuple[Any, ...]:
        plan = mask.spans(q.shape[2], k.shape[2], batch=q.shape[0], grad=False, positions="seed" in features)
        used = registration.Features(**{"softmax_scale": 0.5, "softcap": 2.0, **features})
        return (q, k, v, *registration.filled(registration.operator_arguments(plan, used, "cpu"), q))

    packed = torch.randn(12, 4, 8).transpose(0, 1)[None]
    rows = torch.randn(2, 9, 4, 8).transpose(1, 2)
    grouped = torch.randn(2, 2, 9, 8)
    return {
        "contiguous": arguments(*(torch.randn(2, 4, 9, 8) for _ in range(3)), masks.causal()),
        "transposed": arguments(rows, rows.clone(), rows.clone(), masks.padding(torch.tensor([9, 2]))),
        "packed": arguments(
            packed, packed.clone(), packed.clone(), masks.documents(cu_seqlens=torch.tensor([0, 5, 11]))
        ),
        "grouped": arguments(rows, grouped, torch.randn(2, 2, 9, 3), masks.full()),
        "expanded": arguments(torch.randn(2, 1, 9, 8).expand(2, 4, 9, 8), grouped, grouped.clone(), masks.full()),
        "empty": arguments(torch.randn(2, 4, 0, 8), torch.randn(2, 4, 0, 8), torch.randn(2, 4, 0, 8), masks.full()),
        "features": arguments(
            rows,
            grouped,
            torch.randn(2, 2, 9, 3),
            masks.dense(torch.rand(1, 4, 9, 9) < 0.5),
            bias=torch.randn(9, 9, 4).permute(2, 0, 1)[None].bfloat16(),
            alibi_slopes=torch.rand(2, 4),
            sinks=torch.randn(1, 4),
            seed=torch.tensor(5),
            dropout_p=0.4,
        ),
    }


@pytest.mark.parametrize("layout", operator_inputs())
def test_opcheck(layout: str) -> None:
    reason = maskops.backends()["cpu"]
    if reason != "available":
        pytest.skip(f"cpu: {reason}")
    arguments = operator_inputs()[layout]
    torch.library.opcheck(torch.ops.maskops.attention_forward.default, arguments)
    out, lse = torch.ops.maskops.attention_forward(*arguments)
    wanted = (layout == "features",) * 3
    # The slow check, of compiled code with open sizes, once for both: they differ in the kernel alone.
    quick = ("test_schema", "test_autograd_registration", "test_faketensor")
    for grad_lse, options in ((torch.randn(lse.shape), {}), (torch.empty(0), {"test_utils": quick})):
        backward = (torch.randn_like(out), grad_lse, *arguments[:3], out, lse, *arguments[3:], *wanted)
        torch.library.opcheck(torch.ops.maskops.attention_backward.default, backward, **options)


def test_export(backend: str) -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, lengths: Tensor) -> Any:
            return maskops.attention(x, x, x, masks.padding(lengths) & masks.causal(), backend=backend)

    x, lengths = torch.randn(2, 2, 9, 4), torch.tensor([9, 3])
    program = torch.export.export(Layer(), (x, lengths))
    assert torch.allclose(program.module()(x, lengths), Layer()(x, lengths), atol=1e-6)


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_open_dimensions(backend: str, strict: bool) -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, offsets: Tensor) -> Any:
            return maskops.varlen_attention(x, x, x, offsets, mask=masks.causal(), backend=backend)

    x, offsets = torch.randn(20, 2, 8), torch.tensor([0, 5, 20])
    sizes = {"x": {0: torch.export.Dim("total")}, "offsets": {0: torch.export.Dim("one_more_than_sequences")}}
    module = torch.export.export(Layer(), (x, offsets), dynamic_shapes=sizes, strict=strict).module()
    for total, cuts in ((20, [0, 5, 20]), (33, [0, 3, 3, 9, 30]), (7, [0, 7])):
        x, offsets = torch.randn(total, 2, 8), torch.tensor(cuts)
        assert torch.allclose(module(x, offsets), Layer()(x, offsets), atol=1e-6)


def test_numbers_of_every_kind() -> None:
    def step(x: Tensor, scale: float, softcap: float) -> Any:
        return maskops.attention(x, x, x, softmax_scale=scale, softcap=softcap, dropout_p=0)

    x = torch.randn(1, 2, 9, 4)
    run = compiled(step)
    for scale, softcap in ((1, 2), (0.5, 2.0), (0.25, 3.0)):
        assert torch.allclose(run(x, scale, softcap), step(x, scale, softcap), atol=1e-6)
