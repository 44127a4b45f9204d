"""Which backends a test is for, how it runs on one, and the device that the session runs on."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

import maskops
from maskops import backend
from maskops.backend import BACKENDS

DEVICE = "cpu"
"""Type of the device on which the tests marked `devices` make their tensors; `tests/placement.py` sets it, once."""

AT_HOME: tuple[str, ...] = ()
"""Those that the device runs at their own speed: for tests of many or large calls."""


def place(device: str) -> None:
    """Chooses the device of the session. Called before test modules are imported, which copy these names."""
    global DEVICE, AT_HOME
    DEVICE = device
    AT_HOME = tuple(name for name, row in BACKENDS.items() if row.is_at_home(device))


def for_devices(op: str) -> tuple[str, ...]:
    """Those of devices that serve an op, which tests run on the processor: slowly, so that their cases are few."""
    return tuple(name for name, row in BACKENDS.items() if not row.is_at_home("cpu") and op in row.ops)


def kernels_here() -> list[str]:
    """The backends of AT_HOME that are kernels and can run."""
    return [name for name in AT_HOME if name != backend.REFERENCE and BACKENDS[name].unavailable() is None]


@contextlib.contextmanager
def running_on(name: str) -> Iterator[None]:
    """Runs on this backend and no other, or skips with the reason why it is not there."""
    available = maskops.backends()[name]
    if available != "available":
        pytest.skip(f"{name}: {available}")
    with maskops.use_backend(name, fallback="error" if name != "reference" else "warn"):
        yield


def each_of(names: Sequence[str]) -> Any:
    """A fixture for a file of tests: each of these backends in turn, and no other; its value is the name."""

    @pytest.fixture(params=names)
    def backend(request: pytest.FixtureRequest) -> Iterator[str]:
        with running_on(request.param):
            yield request.param

    return backend


place(DEVICE)
