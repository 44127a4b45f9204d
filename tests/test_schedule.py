"""Schedules of the kernels: enough tasks for many threads, the same bits for any number of them, a trace."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import maskops
from benchmarks.schedule import chained_makespan, makespan
from maskops import extension, masks

pytestmark = pytest.mark.skipif(extension.reason() is not None, reason=str(extension.reason()))


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def inputs(batch: int, heads: int, kv_heads: int, q_len: int, k_len: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q = torch.randn(batch, heads, q_len, width)
    k, v = (torch.randn(batch, kv_heads, k_len, width) for _ in range(2))
    return q, k, v


@pytest.mark.parametrize("instruction_set", extension.instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("features", [{}, {"softcap": 3.0}, {"sinks": torch.tensor([0.5, -1.0])}], ids=str)
def test_parts_of_the_keys_are_merged_in_order(
    instruction_set: str, dtype: torch.dtype, features: dict[str, float | Tensor]
) -> None:
    """Few queries over many keys: tasks share the keys of a row, and nobody can tell from the result."""
    q, k, v = (x.to(dtype) for x in inputs(1, 2, 1, 20, 3000, 70))
    mask = masks.sliding_window(2500, 7) & masks.key_padding(torch.tensor([2990]))
    before = extension.instruction_set()
    assert before is not None
    extension.select_instruction_set(instruction_set)
    try:
        results = []
        for count in (1, 3, 8):
            torch.set_num_threads(count)
            results.append(maskops.attention(q, k, v, mask, return_lse=True, backend="cpu", **features))
    finally:
        extension.select_instruction_set(before)
    for other in results[1:]:
        assert all(torch.equal(one, many) for one, many in zip(results[0], other, strict=True))
    doubles = {name: x.double() if isinstance(x, Tensor) else x for name, x in features.items()}
    expected = maskops.attention(
        q.double(), k.double(), v.double(), mask, return_lse=True, backend="reference", **doubles
    )
    for one, other in zip(results[0], expected, strict=True):
        torch.testing.assert_close(one.double(), other, atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=2e-2)


def test_rows_without_keys_in_some_parts() -> None:
    """A part that no query sees leaves nothing, a row that sees nothing is 0 with a log-sum-exp of -inf."""
    q, k, v = inputs(1, 1, 1, 64, 4096, 64)
    mask = masks.key_padding(torch.tensor([700]))
    out, lse = maskops.attention(q, k, v, mask, return_lse=True, backend="cpu")
    short, short_lse = maskops.attention(q, k[:, :, :700], v[:, :, :700], return_lse=True, backend="cpu")
    torch.testing.assert_close(out, short)
    torch.testing.assert_close(lse, short_lse)
    seen = (torch.arange(64) > 2)[None, None, :, None].expand(1, 1, 64, 4096)
    out, lse = maskops.attention(q, k, v, masks.dense(seen), return_lse=True, backend="cpu")
    assert out[:, :, :3].eq(0).all() and lse[:, :, :3].eq(-torch.inf).all()
    torch.testing.assert_close(out[:, :, 3:], maskops.attention(q[:, :, 3:], k, v, backend="cpu"))


@pytest.mark.parametrize("width", [64, 72])
def test_a_large_result_is_that_of_its_heads(instruction_set: str, width: int) -> None:
    """Large results go past the caches, where their rows are whole lines; of short documents, with rows between."""
    heads, lengths = 96, (16, 3, 7, 40, 1, 60, 200)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(lengths) + 30, heads, width, generator=generator) for _ in range(3))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    out = maskops.varlen_attention(q, k, v, cu_seqlens, backend="cpu")
    assert out.numel() * 4 > 8 << 20
    for first in range(0, heads, 32):
        some = slice(first, first + 32)
        part = maskops.varlen_attention(q[:, some], k[:, some], v[:, some], cu_seqlens, backend="cpu")
        assert torch.equal(out[:, some], part), instruction_set


def test_few_long_sequences_have_tasks_for_all_threads() -> None:
    torch.set_num_threads(64)
    for heads, q_len, k_len in ((1, 2048, 4096), (2, 100, 32768), (1, 8, 65536)):
        q, k, v = inputs(1, heads, 1, q_len, k_len, 16)
        tasks = extension.trace_tasks(lambda q=q, k=k, v=v: maskops.attention(q, k, v, backend="cpu"))
        assert len([task for task in tasks if task.region == 0]) >= 40, (heads, q_len, k_len)
        assert all(task.nanoseconds >= 0 for task in tasks)


@pytest.mark.parametrize("instruction_set", extension.instruction_sets())
@pytest.mark.parametrize("name", ["causal", "window behind keys", "softcap", "sums in the gradients"])
def test_tasks_of_a_chain_add_in_order(instruction_set: str, name: str) -> None:
    """Gradients of keys that many tasks add to: the same bits for any number of threads, 0 for keys of nobody."""
    q, k, v = inputs(1, 4, 2, 300, 450, 13)
    if name == "sums in the gradients":  # rows of whole vectors, those of two heads side by side
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(1, 4, 2, 300, 450, 16))
    mask = {"window behind keys": masks.causal() & masks.sliding_window(40, 0)}.get(name, masks.causal())
    features = {"softcap": 3.0} if name == "softcap" else {}
    leaves = [x.requires_grad_() for x in (q, k, v)]
    gradient = torch.randn(q.shape)
    before = extension.instruction_set()
    assert before is not None
    extension.select_instruction_set(instruction_set)
    try:
        results = []
        for count in (1, 3, 64):
            torch.set_num_threads(count)
            out = maskops.attention(*leaves, mask, backend="cpu", **features)
            results.append(torch.autograd.grad(out, leaves, gradient))
    finally:
        extension.select_instruction_set(before)
    for other in results[1:]:
        assert all(torch.equal(one, many) for one, many in zip(results[0], other, strict=True))
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    expected = torch.autograd.grad(
        maskops.attention(*doubles, mask, backend="reference", **features), doubles, gradient.double()
    )
    for one, expected_one in zip(results[0], expected, strict=True):
        torch.testing.assert_close(one.double(), expected_one, atol=1e-5, rtol=1e-4)
        assert one[expected_one == 0].eq(0).all()


def test_a_long_backward_has_tasks_for_all_threads() -> None:
    """And only what many threads share is cut: one thread takes a sequence as a whole."""
    leaves = [x.requires_grad_() for x in inputs(1, 2, 1, 1500, 1500, 8)]
    for count, least, most in ((64, 64, 200), (1, 1, 1)):
        torch.set_num_threads(count)
        out = maskops.attention(*leaves, masks.causal(), backend="cpu")
        tasks = extension.trace_tasks(lambda out=out: torch.autograd.grad(out.sum(), leaves, retain_graph=True))
        chained = [task for task in tasks if task.chain >= 0]
        assert least <= len(tasks) <= most and len(chained) == (0 if count == 1 else len(tasks))
        assert all(0 < task.keys <= 1500 for task in chained)


def test_short_sequences_share_tasks() -> None:
    """One sequence and head a task would be 4,096 of them, each over in less time than it takes to hand it out."""
    torch.set_num_threads(2)
    q, k, v = inputs(512, 8, 8, 8, 8, 16)
    assert len(extension.trace_tasks(lambda: maskops.attention(q, k, v, backend="cpu"))) <= 512


def test_a_trace_ends_with_its_call_and_grows_with_it() -> None:
    q, k, v = inputs(1, 1, 1, 16, 16, 8)
    assert extension.trace_tasks(lambda: None) == []
    with pytest.raises(RuntimeError, match="broken"):
        extension.trace_tasks(lambda: (_ for _ in ()).throw(RuntimeError("broken")))
    maskops.attention(q, k, v, backend="cpu")  # not traced: nothing is written where the memory was
    twice = extension.trace_tasks(lambda: [maskops.attention(q, k, v, backend="cpu") for _ in range(2)])
    assert sorted({task.region for task in twice}) == [0, 1]


def test_makespan() -> None:
    """Each worker takes the next task when it is free."""
    assert makespan([4, 3, 3, 2], 1) == 12
    assert makespan([4, 3, 3, 2], 2) == 6
    assert makespan([1, 1, 1, 9], 3) == 10
    assert makespan([5], 8) == 5


def test_makespan_of_chains() -> None:
    """The second task of a chain follows the first by its 2 / 5 for 64 keys, and ends after it."""

    def task(nanoseconds: int, chain: int) -> extension.TaskTime:
        return extension.TaskTime(0, 8, nanoseconds, chain, 128)

    assert chained_makespan([task(100, -1), task(100, -1)], 2) == 100
    assert chained_makespan([task(100, 0), task(100, 1)], 2) == 100
    assert chained_makespan([task(100, 0), task(100, 0)], 2) == 120
    assert chained_makespan([task(100, 0), task(50, 0), task(20, -1)], 2) == 120
    assert chained_makespan([task(100, 0), task(100, 0)], 1) == 200
