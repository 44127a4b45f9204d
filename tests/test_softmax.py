"""maskops.masked_softmax against its definition in float64, on every backend."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import maskops
from maskops import extension, masks
from maskops.spans import build_row_spans
from maskops.testing import error_budget
from tests.served import AT_HOME, DEVICE

pytestmark = pytest.mark.devices

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INF, NAN = math.inf, math.nan


@pytest.fixture(params=AT_HOME)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    name = request.param
    if (reason := maskops.backends()[name]) != "available":
        pytest.skip(f"{name}: {reason}")
    with maskops.use_backend(name, fallback="error" if name != "reference" else "warn"):
        yield name


def needs_extension() -> None:
    if (reason := maskops.backends()["cpu"]) != "available":
        pytest.skip(f"cpu: {reason}")


def definition(x: Tensor, allowed: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Weights and lse in x's dtype, softmax by softmax; shares no code with the package."""
    rows, visible = x.movedim(dim, -1), allowed.expand(x.shape).movedim(dim, -1)
    weights, lse = torch.zeros_like(rows), rows.new_full(rows.shape[:-1], -INF)
    for index in itertools.product(*map(range, rows.shape[:-1])):
        values = rows[index][visible[index]]
        if values.numel() and values.max() > -INF:
            shifted = torch.exp(values - values.max())
            weights[index][visible[index]] = shifted / shifted.sum()
            lse[index] = values.max() + torch.log(shifted.sum())
    return weights.movedim(-1, dim), lse


def wide_softmax(x: Tensor, allowed: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The same of finite scores by torch, in float64: quicker than softmax by softmax."""
    scores = x.double().masked_fill(~allowed, -INF)
    return torch.softmax(scores, dim).nan_to_num(0.0), scores.logsumexp(dim)


def gradient_of(weights: Tensor, grad_weights: Tensor, grad_lse: Tensor, dim: int) -> Tensor:
    inner = (weights * grad_weights).sum(dim, keepdim=True)
    return weights * (grad_weights - inner + grad_lse.unsqueeze(dim))


def noise(*sizes: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


def coins(*sizes: int, seed: int = 0, share: float = 0.6) -> Tensor:
    return torch.rand(sizes, generator=torch.Generator().manual_seed(seed)) < share


def check(x: Tensor, mask: Any, allowed: Tensor, dim: int = -1) -> None:
    """Weights, lse and the gradient of both, within the error budget. ``allowed``: what the mask means."""
    dim %= x.dim()
    x = x.detach()
    leaf = x.requires_grad_()
    weights, lse = maskops.masked_softmax(leaf, mask, dim, return_lse=True)
    assert weights.shape == x.shape and weights.dtype == x.dtype and weights.is_contiguous()
    assert lse.shape == (*x.shape[:dim], *x.shape[dim + 1 :])
    assert lse.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    allowed = allowed.expand(x.shape)
    oracle_weights, oracle_lse = wide_softmax(x.detach(), allowed, dim)
    plain_x = x.detach().masked_fill(~allowed, -INF)
    plain = torch.softmax(plain_x, dim).nan_to_num(0.0)
    budget = error_budget(weights.detach(), plain, oracle_weights, x.dtype)
    assert budget.passed, ("weights", budget)
    assert not weights.detach()[~allowed].any()
    budget = error_budget(lse.detach(), plain_x.float().logsumexp(dim), oracle_lse, torch.float32)
    assert budget.passed, ("lse", budget)

    grad_weights = noise(*x.shape, seed=1, scale=1.0).to(x.dtype)
    grad_lse = noise(*lse.shape, seed=2, scale=1.0).to(lse.dtype)
    (grad,) = torch.autograd.grad((weights, lse), leaf, (grad_weights, grad_lse))
    assert grad.shape == x.shape and grad.dtype == x.dtype
    oracle = gradient_of(oracle_weights, grad_weights.double(), grad_lse.double(), dim)
    plain_grad = gradient_of(plain.float(), grad_weights.float(), grad_lse.float(), dim).to(x.dtype)
    magnitude = max(float(grad_weights.abs().max()), float(grad_lse.abs().max())) if x.numel() else None
    budget = error_budget(grad, plain_grad, oracle, x.dtype, magnitude)
    assert budget.passed, ("gradient", budget)
    assert not grad[~allowed].any()


# ---- bool masks -----------------------------------------------------------------------------------------------------

# Ragged and whole groups of every instruction set, along the softmax and across it.
SHAPES = ((1,), (5,), (64,), (3, 7), (2, 33), (2, 3, 17), (2, 130, 3), (3, 5, 70), (2, 1, 9, 1), (2, 2, 3, 2, 5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_dimension(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for dim in range(len(shape)):
        check(noise(*shape, seed=dim).to(dtype), (mask := coins(*shape, seed=dim)), mask, dim)
        check(noise(*shape, seed=dim).to(dtype), None, torch.tensor(True), dim - len(shape))


def test_every_broadcast_of_small_shapes(backend: str) -> None:
    count = 0
    for n_dims in (0, 1, 2, 3):
        for shape in itertools.product((1, 3), repeat=n_dims):
            for taken in range(n_dims + 1):
                for sizes in itertools.product((1, 2, 3), repeat=taken):
                    mask, x = coins(*sizes, seed=count), noise(*shape, seed=count)
                    try:
                        allowed = mask.expand(shape)
                    except RuntimeError:
                        with pytest.raises(ValueError, match="must broadcast to x without enlarging it"):
                            maskops.masked_softmax(x, mask)
                        continue
                    for dim in range(max(n_dims, 1)):
                        weights, lse = maskops.masked_softmax(x, mask, dim, return_lse=True)
                        at_least_1d = x.reshape(shape or (1,)).double()
                        oracle, oracle_lse = definition(at_least_1d, allowed.reshape(at_least_1d.shape), dim)
                        assert torch.allclose(weights.double(), oracle.reshape(shape), atol=1e-6)
                        assert torch.allclose(lse.double(), oracle_lse, atol=1e-5)
                        count += 1
    assert count > 150


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64], ids=str)
def test_integers_count_as_bool(backend: str, dtype: torch.dtype) -> None:
    mask = coins(2, 1, 1, 9)
    check(noise(2, 3, 4, 9), mask.to(dtype), mask)


def strided(kind: str) -> tuple[Tensor, Tensor]:
    """x (4, 6, 40) and a mask of its sizes, with strides of a kind."""
    x, mask = noise(4, 6, 40), coins(4, 6, 40)
    if kind == "transposed":
        return noise(40, 6, 4).permute(2, 1, 0), mask
    if kind == "outer dimensions swapped":
        return noise(6, 4, 40).transpose(0, 1), mask
    if kind == "every second element":
        return noise(4, 6, 80)[:, :, ::2], mask
    if kind == "rows with a gap":
        return noise(4, 6, 50)[:, :, 3:43], coins(4, 7, 41)[:, 1:, :40]
    if kind == "expanded":
        return noise(4, 1, 40).expand(4, 6, 40), mask
    if kind == "expanded along the row":
        return noise(4, 6, 1).expand(4, 6, 40), mask
    if kind == "mask transposed":
        return x, coins(40, 6, 4).permute(2, 1, 0)
    if kind == "mask with gaps":
        return x, coins(8, 12, 120)[::2, ::2, ::3]
    if kind == "mask expanded over rows":
        return x, coins(4, 1, 40).expand(4, 6, 40)
    if kind == "mask expanded along rows":
        return x, coins(4, 6, 1).expand(4, 6, 40)
    return x, coins(40).expand(4, 6, 40)


@pytest.mark.parametrize(
    "kind",
    [
        "transposed",
        "outer dimensions swapped",
        "every second element",
        "rows with a gap",
        "expanded",
        "expanded along the row",
        "mask transposed",
        "mask with gaps",
        "mask expanded over rows",
        "mask expanded along rows",
        "mask of one row",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides(backend: str, kind: str, dtype: torch.dtype) -> None:
    x, mask = strided(kind)
    if dtype != x.dtype:
        x = torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(x) if "expanded" not in kind else x.to(dtype)
    for dim in range(3):
        check(x, mask, mask, dim)


@pytest.mark.processor
def test_strides_of_the_operator() -> None:
    """The kernel walks any strides; the public function copies some of them first, for speed."""
    needs_extension()
    absent = torch.empty(0, dtype=torch.int32)
    x, mask = noise(40, 6, 4).permute(2, 1, 0), coins(80, 6, 4)[::2].permute(2, 1, 0)
    for dim in range(3):
        weights, lse = torch.ops.maskops.masked_softmax_forward(x, mask, absent, absent, absent, dim, True)
        oracle, oracle_lse = definition(x.double(), mask, dim)
        assert torch.allclose(weights.double(), oracle, atol=1e-6) and torch.allclose(lse.double(), oracle_lse)
        grad_weights = noise(40, 12, 4, seed=3)[:, ::2].permute(2, 1, 0)
        grad = torch.ops.maskops.masked_softmax_backward(
            grad_weights, torch.empty(0), weights, absent, absent, absent, dim
        )
        expected = gradient_of(oracle, grad_weights.double(), torch.zeros_like(oracle_lse), dim)
        assert torch.allclose(grad.double(), expected, atol=1e-6)


class Largest(TorchDispatchMode):
    """The largest bool tensor that any operation made, in bytes of its storage."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.bool:
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.processor
def test_broadcast_mask_is_not_materialised() -> None:
    needs_extension()
    x, mask = noise(4, 3, 20, 30).requires_grad_(), coins(4, 1, 1, 30)
    for given in (mask, mask.to(torch.uint8), mask.expand(4, 3, 20, 30)):
        with Largest() as largest:
            maskops.masked_softmax(x, given, backend="cpu").sum().backward()
        assert 0 < largest.nbytes <= mask.numel()


# ---- masks of queries and keys --------------------------------------------------------------------------------------

LENGTHS = torch.tensor([70, 33])
HOLES = coins(2, 70, share=0.8)
MASKS: dict[str, masks.Mask] = {
    "full": masks.full(),
    "causal": masks.causal(),
    "padding and causal": masks.padding(LENGTHS) & masks.causal(),
    "padding on the left": masks.padding(LENGTHS, side="left"),
    "padding with holes": masks.padding(HOLES) & masks.causal(),
    "keys with holes": masks.key_padding(HOLES),
    "no keys": masks.key_padding(torch.tensor([70, 0])),
    "first tokens and window": masks.causal() & (masks.sliding_window(5, 0) | masks.prefix(4)) & masks.padding(HOLES),
    "documents": masks.documents(torch.tensor([0] * 20 + [-1] * 3 + [1] * 47)) & masks.causal(),
    "dense": masks.dense(coins(2, 3, 70, 70)),
    "dense and padding": masks.dense(coins(1, 1, 70, 70)) & masks.padding(LENGTHS),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(backend: str, name: str) -> None:
    mask = MASKS[name]
    x, allowed = noise(2, 3, 70, 70), mask.to_dense(70, 70, batch=2)
    check(x, mask, allowed)
    check(x.bfloat16(), mask.spans(70, 70), allowed)
    for dim in (0, 1, 2):
        check(x, mask, allowed, dim)


def test_shapes_of_scores(backend: str) -> None:
    mask = masks.padding(torch.tensor([6, 4])) & masks.causal()
    allowed = mask.to_dense(6, 6)
    check(noise(2, 6, 6), mask, allowed[:, 0])
    check(noise(2, 3, 4, 6, 6), mask, allowed[:, :, None])
    check(noise(6, 6), masks.causal(), masks.causal().to_dense(6, 6)[0, 0])
    check(noise(3, 2, 6), masks.causal(), masks.causal().to_dense(2, 6)[0])
    dense = masks.dense(coins(2, 3, 6, 6))
    check(noise(2, 3, 4, 6, 6), dense, dense.to_dense(6, 6)[:, :, None])
    packed = masks.documents(cu_seqlens=torch.tensor([0, 2, 5]))
    check(noise(3, 6, 6), packed, packed.to_dense(6, 6)[0])
    check(noise(1, 3, 6, 6), packed, packed.to_dense(6, 6))
    # Rows whose elements are apart in memory.
    check(noise(2, 6, 12)[..., ::2], mask, allowed[:, 0])
    check(noise(6, 2, 6).permute(1, 2, 0), mask, allowed[:, 0])


def test_empty_tensors(backend: str) -> None:
    for shape in ((0,), (0, 3), (3, 0), (2, 0, 3)):
        for dim in range(len(shape)):
            x = torch.empty(shape, requires_grad=True)
            weights, lse = maskops.masked_softmax(x, torch.tensor(True), dim, return_lse=True)
            assert weights.shape == shape and weights.is_contiguous()
            assert lse.tolist() == torch.logsumexp(x, dim).tolist()
            weights.sum().backward()
            assert x.grad is not None and x.grad.shape == shape
    weights = maskops.masked_softmax(torch.empty(2, 3, 0, 5), masks.causal())
    assert weights.shape == (2, 3, 0, 5)
    assert maskops.masked_softmax(torch.tensor(3.0), None).tolist() == 1.0


@pytest.mark.processor
def test_hostile_spans_stay_inside() -> None:
    """Spans that a user made by hand: crossing, out of range, far apart. No access leaves the rows."""
    needs_extension()
    generator = torch.Generator().manual_seed(0)
    plan = masks.full().spans(40, 70)
    x = noise(2, 40, 70)
    for _ in range(20):
        start, end = (torch.randint(-100, 200, (3, 1, 40), dtype=torch.int32, generator=generator) for _ in range(2))
        start[0, 0, 0], end[0, 0, 0] = -(2**31), 2**31 - 1
        weights = maskops.masked_softmax(x, plan._replace(start=start, end=end), backend="cpu")
        total = weights.sum(-1)
        assert ((total - 1).abs() < 1e-5).logical_or(total == 0).all()
        assert (total[:, 0] > 0).all()


# ---- what masked and special values do ------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_masked_values_reach_nothing(backend: str, dim: int, poison: float) -> None:
    mask = coins(5, 9, 70)
    mask[1], mask[:, 2], mask[:, :, 3] = False, False, False
    x, grad_weights = noise(5, 9, 70), noise(5, 9, 70, seed=1)
    clean, dirty = x.clone().requires_grad_(), x.masked_fill(~mask, poison).requires_grad_()
    expected = maskops.masked_softmax(clean, mask, dim, return_lse=True)
    actual = maskops.masked_softmax(dirty, mask, dim, return_lse=True)
    nothing = ~mask.any(dim)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
    assert (actual[1][nothing] == -INF).all()
    grad_lse = noise(*nothing.shape, seed=2)
    (grad,) = torch.autograd.grad(expected, clean, (grad_weights, grad_lse))
    poisoned = (grad_weights.masked_fill(~mask, poison), grad_lse.masked_fill(nothing, poison))
    (dirty_grad,) = torch.autograd.grad(actual, dirty, poisoned)
    assert torch.equal(grad, dirty_grad) and not grad[~mask].any()


def test_masked_values_under_spans(backend: str) -> None:
    mask = masks.padding(HOLES) & masks.causal()
    allowed = mask.to_dense(70, 70)[:, 0]
    x = noise(2, 70, 70).masked_fill(~allowed, NAN).requires_grad_()
    weights = maskops.masked_softmax(x, mask)
    assert torch.equal(weights != 0, allowed)
    (grad,) = torch.autograd.grad(weights, x, noise(2, 70, 70, seed=1).masked_fill(~allowed, NAN))
    assert grad.isfinite().all() and not grad[~allowed].any()


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("length", [5, 70, 40000])
def test_infinite_and_nan_scores(backend: str, length: int, dim: int) -> None:
    rows = noise(6, length)
    rows[0] = -INF  # like nothing visible
    rows[1, 1:] = -INF
    rows[2, 3] = INF
    rows[3, 3] = NAN
    rows[4, 2], rows[4, 4] = INF, NAN
    mask = torch.ones(6, length, dtype=torch.bool)
    mask[:, 1] = False
    mask[5], rows[5, 0] = False, NAN
    x, mask = (rows, mask) if dim == 1 else (rows.T.contiguous(), mask.T)
    x.requires_grad_()
    weights, lse = maskops.masked_softmax(x, mask, dim, return_lse=True)
    (grad,) = torch.autograd.grad(weights, x, torch.ones_like(weights))
    weights, grad, mask = (t if dim == 1 else t.T for t in (weights.detach(), grad, mask))
    assert not weights[~mask].any() and not grad[~mask].any()
    assert not weights[[0, 5]].any() and not grad[[0, 5]].any()
    assert weights[1, 0] == 1 and not weights[1, 1:].any()
    torch_weights = torch.softmax(rows[2:5, mask[2]], -1)
    assert torch_weights.isnan().all() and weights[2:5, mask[2]].isnan().all()
    assert torch.equal(
        lse.detach().nan_to_num(7.0, neginf=-9.0, posinf=9.0)[[0, 2, 3, 4, 5]], torch.tensor([-9.0, 9, 7, 7, -9])
    )


def test_range_of_scores(backend: str) -> None:
    x = torch.tensor([[-3.3e38, 3.3e38, 0.0], [-3e38, -3e38, -3e38], [-200.0, -90.0, 0.0]])
    weights, lse = maskops.masked_softmax(x, None, return_lse=True)
    assert torch.allclose(weights, torch.softmax(x, -1), atol=1e-7) and torch.allclose(lse, torch.logsumexp(x, -1))
    assert (maskops.masked_softmax(torch.full((1000,), 7.0), None) == 0.001).all()


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_softmax(backend: str, dim: int, dtype: torch.dtype) -> None:
    """Longer than what the kernel keeps: the maximum rises from block to block, and in the last element."""
    length = 40000
    x = (noise(3, length) + torch.linspace(-60.0, 10.0, length)).to(dtype)
    x[1, -1], x[2] = 90.0, -80.0
    mask = coins(3, length, share=0.9)
    mask[0, :20000], mask[1, -1] = False, True
    if dim == 0:
        x, mask = x.T.contiguous(), mask.T.contiguous()
    check(x, mask, mask, dim)
    check(x, None, torch.tensor(True), dim)


def test_long_rows_of_spans(backend: str) -> None:
    start = torch.tensor([[[0, 5, 30000]], [[20000, 39000, 39999]]])
    end = torch.tensor([[[15000, 36000, 30000]], [[40000, 40000, 40000]]])
    spans = build_row_spans(start, end, 40000, key_holes=coins(1, 40000, share=0.1), grad=False)
    check(noise(3, 40000), spans, spans.to_dense()[0, 0])


# ---- the same answer ------------------------------------------------------------------------------------------------


def results(x: Tensor, mask: Any, dim: int) -> tuple[Tensor, ...]:
    x = x.detach().requires_grad_()
    weights, lse = maskops.masked_softmax(x, mask, dim, return_lse=True, backend="cpu")
    return (weights, lse, *torch.autograd.grad((weights, lse), x, (noise(*x.shape, seed=1), torch.ones_like(lse))))


@pytest.mark.processor
def test_threads_give_the_same_bits() -> None:
    needs_extension()
    mask = masks.padding(torch.tensor([300, 5])) & masks.causal()
    inputs = [(noise(2, 3, 300, 300), m, dim) for dim in (3, 2, 0) for m in (coins(2, 1, 300, 300), mask)]
    before = torch.get_num_threads()
    try:
        for arguments in inputs:
            torch.set_num_threads(1)
            one = results(*arguments)
            torch.set_num_threads(3)
            for a, b in zip(one, results(*arguments), strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


@pytest.mark.processor
def test_instruction_sets_agree() -> None:
    needs_extension()
    widest = extension.instruction_set()
    assert widest is not None
    try:
        for dtype in DTYPES:
            for dim in (0, 1, 2):
                x, mask = noise(3, 37, 75).to(dtype), coins(3, 1, 75)
                extension.select_instruction_set(widest)
                expected = results(x, mask, dim)
                for name in extension.instruction_sets():
                    extension.select_instruction_set(name)
                    for a, b in zip(results(x, mask, dim), expected, strict=True):
                        assert torch.allclose(a.double(), b.double(), rtol=0.0, atol=8 * torch.finfo(a.dtype).eps), name
    finally:
        extension.select_instruction_set(widest)


# ---- gradients and torch --------------------------------------------------------------------------------------------


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


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "mask_shape", "message"),
    [
        (
            (2, 5, 5),
            (2, 1, 1, 5),
            r"mask has shape \(2, 1, 1, 5\), x has shape \(2, 5, 5\): a mask must broadcast to x without enlarging it, "
            r"and these two give \(2, 2, 5, 5\)\. Use mask\.squeeze\(1\), shape \(2, 1, 5\)$",
        ),
        ((2, 5, 5), (1, 1, 1, 5), r"these two give \(1, 2, 5, 5\)\. Use mask\.squeeze\(0\), shape \(1, 1, 5\)$"),
        ((2, 5, 5), (2, 5), r"enlarging it\. Use mask\.unsqueeze\(1\), shape \(2, 1, 5\)$"),
        ((2, 3, 5, 5), (2, 5, 5), r"Use mask\.unsqueeze\(1\), shape \(2, 1, 5, 5\)$"),
        ((2, 3, 5, 5), (2, 5), r"Use mask\.reshape\(2, 1, 1, 5\), or masks\.key_padding\(mask\)$"),
        ((5,), (2, 5), r"and these two give \(2, 5\)$"),
        ((2, 5), (2, 4), r"x has shape \(2, 5\): a mask must broadcast to x without enlarging it$"),
    ],
)
def test_masks_that_do_not_broadcast(shape: tuple[int, ...], mask_shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        maskops.masked_softmax(noise(*shape), coins(*mask_shape))


PLAN = masks.causal().spans(4, 4)
TWO = masks.padding(torch.tensor([4, 2]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], None), TypeError, r"^x: expected a tensor of scores, got list$"),
        ((torch.ones(3, dtype=torch.int64), None), TypeError, r"^x has dtype torch\.int64: expected float32"),
        ((torch.ones(3), [True]), TypeError, r"^mask: expected a tensor of bool or 0/1 integers, a mask of maskops"),
        (
            (torch.ones(3), torch.ones(3)),
            TypeError,
            r"^mask has dtype torch\.float32: .*masked_softmax\(x \+ mask, None",
        ),
        (
            (torch.ones(3), torch.ones(3, dtype=torch.uint16)),
            TypeError,
            r"^mask has dtype torch\.uint16: expected bool",
        ),
        ((torch.ones(3), torch.tensor([0, 2, 1])), ValueError, r"^mask\[1\]=2: a mask holds 0 and 1"),
        ((torch.ones(3), torch.ones(3, dtype=torch.bool, device="meta")), ValueError, r"^mask is on meta, x on cpu"),
        ((torch.ones(2, 3), None, 2), IndexError, r"^dim is 2: x has shape \(2, 3\), expected -2 to 1$"),
        ((torch.ones(2, 3), None, 1.0), TypeError, r"^dim is a float: expected an int$"),
        ((torch.ones(2, 3), None, True), TypeError, r"^dim is a bool: expected an int$"),
        ((torch.ones(4), masks.causal()), ValueError, r"^x has shape \(4,\): a mask of queries and keys needs scores"),
        ((torch.ones(5, 5), PLAN), ValueError, r"^mask is a plan for 4 queries and 4 keys, .*mask\.spans\(5, 5\)$"),
        (
            (torch.ones(3, 4, 4), TWO.spans(4, 4)),
            ValueError,
            r"^mask is a plan for a batch of 2, x has shape \(3, 4, 4\)",
        ),
        (
            (torch.ones(4, 4, device="meta"), PLAN),
            ValueError,
            r"^mask is a plan on cpu, x is on meta: plan it with dev",
        ),
        ((torch.ones(6, 4, 4), TWO), ValueError, r"is for a batch of 2, x has .* pass x\.unflatten\(0, \(2, 3\)\)$"),
        (
            (torch.ones(2, 4, 4), masks.dense(coins(2, 3, 4, 4))),
            ValueError,
            r"^mask holds a dense mask with shape \(2, 3",
        ),
    ],
)
def test_errors(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        maskops.masked_softmax(*arguments)


@pytest.mark.processor
def test_named_backend_refuses() -> None:
    with pytest.raises(ValueError, match=r"backend 'cpu' cannot run maskops\.masked_softmax: .*not float64"):
        maskops.masked_softmax(torch.ones(3, dtype=torch.float64), None, backend="cpu")


@pytest.mark.processor
@pytest.mark.parametrize("place", range(6))
def test_operator_refuses_what_it_cannot_read(place: int) -> None:
    """What only a direct call of the operator can bring about; the kernels rely on it for their memory accesses."""
    needs_extension()
    x = noise(2, 4, 5)
    plan = masks.causal().spans(4, 5, grad=False)
    absent = torch.empty(0, dtype=torch.int32)
    spans = [plan.start, plan.end, plan.key_valid]
    mask, dim = absent, 2
    if place == 0:
        mask, spans = coins(2, 4, 4), [absent] * 3
    elif place == 1:
        mask, spans = torch.ones(2, 4, 5), [absent] * 3
    elif place == 2:
        dim = 1
    elif place == 3:
        spans[0] = spans[0][:, :, :3]
    elif place == 4:
        spans[2] = spans[2][:, :4]
    else:
        dim = 3
    with pytest.raises(ValueError, match=r"^masked_softmax: "):
        torch.ops.maskops.masked_softmax_forward(x, mask, *spans, dim, False)
