"""What a model says of each token, and how far two of its answers are apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from maskops.testing.leak.documents import Stream

Call = Callable[[Any, dict[str, Any]], Any]
"""Runs a model on the entries of a batch: ``lambda model, inputs: model(**inputs)``."""

_AT_ONCE = 1 << 22  # numbers of a distribution that are held in float64 at a time
_LOSSES = ("labels", "shift_labels", "num_items_in_batch")


@dataclass(frozen=True)
class Change:
    """How far two outputs are apart at some tokens.

    Attributes:
        max_abs: the largest absolute difference; infinite where one of the two is NaN and the other is not.
        relative: that, in units of the largest absolute output.
        kl: mean Kullback-Leibler divergence of the predictions in nats per token; None for hidden states.
        nll: mean rise of the negative log likelihood of the real token (the next one of the document in causal models,
            the token itself in others), nats per token; None where no token is predicted.
        flipped: share of tokens, 0 to 1, whose most likely prediction is another; None for hidden states.
        tokens: how many were compared.
    """

    max_abs: float
    relative: float
    kl: float | None
    nll: float | None
    flipped: float | None
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """The attributes by name."""
        return asdict(self)


@dataclass(frozen=True)
class Output:
    """The output of a model, a row for each token of the flattened batch or for each document.

    Attributes:
        values: (rows, ..., channels).
        is_distribution: whether the channels are logits.
        row_of: the row of each document, where the rows are documents.
    """

    values: Tensor
    is_distribution: bool
    row_of: dict[int, int] | None = None

    @property
    def per_document(self) -> bool:
        """Whether the rows are documents and not tokens."""
        return self.row_of is not None

    def rows(self, stream: Stream, document: int) -> Tensor:
        """int64 (n,): the rows that belong to a document."""
        return stream.places(document) if self.row_of is None else torch.tensor([self.row_of[document]])

    def at(self, rows: Tensor) -> Tensor:
        """Those rows."""
        return self.values[rows.to(self.values.device)]

    @property
    def scale(self) -> float:
        """The largest finite absolute value."""
        finite = self.values[self.values.isfinite()]
        # -1e38 and the like suppress tokens of a vocabulary; they are no measure of size.
        finite = finite[finite.abs() < torch.finfo(finite.dtype).max / 2]
        return float(finite.abs().max()) if finite.numel() else 0.0


class Runner:
    """Calls a model in eval mode without gradients, each time with the same random numbers."""

    def __init__(self, model: Any, call: Call | None, seed: int, vocabulary: int | None) -> None:
        self.model = model
        self.calls = 0
        self._call = call
        self._seed = seed
        self._vocabulary = vocabulary

    def __call__(self, inputs: Mapping[str, Any], stream: Stream) -> Output:
        """The output, aligned with a stream."""
        return self._aligned(self.raw(inputs), stream)

    def raw(self, inputs: Mapping[str, Any]) -> Any:
        """What the model returns."""
        # Caches and other objects are written to by a call; tensors are not. Losses are not looked at.
        entries = {
            name: value if isinstance(value, (Tensor, int, float, str, type(None))) else deepcopy(value)
            for name, value in inputs.items()
            if name not in _LOSSES
        }
        self.calls += 1
        for kind in _device_types(self.model):
            module = torch.get_device_module(kind)
            getattr(module, "manual_seed_all", module.manual_seed)(self._seed)
        torch.default_generator.manual_seed(self._seed)
        with torch.no_grad():
            return self.model(**entries) if self._call is None else self._call(self.model, entries)

    def _aligned(self, result: Any, stream: Stream) -> Output:
        name, values = _main_tensor(result)
        batch, length = stream.documents.shape
        numbers = stream.numbers
        documents = len(numbers)
        shape = tuple(values.shape)
        is_distribution = "logits" in name or (not name and shape[-1:] == (self._vocabulary,))
        if len(shape) >= 2 and shape[:2] == (batch, length):
            return Output(values.flatten(0, 1), is_distribution and len(shape) > 2)
        if len(shape) >= 2 and shape[0] == batch * length and batch * length != documents:
            return Output(values, is_distribution)
        if len(shape) >= 1 and shape[0] == documents:
            row_of = {number: row for row, number in enumerate(numbers)}
            return Output(values, is_distribution and len(shape) > 1, row_of)
        if len(shape) >= 1 and shape[0] == stream.sequences and max(numbers) < stream.sequences:
            return Output(values, is_distribution and len(shape) > 1, {number: number for number in numbers})
        raise ValueError(
            f"the model returned {name or 'a tensor'} of shape {shape}, expected ({batch}, {length}, ...) with a row "
            f"for each token, or ({documents}, ...) with one for each document; give call= a function of model and "
            "inputs that returns such a tensor"
        )


def _main_tensor(result: Any) -> tuple[str, Tensor]:
    """The name, "" for none, and the tensor that an output is about."""
    if isinstance(result, Tensor):
        return "", result
    entries: list[tuple[str, Any]] = []
    if isinstance(result, Mapping):  # the outputs of transformers are mappings as well
        entries = list(result.items())
    elif isinstance(result, (tuple, list)):
        entries = [("", value) for value in result]
    elif hasattr(result, "__dict__"):
        entries = list(vars(result).items())
    tensors = [(name, value) for name, value in entries if isinstance(value, Tensor) and value.is_floating_point()]
    for wanted in ("logits", "last_hidden_state"):
        for name, value in tensors:
            if name == wanted:
                return name, value
    shaped = [(name, value) for name, value in tensors if value.dim() > 0 and name != "loss"]
    if not shaped:
        raise TypeError(
            f"the model returned {type(result).__name__} without a tensor of logits or hidden states; give call= a "
            "function of model and inputs that returns one"
        )
    return shaped[0]


def compare(base: Output, other: Tensor, rows: Tensor, targets: Tensor | None, scale: float) -> Change:
    """How far ``other`` (n, ..., channels) is from these rows of ``base``.

    Args:
        targets: int64 (n,): the token that each row predicts, -1 for none; or None.
        scale: the unit of ``relative``.
    """
    ours, theirs = base.at(rows), other
    difference = _difference(ours, theirs)
    largest = float(difference.max()) if difference.numel() else 0.0
    kl = nll = flipped = None
    if base.is_distribution and rows.numel():
        kl, nll, flipped = _in_nats(ours, theirs, targets)
    return Change(largest, largest / scale if scale else largest, kl, nll, flipped, int(rows.numel()))


def _difference(ours: Tensor, theirs: Tensor) -> Tensor:
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())  # infinities of one sign as well
    wide = torch.float64 if ours.dtype == torch.float64 else torch.float32
    difference = (ours.to(wide) - theirs.to(wide)).abs()
    return torch.where(same, 0.0, difference.nan_to_num(nan=torch.inf))


def _in_nats(ours: Tensor, theirs: Tensor, targets: Tensor | None) -> tuple[float, float | None, float]:
    """Mean divergence, mean rise of the negative log likelihood, share of changed predictions."""
    step = max(1, _AT_ONCE // max(1, ours[0].numel()))
    divergence = rise = 0.0
    changed = predictions = predicted = 0
    for start in range(0, ours.shape[0], step):
        ours_here, theirs_here = ours[start : start + step], theirs[start : start + step]
        before, after = ours_here.double().log_softmax(-1), theirs_here.double().log_softmax(-1)
        terms = before.exp() * (before - after)
        divergence += float(torch.where(before == -torch.inf, 0.0, terms).sum().clamp(min=0.0))
        # NaN is the largest of a row for argmax, and no prediction.
        moved = ours_here.argmax(-1) != theirs_here.argmax(-1)
        changed += int((moved | theirs_here.isnan().any(-1)).sum())
        predictions += moved.numel()
        if targets is not None and before.dim() == 2:
            wanted = targets[start : start + step].to(before.device)
            known = (wanted >= 0) & (wanted < before.shape[-1])
            index = wanted.clamp(0, before.shape[-1] - 1).unsqueeze(-1)
            rises = (before - after).gather(-1, index).squeeze(-1)
            rise += float(rises[known].sum())
            predicted += int(known.sum())
    return divergence / predictions, rise / predicted if predicted else None, changed / predictions


def likelihood(values: Tensor, targets: Tensor) -> tuple[float, int]:
    """Summed negative log likelihood in nats of the targets that are 0 or more, and how many they are."""
    total, count = 0.0, 0
    step = max(1, _AT_ONCE // max(1, values.shape[-1]))
    for start in range(0, values.shape[0], step):
        logits = values[start : start + step].double().log_softmax(-1)
        wanted = targets[start : start + step].to(logits.device)
        known = (wanted >= 0) & (wanted < logits.shape[-1])
        index = wanted.clamp(0, logits.shape[-1] - 1).unsqueeze(-1)
        total -= float(logits.gather(-1, index).squeeze(-1)[known].sum())
        count += int(known.sum())
    return total, count


@contextmanager
def undisturbed(model: Any) -> Any:
    """Eval mode and a random state of its own; both are as before afterwards."""
    with ExitStack() as stack:
        if isinstance(model, nn.Module):
            flags = [(module, module.training) for module in model.modules()]
            stack.callback(_set_training, flags)
            model.eval()
        for kind in _device_types(model):
            devices = range(torch.get_device_module(kind).device_count())
            stack.enter_context(torch.random.fork_rng(devices=devices, device_type=kind))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        yield


def _device_types(model: Any) -> set[str]:
    """Of the weights, but for processors."""
    weights = model.parameters() if isinstance(model, nn.Module) else ()
    return {weight.device.type for weight in weights} - {"cpu", "meta"}


def _set_training(flags: list[tuple[nn.Module, bool]]) -> None:
    for module, training in flags:
        module.training = training


def coarsest_dtype(model: Any, output: Tensor) -> torch.dtype:
    """The dtype with the largest rounding that model, output and autocast compute in."""
    kinds = {output.dtype} if output.is_floating_point() else {torch.float32}
    if isinstance(model, nn.Module):
        # A model in which a vector of weights or two are narrower computes in the others; matrices decide.
        kinds |= {weight.dtype for weight in model.parameters() if weight.is_floating_point() and weight.dim() > 1}
    kind = output.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        kinds.add(torch.get_autocast_dtype(kind))
    # Weights of eight bits are stored so and computed with in wider numbers.
    return max((kind for kind in kinds if kind.itemsize > 1), key=lambda kind: torch.finfo(kind).eps)
