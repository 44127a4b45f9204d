"""The output layer fused into the loss: training steps that never hold the logits of a batch.

While a model trains on labels, its output layer hands on one row, and the loss is computed from what went into that
layer, by ``maskops.linear_cross_entropy``. What the model does to its logits before the loss (a soft cap, a scale) is
found out by measuring, and the whole is compared with the loss and the gradients of the model as it was; what is not
equal is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from maskops.data.labels import IGNORE_INDEX
from maskops.integrations.transformers.calls import Call, innermost
from maskops.integrations.transformers.loss import Score, Served
from maskops.ops.linear_cross_entropy.api import linear_cross_entropy

if TYPE_CHECKING:
    from maskops.integrations.transformers.attach import Installation

_NOTE = "fused head"

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Of the comparison with the logits that are there, which are rounded to the dtype of the model."""


class Refusal(Exception):  # noqa: N818
    """The reason why an output layer is not fused."""


class Setting(NamedTuple):
    """A number of a model or its configuration, read whenever it is used: it may be changed while it trains."""

    owner: Any
    name: str
    inverse: bool = False

    def value(self) -> float:
        """The number as it is now."""
        number = float(getattr(self.owner, self.name))
        return 1.0 / number if self.inverse else number

    def __str__(self) -> str:
        return f"1 / {self.name}" if self.inverse else self.name


class Processing(NamedTuple):
    """What a model does to its logits: ``softcap * tanh(scale * logits / softcap)``; None: without it."""

    scale: Setting | None = None
    softcap: Setting | None = None

    def apply(self, logits: Tensor) -> Tensor:
        """What becomes of logits (...), in their dtype."""
        if self.scale is not None:
            logits = logits * self.scale.value()
        if self.softcap is not None:
            logits = self.softcap.value() * torch.tanh(logits / self.softcap.value())
        return logits

    def __str__(self) -> str:
        parts = [f"{word} {setting}" for word, setting in zip(("times", "soft cap"), self, strict=True) if setting]
        return ", ".join(parts) or "as they are"


def settings(model: Any) -> list[Setting]:
    """Numbers that may be what a model multiplies its logits by or caps them at: by the words in their names."""
    found: dict[tuple[str, float], Setting] = {}
    for owner in (model.config.get_text_config(), model.config, model):
        for name, value in vars(owner).items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < math.inf:
                continue
            if value != 1 and any(word in name for word in ("logit", "scal", "cap", "multiplier")):
                found.setdefault((name, float(value)), Setting(owner, name))
    return list(found.values())


def processing_of(raw: Tensor, processed: Tensor, numbers: Sequence[Setting]) -> Processing:
    """Which processing with these numbers makes ``processed`` of ``raw``.

    Args:
        raw: (..., V), what the output layer gave; wide enough to reach a cap.
        processed: (..., V), what the loss was given.
        numbers: what may have been used.

    Raises:
        Refusal: none of them does.
    """
    if raw.shape != processed.shape:
        raise Refusal(
            f"the output layer gives {tuple(raw.shape)}, the loss is given {tuple(processed.shape)}: what happens in "
            f"between is not known"
        )
    # A division, a tanh and a product, each rounded to the dtype of the model.
    tolerance = 8 * torch.finfo(processed.dtype).eps * float(processed.abs().max())
    raw, processed = raw.detach().double(), processed.detach().double()
    scales = [None, *numbers, *(number._replace(inverse=True) for number in numbers)]
    tried = [Processing(scale, softcap) for softcap in (None, *numbers) for scale in scales]
    differences = [float((processing.apply(raw) - processed).abs().max()) for processing in tried]
    smallest = min(differences)
    if smallest <= tolerance:
        return tried[differences.index(smallest)]
    raise Refusal(
        "what the model does to its logits before the loss is none of: nothing, a factor, a soft cap with a number of "
        "its configuration"
    )


def check_layer(layer: Any) -> None:
    """Raises Refusal unless ``layer`` is a plain linear layer, of which weight and bias say everything."""
    if layer is None:
        raise Refusal("the model has no output layer (get_output_embeddings() is None)")
    kind = type(layer).__name__
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        raise Refusal(
            f"the output layer is {kind}, expected torch.nn.Linear: adapters and quantised weights on it are not what "
            f"its weight alone says"
        )
    if "forward" in vars(layer):
        raise Refusal("the forward method of the output layer has been replaced, as offloading does")
    if layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        raise Refusal("the output layer has hooks that look at its output, of which one row would be left")
    if type(layer.weight.data) is not Tensor or layer.weight.is_meta:
        where = "has no values (meta)" if layer.weight.is_meta else f"is a {type(layer.weight.data).__name__}"
        raise Refusal(f"the weight of the output layer {where}: expected a plain tensor, whole on its device")


class _Step:
    """What one call of the model keeps for its loss, among the notes of the call."""

    __slots__ = ("hidden", "logits")

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden
        self.logits: Tensor | None = None


class FusedHead:
    """The output layer of one model, fused into its loss while the model trains on labels.

    Attributes:
        model: a PreTrainedModel whose ``loss_function`` asks ``score``.
        layer: its output layer, whose input ``keep`` keeps.
        processing: what happens to the logits before the loss.
        logits_name: the field of the model's output that becomes None.
        proof: while it is proven: what stands in for training steps.
    """

    def __init__(self, model: Any, layer: nn.Linear) -> None:
        self.model, self.layer = model, layer
        self.processing = Processing()
        self.logits_name = "logits"
        self.proof: Proof | None = None

    def _is_step(self, call: Call) -> bool:
        if self.proof is not None:
            return self.proof.is_fused
        keep = call.arguments.get("logits_to_keep", 0)
        return (
            self.model.training
            and call.arguments.get("labels") is not None
            and (keep is None or (isinstance(keep, int) and keep == 0))
        )

    # ---- one call of the model, in the order in which it happens ----------------------------------------------------

    def keep(self, layer: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """A forward pre-hook of the layer: keeps its input, and hands on one row of it."""
        call = innermost()
        if call is None or call.module is not self.model or not self._is_step(call):
            return None
        if _NOTE in call.notes:
            raise RuntimeError(
                "fuse_lm_head=True: the output layer was called twice in one forward pass, but one loss is computed "
                "of it; attach without it"
            )
        (hidden,) = arguments
        call.notes[_NOTE] = _Step(hidden)
        row = hidden.detach()
        for dimension in range(row.dim() - 1):
            row = row[(slice(None),) * dimension + (slice(1),)]
        return (row,)

    def score(self, logits: Tensor) -> Score | None:
        """What scores the targets in the place of ``logits``, the row that is left; None outside of training steps."""
        if self.proof is not None:
            self.proof.logits.append(logits)
        call = innermost()
        step = None if call is None or call.module is not self.model else call.notes.get(_NOTE)
        if step is None:
            return None
        step.logits = logits
        hidden, layer, processing = step.hidden, self.layer, self.processing
        if hasattr(layer.weight, "device_mesh"):  # a DTensor, which a torch without distributed does not know
            raise RuntimeError(
                "fuse_lm_head=True: the weight of the output layer is sharded where the loss is computed: shard it "
                "with the model around it (no fully_shard of the layer itself), or attach without fuse_lm_head"
            )

        def score(target: Tensor, *, ignore_index: int, num_items: int | Tensor | None) -> Tensor:
            rows = hidden.shape[:-1]
            loss: Tensor = linear_cross_entropy(
                hidden,
                layer.weight,
                target.reshape(rows) if target.numel() == rows.numel() else target,
                bias=layer.bias,
                ignore_index=ignore_index,
                num_items=num_items,
                softcap=0.0 if processing.softcap is None else processing.softcap.value(),
                logit_scale=1.0 if processing.scale is None else processing.scale.value(),
            )
            return loss

        return score

    def after(self, call: Call, output: Any) -> Any:
        """The output of the model, with None in the place of the row of logits."""
        step = call.notes.get(_NOTE) if call.module is self.model else None
        if step is None:
            return None
        if step.logits is None:
            raise RuntimeError(
                "fuse_lm_head=True: the model was given labels, but did not call its loss_function, and its output "
                "layer has handed on one row only: attach without it"
            )
        if isinstance(output, tuple):
            # A conversion of dtypes may have made other tensors of them, but no other output has this shape.
            shapes = [value.shape if isinstance(value, Tensor) else None for value in output]
            place = shapes.index(step.logits.shape)
            return (*output[:place], None, *output[place + 1 :])
        # An output of transformers is an ordered mapping that refuses to lose an entry.
        return type(output)(**{name: value for name, value in output.items() if name != self.logits_name})


# ---- proof -----------------------------------------------------------------------------------------------------------


class Proof:
    """One forward pass of a probe batch, fused or not, with hidden states that are not those of the model.

    Attributes:
        is_fused: whether the output layer is fused.
        scale: of the logits that hidden states are made for; None: take ``hidden``.
        hidden: what the output layer is given, of the shape of what the model gave it.
        raw: what the output layer gave.
        logits: what the loss was given, for each time that it was called.
    """

    def __init__(self, fused: FusedHead, *, is_fused: bool, scale: float | None = None, hidden: Tensor | None = None):
        self.fused = fused
        self.is_fused = is_fused
        self.scale = scale
        self.hidden = hidden
        self.raw: Tensor | None = None
        self.logits: list[Tensor] = []
        self.calls = 0

    def _stand_in(self, layer: nn.Linear, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        self.calls += 1
        if self.hidden is None:
            (like,) = arguments
            generator = torch.Generator().manual_seed(0)
            hidden = torch.randn(like.shape, generator=generator).to(like.device, like.dtype)
            with torch.no_grad():
                deviation = nn.functional.linear(hidden, layer.weight.to(hidden.dtype)).float().std()
            # Weights that are still 0 give logits of 0, whatever goes in.
            factor = self.scale / float(deviation) if self.scale and float(deviation) > 0 else 1.0
            self.hidden = (hidden * factor).requires_grad_()
        return (self.hidden,)

    def _keep_raw(self, layer: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        self.raw = output

    def run(self, inputs: dict[str, Any]) -> Any:
        """The output of the model for the batch."""
        layer = self.fused.layer
        hooks = [
            layer.register_forward_pre_hook(self._stand_in, prepend=True),
            layer.register_forward_hook(self._keep_raw),
        ]
        self.fused.proof = self
        try:
            return self.fused.model(**inputs)
        finally:
            self.fused.proof = None
            for hook in hooks:
                hook.remove()


def _probe_batch(model: Any) -> dict[str, Any]:
    embeddings = model.get_input_embeddings()
    device = embeddings.weight.device if embeddings is not None else model.device
    config = model.config.get_text_config()
    special = {
        value
        for owner in (config, model.config)
        for name, value in vars(owner).items()
        if name.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    words = [word for word in range(min(int(config.vocab_size), 4096)) if word not in special]
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor(words)[torch.randint(len(words), (2, 6), generator=generator)].to(device)
    labels = ids.clone()
    labels[0, 3] = labels[1, 0] = IGNORE_INDEX
    # What a configuration asks for beside the logits is recorded by hooks that transformers leaves on its layers.
    recorded = ("output_router_logits", "output_hidden_states", "output_attentions")
    left_out = {name: False for name in recorded if getattr(config, name, False)}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **left_out}


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Evaluation, with gradients; training flags and random numbers are restored."""
    training = [(module, module.training) for module in model.modules()]
    devices = {parameter.device.index for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(index for index in devices if index is not None)), torch.enable_grad():
        try:
            for module, _ in training:
                module.training = False
            yield
        finally:
            for module, was in training:
                module.training = was


def prove(fused: FusedHead) -> None:
    """Finds out what the model does to its logits, and compares its loss and gradients, fused and not.

    The hidden states of the comparison are random, of a size that reaches soft caps: those of a model with random
    weights would not.

    Raises:
        Refusal: they are not equal, or cannot be compared.
    """
    model, layer = fused.model, fused.layer
    with _as_it_was(model):
        try:
            inputs = _probe_batch(model)
            numbers = settings(model)
            caps = [number.value() for number in numbers if "cap" in number.name]
            with torch.no_grad():
                wide = Proof(fused, is_fused=False, scale=2.0 * max(caps, default=10.0))
                output = wide.run(inputs)
            _check_calls(wide)
            assert wide.raw is not None
            fused.processing = processing_of(wide.raw, wide.logits[0], numbers)
            fused.logits_name = _name_of(output, wide.logits[0])
            apart = Proof(fused, is_fused=False, scale=2.0)
            expected = _loss_and_gradients(apart.run(inputs).loss, apart, layer)
            joined = Proof(fused, is_fused=True, hidden=apart.hidden)
            output = joined.run(inputs)
            found = _loss_and_gradients(output.loss, joined, layer)
        except Refusal:
            raise
        except Exception as error:
            raise Refusal(f"the probe batch ended in {type(error).__name__}: {error}") from error
    if getattr(output, fused.logits_name) is not None:
        raise Refusal(f"the {fused.logits_name} of its output are made again after the loss")
    tolerance = max(_TOLERANCE[tensor.dtype] for tensor in (wide.logits[0], layer.weight))
    for name, mine in found.items():
        difference = float((mine.double() - expected[name].double()).norm())
        size = float(expected[name].double().norm())
        if not difference <= tolerance * size:
            raise Refusal(f"{name} of a probe batch differs by {difference:.3g} from {size:.3g} without it")


def _check_calls(proof: Proof) -> None:
    if len(proof.logits) != 1:
        raise Refusal(f"the model called its loss_function {len(proof.logits)} times for labels, expected once")
    if proof.calls != 1:
        raise Refusal(f"the output layer was called {proof.calls} times in a forward pass, expected once")


def _name_of(output: Any, logits: Tensor) -> str:
    for name, value in output.items():
        if value is logits:
            return str(name)
    raise Refusal("the logits that its loss is given are not those of its output")


def _loss_and_gradients(loss: Tensor, proof: Proof, layer: nn.Linear) -> dict[str, Tensor]:
    leaves = {"the gradient of the hidden states": proof.hidden, "the gradient of the weight": layer.weight}
    if layer.bias is not None:
        leaves["the gradient of the bias"] = layer.bias
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    gradients = torch.autograd.grad(loss, list(wanted.values()))
    return {"the loss": loss.detach(), **dict(zip(wanted, gradients, strict=True))}


def fuse(installation: Installation, served: Sequence[Served]) -> str:
    """Fuses the output layer of the outermost model whose loss is of this package, until ``detach``.

    Returns:
        What the report says of it.

    Raises:
        Refusal: there is no such model, or its loss would not be the same.
    """
    one = next((one for one in served if one.function is not None), None)
    if one is None or one.function is None:
        raise Refusal("; ".join(map(str, served)) or "no model in it takes labels")
    layer: Any = one.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    check_layer(layer)
    fused = FusedHead(one.model, layer)
    installation.undo.callback(layer.register_forward_pre_hook(fused.keep).remove)
    one.function.fused = fused
    installation.steps.after.append(fused.after)
    prove(fused)
    return (
        f"output layer of {type(one.model).__name__}: fused into the loss of training steps, whose "
        f"{fused.logits_name} are None; logits {fused.processing}; loss and gradients of a probe batch are equal"
    )
