"""The program of ``build_plan``, read: what ``csrc/cpu/plan_program.cpp`` is to the extension.

The words are those of ``registration.py``. What becomes structure (kinds, numbers of operands) is kept apart from what
are mere numbers (offsets, sizes of chunks), so that a kernel is compiled for the one and takes the other as it comes.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

MASK_KINDS = ("padding_mask", "key_mask")
_LENGTH_KINDS = ("padding_right", "padding_left", "key_lengths")
_WITH_NUMBER = ("diag", "prefix", "chunk_start", "chunk_end")
_PLAIN = ("first", "last", "max", "min")
_OPERANDS = 6


class Layout(NamedTuple):
    """One layout of a program.

    Attributes:
        kind: as in ``layouts.py``; ``varlen`` is ``cu_seqlens``.
        operand: number of its operand.
        keys: number of the operand of the keys, of cu_seqlens.
        which: number of its value (key_length) or of its mask among the masks.
        counts: whether its ordinals number the sequences.
        keys_given: whether the keys have cumulative lengths of their own.
    """

    kind: str
    operand: int
    keys: int
    which: int
    counts: bool
    keys_given: bool


class Step(NamedTuple):
    """One step of a bound: its kind, and which value or operand it takes."""

    kind: str
    which: int


@dataclass(frozen=True)
class Program:
    """A program, read.

    Attributes:
        layouts: where the sequences lie.
        spans: for each span the steps that leave its start and its end.
        values: the numbers that layouts and steps take.
    """

    layouts: tuple[Layout, ...]
    spans: tuple[tuple[Step, ...], ...]
    values: tuple[int, ...]

    def structure(self) -> dict[str, tuple[str | int, ...]]:
        """What a kernel is compiled for, as flat tuples, for that is what every Triton takes as a constant.

        LAYOUTS: kind, operand, operand of the keys, index, whether it counts, one layout after the other. STEPS: kind
        and index of each step, with a step ``span`` behind those of each span.
        """
        steps = [word for span in self.spans for step in (*span, Step("span", 0)) for word in step]
        layouts = [word for layout in self.layouts for word in layout[:5]]
        return {"LAYOUTS": tuple(layouts), "STEPS": tuple(steps)}

    @property
    def reads_ordinals(self) -> bool:
        """Whether a bound depends on which sequence a row lies in."""
        return any(step.kind == "prefix_of" for span in self.spans for step in span)

    def mask_operands(self) -> tuple[int, ...]:
        """Operands that are masks, in the order of their layouts."""
        return tuple(layout.operand for layout in self.layouts if layout.kind in MASK_KINDS)

    def first_size(self, index: int, operand: Tensor) -> int:
        """Size of the first dimension of an operand, 1 of ids without one for the batch."""
        is_row = operand.dim() == 1 and any(x.kind == "ids" and x.operand == index for x in self.layouts)
        return 1 if is_row or operand.dim() == 0 else operand.shape[0]

    def check(self, operands: Sequence[Tensor], batch: int, q_len: int, k_len: int) -> None:
        """Refuses operands whose shapes do not fit, so that no kernel reads beyond them; values are not looked at."""
        _require(
            min(batch, q_len, k_len) >= 0 and max(batch, q_len, k_len) < 2**28, "a length is negative or too large"
        )
        for operand in operands:
            _require(not operand.is_floating_point() and not operand.is_complex(), "operands must be integers or bool")
            _require(operand.is_contiguous(), "operands must be contiguous")
        for layout in self.layouts:
            operand = operands[layout.operand]
            fits_batch = operand.dim() > 0 and operand.shape[0] in (1, batch)
            if layout.kind == "key_length":
                _require(0 <= self.values[layout.which] <= k_len, "the length of the keys is not in [0, k_len]")
            elif layout.kind in _LENGTH_KINDS:
                _require(operand.dim() == 1 and fits_batch, "lengths must have shape (batch|1)")
            elif layout.kind in MASK_KINDS:
                fits = operand.dim() == 2 and fits_batch and operand.shape[1] == k_len
                _require(fits, "mask must be (batch|1, k_len)")
            elif layout.kind == "ids":
                fits = operand.dim() == 1 or (operand.dim() == 2 and fits_batch)
                _require(fits and operand.shape[-1] == q_len == k_len, "ids must be (q_len) or (batch|1, q_len)")
            else:
                keys = operands[layout.keys]
                fits = batch == 1 and operand.dim() == keys.dim() == 1 and operand.shape == keys.shape
                _require(fits and operand.shape[0] >= 1, "cu_seqlens must be one packed row")
                _require(layout.keys_given or q_len == k_len, "cu_seqlens without cu_seqlens_k needs q_len == k_len")
            if layout.kind.startswith("padding"):
                _require(q_len == k_len, "padding needs q_len == k_len")
        for span in self.spans:
            for step in span:
                if step.kind == "prefix_of":
                    _require(operands[step.which].dim() <= 1, "lengths of a prefix must have at most one dimension")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"build_plan: {message}")


@functools.lru_cache(maxsize=512)
def parse(text: str) -> Program:
    """Reads the text of a program.

    Raises:
        ValueError: it is none.
    """
    words = iter(text.split())
    layouts: list[Layout] = []
    spans: list[tuple[Step, ...]] = []
    values: list[int] = []

    def integer() -> int:
        word = next(words, None)
        _require(word is not None, "a number is missing in the program")
        _require(str(word).lstrip("-").isdigit(), "a number of the program is malformed")
        return int(str(word))

    def operand() -> int:
        index = integer()
        _require(0 <= index < _OPERANDS, "the program names an operand that does not exist")
        return index

    def value() -> int:
        values.append(integer())
        return len(values) - 1

    word = next(words, None)
    masks, is_counted = 0, False
    while word is not None and word != "span":
        if word == "key_length":
            layouts.append(Layout(word, 0, 0, value(), False, False))
        elif word in ("cu_seqlens", "varlen"):
            layouts.append(Layout("cu_seqlens", operand(), operand(), 0, not is_counted, integer() != 0))
            is_counted = True
        elif word == "ids":
            layouts.append(Layout(word, operand(), 0, 0, not is_counted, False))
            is_counted = True
        else:
            _require(word in _LENGTH_KINDS or word in MASK_KINDS, "the program has an unknown layout")
            layouts.append(Layout(word, operand(), 0, masks, False, False))
            masks += word in MASK_KINDS
        word = next(words, None)
    while word is not None:
        steps: list[Step] = []
        depth = 0
        word = next(words, None)
        while word is not None and word != "span":
            if word == "prefix_of":
                steps.append(Step(word, operand()))
            elif word in _WITH_NUMBER:
                steps.append(Step(word, value()))
                _require(not word.startswith("chunk") or values[-1] >= 1, "a chunk has no keys")
            else:
                _require(word in _PLAIN, f"the program has an unknown word '{word}'")
                steps.append(Step(word, 0))
            joins = word in ("max", "min")
            _require(not joins or depth >= 2, "the program takes the maximum or minimum of nothing")
            depth += -1 if joins else 1
            word = next(words, None)
        _require(depth == 2, "a span of the program must leave its start and its end")
        spans.append(tuple(steps))
    _require(bool(spans), "the program has no span")
    return Program(tuple(layouts), tuple(spans), tuple(values))
