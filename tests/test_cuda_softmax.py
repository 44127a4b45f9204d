"""maskops.masked_softmax on the backend `cuda`, emulated where there is no device, by the cases of every backend."""

import math
from collections.abc import Iterator

import pytest
import torch

import maskops
from maskops import backend as backends
from maskops import masks
from tests import test_softmax as common
from tests.served import DEVICE
from tests.softmax_oracle import DTYPES, INF, NAN, check, coins, definition, gradient_of, noise

NAME = "cuda"
pytestmark = pytest.mark.devices


@pytest.fixture(autouse=True)
def backend() -> Iterator[str]:
    if reasons := backends.BACKENDS[NAME].refusals_of(DEVICE):
        pytest.skip(f"{NAME}: {'; '.join(reasons)}")
    with maskops.use_backend(NAME, fallback="error"):
        yield NAME


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", common.SHAPES, ids=str)
def test_every_dimension(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    common.test_every_dimension(backend, shape, dtype)


def test_integers_count_as_bool(backend: str) -> None:
    common.test_integers_count_as_bool(backend, torch.int64)


@pytest.mark.parametrize(
    "kind",
    [
        "transposed",
        "every second element",
        "rows with a gap",
        "expanded along the row",
        "mask transposed",
        "mask with gaps",
        "mask expanded along rows",
        "mask of one row",
    ],
)
def test_strides(backend: str, kind: str) -> None:
    common.test_strides(backend, kind, torch.bfloat16)


def test_strides_of_the_operator() -> None:
    """The kernel walks any strides; the public function copies some of them first, for speed."""
    absent = torch.empty(0, dtype=torch.int32)
    x, mask = noise(40, 6, 4).permute(2, 1, 0), coins(80, 6, 4)[::2].permute(2, 1, 0)
    for dim in range(3):
        weights, lse = torch.ops.maskops.masked_softmax_forward_cuda(x, mask, absent, absent, absent, dim, True)
        oracle, oracle_lse = definition(x.double(), mask, dim)
        assert torch.allclose(weights.double(), oracle, atol=1e-6) and torch.allclose(lse.double(), oracle_lse)
        grad_weights = noise(40, 12, 4, seed=3)[:, ::2].permute(2, 1, 0)
        grad = torch.ops.maskops.masked_softmax_backward_cuda(
            grad_weights, torch.zeros(0), weights, absent, absent, absent, dim
        )
        expected = gradient_of(oracle, grad_weights.double(), torch.zeros_like(oracle_lse), dim)
        assert torch.allclose(grad.double(), expected, atol=1e-6)


@pytest.mark.parametrize("name", common.MASKS)
def test_masks(name: str) -> None:
    mask = common.MASKS[name]
    x, allowed = noise(2, 3, 70, 70), mask.to_dense(70, 70, batch=2, device=DEVICE)
    check(x.bfloat16(), mask.spans(70, 70, device=DEVICE), allowed)
    check(x, mask, allowed, 2 if name == "padding and causal" else 3)


def test_shapes_of_scores(backend: str) -> None:
    common.test_shapes_of_scores(backend)


def test_empty_tensors(backend: str) -> None:
    common.test_empty_tensors(backend)


def test_hostile_spans_stay_inside() -> None:
    """Spans that a user made by hand, crossing, out of range, far apart: as on the CPU, and inside the rows."""
    generator = torch.Generator().manual_seed(0)
    plan = masks.full().spans(40, 70, device=DEVICE)
    x = noise(2, 40, 70)
    for _ in range(5):
        start, end = (torch.randint(-100, 200, (3, 1, 40), dtype=torch.int32, generator=generator) for _ in range(2))
        start[0, 0, 0], end[0, 0, 0] = -(2**31), 2**31 - 1
        weights = maskops.masked_softmax(x, plan._replace(start=start, end=end))
        total = weights.sum(-1)
        assert ((total - 1).abs() < 1e-5).logical_or(total == 0).all()
        assert (total[:, 0] > 0).all()
        # Spans come in order: a later one begins where those before it ended.
        first, last = start[:, 0].clamp(0, 70), end[:, 0].clamp(0, 70)
        done = torch.zeros(40, dtype=torch.int32)
        seen = torch.zeros(40, 70, dtype=torch.bool)
        for span in range(3):
            begin = torch.maximum(first[span], done)
            stop = torch.maximum(last[span], begin)
            position = torch.arange(70)
            seen |= (position >= begin[:, None]) & (position < stop[:, None])
            done = torch.where(stop > begin, stop, done)
        assert torch.equal((weights != 0), seen.expand(2, 40, 70))


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("dim", [0, 2])
def test_masked_values_reach_nothing(backend: str, dim: int, poison: float) -> None:
    common.test_masked_values_reach_nothing(backend, dim, poison)


def test_masked_values_under_spans(backend: str) -> None:
    common.test_masked_values_under_spans(backend)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("length", [5, 70, 5000])
def test_infinite_and_nan_scores(backend: str, length: int, dim: int) -> None:
    common.test_infinite_and_nan_scores(backend, length, dim)


def test_range_of_scores(backend: str) -> None:
    common.test_range_of_scores(backend)


@pytest.mark.parametrize("dim", [0, 1])
def test_long_softmax(backend: str, dim: int) -> None:
    common.test_long_softmax(backend, dim, torch.bfloat16)


def test_long_rows_of_spans(backend: str) -> None:
    common.test_long_rows_of_spans(backend)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    """Nor on their order, nor on how many share a block; long ones and short ones."""
    for length in (64, 4096):
        x = noise(9, length)
        whole = maskops.masked_softmax(x, None)
        for row in (0, 4, 8):
            assert torch.equal(maskops.masked_softmax(x[row : row + 1].clone(), None), whole[row : row + 1])


def test_gradients_where_there_is_no_weight() -> None:
    """Incoming NaN at weights of 0, and at softmaxes over nothing, passes nothing on."""
    mask = coins(6, 33)
    mask[2] = False
    x = noise(6, 33).requires_grad_()
    weights, lse = maskops.masked_softmax(x, mask, return_lse=True)
    incoming = torch.ones(6, 33).masked_fill(~mask, math.nan)
    (grad,) = torch.autograd.grad((weights, lse), x, (incoming, torch.ones(6).masked_fill(~mask.any(1), math.nan)))
    assert grad.isfinite().all() and not grad[~mask].any()
