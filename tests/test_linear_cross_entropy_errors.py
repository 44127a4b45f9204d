"""What maskops.linear_cross_entropy refuses, and in which words."""

import re
from typing import Any

import pytest
import torch

import maskops
from tests.served import AT_HOME, each_of

pytestmark = pytest.mark.devices

backend = each_of(AT_HOME)


HIDDEN, WEIGHT, TARGET = torch.zeros(2, 3, 8), torch.zeros(10, 8), torch.zeros(2, 3, dtype=torch.int64)
REFUSED: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "hidden: expected a tensor (..., H), got list", {"hidden": [1.0]}),
    (TypeError, "hidden has dtype int64: expected float32, bfloat16, float16 or float64", {"hidden": HIDDEN.long()}),
    (ValueError, "hidden has shape (): expected (..., H)", {"hidden": torch.zeros(())}),
    (TypeError, "weight: expected a tensor (V, H), got Linear", {"weight": torch.nn.Linear(8, 10)}),
    (TypeError, "weight has dtype complex64: expected float32", {"weight": WEIGHT.to(torch.complex64)}),
    (
        ValueError,
        "weight has shape (8, 10): expected (V, 8), a row for every word of the vocabulary, since hidden has shape "
        "(2, 3, 8): weight.t() is that",
        {"weight": torch.zeros(8, 10)},
    ),
    (ValueError, "weight has shape (0, 8): expected (V, 8)", {"weight": torch.zeros(0, 8)}),
    (ValueError, "weight is on meta, hidden on cpu: put them on one device", {"weight": WEIGHT.to("meta")}),
    (ValueError, "bias has shape (8,): expected (10,), as weight has rows", {"bias": torch.zeros(8)}),
    (TypeError, "bias: expected a tensor (V,) or None, got float", {"bias": 1.0}),
    (
        ValueError,
        "target has shape (3, 2): expected (2, 3), the shape of hidden (2, 3, 8) without the last dimension",
        {"target": TARGET.mT},
    ),
    (TypeError, "target has dtype int16: expected int64 or int32", {"target": TARGET.short()}),
    (
        TypeError,
        "target has dtype float32: expected int64 or int32 labels. Probabilities for every token are as large as the "
        "logits: maskops.cross_entropy(torch.nn.functional.linear(hidden, weight, bias), target)",
        {"target": torch.zeros(2, 3, 10)},
    ),
    (ValueError, "class_weights has shape (8,): expected (10,)", {"class_weights": torch.ones(8)}),
    (
        ValueError,
        "target: the label that row 0 of the logits is scored against is 10, outside the vocabulary of 10",
        {"target": TARGET + 10},
    ),
    (ValueError, "mask has shape (2, 1): expected one value per target", {"mask": torch.ones(2, 1).bool()}),
    (ValueError, "label_smoothing is 2.0: expected a number in [0, 1]", {"label_smoothing": 2.0}),
    (ValueError, "reduction is 'median': expected one of", {"reduction": "median"}),
    (ValueError, "cu_seqlens", {"cu_seqlens": torch.tensor([0, 4, 2])}),
]


@pytest.mark.parametrize(("kind", "words", "changes"), REFUSED, ids=[words[:40] for _, words, _ in REFUSED])
def test_refusals(backend: str, kind: type[Exception], words: str, changes: dict[str, Any]) -> None:
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "target": TARGET} | changes
    with pytest.raises(kind, match=re.escape(words)):
        maskops.linear_cross_entropy(**arguments)
