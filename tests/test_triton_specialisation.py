"""Kernels on Triton are compiled once, however the lengths of batches change: no launch has a cache key of its own.

Launches are recorded and never run; their keys are what Triton's own binder makes of the arguments.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import maskops
from maskops import masks

pytestmark = pytest.mark.skipif(
    maskops.backends()["triton"] != "available", reason=f"triton: {maskops.backends()['triton']}"
)

TOTALS = (1025, 1040, 1137, 1280, 2047)
"""Odd ones, multiples of 16 and of a tile: whatever a kernel could be specialised on differs between them. Plans of
other sizes may take other blocks, of which there are three."""


def key_of(kernel: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> str:
    """What Triton would look a launch up by, as though the kernel were compiled for a device."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    compiled = JITFunction(kernel.fn, **kernel.kwargs)
    binder = create_function_from_signature(
        inspect.signature(kernel.fn), compiled.params, make_backend(GPUTarget("cuda", 90, 32))
    )
    _, specialization, options = binder(*arguments, **keywords)
    names = [parameter.name for parameter in compiled.params]
    return repr((sorted(zip(names, map(str, specialization), strict=True)), sorted(map(str, options.items()))))


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, set[str]]]:
    """The keys of all launches, by kernel."""
    from triton.runtime.interpreter import InterpretedFunction

    found: dict[str, set[str]] = defaultdict(set)

    def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        del grid, warmup
        found[kernel.fn.__name__].add(key_of(kernel, arguments, keywords))

    monkeypatch.setattr(InterpretedFunction, "run", record)
    with maskops.use_backend("triton", fallback="error"):
        yield found


def documents(total: int) -> Tensor:
    """Offsets of a few documents, more of them where there is more."""
    return torch.tensor([0, *range(total % 37 + 5, total - 3, total // 5 + 7), total], dtype=torch.int32)


def leaves(*sizes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(size, dtype=torch.bfloat16).requires_grad_() for size in sizes]


def packed(total: int) -> None:
    cu_seqlens = documents(total)
    q, k, v = leaves((total, 4, 32), (total, 4, 32), (total, 4, 16))
    out, lse = maskops.varlen_attention(q, k, v, cu_seqlens, mask=masks.causal(), return_lse=True)
    torch.autograd.backward([out, lse], [torch.ones_like(out), torch.ones_like(lse)])


def padded(total: int) -> None:
    batch, length = total % 3 + 1, total
    q, k, v = leaves(*[(batch, 4, length, 32)] * 3)
    sinks = torch.zeros(4, requires_grad=True)
    mask = masks.padding(torch.full((batch,), length - 1)) & masks.causal()
    maskops.attention(q, k, v, mask, sinks=sinks).sum().backward()


def positions(total: int) -> None:
    cu_seqlens = documents(total)
    q, k, v = leaves(*[(total, 4, 32)] * 3)
    slopes = torch.rand(cu_seqlens.numel() - 1, 4, requires_grad=True)
    maskops.varlen_attention(q, k, v, cu_seqlens, alibi_slopes=slopes, dropout_p=0.1).sum().backward()


def dense(total: int) -> None:
    q, k, v = leaves(*[(2, 4, total, 32)] * 3)
    maskops.attention(q, k, v, masks.dense(torch.ones(1, 1, total, total, dtype=torch.bool).tril())).sum().backward()


def loss(total: int) -> None:
    (logits,) = leaves((total, 320))
    maskops.cross_entropy(logits, torch.zeros(total, dtype=torch.long), mask=torch.ones(total).bool()).backward()


def linear_loss(total: int) -> None:
    hidden, weight = leaves((total, 32), (320, 32))
    maskops.linear_cross_entropy(hidden, weight, torch.zeros(total, dtype=torch.long)).backward()


def softmax(total: int) -> None:
    length = -(-total // 8) * 8  # rows of whole groups of 16 bytes; others are a kernel of their own, the same for all
    (x,) = leaves((2, 4, total, length))
    maskops.masked_softmax(x, masks.key_padding(torch.tensor([length, total // 2]))).sum().backward()


def decode(total: int) -> None:
    lengths = torch.full((total % 5 + 1,), total // 2)
    q, k, v = leaves((lengths.numel(), 4, 1, 32), *[(lengths.numel(), 2, 1024, 32)] * 2)
    maskops.decode_attention(q.detach(), k.detach(), v.detach(), lengths)


CALLS: dict[str, tuple[Callable[[int], None], set[str]]] = {
    "packed": (packed, {"attention_forward_kernel", "row_terms_kernel", "grad_queries_kernel", "grad_keys_kernel"}),
    "padded": (padded, {"attention_forward_kernel", "row_terms_kernel", "grad_queries_kernel", "grad_keys_kernel"}),
    "positions": (positions, {"grad_queries_kernel", "grad_keys_kernel", "renewed_sums_kernel", "grad_slopes_kernel"}),
    "dense": (dense, {"attention_forward_kernel", "grad_queries_kernel", "grad_keys_kernel"}),
    "loss": (loss, set()),
    "linear loss": (linear_loss, set()),
    "softmax": (softmax, set()),
    "decode": (decode, {"decode_forward_kernel"}),
}


@pytest.mark.parametrize("name", CALLS)
def test_lengths_compile_nothing_anew(name: str, keys: dict[str, set[str]]) -> None:
    call, kernels = CALLS[name]
    for total in TOTALS:
        call(total)
    assert keys and kernels <= set(keys)
    several = {kernel: len(found) for kernel, found in keys.items() if len(found) > 1}
    assert not several


def test_a_key_tells_what_is_compiled_apart(keys: dict[str, set[str]]) -> None:
    """The test of the tests: another width, or a stride that is no multiple of 16, is another kernel."""
    packed(128)
    (before,) = keys["grad_keys_kernel"]
    assert "'WIDTH'" in before
    q, k, v = (x[:, :3] for x in leaves(*[(128, 4, 40)] * 3))
    maskops.varlen_attention(q, k, v, documents(128), mask=masks.causal()).sum().backward()
    assert len(keys["grad_keys_kernel"]) == 2
