"""One small case of each op, backend and pass, against the reference in float64: a minute on a device.

What a device shows first: a kernel that does not launch, a wrong stream, a wrong address, a missing barrier.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import maskops
from maskops import masks, testing
from maskops.backend import BACKENDS
from maskops.ops.attention.api import attention
from tests.served import AT_HOME, for_devices

pytestmark = [pytest.mark.devices, pytest.mark.gpu_smoke]

Outputs = tuple[Tensor, ...]
Problem = tuple[dict[str, tuple[int, ...]], Callable[[str, dict[str, Tensor]], Outputs]]

OFFSETS = torch.tensor([0, 70, 70, 75, 201], dtype=torch.int32)
LENGTHS = torch.tensor([40, 75])
TARGET = (torch.arange(48) * 7 % 320).masked_fill(torch.arange(48) % 4 == 1, -100)


def _packed(backend: str, x: dict[str, Tensor]) -> Outputs:
    mask = masks.documents(cu_seqlens=OFFSETS) & masks.causal()
    plan = mask.spans(210, 210, device=x["q"].device)
    out, lse = maskops.varlen_attention(x["q"], x["k"], x["v"], mask=plan, return_lse=True, backend=backend)
    return out, lse.nan_to_num(neginf=0.0)


def _padded(backend: str, x: dict[str, Tensor]) -> Outputs:
    mask = masks.padding(LENGTHS) & masks.causal() & (masks.sliding_window(20, 0) | masks.prefix(3))
    features: dict[str, Any] = {name: x[name] for name in ("bias", "sinks", "alibi_slopes")}
    return (attention(x["q"], x["k"], x["v"], mask, softcap=3.0, backend=backend, **features),)


def _decoded(backend: str, x: dict[str, Tensor]) -> Outputs:
    pages = [x[name].detach().unflatten(2, (-1, 16)).transpose(1, 2).flatten(0, 1).contiguous() for name in "kv"]
    table = torch.arange(16, dtype=torch.int32).view(2, 8)
    queries = x["q"].detach()
    whole = maskops.decode_attention(queries, x["k"].detach(), x["v"].detach(), LENGTHS, backend=backend)
    return whole, maskops.decode_attention(queries, *pages, LENGTHS, block_table=table, backend=backend)


def _loss(backend: str, x: dict[str, Tensor]) -> Outputs:
    with maskops.use_backend(backend, fallback="error"):
        found = maskops.cross_entropy(x["logits"], TARGET, label_smoothing=0.1, z_loss=1e-3, return_lse=True)
    return found.loss, found.lse


def _linear_loss(backend: str, x: dict[str, Tensor]) -> Outputs:
    with maskops.use_backend(backend, fallback="error"):
        return (maskops.linear_cross_entropy(x["hidden"], x["weight"], TARGET),)


def _softmax(backend: str, x: dict[str, Tensor]) -> Outputs:
    mask = masks.padding(LENGTHS) & masks.causal()
    with maskops.use_backend(backend, fallback="error"):
        return (maskops.masked_softmax(x["scores"], mask),)


QKV = {"q": (2, 4, 75, 64), "k": (2, 2, 75, 64), "v": (2, 2, 75, 64)}
PROBLEMS: dict[str, Problem] = {
    "attention, packed": ({"q": (210, 4, 64), "k": (210, 2, 64), "v": (210, 2, 64)}, _packed),
    "attention, padded, all features": (
        {**QKV, "bias": (1, 4, 75, 75), "sinks": (4,), "alibi_slopes": (4,)},
        _padded,
    ),
    "decode_attention": ({"q": (2, 4, 1, 64), "k": (2, 2, 128, 64), "v": (2, 2, 128, 64)}, _decoded),
    "cross_entropy": ({"logits": (48, 333)}, _loss),
    "linear_cross_entropy": ({"hidden": (48, 32), "weight": (333, 32)}, _linear_loss),
    "masked_softmax": ({"scores": (2, 3, 75, 75)}, _softmax),
}


def served(name: str) -> list[str]:
    op = name.split(",")[0]
    found = dict.fromkeys((*AT_HOME, *for_devices(op)))
    return [backend for backend in found if backend != "reference" and op in BACKENDS[backend].ops]


DTYPES = {"half": torch.float16, "bfloat16": torch.bfloat16}
WORK = [(name, backend) for name in PROBLEMS for backend in served(name)]
# Interpreted, Triton takes bfloat16 many times slower than float16: its own tests have some of it.
CASES = [
    pytest.param(name, backend, dtype, id=f"{name}-{backend}-{element}")
    for name, backend in WORK
    for element, dtype in DTYPES.items()
    if element == "half" or backend != "triton" or backend in AT_HOME
]


def outcome(name: str, backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs and, where there are some, gradients, of inputs that any dtype under test can hold."""
    sizes, compute = PROBLEMS[name]
    generator = torch.Generator().manual_seed(0)
    leaves = {key: torch.randn(size, generator=generator).bfloat16() for key, size in sizes.items()}
    keep = ("bias", "sinks", "alibi_slopes")
    wide = torch.float32 if dtype != torch.float64 else dtype
    leaves = {key: x.to(wide if key in keep else dtype).requires_grad_() for key, x in leaves.items()}
    outputs = compute(backend, leaves)
    found = {f"output {index}": x.detach() for index, x in enumerate(outputs)}
    if outputs[0].requires_grad:
        upstream = [torch.linspace(-1, 1, x.numel()).view(x.shape).to(x.dtype) for x in outputs]
        gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
        found.update({f"d{key}": x for key, x in zip(leaves, gradients, strict=True)})
    return found


@pytest.mark.parametrize(("name", "backend", "dtype"), CASES)
def test_op(name: str, backend: str, dtype: torch.dtype) -> None:
    if (reason := BACKENDS[backend].unavailable()) is not None:
        pytest.skip(f"{backend}: {reason}")
    exact = outcome(name, "reference", torch.float64)
    plain = outcome(name, "reference", dtype)
    found = outcome(name, backend, dtype)
    assert found.keys() == exact.keys()
    largest = max(float(exact[key].abs().max()) for key in exact if key.startswith(("d", "output")))
    for key, expected in exact.items():
        magnitude = largest if key.startswith("d") else None
        budget = testing.error_budget(found[key], plain[key], expected, dtype, magnitude)
        assert budget.passed, f"{key}: error {budget.error:.3g}, limit {budget.limit:.3g}"


def test_no_op_is_left_out() -> None:
    covered = {name.split(",")[0] for name in PROBLEMS}
    assert covered == set(BACKENDS["reference"].ops) - {"append_kv"}  # appended to by tests/test_decode.py alone
