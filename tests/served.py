"""Which backends a test is for."""

from maskops import backend
from maskops.backend import BACKENDS

AT_HOME = tuple(name for name, row in BACKENDS.items() if row.is_at_home("cpu"))
"""Those that processors run at their own speed: for tests of many or large calls."""


def for_devices(op: str) -> tuple[str, ...]:
    """Those of devices that serve an op, which tests run on the processor: slowly, so that their cases are few."""
    return tuple(name for name, row in BACKENDS.items() if not row.is_at_home("cpu") and op in row.ops)


def kernels_here() -> list[str]:
    """The backends of AT_HOME that are kernels and can run."""
    return [name for name in AT_HOME if name != backend.REFERENCE and BACKENDS[name].unavailable() is None]
