"""Measures one batch: who reaches whom, in what order, by which layer, and what each document is alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from maskops.testing.leak.alone import inputs_alone, stream_alone
from maskops.testing.leak.arrivals import Arrival
from maskops.testing.leak.documents import OFFSETS, Stream
from maskops.testing.leak.layers import Alignment, LayerLeak, find_layers
from maskops.testing.leak.outputs import Change, Output, Runner, coarsest_dtype, compare, likelihood
from maskops.testing.leak.perturb import Replacement, input_embedding, separating_sets
from maskops.testing.leak.report import Alone, BatchAudit, Finding, Leak

_Source = int | Literal["padding"]
_FEW_DIGITS = 1e-4  # rounding of float16 and bfloat16
_SINGLES = 16  # documents that are changed each on its own when there is a leak
REFUSALS = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError, ArithmeticError)


@dataclass(frozen=True)
class Settings:
    """What the caller chose.

    Attributes:
        tolerance: above which a change is a leak, absolute; None: from the dtype and what was measured.
        per_layer: whether to look for the layer.
        is_causal: whether the model is; None: as it turns out on a document alone.
    """

    tolerance: float | None
    per_layer: bool
    is_causal: bool | None


class Measurement:
    """One batch through one model."""

    def __init__(self, runner: Runner, arrival: Arrival, replacement: Replacement, settings: Settings) -> None:
        self._runner = runner
        self._inputs = arrival.inputs
        self._streams = arrival.streams
        self._stream = arrival.streams[-1]
        self._documents = self._stream.numbers
        self._name = arrival.name
        self._replacement = replacement
        self._settings = settings
        self._findings: list[Finding] = []
        self._notes: list[str] = []
        if not self._documents:
            raise ValueError(f"{arrival.name}: no document: every place is padding")

    def run(self) -> BatchAudit:
        """All of it. What the model raises on the batch itself is the caller's."""
        calls = self._runner.calls
        self._base = self._runner(self._inputs, self._stream)
        real = torch.cat([self._base.rows(self._stream, document) for document in self._documents])
        self._scale = Output(self._base.at(real), self._base.is_distribution).scale
        self._check_finite()
        noise = self._noise()
        self._set_tolerances(noise)
        alone = self._alone_outputs()
        self._causal = self._settings.is_causal
        if self._causal is None:
            self._causal = self._is_causal_alone()
        self._targets = self._predicted()
        leaks, asked = self._leaks()
        order = self._order() if self._causal and not self._base.per_document else None
        beside = None if alone is None else self._beside(alone)
        layers = self._layers(leaks)
        self._tell(leaks, order, beside, layers)
        return BatchAudit(
            name=self._name,
            documents=tuple(self._documents),
            lengths=tuple(len(self._stream.places(document)) for document in self._documents),
            padding=sum(len(stream.padding) for stream in self._streams),
            measured="logits" if self._base.is_distribution else "hidden states",
            scale=self._scale,
            noise=noise,
            tolerance=self._tolerance,
            causal=self._causal,
            leaks=leaks,
            asked=asked,
            alone=beside,
            order=order,
            layers=layers,
            findings=tuple(self._findings),
            notes=tuple(self._notes),
            calls=self._runner.calls - calls,
        )

    # ---- noise -------------------------------------------------------------------------------------------------------

    def _check_finite(self) -> None:
        for document in self._documents:
            broken = int(self._base.at(self._base.rows(self._stream, document)).isnan().any(-1).sum())
            if broken:
                self._findings.append(
                    Finding("not finite", self._name, f"NaN at {broken} places of document {document}", None)
                )

    def _noise(self) -> float:
        """Largest change of the batch run again, and of the batch in a batch of twice its rows."""
        real = torch.cat([self._base.rows(self._stream, document) for document in self._documents])
        again = compare(self._base, self._runner(self._inputs, self._stream).at(real), real, None, 1.0).max_abs
        self._again = again
        if again:
            self._notes.append(f"the model is not deterministic: the same batch again changes outputs by {again:.2g}")
        doubled = self._doubled()
        if doubled is None:
            return again
        streams = Stream(self._stream.name, torch.cat([self._stream.documents, self._stream.documents]))
        try:
            output = self._runner(doubled, streams)
        except REFUSALS:
            return again
        if output.per_document != self._base.per_document or output.values.shape[0] < self._base.values.shape[0]:
            return again
        return max(again, compare(self._base, output.at(real), real, None, 1.0).max_abs)

    def _doubled(self) -> dict[str, Any] | None:
        """Every row of the batch twice: other shapes for the kernels, the same neighbours for every document."""
        if self._base.per_document:
            return None
        batch, length = self._stream.documents.shape
        result = {}
        for name, value in self._inputs.items():
            if isinstance(value, Tensor) and name.startswith(OFFSETS):
                if int(value[-1]) != batch * length:
                    return None  # the offsets of a second copy cannot begin behind a tail
                value = torch.cat([value, value[1:] + value[-1]])
            elif isinstance(value, Tensor) and value.dim() >= 2 and value.shape[0] == batch:
                value = torch.cat([value, value])
            elif isinstance(value, Tensor) and value.dim() == 3 and value.shape[1] == batch:
                value = torch.cat([value, value], 1)  # multimodal positions
            elif not isinstance(value, (Tensor, int, float, str, type(None))):
                return None
            result[name] = value
        return result

    def _set_tolerances(self, noise: float) -> None:
        if self._settings.tolerance is not None:
            self._tolerance = self._tolerance_alone = self._settings.tolerance
            return
        # Models in float64 have norms and softmax that compute in float32.
        single = torch.finfo(torch.float32).eps
        eps = max(single, torch.finfo(coarsest_dtype(self._runner.model, self._base.values)).eps)
        unit = eps * self._scale
        if self._again > 32 * unit:
            raise ValueError(
                f"the model is not deterministic: the same batch again changes outputs by {self._again:.2g}, more than "
                "rounding does, so that no change can be laid to a leak; give a tolerance, or a model that keeps no "
                "state between calls"
            )
        # Leaks are looked for between batches of one shape, where rounding is the same but for kernels that group
        # tokens by what they hold. What a leak adds to the noise of another composition is kept out by the bounds.
        self._tolerance = min(max(4 * noise, 2 * unit), 32 * unit)
        # A document alone has another shape, and hidden states may be much larger than the outputs. Where there are
        # few digits, so much room would hide what is wrong: there, the measured noise has to do.
        is_exact = eps < _FEW_DIGITS
        least, most = (128, 1024) if is_exact else (8, 64)
        self._tolerance_alone = min(max(8 * noise, least * unit), most * unit)

    # ---- leaks -------------------------------------------------------------------------------------------------------

    def _changed(self, sources: Sequence[_Source]) -> dict[str, Any] | None:
        """The batch with other tokens in these documents, None if they hold no token that may be replaced."""
        inputs = dict(self._inputs)
        count = 0
        for stream in self._streams:
            tokens = inputs[stream.name]
            free = self._replacement.can_change(tokens).flatten()
            parts = [
                stream.padding if source == "padding" else self._free(stream.places(source), free) for source in sources
            ]
            places = torch.cat(parts)
            if len(places):
                inputs[stream.name] = self._replacement.replaced(tokens, places)
                count += len(places)
        return inputs if count else None

    def _free(self, places: Tensor, free: Tensor) -> Tensor:
        return places[free[places]]

    def _effects(self, inputs: Mapping[str, Any], targets: Sequence[int]) -> dict[int, Change]:
        """What reaches each of the documents, of changes above the tolerance."""
        output = self._runner(inputs, self._stream)
        found = {}
        for target in targets:
            rows = self._base.rows(self._stream, target)
            change = compare(self._base, output.at(rows), rows, self._targets_at(rows), self._scale)
            if change.max_abs > self._tolerance:
                found[target] = change
        return found

    def _leaks(self) -> tuple[tuple[Leak, ...], tuple[_Source, ...]]:
        """Pairs of source and target, and the sources that were changed on their own."""
        sources: list[_Source] = [*self._documents]
        if any(len(stream.padding) for stream in self._streams):
            sources.append("padding")
        for source in list(sources):
            if self._changed([source]) is None:
                sources.remove(source)
                self._notes.append(f"document {source} holds special tokens alone: it was not changed")
        if not sources or (len(self._documents) == 1 and sources != ["padding"] and len(sources) == 1):
            return (), ()
        sets = [[sources[number] for number in chosen] for chosen in separating_sets(len(sources))]
        reached: list[tuple[list[_Source], dict[int, Change]]] = []
        for chosen in sets:
            inputs = self._changed(chosen)
            others = [document for document in self._documents if document not in chosen]
            effects = self._effects(inputs, others) if inputs is not None and others else {}
            reached.append((chosen, effects))
        if all(len(chosen) == 1 for chosen in sets):
            leaks = [Leak(chosen[0], target, change) for chosen, found in reached for target, change in found.items()]
            return self._sorted(leaks), tuple(sources)
        return self._singled_out(sources, [pair for pair in reached if pair[1]])

    def _singled_out(
        self, sources: list[_Source], reached: list[tuple[list[_Source], dict[int, Change]]]
    ) -> tuple[tuple[Leak, ...], tuple[_Source, ...]]:
        """Asks each source on its own, where a set of them reached others."""
        suspects = [source for source in sources if any(source in chosen for chosen, _ in reached)]
        if len(suspects) > _SINGLES:
            self._notes.append(f"{_SINGLES} of {len(suspects)} suspects were changed each on its own")
            last: list[_Source] = ["padding"] if "padding" in suspects else []
            suspects = suspects[: _SINGLES - len(last)] + [source for source in last if source not in suspects[:1]]
        leaks = []
        for source in suspects:
            inputs = self._changed([source])
            others = [document for document in self._documents if document != source]
            if inputs is not None:
                effects = self._effects(inputs, others)
                leaks += [Leak(source, target, change) for target, change in effects.items()]
        if reached and not leaks:  # too little to be seen of one alone
            leaks = [Leak("several", target, change) for _, found in reached for target, change in found.items()]
        return self._sorted(leaks), tuple(suspects)

    def _sorted(self, leaks: list[Leak]) -> tuple[Leak, ...]:
        if any(leak.source == "padding" for leak in leaks) and not self._padding_is_seen():
            self._notes.append(
                "ids at padding decide something, such as positions, but what is embedded there reaches nobody"
            )
            leaks = [leak for leak in leaks if leak.source != "padding"]
        return tuple(sorted(leaks, key=lambda leak: -leak.change.max_abs))

    def _padding_is_seen(self) -> bool:
        """Whether other vectors at padding, behind the embedding of the same ids, reach a document."""
        embedding = input_embedding(self._runner.model)
        if embedding is None or self._inputs[self._stream.name].is_floating_point():
            return True
        alignment = Alignment(self._streams, tuple(stream.padding for stream in self._streams))
        generator = torch.Generator().manual_seed(0)
        replaced = []

        def disturb(module: nn.Module, args: Any, output: Any) -> Any:
            rows = alignment.rows(output, "")
            if rows is None:
                return None
            replaced.append(rows)
            noise = torch.randn(rows.shape, generator=generator).to(rows)
            return alignment.replaced(output, output.detach().float().std().to(rows) * noise, "")

        handle = embedding.register_forward_hook(disturb)
        try:
            effects = self._effects(self._inputs, self._documents)
        finally:
            handle.remove()
        return bool(effects) or not replaced

    # ---- order -------------------------------------------------------------------------------------------------------

    def _last_replaceable(self, document: int) -> Tensor:
        """int64 (1,) or (0,): the last token of a document that may be replaced and has one before it."""
        places = self._stream.places(document)[1:]
        return self._free(places, self._replacement.can_change(self._inputs[self._stream.name]).flatten())[-1:]

    def _is_causal_alone(self) -> bool | None:
        """Whether the longest document alone, changed at its end, has the same outputs before."""
        if self._base.per_document:
            return None
        able = [document for document in self._documents if len(self._last_replaceable(document))]
        document = max(able, key=lambda number: len(self._stream.places(number)), default=None)
        if document is None:
            return None
        at = int((self._stream.places(document) < self._last_replaceable(document)).sum())
        alone = inputs_alone(self._inputs, self._streams, document)
        stream = stream_alone(self._stream, document)
        changed = {**alone, stream.name: self._replacement.replaced(alone[stream.name], torch.tensor([at]))}
        rows = torch.arange(at)
        try:
            before, after = self._runner(alone, stream), self._runner(changed, stream)
        except REFUSALS:
            return None
        if before.per_document:
            return None
        return compare(before, after.at(rows), rows, None, 1.0).max_abs <= self._tolerance

    def _order(self) -> Change | None:
        """The largest change of outputs before the last token of their document, when that is replaced."""
        able = [document for document in self._documents if len(self._last_replaceable(document))]
        change = self._before_last(able)
        if change is not None and change.max_abs > self._tolerance and len(able) > 1:
            # Perhaps it came from the last token of another document: one document at a time.
            singles = [self._before_last([document]) for document in able[:_SINGLES]]
            change = max((each for each in singles if each is not None), key=lambda each: each.max_abs)
        return change

    def _before_last(self, documents: Sequence[int]) -> Change | None:
        if not documents:
            return None
        last = {document: self._last_replaceable(document) for document in documents}
        tokens = self._inputs[self._stream.name]
        changed = {
            **self._inputs,
            self._stream.name: self._replacement.replaced(tokens, torch.cat(list(last.values()))),
        }
        output = self._runner(changed, self._stream)
        places = {document: self._stream.places(document) for document in last}
        rows = torch.cat([places[document][places[document] < at] for document, at in last.items()])
        return compare(self._base, output.at(rows), rows, self._targets_at(rows), self._scale)

    def _predicted(self) -> Tensor | None:
        """int64 (batch * length,): the token that each place predicts, -1 for none; None where none is."""
        tokens = self._inputs[self._stream.name]
        if not self._base.is_distribution or self._base.per_document or tokens.is_floating_point() or tokens.dim() != 2:
            return None
        flat: Tensor = tokens.detach().cpu().long().flatten()
        if self._causal is False:
            return flat
        targets = torch.full_like(flat, -1)
        for document in self._documents:
            places = self._stream.places(document)
            targets[places[:-1]] = flat[places[1:]]
        return targets

    def _targets_at(self, rows: Tensor) -> Tensor | None:
        return None if self._targets is None else self._targets[rows]

    # ---- alone -------------------------------------------------------------------------------------------------------

    def _alone_outputs(self) -> dict[int, Tensor] | None:
        """The output of each document alone."""
        outputs = {}
        for document in self._documents:
            try:
                output = self._runner(
                    inputs_alone(self._inputs, self._streams, document), stream_alone(self._stream, document)
                )
            except REFUSALS as error:
                self._notes.append(f"document {document} could not be run alone: {_first_line(error)}")
                return None
            rows = self._base.rows(self._stream, document)
            if output.values.shape[0] != len(rows):
                self._notes.append(f"document {document} alone has {output.values.shape[0]} rows, here {len(rows)}")
                return None
            outputs[document] = output.values
        return outputs

    def _beside(self, alone: Mapping[int, Tensor]) -> Alone:
        """Each document alone beside itself in the batch."""
        rows = torch.cat([self._base.rows(self._stream, document) for document in alone])
        values = torch.cat(list(alone.values()))
        singles = Output(values, self._base.is_distribution)
        targets = self._targets_at(rows)
        everything = torch.arange(len(rows))
        change = compare(singles, self._base.at(rows), everything, targets, self._scale)
        sizes = {}
        for document, output in alone.items():
            own = self._base.rows(self._stream, document)
            sizes[document] = compare(self._base, output, own, None, 1.0).max_abs
        nll_alone = nll_batch = None
        if targets is not None:
            total, count = likelihood(values, targets)
            ours, _ = likelihood(self._base.at(rows), targets)
            nll_alone, nll_batch = (total / count, ours / count) if count else (None, None)
        worst = max(sizes, key=lambda document: sizes[document])
        return Alone(change, worst, nll_alone, nll_batch, self._tolerance_alone)

    # ---- layers, findings --------------------------------------------------------------------------------------------

    def _layers(self, leaks: tuple[Leak, ...]) -> tuple[LayerLeak, ...]:
        model = self._runner.model
        if not leaks or not self._settings.per_layer or not isinstance(model, nn.Module):
            return ()
        worst = leaks[0]
        changed = None if worst.source == "several" else self._changed([worst.source])
        if changed is None:
            return ()
        layers = find_layers(
            model,
            self._streams,
            worst.target,
            lambda: self._runner(self._inputs, self._stream),
            lambda: self._runner(changed, self._stream),
        )
        if not any(layer.leaks for layer in layers):
            self._notes.append(
                "no module shows the leak while it is watched: it enters between modules, or on a way that hooks close"
            )
        return layers

    def _tell(
        self, leaks: tuple[Leak, ...], order: Change | None, beside: Alone | None, layers: tuple[LayerLeak, ...]
    ) -> None:
        """Findings from figures."""
        between = [leak for leak in leaks if leak.source != "padding"]
        count = len(self._documents)
        where = tuple(name for layer in layers if layer.leaks for name in layer.culprits or (layer.name,))
        if between:
            worst = between[0]
            self._findings.append(
                Finding(
                    "leak",
                    self._name,
                    f"documents change one another in {len(between)} of {count * (count - 1)} pairs, most of all "
                    f"{worst.source} changes {worst.target}: {_told(worst.change)}",
                    worst.change,
                    where,
                )
            )
        padding = [leak for leak in leaks if leak.source == "padding"]
        if padding:
            worst = padding[0]
            self._findings.append(
                Finding(
                    "padding",
                    self._name,
                    f"padding changes {len(padding)} of {count} documents, most of all {worst.target}: "
                    f"{_told(worst.change)}",
                    worst.change,
                    () if between else where,
                )
            )
        if order is not None and order.max_abs > self._tolerance:
            self._findings.append(
                Finding(
                    "order",
                    self._name,
                    f"tokens see later ones of their document, though the model is causal: {_told(order)}",
                    order,
                )
            )
        if beside is not None and beside.change.max_abs > beside.tolerance:
            nll = (
                f"; NLL {beside.nll_batch:.4g} nats a token instead of {beside.nll_alone:.4g}"
                if beside.nll_batch is not None and beside.nll_alone is not None
                else ""
            )
            why = "" if leaks else ": nothing leaks, so look at the position ids and at what the mask leaves out"
            self._findings.append(
                Finding(
                    "alone",
                    self._name,
                    f"documents differ from what they are alone, most of all {beside.worst}: {_told(beside.change)}"
                    f"{nll}{why}",
                    beside.change,
                )
            )


def _told(change: Change) -> str:
    parts = [f"up to {change.max_abs:.2g} ({_percent(change.relative)} of the largest output)"]
    if change.kl is not None:
        parts.append(f"{change.kl:.2g} nats a token")
    if change.flipped is not None:
        parts.append(f"{_percent(change.flipped)} of predictions flipped")
    return ", ".join(parts)


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%" if share == 0 or share >= 0.01 else f"{100 * share:.1g}%"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
