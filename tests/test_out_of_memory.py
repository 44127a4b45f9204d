"""Where an operator finds no memory the error is torch.OutOfMemoryError, and what it had so far is given back."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch

import maskops
from maskops import backend as backends
from maskops import extension, masks
from maskops.packing import pad_input, unpad_input
from tools import emulation


def attention() -> object:
    q, k, v = (torch.randn(1, 2, 6, 8, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, 2, 6, 6, requires_grad=True)
    out = maskops.attention(q, k, v, masks.causal(), bias=bias)
    return torch.autograd.grad(out.sum(), (q, k, v, bias))


def dense_attention() -> object:
    q = torch.randn(1, 1, 6, 8)
    return maskops.attention(q, q, q, masks.dense(torch.rand(1, 1, 6, 6) < 0.5))


def softmax() -> object:
    x = torch.randn(2, 6, 6, requires_grad=True)
    weights, lse = maskops.masked_softmax(x, masks.causal(), return_lse=True)
    return torch.autograd.grad(weights[..., 0].sum() + lse.sum(), x)


def cross_entropy() -> object:
    logits = torch.randn(5, 7, requires_grad=True)
    loss = maskops.cross_entropy(logits, torch.tensor([0, 1, -100, 6, 2]))
    return torch.autograd.grad(loss, logits)


def linear_cross_entropy() -> object:
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    loss = maskops.linear_cross_entropy(hidden, weight, torch.tensor([0, 1, -100, 6, 2]))
    return torch.autograd.grad(loss, (hidden, weight))


def packing() -> object:
    packed, indices, *_ = unpad_input(torch.randn(2, 4, 3), torch.tensor([[1, 1, 0, 0], [1, 0, 1, 1]]), capacity=8)
    return pad_input(packed, indices, 2, 4)


def decode() -> object:
    cache = torch.randn(1, 1, 8, 8)
    return maskops.decode_attention(torch.randn(1, 1, 1, 8), cache, cache, torch.tensor([5]))


@pytest.fixture
def failing():
    if reasons := backends.BACKENDS["cuda"].refusals_of("cpu"):
        pytest.skip(f"cuda: {'; '.join(reasons)}")
    if not extension.cuda_is_emulated():
        pytest.skip("only the emulation makes an allocation fail")
    fail = ctypes.CDLL(str(emulation.library())).maskops_emulate_failing_allocation
    fail.argtypes = [ctypes.c_int64]
    with maskops.use_backend("cuda", fallback="error"):
        yield fail
    fail(-1)


@pytest.mark.parametrize(
    "call", [attention, dense_attention, softmax, cross_entropy, linear_cross_entropy, packing, decode]
)
def test_every_allocation_of_a_call_may_fail(failing, call: Callable[[], object]) -> None:
    call()
    said = []
    is_served = False
    while not is_served:
        failing(len(said))
        try:
            call()
            is_served = True
        except torch.OutOfMemoryError as error:
            said.append(str(error))
        finally:
            failing(-1)
    assert len(said) >= 2
    for words in said:
        assert words.startswith("maskops: out of memory: no ") and "on the processor" in words
    call()


def test_compiled_code_says_the_same(failing) -> None:
    logits = torch.randn(5, 7)
    compiled = torch.compile(lambda x: maskops.masked_softmax(x, masks.full()), fullgraph=True, backend="aot_eager")
    compiled(logits)
    failing(0)
    with pytest.raises(RuntimeError, match="maskops: out of memory"):
        compiled(logits)


def test_on_the_processor() -> None:
    """More elements than an address space holds, of which one row is there."""
    if reasons := backends.BACKENDS["cpu"].refusals_of("cpu"):
        pytest.skip(f"cpu: {'; '.join(reasons)}")
    x = torch.zeros(1, 1 << 10).expand(1 << 38, 1 << 10)
    with pytest.raises(torch.OutOfMemoryError, match=r"out of memory: no 1073741824\.00 MiB on the processor"):
        maskops.masked_softmax(x, torch.ones(1, 1, dtype=torch.bool))
