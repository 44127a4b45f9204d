"""`pytest --device cuda`: the same tests on tensors of a device, without a word about it in most of them.

A test that is marked `devices` makes its tensors as everybody does, `torch.randn(2, 3)`. On another device than the
processor the name `torch` of the test modules stands for `PlacedTorch`, which makes each tensor as before, on the
processor, and moves it: values are those of every other run. The package under test never sees it: a tensor that a
kernel's driver makes on the wrong device stays a mistake that shows.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from maskops.backend import interpreter_problem
from maskops.layouts import Layout
from maskops.masks import Mask
from tests import served

MARKER = "devices: runs on the tensors of any device, chosen by --device"
PROCESSOR = "processor: among those, one that is about the processor: its threads, its kernels, values that it checks"
SMOKE = "gpu_smoke: one small case of each op, backend and pass; a minute on a device"

_DRAWN = frozenset(
    [
        "tensor",
        "as_tensor",
        "scalar_tensor",
        "from_numpy",
        "zeros",
        "ones",
        "full",
        "eye",
        "arange",
        "linspace",
        "logspace",
        "rand",
        "randn",
        "randint",
        "randperm",
        "normal",
        "tril_indices",
        "triu_indices",
    ]
)
_UNWRITTEN = frozenset({"empty", "empty_strided"})
_OURS = {"tests.placement", "tests.served", "tests.conftest"}


class PlacedTorch(ModuleType):
    """torch, but what makes tensors puts them on a device unless it is told where."""

    def __init__(self, device: str) -> None:
        super().__init__("torch")
        self.placed_on = device

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        if name in _DRAWN:
            return _drawn(found, self.placed_on)
        if name in _UNWRITTEN:
            return _unwritten(found, self.placed_on)
        return found


def _drawn(make: Callable[..., Tensor], device: str) -> Callable[..., Tensor]:
    @functools.wraps(make)
    def placed(*args: Any, **keywords: Any) -> Tensor:
        if keywords.get("device") is not None or keywords.get("out") is not None:
            return make(*args, **keywords)
        differentiated = keywords.pop("requires_grad", False)
        # Moved first: what is moved afterwards is no leaf.
        return make(*args, **keywords).to(device).requires_grad_(differentiated)

    return placed


def _unwritten(make: Callable[..., Tensor], device: str) -> Callable[..., Tensor]:
    @functools.wraps(make)
    def placed(*args: Any, **keywords: Any) -> Tensor:
        keywords["device"] = keywords.get("device") or device
        return make(*args, **keywords)

    return placed


def moved(value: Any, device: str) -> Any:
    """A value with the tensors in its dicts, lists, tuples and masks on a device; itself where it holds none."""
    if type(value) is Tensor and not value.is_meta:
        return value.detach().to(device).requires_grad_(value.requires_grad)
    if isinstance(value, (Mask, Layout)):
        parts = {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value) if entry.init}
        return dataclasses.replace(value, **moved(parts, device))
    if type(value) is dict:
        parts = {key: moved(part, device) for key, part in value.items()}
        return parts if any(parts[key] is not value[key] for key in value) else value
    if type(value) in (list, tuple):
        entries = [moved(part, device) for part in value]
        return type(value)(entries) if any(a is not b for a, b in zip(entries, value, strict=True)) else value
    return value


def configure(config: pytest.Config) -> None:
    """Sets the device of the session, before any test module is imported."""
    device = str(config.getoption("device"))
    for line in (MARKER, PROCESSOR, SMOKE):
        config.addinivalue_line("markers", line)
    if device == "cpu":
        return
    if device != "meta" and not getattr(torch, device).is_available():
        raise pytest.UsageError(f"--device {device}: torch sees no such device here")
    served.place(device)
    # cuBLAS reads this once. Without it, products under use_deterministic_algorithms are refused.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # What torch itself has no deterministic form of on a device (a float cumsum) serves tests as well without.
    torch.use_deterministic_algorithms(True, warn_only=True)
    config.addinivalue_line("filterwarnings", "ignore:.*does not have a deterministic implementation:UserWarning")
    if config.getoption("precompile"):
        from maskops.cli.bench.gpu.precompile import without_launches

        compiling = without_launches()
        compiling.__enter__()
        config.add_cleanup(lambda: compiling.__exit__(None, None, None))


def place(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves the tests that are for every device, and gives their modules a torch that places tensors there."""
    device = served.DEVICE
    if device == "cpu":
        if reason := interpreter_problem():
            for item in items:
                if item.path.name.startswith("test_triton_"):
                    item.add_marker(pytest.mark.skip(reason=reason))
        return
    kept, left_out = [], []
    for item in items:
        is_kept = item.get_closest_marker("devices") and not item.get_closest_marker("processor")
        (kept if is_kept else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept
    for item in kept:
        called = getattr(item, "callspec", None)
        if called is not None:
            called.params.update(moved(dict(called.params), device))
    for name, module in list(sys.modules.items()):
        if name.startswith("tests.") and name not in _OURS:
            for key, value in list(vars(module).items()):
                if value is torch:
                    vars(module)[key] = PlacedTorch(device)
                elif not key.startswith("__"):
                    vars(module)[key] = moved(value, device)
