"""build_plan against the torch path, and against each mask's own dense form, over masks that nobody chose."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import strategies as st

from maskops.backend import planner
from tests.fuzz import Property
from tests.test_plan import check_same
from tests.test_spans import random_mask

pytestmark = pytest.mark.skipif(
    planner("cpu") is None, reason="the C++ extension is not built, so there is no operator"
)


def check_plan(generator: random.Random) -> None:
    mask, q_len, k_len = random_mask(generator)
    check_same(mask, q_len, k_len, grad=generator.random() < 0.8, positions=generator.random() < 0.5)
    spans = mask.spans(q_len, k_len)
    expected = mask.to_dense(q_len, k_len)
    assert torch.equal(spans.to_dense().expand_as(expected), expected)


PROPERTIES = {"build_plan": Property(st.randoms(use_true_random=False), check_plan)}

test_build_plan = PROPERTIES["build_plan"].test(60)
