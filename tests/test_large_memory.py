"""Memory of large results: in huge pages, kept for the next one, given back when asked; what it held never shows."""

import math
import os
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import maskops
from maskops import extension

resource = pytest.importorskip("resource", reason="only POSIX limits address space")

pytestmark = [
    pytest.mark.skipif(extension.reason() is not None, reason=str(extension.reason())),
    pytest.mark.skipif(sys.platform != "linux", reason="large results lie in memory of their own on Linux alone"),
    pytest.mark.skipif(
        tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11), reason="torch has no tensors over others' memory"
    ),
]
keeps = pytest.mark.skipif(
    resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY,
    reason="nothing is kept where address space is limited (ulimit -v)",
)
HUGE_PAGE = 2 << 20
ROWS, VOCABULARY = 3, 3 << 20
BYTES = 4 * ROWS * VOCABULARY


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    extension.release_memory()
    yield
    extension.release_memory()


@pytest.fixture(scope="module")
def logits() -> Tensor:
    return torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(0)).requires_grad_()


def gradient(logits: Tensor) -> Tensor:
    target = torch.tensor([5, -100, VOCABULARY - 1])
    with maskops.use_backend("cpu", fallback="error"):
        return torch.autograd.grad(maskops.cross_entropy(logits, target), logits)[0]


@keeps
def test_freed_memory_serves_the_next_result_and_what_it_held_reaches_nothing(logits: Tensor) -> None:
    first = gradient(logits)
    expected, place = first.clone(), first.data_ptr()
    assert place % HUGE_PAGE == 0
    first.fill_(math.nan)
    row = first[1]  # a view keeps the memory as the tensor does
    del first
    second = gradient(logits)
    assert second.data_ptr() != place and torch.equal(second, expected)
    assert bool(row.isnan().all())
    del row
    third = gradient(logits)
    assert third.data_ptr() == place and torch.equal(third, expected)
    assert bool((third[1] == 0).all())


@keeps
def test_memory_that_is_much_larger_is_not_taken(logits: Tensor) -> None:
    place = gradient(logits).data_ptr()  # and freed
    wide = torch.zeros(ROWS, 3 * VOCABULARY, requires_grad=True)
    large = gradient(wide).data_ptr()
    assert large != place
    assert gradient(logits).data_ptr() == place
    assert extension.release_memory() >= 4 * BYTES
    assert extension.release_memory() == 0


@keeps
def test_at_most_sixteen_blocks_are_kept() -> None:
    rounded = 8 << 20  # the least that is large
    x = torch.zeros(rounded // 4 // 1024, 1024)
    with maskops.use_backend("cpu", fallback="error"):
        held = [maskops.masked_softmax(x, None) for _ in range(18)]
    assert len({x.data_ptr() for x in held}) == 18
    held.clear()
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert extension.release_memory() == min(16, physical // 16 // rounded) * rounded


@keeps
def test_nothing_is_kept_where_address_space_is_limited(logits: Tensor) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    large = gradient(logits)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 46, before[1]))
    try:
        del large
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert extension.release_memory() == 0


def test_such_tensors_are_shared_and_copied_like_others(logits: Tensor) -> None:
    large = gradient(logits)
    expected = large.clone()
    assert large.untyped_storage().nbytes() == BYTES
    assert torch.equal(large.share_memory_(), expected) and large.is_shared()


def test_their_storage_keeps_its_size(logits: Tensor) -> None:
    """As README and large_memory.h say; in place and into results of their own shape everything goes on."""
    large = gradient(logits)
    torch.mul(large, 2.0, out=large)
    with pytest.raises(RuntimeError, match="not resizable"):
        large.resize_(2 * ROWS, VOCABULARY)
    with pytest.raises(RuntimeError, match="not resizable"):
        large.untyped_storage().resize_(0)


def test_every_op_has_its_large_results_there() -> None:
    """Through the full way and the short one: tensors say that they are on processor -1, which is processor 0."""
    scores = torch.randn(1, 3, 1700, 1700)
    x = torch.randn(1 << 16, 2, 64, requires_grad=True)
    cu_seqlens = torch.arange(0, (1 << 16) + 1, 64, dtype=torch.int32)
    with torch.no_grad():
        short = [maskops.masked_softmax(scores, None), maskops.varlen_attention(x, x, x, cu_seqlens)]
    with maskops.use_backend("cpu", fallback="error"):
        full = [maskops.masked_softmax(scores, None), maskops.varlen_attention(x, x, x, cu_seqlens)]
    torch.testing.assert_close(full[1], short[1], rtol=0, atol=0)
    for result in (*short, *full, torch.autograd.grad(full[1].sum(), x)[0]):
        assert result.data_ptr() % HUGE_PAGE == 0
