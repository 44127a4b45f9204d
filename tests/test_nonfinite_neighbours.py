"""A value that is not finite stays in its document: others see it only if they share a tile and all are shorter.

Documents border on each other amid the tiles of keys and of rows, so that kernels compute products of the one with the
other and select; what is selected must not have been added before.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import maskops
from maskops import masks
from maskops.backend import BACKENDS
from tests.served import AT_HOME, DEVICE

pytestmark = pytest.mark.devices

KERNELS = [name for name in ("cpu", "triton", "cuda") if DEVICE == "cpu" or name in AT_HOME]
OFFSETS = (0, 130, 150, 280)
"""The outer two are longer than a tile of 128 rows: neither reaches the other, nor the short one between them."""

TENSORS = ("q", "k", "v", "grad_out", "grad_lse")
CALLS: dict[str, tuple[int, float, dict[str, Any]]] = {
    "NaN at the end of the first, causal": (129, math.nan, {"pattern": masks.causal()}),
    "infinity at the beginning of the last, window and features": (
        151,
        math.inf,
        {"pattern": masks.sliding_window(90, 60), "softcap": 2.0, "sinks": torch.tensor([0.5])},
    ),
}


def draw(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def results(backend: str, name: str, poisoned: str = "") -> dict[str, Tensor]:
    """Outputs and gradients; of one tensor all numbers of a row are replaced."""
    row, value, keywords = CALLS[name]
    rows = OFFSETS[-1]
    inputs = {
        "q": draw(1, 1, rows, 8, seed=1), "k": draw(1, 1, rows, 8, seed=2), "v": draw(1, 1, rows, 6, seed=3),
        "grad_out": draw(1, 1, rows, 6, seed=4), "grad_lse": draw(1, 1, rows, seed=5),
    }  # fmt: skip
    if poisoned:
        inputs[poisoned][:, :, row] = value
    placed = {x: y.to(DEVICE) if isinstance(y, Tensor) else y for x, y in (inputs | keywords).items()}
    mask = masks.documents(cu_seqlens=torch.tensor(OFFSETS)) & placed.pop("pattern")
    leaves = [placed.pop(x).requires_grad_() for x in "qkv"]
    received = [placed.pop("grad_out"), placed.pop("grad_lse")]
    out, lse = maskops.attention(*leaves, mask, return_lse=True, backend=backend, **placed)
    grads = torch.autograd.grad([out, lse], leaves, received)
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


@functools.cache
def clean(backend: str, name: str) -> dict[str, Tensor]:
    """What is found without it."""
    return results(backend, name)


@pytest.mark.parametrize("poisoned", TENSORS)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", KERNELS)
def test_it_reaches_no_other_document(backend: str, name: str, poisoned: str) -> None:
    if (reason := BACKENDS[backend].unavailable()) is not None:
        pytest.skip(f"{backend}: {reason}")
    document = slice(*OFFSETS[:2]) if CALLS[name][0] < OFFSETS[1] else slice(*OFFSETS[2:])
    others = torch.ones(OFFSETS[-1], dtype=torch.bool)
    others[document] = False
    expected, found = clean(backend, name), results(backend, name, poisoned)
    assert not all(bool(x[:, :, document].isfinite().all()) for x in found.values()), "the value is lost"
    for x, there in found.items():
        assert torch.equal(there[:, :, others], expected[x][:, :, others]), x


@pytest.mark.parametrize("width", [5, 8])
@pytest.mark.parametrize("poisoned", ["q", "k", "v", "grad_out"])
def test_cuda_keeps_it_from_documents_that_share_a_tile_too(poisoned: str, width: int) -> None:
    """Its products select where a tile holds such a value: no document reaches another, nor a head the next.

    Rows of 8 numbers are read in vectors; the value is in another place of them each time.
    """
    if reasons := BACKENDS["cuda"].refusals_of(DEVICE):
        pytest.skip(f"cuda: {'; '.join(reasons)}")
    offsets = [0, 70, 200, 205, 208]
    mask = masks.documents(cu_seqlens=torch.tensor(offsets)) & masks.causal()
    inputs = {name: draw(1, 2, 208, width, seed=at) for at, name in enumerate(("q", "k", "v", "grad_out"))}

    def computed(tensors: dict[str, Tensor]) -> list[Tensor]:
        leaves = [tensors[name].clone().requires_grad_() for name in "qkv"]
        out, lse = maskops.attention(*leaves, mask, return_lse=True, backend="cuda")
        return [out.detach(), lse.detach()[..., None], *torch.autograd.grad(out, leaves, tensors["grad_out"])]

    expected = computed(inputs)
    for document, (first, end) in enumerate(itertools.pairwise(offsets)):
        others = torch.ones(208, dtype=torch.bool)
        others[first:end] = False
        value = (math.nan, math.inf)[document % 2]
        changed = inputs[poisoned].clone()
        changed[:, 1, [first, end - 1], document] = value
        found = computed(inputs | {poisoned: changed})
        assert not all(bool(x.isfinite().all()) for x in found), "the value is lost"
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours[:, :, others], theirs[:, :, others]), document
            assert torch.equal(ours[:, 0], theirs[:, 0]), document
