"""What an audit found, as a table, as findings and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from maskops.json_data import json_data
from maskops.testing.leak.layers import LayerLeak
from maskops.testing.leak.outputs import Change

Kind = Literal["leak", "padding", "order", "alone", "not finite"]
_LEAKS = ("leak", "padding", "order")
_SHOWN = 12  # documents of a matrix
_SHOWN_LAYERS = 8


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: ``"leak"``: a document changes the outputs of another; ``"padding"``: padding changes those of a document;
            ``"order"``: a token changes outputs before it, in a causal model; ``"alone"``: a document has other outputs
            in the batch than alone; ``"not finite"``: NaN at real tokens.
        batch: the name of the batch.
        problem: what is wrong, in one line.
        change: its size; None for NaN.
        layers: the modules where it enters, each looked at on its own, in the order in which they run.
    """

    kind: Kind
    batch: str
    problem: str
    change: Change | None
    layers: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f"; enters first in {self.layers[0]}" if self.layers else ""
        return f"{self.batch}: {self.problem}{where}"

    def to_dict(self) -> dict[str, Any]:
        """The attributes by name."""
        return {
            "kind": self.kind,
            "batch": self.batch,
            "problem": self.problem,
            "change": None if self.change is None else self.change.to_dict(),
            "layers": list(self.layers),
        }


@dataclass(frozen=True)
class Leak:
    """One pair: other tokens in ``source`` changed the outputs of ``target``.

    Attributes:
        source: a document, ``"padding"``, or ``"several"`` where no document alone does it.
        target: a document.
        change: of the outputs of the target.
    """

    source: int | Literal["padding", "several"]
    target: int
    change: Change

    def to_dict(self) -> dict[str, Any]:
        """The attributes by name."""
        return {"source": self.source, "target": self.target, "change": self.change.to_dict()}


@dataclass(frozen=True)
class Alone:
    """Every document in the batch beside the same document alone through the same model.

    Attributes:
        change: from alone to the batch, over all documents.
        worst: the document with the largest difference.
        nll_alone: negative log likelihood of the documents alone, nats per token; None where none is predicted.
        nll_batch: in the batch.
        tolerance: above which ``change.max_abs`` is a finding: shapes differ, and with them rounding.
    """

    change: Change
    worst: int
    nll_alone: float | None
    nll_batch: float | None
    tolerance: float

    def to_dict(self) -> dict[str, Any]:
        """The attributes by name."""
        return {**vars(self), "change": self.change.to_dict()}


@dataclass(frozen=True)
class BatchAudit:
    """What was measured with one batch.

    Attributes:
        name: how the documents arrived.
        refused: why the model does not take this batch; nothing else was measured then. None if it does.
        documents: their numbers, those of the row in padded batches, in the order of the batch in packed ones.
        lengths: tokens of each document.
        padding: places that belong to no document.
        measured: what was compared: ``"logits"`` or ``"hidden states"``.
        scale: the largest absolute output.
        noise: largest change of the same documents when the batch is run again, and run twice as large.
        tolerance: above which a change is a leak.
        causal: whether a document alone, changed at its end, has the same outputs before; None if it cannot be said.
        leaks: the pairs, worst first.
        asked: the sources that were changed each on its own; where none leaks, sets of documents say it for all.
        alone: None where documents could not be run alone.
        order: largest change before a changed last token; None for models that are not causal.
        layers: where the worst leak enters, in the order in which the model computes.
        findings: all of the above that is wrong.
        notes: what was not measured, and why.
        calls: of the model.
    """

    name: str
    refused: str | None = None
    documents: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    padding: int = 0
    measured: str = ""
    scale: float = 0.0
    noise: float = 0.0
    tolerance: float = 0.0
    causal: bool | None = None
    leaks: tuple[Leak, ...] = ()
    asked: tuple[int | Literal["padding"], ...] = ()
    alone: Alone | None = None
    order: Change | None = None
    layers: tuple[LayerLeak, ...] = ()
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    calls: int = 0

    @property
    def leaking(self) -> bool:
        """Whether something reached a document that is none of its business."""
        return any(finding.kind in _LEAKS for finding in self.findings)

    @property
    def worst(self) -> Leak | None:
        """The pair with the largest change."""
        return max(self.leaks, key=lambda leak: leak.change.max_abs, default=None)

    @property
    def enters(self) -> tuple[str, ...]:
        """The layers that let the leak in themselves."""
        return tuple(layer.name for layer in self.layers if layer.leaks)

    @property
    def verdict(self) -> str:
        """One or two words."""
        if self.refused is not None:
            return "not taken"
        kinds = {finding.kind for finding in self.findings}
        words = {
            "leak": "LEAKS",
            "padding": "PADDING LEAKS",
            "order": "SEES LATER TOKENS",
            "not finite": "NaN",
            "alone": "WRONG",
        }
        found = [word for kind, word in words.items() if kind in kinds]
        # What leaks is wrong as well.
        return ", ".join(found[:-1] if len(found) > 1 and found[-1] == "WRONG" else found) or "clean"

    def to_dict(self) -> dict[str, Any]:
        """The attributes by name, in what JSON knows: ``"inf"`` and ``"nan"`` are text."""
        if self.refused is not None:
            return {"name": self.name, "verdict": self.verdict, "refused": self.refused}
        found = {
            "name": self.name,
            "verdict": self.verdict,
            "documents": list(self.documents),
            "lengths": list(self.lengths),
            "padding": self.padding,
            "measured": self.measured,
            "scale": self.scale,
            "noise": self.noise,
            "tolerance": self.tolerance,
            "causal": self.causal,
            "leaks": [leak.to_dict() for leak in self.leaks],
            "asked": list(self.asked),
            "alone": None if self.alone is None else self.alone.to_dict(),
            "order": None if self.order is None else self.order.to_dict(),
            "layers": [layer.to_dict() for layer in self.layers],
            "findings": [finding.to_dict() for finding in self.findings],
            "notes": list(self.notes),
            "calls": self.calls,
        }
        return dict(json_data(found))


@dataclass(frozen=True)
class AuditReport:
    """The result of `maskops.audit`. Printed, it is a table with a line for each batch and what is wrong below.

    Attributes:
        model: the class of the model.
        implementation: its attention, as transformers calls it; "" where that is not known.
        dtype: what it computes in.
        batches: what was measured with each.
    """

    model: str
    implementation: str
    dtype: str
    batches: tuple[BatchAudit, ...]

    @property
    def leaks(self) -> bool:
        """Whether in any batch something reached a document that is none of its business."""
        return any(batch.leaking for batch in self.batches)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All that is wrong: leaks, and documents whose outputs are not what they are alone."""
        return tuple(finding for batch in self.batches for finding in batch.findings)

    def __getitem__(self, name: str) -> BatchAudit:
        """The batch of this name."""
        for batch in self.batches:
            if batch.name == name:
                return batch
        raise KeyError(f"{name!r}: expected one of {', '.join(repr(batch.name) for batch in self.batches)}")

    def to_dict(self) -> dict[str, Any]:
        """All of it, in what JSON knows: ``"inf"`` and ``"nan"`` are text."""
        return {
            "model": self.model,
            "implementation": self.implementation,
            "dtype": self.dtype,
            "leaks": self.leaks,
            "batches": [batch.to_dict() for batch in self.batches],
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        taken = [batch for batch in self.batches if batch.refused is None]
        bad = [batch for batch in taken if batch.findings]
        leaking = sum(batch.leaking for batch in taken)
        if not taken:
            verdict = "nothing measured"
        elif not bad:
            verdict = f"clean in {_counted(len(taken), 'batch', 'batches')}"
        else:
            wrong = len(bad) - leaking
            parts = [f"LEAKS in {leaking}"] if leaking else []
            parts += [f"WRONG in {wrong}"] if wrong else []
            verdict = f"{', '.join(parts)} of {_counted(len(taken), 'batch', 'batches')}"
        attention = f", attention {self.implementation}" if self.implementation else ""
        yield f"audit of {self.model}{attention}, {self.dtype}: {verdict}"
        yield "  leak: change in other documents when one is given other tokens (largest; nats a token; flipped argmax)"
        yield "  alone: difference from each document alone through the same model"
        rows = [["batch", "leak", "KL", "NLL", "flipped", "alone", "NLL", "verdict"]]
        rows += [_row(batch) for batch in taken]
        yield from aligned(rows)
        for batch in self.batches:
            if batch.refused is not None:
                yield f"  {batch.name}: not taken: {batch.refused}"
        for batch in taken:
            if batch.findings or batch.notes:
                yield from batch_lines(batch)


def batch_lines(batch: BatchAudit) -> Iterator[str]:
    """What is wrong with one batch, a line each, with the matrix of who reaches whom."""
    yield ""
    padding = f" and {_counted(batch.padding, 'place')} of padding" if batch.padding else ""
    lengths = ", ".join(map(str, batch.lengths[:_SHOWN])) + (", ..." if len(batch.lengths) > _SHOWN else "")
    documents = f"{_counted(len(batch.lengths), 'document')} of {lengths} tokens{padding}"
    yield f"{batch.name}: {documents}; changes up to {_size(batch.tolerance)} are rounding"
    for finding in batch.findings:
        yield f"  {finding.problem}"
    entering = [layer for layer in batch.layers if layer.leaks]
    if entering:
        yield f"  enters in {len(entering)} of {_counted(len(batch.layers), 'layer')}, each looked at on its own:"
        for layer in entering[:_SHOWN_LAYERS]:
            yield f"    {', '.join(layer.culprits) or layer.name}: {_share(layer.change)} of its largest output"
        if len(entering) > _SHOWN_LAYERS:
            yield f"    and {len(entering) - _SHOWN_LAYERS} more"
    if batch.leaks:
        yield from _matrix(batch) if len(batch.lengths) <= _SHOWN else _pairs(batch)
    for note in batch.notes:
        yield f"  note: {note}"


def _matrix(batch: BatchAudit) -> Iterator[str]:
    changes = {(leak.source, leak.target): leak.change.max_abs for leak in batch.leaks}
    yield "  largest change of the outputs of each document (down) by other tokens in (across):"
    rows = [["", *map(str, batch.asked)]]
    for target in batch.documents:
        row = ["-" if source == target else _size(changes.get((source, target), 0.0)) for source in batch.asked]
        rows.append([f"document {target}", *row])
    yield from aligned(rows, indent="    ")


def _pairs(batch: BatchAudit) -> Iterator[str]:
    yield "  largest changes of the outputs of documents by other tokens in others:"
    for leak in batch.leaks[:_SHOWN]:
        yield f"    {leak.source} changes {leak.target}: {_size(leak.change.max_abs)}"
    if len(batch.leaks) > _SHOWN:
        yield f"    and {len(batch.leaks) - _SHOWN} more"


def _row(batch: BatchAudit) -> list[str]:
    worst, alone = batch.worst, batch.alone
    leak = ["none", "", "", ""]
    if worst is not None:
        change = worst.change
        leak = [_size(change.max_abs), _nats(change.kl), _signed(change.nll), _share(change.flipped)]
    apart = [] if alone is None else [_size(alone.change.max_abs), _signed(alone.change.nll)]
    return [batch.name, *leak, *(apart or ["", ""]), batch.verdict]


def aligned(rows: list[list[str]], indent: str = "  ") -> Iterator[str]:
    """Lines of a table: the first column to the left, the others to the right, two blanks apart."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield (indent + "  ".join(cells)).rstrip()


def _counted(number: int, one: str, several: str | None = None) -> str:
    return f"{number} {one if number == 1 else several or one + 's'}"


def _size(value: float) -> str:
    return "0" if value == 0 else f"{value:.2g}"


def _nats(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.2g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f}%"
