"""`--device`: what makes tensors places them, what a module already holds is moved, other tests are left out."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from maskops import masks
from tests import placement, served
from tests.placement import PlacedTorch, moved


def test_tensors_are_made_as_before_and_then_moved() -> None:
    placed = PlacedTorch("meta")
    for made in (
        placed.randn(2, 3, generator=torch.Generator().manual_seed(0)),
        placed.tensor([1, 2]),
        placed.arange(3),
        placed.empty(2, 3),
        placed.empty_strided((2, 2), (1, 5)),
    ):
        assert made.device.type == "meta"
    assert placed.empty_strided((2, 2), (1, 5)).stride() == (1, 5)
    assert placed.zeros(2, device="cpu").device.type == "cpu"
    leaf = placed.randn(2, requires_grad=True)
    assert leaf.is_leaf and leaf.requires_grad
    assert placed.float32 is torch.float32 and placed.nn is torch.nn and placed.Tensor is Tensor
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(PlacedTorch("cpu").rand(3), expected)


def test_what_a_module_holds_is_moved() -> None:
    leaf = torch.ones(2, requires_grad=True)
    held = {"a": leaf, "b": [leaf.detach(), (1, "x")], "c": 3}
    found = moved(held, "meta")
    assert found["a"].is_meta and found["a"].requires_grad and found["b"][0].is_meta and found["b"][1] == (1, "x")
    mask = moved((masks.padding(torch.tensor([3, 1])) & masks.causal(),), "meta")[0]
    assert mask.layouts[0].tensor.is_meta and str(mask) == str(masks.padding(torch.tensor([3, 1])) & masks.causal())
    plain = {"a": [1, 2], "b": (3,)}
    assert moved(plain, "meta") is plain


def test_the_tests_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("tests.test_of_a_device")
    vars(module).update(torch=torch, LENGTHS=torch.ones(2), NAME="x")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    others = {name: dict(vars(found)) for name, found in sys.modules.items() if name.startswith("tests.")}
    params: dict[str, Any] = {"lengths": torch.ones(2), "n": 3}
    call = SimpleNamespace(params=params)
    marked = SimpleNamespace(get_closest_marker=lambda name: name == "devices", callspec=call)
    plain = SimpleNamespace(get_closest_marker=lambda name: None)
    of_processors = SimpleNamespace(get_closest_marker=lambda name: name in ("devices", "processor"))
    left_out: list[object] = []
    hook = SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items))
    config: Any = SimpleNamespace(hook=hook)
    items: list[Any] = [plain, marked, of_processors]
    placement.place(config, items)
    assert (
        items == [plain, marked, of_processors] and vars(module)["torch"] is torch
    )  # on the processor nothing changes
    monkeypatch.setattr(served, "DEVICE", "meta")
    try:
        placement.place(config, items)
        assert items == [marked] and left_out == [plain, of_processors]
        assert params["lengths"].is_meta and params["n"] == 3
        held = vars(module)
        assert isinstance(held["torch"], PlacedTorch) and held["LENGTHS"].is_meta and held["NAME"] == "x"
        assert not isinstance(placement.torch, PlacedTorch)
    finally:
        for name, values in others.items():
            vars(sys.modules[name]).update(values)


def test_a_device_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config: Any = SimpleNamespace(getoption=lambda name: "cuda", addinivalue_line=lambda *words: None)
    with pytest.raises(pytest.UsageError, match="--device cuda: torch sees no such device here"):
        placement.configure(config)


def test_backends_at_home_follow_the_device() -> None:
    before = served.DEVICE
    try:
        served.place("cuda")
        assert served.AT_HOME == ("triton", "cuda", "reference")
    finally:
        served.place(before)
    assert served.AT_HOME == ("cpu", "reference") or before != "cpu"
