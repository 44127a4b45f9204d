"""The products of matrices that linear cross-entropy is made of, on every instruction set of this machine."""

import pytest
import torch
from torch import Tensor

from maskops import extension
from tests.cross_entropy_oracle import DTYPES

pytestmark = [
    pytest.mark.processor,
    pytest.mark.skipif(extension.reason() is not None, reason=f"the extension is not there: {extension.reason()}"),
]

# Rows, columns, depth: within a panel, whole panels and parts of the depth, one more than those.
SHAPES = ((1, 1, 1), (3, 70, 5), (12, 64, 256), (13, 65, 257), (50, 3, 600))


def draw(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float32, turned: bool = False) -> Tensor:
    shape = (columns, rows) if turned else (rows, columns)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.t() if turned else x


def multiply(left: Tensor, right: Tensor, row: Tensor | None = None, before: Tensor | None = None) -> Tensor:
    """Into the middle of a larger matrix, whose rim has to stay what it is."""
    rim = torch.full((left.shape[0] + 2, right.shape[1] + 2), -7.0)
    result = rim[1:-1, 1:-1]
    if before is not None:
        result.copy_(before)
    nothing = torch.empty(0)
    torch.ops.maskops.matmul_into(left, right, nothing if row is None else row, result, before is not None)
    copy = result.clone()
    result.fill_(-7.0)
    assert bool((rim == -7.0).all())
    return copy


def check(actual: Tensor, left: Tensor, right: Tensor, start: Tensor | float = 0.0) -> None:
    expected = left.double() @ right.double() + start
    size = left.double().abs() @ right.double().abs() + 1.0
    assert float(((actual.double() - expected).abs() / size).max()) < 2e-6


@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product(instruction_set: str, shape: tuple[int, int, int], turned: tuple[bool, bool]) -> None:
    rows, columns, depth = shape
    left, right = draw(rows, depth, 0, turned=turned[0]), draw(depth, columns, 1, turned=turned[1])
    check(multiply(left, right), left, right)
    row, before = draw(1, columns, 2)[0], draw(rows, columns, 3)
    check(multiply(left, right, row), left, right, row.double())
    check(multiply(left, right, before=before), left, right, before.double())


@pytest.mark.parametrize("shape", [(7, 4500, 260), (4500, 5, 260), (1100, 1, 1300)], ids=str)
def test_several_slabs(instruction_set: str, shape: tuple[int, int, int]) -> None:
    rows, columns, depth = shape
    left, right = draw(rows, depth, 0), draw(depth, columns, 1)
    check(multiply(left, right), left, right)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES], ids=str)
def test_dtypes(instruction_set: str, dtypes: tuple[torch.dtype, torch.dtype], turned: bool) -> None:
    left, right = draw(29, 61, 0, dtypes[0], turned), draw(61, 70, 1, dtypes[1], turned)
    check(multiply(left, right), left, right)


def test_any_strides(instruction_set: str) -> None:
    left, right = draw(40, 90, 0)[::2, ::3], draw(60, 100, 1)[::2, ::5]
    check(multiply(left, right), left, right)
    wide = draw(1, 30, 2).expand(20, 30)
    check(multiply(wide, right), wide, right)


def test_nothing_to_sum(instruction_set: str) -> None:
    left, right, row = torch.empty(3, 0), torch.empty(0, 5), draw(1, 5, 0)[0]
    before = draw(3, 5, 1)
    assert torch.equal(multiply(left, right), torch.zeros(3, 5))
    assert torch.equal(multiply(left, right, row), row.expand(3, 5))
    assert torch.equal(multiply(left, right, before=before), before)


def test_bits_depend_on_the_row_and_the_column_alone(instruction_set: str) -> None:
    left, right = draw(70, 600, 0), draw(600, 300, 1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = multiply(left, right)
        torch.set_num_threads(3)
        assert torch.equal(multiply(left, right), whole)
        assert torch.equal(multiply(left[31:44], right[:, 7:90]), whole[31:44, 7:90])
    finally:
        torch.set_num_threads(threads)


def test_refusals() -> None:
    x, nothing = torch.zeros(2, 2), torch.empty(0)
    for left, right, row, result, add, message in (
        (x, torch.zeros(3, 2), nothing, x, False, "must be"),
        (x, x, nothing, x.double(), False, "float32"),
        (x, x, nothing, torch.zeros(4, 4)[:2, ::2], False, "contiguous columns"),
        (x, x, torch.zeros(3), torch.zeros(2, 2), False, "a value for every column"),
        (x, x, torch.zeros(2), torch.zeros(2, 2), True, "a value for every column"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.ops.maskops.matmul_into(left, right, row, result, add)


def test_a_result_among_the_operands_is_refused_by_name() -> None:
    memory, other, nothing = torch.ones(3, 4), torch.ones(2, 2), torch.empty(0)
    result, beside = memory[:2, :2], memory[1:, 1:3]
    for left, right, row, name in (
        (beside, other, nothing, "left"),
        (other, beside.t(), nothing, "right"),
        (other, other, memory[1, 1:3], "row"),
    ):
        with pytest.raises(ValueError, match=f"apart from that of {name}"):
            torch.ops.maskops.matmul_into(left, right, row, result, False)
    assert bool((memory == 1.0).all())
    # What ends where the result begins is apart from it.
    torch.ops.maskops.matmul_into(other, other, memory[0, :2], memory[1:, :2], False)
    assert bool((memory[1:, :2] == 3.0).all())
