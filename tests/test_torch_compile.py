"""torch.compile over streams of ragged batches: how many graphs it makes, and that each of them is right."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch._functorch._aot_autograd.utils import make_boxed_func

import maskops
from maskops import masks

HEADS, HEAD_DIM, VOCABULARY = 2, 8, 7
CAPACITY, SEQUENCES = 6000, 12


class Counting:
    """A backend for torch.compile that generates no code, and counts the graphs that it is given."""

    def __init__(self) -> None:
        self.forwards = 0
        self.backwards = 0
        self.compiler = aot_autograd(fw_compiler=self._forward, bw_compiler=self._backward)

    def _forward(self, module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.forwards += 1
        return make_boxed_func(module.forward)

    def _backward(self, module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.backwards += 1
        return make_boxed_func(module.forward)

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        return self.compiler(module, inputs)  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Forgets what other tests compiled; one graph too many is an error, not a fallback to eager code."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        yield


def available(name: str) -> str:
    """The name, if that backend runs here."""
    if (reason := maskops.backends()[name]) != "available":
        pytest.skip(f"{name}: {reason}")
    return name


def ragged_lengths() -> list[list[int]]:
    """Twenty batches: one sequence, many, empty ones, few tokens, and one that is longer than a piece of a sum.

    None has a single token: torch itself compiles sizes of 1 apart.
    """
    generator = torch.Generator().manual_seed(1)
    stream = [[9, 4, 17], [31], [2], [0, 5], [1, 1, 1, 1], [5, 0, 0, 2], [4000, 130], [128, 64], [1, 0, 1]]
    while len(stream) < 20:
        count = int(torch.randint(1, SEQUENCES, (), generator=generator))
        stream.append(torch.randint(1, 70, (count,), generator=generator).tolist())
    return stream


def packed_batches(capacity: int | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """x (total, heads, head_dim), cu_seqlens, target (total,)."""
    for lengths in ragged_lengths():
        cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        total = int(cu_seqlens[-1])
        if capacity is not None:
            cu_seqlens = torch.cat((cu_seqlens, cu_seqlens[-1:].expand(SEQUENCES + 1 - len(cu_seqlens))))
            total = capacity
        yield torch.randn(total, HEADS, HEAD_DIM), cu_seqlens, torch.randint(VOCABULARY, (total,))


def padded_batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """x (batch, heads, length, head_dim), lengths, target (batch, length); torch compiles a size of 1 apart."""
    for lengths in ragged_lengths():
        lengths = lengths if len(lengths) > 1 else [*lengths, 3]
        longest = max(2, min(300, max(lengths)))
        x = torch.randn(len(lengths), HEADS, longest, HEAD_DIM)
        target = torch.randint(VOCABULARY, (len(lengths), longest))
        yield x, torch.tensor(lengths).clamp(max=longest), target


WEIGHT = torch.linspace(-1, 1, HEADS * HEAD_DIM * VOCABULARY).reshape(HEADS * HEAD_DIM, VOCABULARY)


def packed_step(x: Tensor, cu_seqlens: Tensor, target: Tensor) -> Tensor:
    """Attention planned from the offsets inside, and the loss of the next token."""
    out = maskops.varlen_attention(x, x * 0.5, x + 1, cu_seqlens, mask=masks.causal() & masks.sliding_window(40, 0))
    logits = out.flatten(1) @ WEIGHT
    return maskops.cross_entropy(logits, target, cu_seqlens=cu_seqlens, shift=True, reduction="sequence_mean")


def padded_step(x: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
    """The same, padded."""
    out = maskops.attention(x, x * 0.5, x + 1, masks.padding(lengths) & masks.causal())
    logits = out.transpose(1, 2).flatten(2) @ WEIGHT
    real = torch.arange(x.shape[2]) < lengths[:, None]
    return maskops.cross_entropy(logits, target, mask=real, shift=True, reduction="sequence_mean")


def run_stream(
    step: Callable[..., Tensor], batches: Iterator[tuple[Tensor, ...]], training: bool, **options: Any
) -> Counting:
    """Runs every batch, compiled and eager, and compares losses and gradients."""
    counting = Counting()
    run = torch.compile(step, fullgraph=True, backend=counting, **options)
    for x, *rest in batches:
        x.requires_grad_(training)
        loss, expected = run(x, *rest), step(x, *rest)
        assert torch.allclose(loss, expected, rtol=1e-5, atol=1e-6)
        if training:
            (grad,), (grad_,) = torch.autograd.grad(loss, x), torch.autograd.grad(expected, x)
            assert torch.allclose(grad, grad_, atol=1e-6)
    return counting


@pytest.mark.parametrize(("layout", "training"), [("packed", False), ("packed", True), ("padded", True)])
def test_two_graphs_serve_a_ragged_stream(layout: str, training: bool) -> None:
    """One for the first batch, whose sizes torch takes for constants, and one for all others."""
    with maskops.use_backend(available("cpu"), fallback="error"):
        step, batches = (packed_step, packed_batches()) if layout == "packed" else (padded_step, padded_batches())
        counting = run_stream(step, batches, training)
    assert (counting.forwards, counting.backwards) == (2, 2 if training else 0)


def test_one_graph_serves_a_stream_of_open_sizes() -> None:
    """No more with dynamic=True, where torch takes our floats of default arguments for unknown as well."""
    with maskops.use_backend(available("cpu"), fallback="error"):
        counting = run_stream(packed_step, packed_batches(), training=True, dynamic=True)
    assert (counting.forwards, counting.backwards) == (1, 1)


def test_one_graph_serves_a_capacity() -> None:
    with maskops.use_backend(available("cpu"), fallback="error"):
        counting = run_stream(packed_step, packed_batches(CAPACITY), training=True)
    assert (counting.forwards, counting.backwards) == (1, 1)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_two_graphs_of_the_reference(layout: str) -> None:
    def short(batches: Iterator[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
        return (batch for batch in batches if batch[0].shape[0] < 1000)

    with maskops.use_backend("reference"):
        if layout == "packed":
            counting = run_stream(packed_step, short(packed_batches()), training=True)
        else:
            counting = run_stream(padded_step, short(padded_batches()), training=False)
    assert (counting.forwards, counting.backwards) == (2, 2 if layout == "packed" else 0)


def test_two_graphs_of_plans_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks planned by torch operations, as on every device without a kernel of its own for that; dense ones too."""
    monkeypatch.setattr("maskops.lowering.planner", lambda device: None)

    def plans(holes: Tensor, cu_seqlens: Tensor, ids: Tensor, lengths: Tensor) -> list[tuple[Tensor | None, ...]]:
        length = holes.shape[1]
        documents = masks.documents(cu_seqlens=cu_seqlens)
        every = [
            documents & (masks.causal() & (masks.sliding_window(5, 0) | masks.prefix(2))),
            masks.documents(ids) & masks.chunked(7),
            masks.dense(holes[None, :, :, None] & holes[None, :, None]) & masks.causal(),
        ]
        plans = [mask.spans(length, length, positions=True) for mask in every]
        # The batch is that of the lengths, which torch may not take for a constant here.
        plans.append((masks.padding(lengths) & masks.causal()).spans(length, length, grad=False))
        return [tuple(plan) for plan in plans]

    # Dynamo's graphs alone: test_spans.py takes the same operations through the ahead-of-time compiler.
    counting = CompileCounter()
    run = torch.compile(plans, fullgraph=True, backend=counting)
    # Above 64 keys: key_tiles has a row for each 64 keys, and torch compiles sizes of 1 apart.
    for lengths in ([9, 4, 170], [31, 60], [66], [65, 0, 2], [600, 130], [128, 64], [3, 40, 5, 60]):
        total = sum(lengths)
        holes = torch.rand(1, total) < 0.8
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        arguments = (holes, cu_seqlens, ids, torch.tensor([total, *lengths]))
        for traced, eager in zip(run(*arguments), plans(*arguments), strict=True):
            for mine, expected in zip(traced, eager, strict=True):
                assert mine is None if expected is None else torch.equal(mine, expected)
    assert counting.frame_count == 2


@pytest.mark.parametrize("dynamic", [None, True])
def test_numbers_stay_open(dynamic: bool | None) -> None:
    """A schedule of coefficients makes no graph for each of its values."""

    def step(x: Tensor, target: Tensor, scale: float, softcap: float, z_loss: float, temperature: float) -> Tensor:
        out = maskops.attention(x, x * 0.5, x + 1, masks.causal(), softmax_scale=scale, softcap=softcap)
        logits = out.transpose(1, 2).flatten(2) @ WEIGHT
        return maskops.cross_entropy(
            logits, target, z_loss=z_loss, label_smoothing=z_loss, softcap=softcap, logit_scale=temperature
        )

    def batches() -> Iterator[tuple[Any, ...]]:
        for number in range(1, 7):
            x, target = torch.randn(2, HEADS, 9, HEAD_DIM), torch.randint(VOCABULARY, (2, 9))
            yield x, target, 0.3 * number, 2.0 + number, 0.01 * number, 1.1 * number

    with maskops.use_backend(available("cpu"), fallback="error"):
        counting = run_stream(step, batches(), training=True, dynamic=dynamic)
    assert (counting.forwards, counting.backwards) == ((1, 1) if dynamic else (2, 2))


def test_numbers_of_decoding_stay_open() -> None:
    def step(q: Tensor, keys: Tensor, lengths: Tensor, scale: float, softcap: float) -> Tensor:
        return maskops.decode_attention(q, keys, keys, lengths, softmax_scale=scale, softcap=softcap)

    def batches() -> Iterator[tuple[Any, ...]]:
        for number in range(1, 5):
            keys, lengths = torch.randn(2, HEADS, 9, HEAD_DIM), torch.tensor([9, number])
            yield torch.randn(2, HEADS, 1, HEAD_DIM), keys, lengths, 0.3 * number, 1.0 + number

    with maskops.use_backend(available("cpu"), fallback="error"):
        assert run_stream(step, batches(), training=False).forwards == 2


def test_inductor() -> None:
    """The default compiler, once: a training step over the stream, with open numbers and one tensor in all roles."""

    def step(x: Tensor, cu_seqlens: Tensor, target: Tensor, softcap: float) -> Tensor:
        out = maskops.varlen_attention(x, x * 0.5, x + 1, cu_seqlens, mask=masks.causal(), softcap=softcap)
        alike, lse = maskops.varlen_attention(x, x, x, cu_seqlens, cu_seqlens, mask=masks.causal(), return_lse=True)
        out = out + alike * lse.nan_to_num(neginf=0.0).transpose(0, 1)[..., None]
        return maskops.cross_entropy(out.flatten(1) @ WEIGHT, target, cu_seqlens=cu_seqlens, shift=True, z_loss=1e-3)

    run = torch.compile(step, fullgraph=True, dynamic=True)
    with maskops.use_backend(available("cpu"), fallback="error"):
        for number, (x, cu_seqlens, target) in enumerate(itertools.islice(packed_batches(), 8)):
            x.requires_grad_()
            loss, expected = run(x, cu_seqlens, target, 5.0 + number), step(x, cu_seqlens, target, 5.0 + number)
            (grad,), (grad_,) = torch.autograd.grad(loss, x), torch.autograd.grad(expected, x)
            assert torch.allclose(loss, expected, rtol=1e-5, atol=1e-6) and torch.allclose(grad, grad_, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
