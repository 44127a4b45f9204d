"""Mutations by area: one-line breaks of the kernels, each with the tests that must notice."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Mutation:
    """A piece of text that stands in a file exactly once, and what replaces it."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = ("tests/test_attention.py",)

    @property
    def is_in_binary(self) -> bool:
        """Whether the file is compiled into the extension; the tests compile the CUDA kernels as host code."""
        return self.file.startswith("csrc/") and not self.file.startswith(("csrc/cuda/", "csrc/ops/cuda/"))

    def apply(self, root: Path) -> None:
        """Breaks the copy of the project in ``root``."""
        path = root / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.old!r} stands {text.count(self.old)} times in {self.file}, not once")
        path.write_text(text.replace(self.old, self.new))

    def revert(self, root: Path) -> None:
        """Puts the file of the project back."""
        shutil.copy(ROOT / self.file, root / self.file)
