"""Threads, forked processes and DataLoader workers."""

import copy
import functools
import pickle
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import maskops
from maskops import masks

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def training_step(x: Tensor, weight: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
    """Loss and gradients of attention and both losses."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    out = maskops.varlen_attention(x, x * 2, x + 1, cu_seqlens, mask=masks.causal()).flatten(1)
    target = torch.arange(x.shape[0]) % weight.shape[0]
    loss = maskops.cross_entropy(out @ weight.T, target, cu_seqlens=cu_seqlens, shift=True)
    loss = loss + maskops.linear_cross_entropy(out, weight, target)
    return (loss.detach(), *torch.autograd.grad(loss, (x, weight)))


def inputs(number: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    total = 150 + 10 * number
    offsets = torch.tensor([0, 3, 60 + number, total])
    return torch.randn(total, 2, 8, generator=generator), torch.randn(9, 16, generator=generator), offsets


# ---- threads ---------------------------------------------------------------------------------------------------------


def test_many_threads_at_once() -> None:
    """Every thread gets the bits that it gets alone, while others run other shapes on all of torch's threads."""
    torch.set_num_threads(2)
    try:
        expected = [training_step(*inputs(number)) for number in range(8)]
        start = threading.Barrier(8)

        def run(number: int) -> list[tuple[Tensor, ...]]:
            start.wait()
            return [training_step(*inputs(number)) for _ in range(4)]

        with ThreadPoolExecutor(8) as pool:
            for number, results in enumerate(pool.map(run, range(8))):
                for result in results:
                    assert all(torch.equal(mine, alone) for mine, alone in zip(result, expected[number], strict=True))
    finally:
        torch.set_num_threads(1)


def test_backends_of_threads() -> None:
    """use_backend holds in its own thread: the others choose as if it were not there."""
    x, _, offsets = inputs(0)
    inside, outside = threading.Event(), threading.Event()
    found: dict[str, Any] = {}

    def chooser() -> None:
        with maskops.use_backend("reference", fallback="error"):
            inside.set()
            assert outside.wait(60)
            found["inside"] = maskops.varlen_attention(x, x, x, offsets)

    thread = threading.Thread(target=chooser)
    thread.start()
    assert inside.wait(60)
    found["outside"] = maskops.varlen_attention(x, x, x, offsets)
    outside.set()
    thread.join()
    assert torch.equal(found["inside"], maskops.varlen_attention(x, x, x, offsets, backend="reference"))
    if maskops.backends()["cpu"] == "available":
        assert torch.equal(found["outside"], maskops.varlen_attention(x, x, x, offsets, backend="cpu"))


def test_a_plan_of_many_threads() -> None:
    """One plan, made once, is read by many threads."""
    x, _, offsets = inputs(1)
    plan = (masks.documents(cu_seqlens=offsets) & masks.causal()).spans(x.shape[0], x.shape[0])
    expected = maskops.varlen_attention(x, x, x, mask=plan)
    with ThreadPoolExecutor(8) as pool:
        for result in pool.map(lambda _: maskops.varlen_attention(x, x, x, mask=plan), range(16)):
            assert torch.equal(result, expected)


# ---- fork ------------------------------------------------------------------------------------------------------------


FORK = """
    import os
    import signal

    import torch
    import maskops
    from maskops import masks

    torch.manual_seed(0)
    x = torch.randn(1, 4, 150, 8, requires_grad=True)
    logits, target = torch.randn(150, 150, requires_grad=True), torch.arange(150)

    def step():
        # Kernels alone: torch's own operators hang in such a child where they ask for more than one thread.
        out = maskops.attention(x, x, x, masks.causal())
        weights = maskops.masked_softmax(logits, masks.causal() | masks.prefix(3))
        loss = maskops.cross_entropy(logits, target)
        keys = x.detach()
        decoded = maskops.decode_attention(keys[:, :, :1], keys, keys, torch.tensor([150]))
        results = (out, weights, loss)
        return *results, decoded, *torch.autograd.grad(results, (x, logits), [r.detach() for r in results])

    for threads in (1, 2):
        torch.set_num_threads(threads)
        expected = step()  # torch's threads run before the fork
        child = os.fork()
        if child == 0:
            signal.alarm(100)  # a hang is an error
            same = all(torch.equal(mine, theirs) for mine, theirs in zip(step(), expected))
            os._exit(0 if same else 3)
        _, status = os.waitpid(child, 0)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(step(), expected))
        print(threads, os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_fork_after_threads() -> None:
    """A child of a process whose threads have run computes the same: on threads of its own, for torch's are lost."""
    if (reason := maskops.backends()["cpu"]) != "available":
        pytest.skip(f"cpu: {reason}")
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORK)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=240,
    )
    assert result.stdout.split("\n")[:-1] == ["1 0", "2 0"], result.stdout + result.stderr


# ---- data that travels -----------------------------------------------------------------------------------------------


def example_masks() -> dict[str, masks.Mask]:
    lengths = torch.tensor([5, 2])
    return {
        "patterns": masks.causal() & (masks.sliding_window(3, 0) | masks.prefix(1)),
        "lengths": masks.padding(lengths) & masks.chunked(2),
        "prefixes": masks.padding(lengths, side="left") & (masks.causal() | masks.prefix(lengths)),
        "keys": masks.key_padding(4) & masks.causal(),
        "documents": masks.documents(cu_seqlens=torch.tensor([0, 2, 5])) & masks.causal(),
        "ids": masks.documents(torch.tensor([[0, 0, 1, 1, -1], [0, 1, 2, 3, 4]])),
        "dense": masks.dense(torch.rand(2, 1, 5, 5) < 0.5) & masks.causal(),
    }


COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", example_masks())
def test_copies_of_masks_and_plans(kind: str, how: str) -> None:
    mask = example_masks()[kind]
    plan = mask.spans(5, 5, positions=True)
    copied = COPIES[how](mask)
    assert repr(copied) == repr(mask)
    for found in (copied.spans(5, 5, positions=True), COPIES[how](plan)):
        assert type(found) is maskops.RowSpans
        for mine, theirs in zip(found, plan, strict=True):
            assert mine is None if theirs is None else torch.equal(mine, theirs)
    # A copy still combines with others.
    assert torch.equal((copied & masks.causal()).to_dense(5, 5), (mask & masks.causal()).to_dense(5, 5))


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_batches(how: str) -> None:
    batch = maskops.PackedBatch.from_sequences([[1, 2, 3], [], [4]], labels=[[1, 2, 3], [], [4]], capacity=6)
    copied = COPIES[how](batch)
    assert type(copied) is maskops.PackedBatch and copied.max_seqlen == 3
    for name in ("input_ids", "lengths", "labels", "cu_seqlens", "position_ids", "shift_labels"):
        assert torch.equal(getattr(copied, name), getattr(batch, name))


def collate(sequences: list[list[int]]) -> tuple[maskops.PackedBatch, maskops.RowSpans, masks.Mask]:
    """What a training loop may well do in a worker: pack, plan, and hand over the mask as well."""
    batch = maskops.PackedBatch.from_sequences(sequences)
    mask = batch.mask & masks.causal()
    # Attention in a worker, whose torch has one thread.
    x = torch.ones(batch.total, 1, 4)
    assert torch.allclose(maskops.varlen_attention(x, x, x, mask=mask.spans(batch.total, batch.total)), x)
    return batch, mask.spans(batch.total, batch.total), mask


def loader(workers: int, **options: Any) -> DataLoader[list[int]]:
    sequences: Any = [list(range(length)) for length in (3, 1, 5, 2, 2, 6)]
    return DataLoader(sequences, batch_size=2, num_workers=workers, collate_fn=collate, **options)


def assert_same_batches(found: Iterator[Any]) -> None:
    for (batch, plan, mask), (batch_, plan_, _) in zip(found, loader(0), strict=True):
        assert torch.equal(batch.input_ids, batch_.input_ids) and torch.equal(batch.cu_seqlens, batch_.cu_seqlens)
        for other in (plan, mask.spans(batch.total, batch.total)):
            assert type(other) is maskops.RowSpans
            assert all(torch.equal(a, b) for a, b in zip(other, plan_, strict=True) if b is not None)


def test_workers_of_a_loader() -> None:
    """Forked workers, after this process has run the extension on several threads, pack and plan."""
    torch.set_num_threads(2)
    try:
        training_step(*inputs(0))
        assert_same_batches(iter(loader(2, multiprocessing_context="fork")))
    finally:
        torch.set_num_threads(1)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found")
def test_pinned_memory() -> None:
    """Without an accelerator pin_memory does nothing; with one it pins what the containers hold."""
    assert_same_batches(iter(loader(0, pin_memory=True)))
    batch, plan, _ = next(iter(loader(0)))
    pinned = functools.partial(torch.utils.data._utils.pin_memory.pin_memory, device=None)
    if torch.cuda.is_available():
        assert pinned(batch).input_ids.is_pinned() and pinned(plan).start.is_pinned()
    else:
        assert not batch.input_ids.is_pinned()
