"""Span attention on Triton, interpreted: what the cases of every backend do not say."""

import math

import pytest
import torch
from torch import Tensor

import maskops
from maskops import masks
from maskops.masks import Mask
from maskops.ops.attention.registration import Features, span_attention
from maskops.ops.attention.triton_kernels import forward

pytestmark = pytest.mark.devices


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, **features: object) -> tuple[Tensor, Tensor]:
    """The kernel, on a plan as devices have it."""
    wanted = {"order": True, "bits": True, "positions": True}
    spans = mask.spans(q.shape[2], k.shape[2], batch=q.shape[0], device=q.device, **wanted)
    chosen = Features(softmax_scale=1.0 / math.sqrt(q.shape[3]), **features)  # type: ignore[arg-type]
    return span_attention(q, k, v, spans, chosen, "triton")


MASKS = {
    "full": masks.full(),
    "causal": masks.causal(),
    "window": masks.sliding_window(60, 3),
    "two spans": masks.causal() & (masks.sliding_window(40, 0) | masks.prefix(9)),
    "documents": masks.documents(cu_seqlens=torch.tensor([0, 5, 140, 141, 160])) & masks.causal(),
    "dense": masks.dense(torch.rand(1, 1, 170, 170, generator=torch.Generator().manual_seed(0)) < 0.1),
}


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", MASKS)
def test_splits_of_the_keys(name: str, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of the keys, each in its own program, are merged to the same result."""
    monkeypatch.setattr(forward, "KEYS_OF_A_SPLIT", 170 // splits)
    q, k, v = torch.randn(1, 2, 170, 16), torch.randn(1, 1, 170, 16), torch.randn(1, 1, 170, 8)
    sinks = torch.tensor([[0.5, -1.0]])
    out, lse = attend(q, k, v, MASKS[name], sinks=sinks)
    expected, expected_lse = maskops.attention(
        q, k, v, MASKS[name], sinks=sinks[0], return_lse=True, backend="reference"
    )
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=2e-6)
