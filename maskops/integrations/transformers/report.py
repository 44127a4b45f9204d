"""What attach() found out about a model, layer by layer, and how it is told."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from maskops.json_data import json_data

RIGHT = "right"
WRONG = "wrong"
REFUSED = "refused"
OWN_LIMIT = "limit of the model"
NOT_TAKEN = "not taken"


@dataclass
class LayerProof:
    """What was seen of one module in which tokens meet.

    Attributes:
        name: where it is in the model.
        kind: name of its class.
        ran: how often its forward ran.
        called: in how many of these runs it called maskops.
        tolerance: what counts as rounding in its dtype.
        errors: by way of arrival, the largest error of a token's vector relative to its length (infinite for NaN); a
            way is missing where the module did not run or its output has no axis of tokens.
        recurrent: whether it carries a state or a convolution along the row instead of attending.
    """

    name: str
    kind: str
    ran: int = 0
    called: int = 0
    tolerance: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)
    recurrent: bool = False

    def wrong(self, way: str) -> bool:
        """Whether it computed something else than the model's own attention in this way of arrival."""
        return self.errors.get(way, 0.0) > self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and text."""
        return {**vars(self), "errors": dict(self.errors)}


@dataclass
class ArrivalProof:
    """What was seen of one way in which a batch arrives.

    Attributes:
        verdict: ``right``, ``wrong``, ``refused`` (attached, the model raises on it), ``limit of the model`` (its own
            attention is as wrong) or ``not taken`` (the model has no such argument, or raises on it by itself).
        error: the largest error of the model's outputs, as in ``LayerProof.errors``; None where nothing was compared.
        reason: why the verdict is not ``right``; else empty.
    """

    verdict: str
    error: float | None = None
    reason: str = ""


@dataclass
class Report:
    """What a probe proved of an attached model. Printing it gives a table.

    Attributes:
        model: name of the class of the model.
        implementation: the name under which transformers knows the attention function.
        dtype: of its outputs, e.g. ``float32``.
        device: where the probe ran.
        lengths: tokens of the documents of the probe.
        unproven: why nothing was proven; empty where the probe ran.
        arrivals: what was seen of each way in which a batch arrives, by its name.
        layers: what was seen of each layer in which tokens meet.
        notes: what a user should know besides: windows that were not reached, what stays on the model's own code.
        tolerance: the largest of the layers' tolerances.
        unreached: windows in tokens that no document of the probe was longer than: of these nothing is proven.
    """

    model: str
    implementation: str = "maskops"
    dtype: str = ""
    device: str = ""
    lengths: tuple[int, ...] = ()
    unproven: str = ""
    arrivals: dict[str, ArrivalProof] = field(default_factory=dict)
    layers: list[LayerProof] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tolerance: float = 0.0
    unreached: list[int] = field(default_factory=list)

    @property
    def word(self) -> str:
        """What the probe proved, in words: all, or all but windows that its documents did not reach."""
        windows = ", ".join(map(str, self.unreached))
        return f"proven up to the window of {windows} tokens, which was not tested" if windows else "proven"

    @property
    def proven(self) -> bool:
        """Whether the probe ran and every layer that ran was right in every way of arrival that is let through."""
        return not self.unproven and bool(self.arrivals) and not self.failures()

    def failures(self) -> list[str]:
        """What the probe found wrong, a sentence each; empty when nothing was."""
        found = []
        for layer in self.layers:
            ways = [way for way in layer.errors if layer.wrong(way) and self.arrivals[way].verdict == WRONG]
            if not ways:
                continue
            worst = max(layer.errors[way] for way in ways)
            what = "never called maskops" if not layer.called else "called maskops and"
            found.append(
                f"{layer.name} ({layer.kind}) {what}: differs from the model's own attention by {worst:.2g} of the "
                f"size of its output ({', '.join(ways)})".replace("and: differs", "and differs")
            )
        if not found:
            found = [f"{way}: {proof.reason}" for way, proof in self.arrivals.items() if proof.verdict == WRONG]
        if not found and self.arrivals and not any(layer.called for layer in self.layers):
            found = ["maskops was never called"]
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and text, for JSON; an infinite error, the text ``"inf"``, is one with NaN in it."""
        found = {
            **vars(self),
            "proven": self.proven,
            "lengths": list(self.lengths),
            "arrivals": {way: dict(vars(proof)) for way, proof in self.arrivals.items()},
            "layers": [layer.to_dict() for layer in self.layers],
            "notes": list(self.notes),
            "unreached": list(self.unreached),
        }
        return dict(json_data(found))

    def __str__(self) -> str:
        return "\n".join([*self._head(), *self._table(), *(f"note: {note}" for note in self.notes)])

    def _head(self) -> list[str]:
        if self.unproven:
            return [f"maskops is attached to {self.model}, unproven: {self.unproven}"]
        state = "is attached to" if self.proven else "is not attached to"
        word = self.word if self.proven else "FAILED"
        counts = " and ".join(str(length) for length in self.lengths)
        return [
            f"maskops {state} {self.model} ({self.dtype}, {self.device}): {word}",
            f"Two random documents of {counts} tokens went through the model one at a time with its own eager",
            "attention, and together with maskops in each way in which a batch can arrive. A figure is the largest",
            f"error of a token's vector, relative to the vector's length; up to {self.tolerance:.0e} is rounding.",
            "Calls: the runs of a layer in which it called maskops.",
        ]

    def _table(self) -> list[str]:
        if not self.arrivals:
            return []
        ways = list(self.arrivals)
        rows = [["layer", "calls", *ways]]
        groups: dict[tuple[Any, ...], list[LayerProof]] = {}
        for layer in self.layers:
            # Layers that differ by number alone share a row, unless something is wrong with one of them.
            alone = layer.name if any(layer.wrong(way) for way in ways) or layer.called != layer.ran else ""
            pattern = re.sub(r"\d+", "*", layer.name)
            groups.setdefault((alone or pattern, layer.kind, layer.ran, layer.called), []).append(layer)
        for (name, _, ran, called), layers in groups.items():
            title = layers[0].name if len(layers) == 1 else f"{name} ({len(layers)} layers)"
            cells = [_cell([layer.errors[way] for layer in layers if way in layer.errors]) for way in ways]
            wrong = [any(layer.wrong(way) for layer in layers) for way in ways]
            marked = [cell + " WRONG" * bad for cell, bad in zip(cells, wrong, strict=True)]
            rows.append([title, "not run" if not ran else f"{called} of {ran}", *marked])
        outputs = [
            _cell([] if proof.error is None else [proof.error]) + " WRONG" * (proof.verdict == WRONG)
            for proof in self.arrivals.values()
        ]
        rows.append(["outputs of the model", "", *outputs])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.ljust(width) if column == 0 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        reasons = [
            f"{way}: {proof.verdict}: {proof.reason}" for way, proof in self.arrivals.items() if proof.verdict != RIGHT
        ]
        return ["", *lines, "", *reasons]


def _cell(errors: list[float]) -> str:
    return f"{max(errors):.1e}" if errors else "-"


class AttachError(ValueError):
    """A model was not attached, and is as it was before.

    Attributes:
        report: what the probe saw, or None where the model was refused before it ran.
    """

    def __init__(self, message: str, report: Report | None = None) -> None:
        super().__init__(message)
        self.report = report
