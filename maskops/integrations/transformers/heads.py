"""Heads that give one output a document: classifiers, poolers and question answering on packed rows.

A head of transformers takes a row for one document, which begins in the first column. For a packed call

- a classifier (``*ForSequenceClassification``) sees a row for each document, while the model inside it runs the packed
  row as it came: only the last hidden states are laid out anew, so that the first token, the last one, the last that
  is not padding, the last end-of-sequence token or the mean mean what they say. Labels are (n_documents,);
  A classifier whose ``forward`` is called by itself, past the hooks, raises for packed rows;
- a pooler (``pooler_output``) is handed the first tokens of all documents;
- question answering stays token by token; places of answers are (n_documents,), counted inside each document;
- multiple choice is refused.

Classifiers and poolers also find the first token of rows that are padded on the left.

Cumulative lengths tell from their shape how many documents there are, and documents without a token keep their row.
Position ids and masks of integers, which may hold segments, are read for it, which waits for a device; offsets and
masks of bool are not. Without ``max_length_q`` as an integer the length of the longest document is read as well;
compiled code takes the length of a row for it.
"""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from maskops.integrations.transformers.arrival import as_given, is_encoder_decoder
from maskops.integrations.transformers.calls import Call, innermost
from maskops.integrations.transformers.tokens import Tokens, taken, tokens_of_call, tokens_of_rows
from maskops.layouts import values_can_be_read
from maskops.ops.cross_entropy.api import cross_entropy

if TYPE_CHECKING:
    from maskops.integrations.transformers.attach import Installation, Options

_TOLD_BY = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Keywords that speak of the packed row, and of nothing in the rows that a classifier sees."""
_LAID_OUT = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
"""What the model inside a classifier is given as it came, whatever the head was given."""


def install(installation: Installation, _: Options) -> None:
    """A part of ``attach``; its steps come before those that place tokens, which then see the packed call."""
    installation.steps.before.append(_before)
    installation.steps.after.append(_after)
    kinds = ("ForSequenceClassification", "ForQuestionAnswering")
    names = sorted({type(model).__name__ for model in installation.models if any(_is_a(model, kind) for kind in kinds)})
    if names:
        installation.report.notes.append(f"packed rows: one output or label a document in {', '.join(names)}")
    for model in installation.models:
        pooler = getattr(model, "pooler", None)
        if isinstance(pooler, nn.Module):
            handle = pooler.register_forward_pre_hook(_FirstTokens(model))
            installation.undo.callback(handle.remove)
            encoder = getattr(model, "encoder", None)
            if isinstance(pooler, nn.Linear) and isinstance(encoder, nn.Module):
                installation.undo.callback(encoder.register_forward_hook(_note_hidden).remove)


def _is_a(module: nn.Module, ending: str) -> bool:
    """Whether a class of transformers of this kind is among the classes of a module."""
    return any(base.__name__.endswith(ending) for base in type(module).__mro__)


class _Classification(NamedTuple):
    """A packed call of a classifier, between its own step and that of the model inside it."""

    tokens: Tokens
    places: Tensor
    """int64 (n_documents, width): the tokens in the rows that the head sees."""
    packed: dict[str, Any]
    """The arguments of the packed row, by name."""
    segments: dict[str, Tensor]
    """The numbers of documents from which masks among them were made."""


def _before(call: Call) -> None:
    parent = call.parent
    around = None if parent is None else parent.notes.get("classification")
    if parent is not None and around is not None and "inside" not in parent.notes:
        for name, value in around.packed.items():
            if value is not None or name in call.arguments:
                call.set(name, value)
        call.segments.update(around.segments)
        call.notes["tokens"] = around.tokens
        parent.notes["inside"] = call
        return
    if parent is None and (head := _classifier_around(call)) is not None and tokens_of_call(call) is not None:
        raise ValueError(
            f"{type(head).__name__}: its forward was called without its hooks, as wrappers with adapters do, and would "
            "take the packed row for one document: call the model inside the wrapper, or give a padded batch"
        )
    if _is_a(call.module, "ForMultipleChoice"):
        if any(call.arguments.get(name) is not None for name in _TOLD_BY[:2]):
            raise ValueError(_multiple_choice(call))
        return
    if parent is not None and _is_a(parent.module, "ForMultipleChoice"):
        if tokens_of_call(call) is not None:
            raise ValueError(_multiple_choice(parent))
        return
    is_classifier = _is_a(call.module, "ForSequenceClassification")
    answers = _is_a(call.module, "ForQuestionAnswering")
    if not (is_classifier or answers or _derives_decoder_ids(call)):
        return
    if is_encoder_decoder(call) and call.tensor("cu_seq_lens_k") is None and call.tensor("cu_seq_lens_q") is not None:
        call.set("cu_seq_lens_k", call.tensor("cu_seq_lens_q"))
    tokens, bound = tokens_of_call(call), call.arguments.get("max_length_q")
    if tokens is None and is_classifier and call.arguments.get("past_key_values") is None:
        tokens = tokens_of_rows(call)
        bound = None if tokens is None else tokens.length
    if tokens is None:
        return
    width = tokens.width(bound)
    if _derives_decoder_ids(call):
        _set_decoder_ids(call, tokens, width)
    if is_classifier:
        _classify(call, tokens, width)
    elif answers:
        for name in ("start_positions", "end_positions"):
            value = call.tensor(name)
            if value is not None:
                _check_labels(name, value, tokens)
                call.notes[name] = value
                call.set(name, None)


def _after(call: Call, output: Any) -> Any:
    classification = call.notes.get("classification")
    if classification is not None and "inside" not in call.notes:
        raise ValueError(
            f"{type(call.module).__name__}: a packed row cannot be classified document by document, because it called "
            "no model of transformers inside it: give a padded batch"
        )
    parent = call.parent
    if parent is not None and parent.notes.get("inside") is call:
        around: _Classification = parent.notes["classification"]
        return _replaced(output, taken(output[0], around.places))
    if call.notes.get("start_positions") is not None and call.notes.get("end_positions") is not None:
        return _with_loss(output, _answer_loss(call, output))
    _check_pooled(call, output)
    return None


# ---- classifiers -----------------------------------------------------------------------------------------------------


def _check_labels(name: str, labels: Tensor, tokens: Tokens) -> None:
    if labels.dim() == 0 or labels.shape[0] != tokens.number:
        raise ValueError(
            f"{name} has shape {tuple(labels.shape)}, expected ({tokens.number}, ...): the batch holds {tokens.number} "
            "documents, one after the other, and each has its own"
        )


def _classify(call: Call, tokens: Tokens, width: int) -> None:
    """Give the head a row for each document, and keep the packed arguments for the model inside it."""
    labels = call.tensor("labels")
    if labels is not None:
        _check_labels("labels", labels, tokens)
    index = tokens.rows_with_ends(width)
    real = index < tokens.batch * tokens.length
    # Heads divide by the length of a mask: documents without a token count their 0 as one.
    is_empty = tokens.lengths.unsqueeze(1) == 0
    real = real | (is_empty & (torch.arange(width, device=real.device) == 0))
    arguments = call.arguments
    packed, segments = {name: arguments.get(name) for name in _LAID_OUT}, dict(call.segments)
    packed |= {name: arguments[name] for name in _TOLD_BY if name in arguments}
    config: Any = call.module.config
    config = config.get_text_config()
    ids, embeds = call.tensor("input_ids"), call.tensor("inputs_embeds")
    if ids is not None:
        pad = getattr(config, "pad_token_id", None)
        rows = taken(ids, index, 0 if pad is None else pad)
        if is_encoder_decoder(call):
            # Its heads look for the last end-of-sequence token, in every row.
            rows = torch.where(is_empty & real, config.eos_token_id, rows)
        call.set("input_ids", rows)
    targets = call.tensor("decoder_input_ids")
    if targets is not None and tuple(targets.shape) == (tokens.batch, tokens.length):
        # Heads that count from the beginning of a row look at how long it is.
        packed["decoder_input_ids"] = targets
        call.set("decoder_input_ids", taken(targets, index))
    if embeds is not None:
        call.set("inputs_embeds", embeds.new_zeros(()).expand(tokens.number, width, embeds.shape[-1]))
    call.set("attention_mask", real.to(torch.int64))
    if "position_ids" in arguments:
        call.set("position_ids", None)
    for name in _TOLD_BY:
        call.remove(name)
    places = _ends_everywhere(index, tokens)
    call.notes["classification"] = _Classification(tokens, places, packed, segments)


def _classifier_around(call: Call) -> nn.Module | None:
    """The classifier that runs a call, where it is no call itself and the model inside hands out no pooled output."""
    if torch.compiler.is_compiling() or isinstance(getattr(call.module, "pooler", None), nn.Module):
        return None
    frame = call.frame
    while frame is not None:
        around = frame.f_locals.get("self") if frame.f_code.co_name == "forward" else None
        if isinstance(around, nn.Module) and around is not call.module and _is_a(around, "ForSequenceClassification"):
            return around if getattr(around, "base_model", None) is call.module else None
        frame = frame.f_back
    return None


def _ends_everywhere(index: Tensor, tokens: Tokens) -> Tensor:
    """Of documents of one token, which is in the first column, also the last column holds the state."""
    if index.shape[1] == 1:
        return index
    only = (tokens.lengths == 1).unsqueeze(1)
    return torch.cat((index[:, :-1], torch.where(only, index[:, :1], index[:, -1:])), dim=1)


def _replaced(output: Any, hidden: Tensor) -> Any:
    """An output with other last hidden states, which are its first element."""
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    name = next(iter(output.keys()))
    return type(output)(**{**output, name: hidden})


# ---- question answering ----------------------------------------------------------------------------------------------


def _answer_loss(call: Call, output: Any) -> Tensor:
    """Mean cross-entropy of beginnings and ends, each among the tokens of its own document."""
    tokens: Tokens = call.notes["tokens"]
    index = tokens.rows(tokens.width(call.arguments.get("max_length_q")))
    losses: list[Tensor] = []
    for logits_name, name in (("start_logits", "start_positions"), ("end_logits", "end_positions")):
        logits = getattr(output, logits_name, None) if not isinstance(output, tuple) else output[len(losses)]
        if not isinstance(logits, Tensor) or tuple(logits.shape) != (tokens.batch, tokens.length):
            raise ValueError(
                f"{name}: {type(call.module).__name__} gives no {logits_name} of each token, so that places of answers "
                "in a packed row mean nothing to it: give a padded batch"
            )
        places: Tensor = call.notes[name].reshape(-1).clamp(min=0)
        # Answers that were cut off with the rest of their document are ignored, as in a row of their own.
        places = torch.where(places < tokens.lengths, places, -100)
        inside = taken(logits, index, torch.finfo(logits.dtype).min)
        losses.append(cross_entropy(inside, places, num_items=call.arguments.get("num_items_in_batch")))
    return (losses[0] + losses[1]) / 2


def _with_loss(output: Any, loss: Tensor) -> Any:
    if isinstance(output, tuple):
        return (loss, *output)
    return type(output)(**{**output, "loss": loss})


def _multiple_choice(call: Call) -> str:
    return (
        f"{type(call.module).__name__}: a packed row does not say which of its documents are choices of one question: "
        "give input_ids (batch, choices, length), padded"
    )


# ---- poolers ---------------------------------------------------------------------------------------------------------


def _note_hidden(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of an encoder whose model hands its pooler a single token."""
    call = innermost()
    if call is not None:
        call.notes["hidden"] = output[0]


class _FirstTokens:
    """Forward pre-hook of a pooler: in a packed call it is handed the first token of each document."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.reads_first: bool | None = None
        """Whether the pooler was seen to read nothing but the first token; None before the first packed call."""

    def __call__(self, pooler: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Replace the hidden states (batch, length, H) by (n_documents, 1, H)."""
        call = innermost()
        if call is None or call.module is not self.model or not args or not isinstance(args[0], Tensor):
            return None
        tokens = tokens_of_call(call) or tokens_of_rows(call)
        if tokens is None:
            return None
        hidden: Tensor | None = args[0]
        if args[0].dim() == 2:
            hidden = call.notes.get("hidden")
        if hidden is None or tuple(hidden.shape[:2]) != (tokens.batch, tokens.length):
            return None
        if self.reads_first is None and args[0].dim() == 3 and values_can_be_read([hidden], torch.device("cpu")):
            self.reads_first = _reads_first_token(pooler, hidden)
        if self.reads_first is False:
            return None
        call.notes["pooled"] = True
        first = taken(hidden, tokens.first())
        return (first if args[0].dim() == 2 else first.unsqueeze(1), *args[1:])


@torch.no_grad()
def _reads_first_token(pooler: nn.Module, hidden: Tensor) -> bool:
    """Whether a pooler gives the same with and without the tokens behind the first, on three tokens of a call."""
    training = {module: module.training for module in pooler.modules()}
    rows = hidden.flatten(0, 1)[:3].detach().unsqueeze(0)
    try:
        for module in training:
            module.training = False
        alone, together = (pooler.forward(x) for x in (rows[:, :1], rows))
    finally:
        for module, was_training in training.items():
            module.training = was_training
    return isinstance(alone, Tensor) and alone.shape == together.shape and torch.equal(alone, together)


def _check_pooled(call: Call, output: Any) -> None:
    """Raise ValueError where a model has pooled a packed row as if it were one document."""
    pooled = None if isinstance(output, tuple) else getattr(output, "pooler_output", None)
    if not isinstance(pooled, Tensor) or "pooled" in call.notes or call.sizes is None:
        return
    if tokens_of_call(call) is not None:
        raise ValueError(
            f"{type(call.module).__name__} pools in a way of its own, which takes a packed row for one document: build "
            "it with add_pooling_layer=False and use maskops.integrations.pool, or give a padded batch"
        )


# ---- encoder-decoders ------------------------------------------------------------------------------------------------


def _derives_decoder_ids(call: Call) -> bool:
    """Whether an encoder-decoder would make the ids of its decoder from ``input_ids``, which runs over documents."""
    given = ("decoder_input_ids", "decoder_inputs_embeds", "encoder_outputs", "past_key_values")
    config = getattr(call.module, "config", None)
    return (
        getattr(config, "is_encoder_decoder", False)
        and "decoder_input_ids" in call.accepts
        and not (_is_a(call.module, "ForConditionalGeneration") and call.tensor("labels") is not None)
        and call.tensor("input_ids") is not None
        and all(call.arguments.get(name) is None for name in given)
    )


def _set_decoder_ids(call: Call, tokens: Tokens, width: int) -> None:
    """The ids of the decoder: those of each document, shifted as the model shifts those of a row."""
    ids = call.arguments["input_ids"]
    config: Any = call.module.config
    pad = config.pad_token_id or 0
    rows = taken(ids, tokens.rows(width), pad)
    own = getattr(call.module, "_shift_right", None)
    shift = getattr(sys.modules[type(call.module).__module__], "shift_tokens_right", None)
    start: Any = getattr(config, "decoder_start_token_id", None)  # some have none, and shift in another way
    if own is not None:
        shifted = own(rows)
    elif shift is not None:
        shifted = shift(rows, *(pad, start)[: len(inspect.signature(shift).parameters) - 1])
    else:
        shifted = torch.cat((torch.full_like(rows[:, :1], start), rows[:, :-1]), dim=1)
    place = torch.where(tokens.ids < tokens.number, tokens.ids * rows.shape[1] + tokens.place, shifted.numel())
    call.set("decoder_input_ids", taken(shifted, place, pad).view_as(ids))
    if call.tensor("decoder_attention_mask") is None and call.tensor("attention_mask") is not None:
        call.set("decoder_attention_mask", as_given(call, "attention_mask"))
    if call.tensor("cu_seq_lens_k") is not None:
        call.set("cu_seq_lens_q", call.arguments["cu_seq_lens_k"])
