"""``attach(model, unpad=True)``: padded calls run packed inside the model, and come back padded.

For code that cannot change its batches. What computes tokens (an encoder, a decoder, the stacks of an encoder-decoder)
is handed the real tokens of a call in one row, with their positions, and whatever it returns for each token is laid
out again as the batch was, 0 where there was padding. Only heads, such as that of a language model, still see padding.
Packed rows with padding in them are closed up in the same way.

Left as they are: calls with a cache, calls without a 2-D mask, models with a learned relative bias (T5), whose size is
the square of the row, and models with layers that carry a state along it. How many tokens are real is read once a call,
which waits for a device.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from maskops.integrations.transformers.calls import Call
from maskops.integrations.transformers.mixers import token_mixers
from maskops.integrations.transformers.tokens import Tokens, kept_of_call, tokens_of_call
from maskops.packing import cu_seqlens_from_lengths, pad_input

if TYPE_CHECKING:
    from maskops.integrations.transformers.attach import Installation, Options

_KEYS, _KEY_MASK = "encoder_hidden_states", "encoder_attention_mask"
_ELSEWHERE = (_KEYS, _KEY_MASK, "attention_mask", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""Tensors that are not moved with the tokens of the call."""


def install(installation: Installation, options: Options) -> None:
    """A part of ``attach``; its steps lie inside those of heads, and before those that place tokens."""
    if not options.unpad:
        return
    reasons = _reasons(installation.models)
    models = frozenset(model for model, reason in reasons.items() if not reason)
    for reason in sorted(set(reasons.values())):
        names = ", ".join(sorted({type(model).__name__ for model, its in reasons.items() if its == reason}))
        installation.report.notes.append(
            f"unpad: {names} stay padded: {reason}"
            if reason
            else f"unpad: padded calls without a cache run packed inside {names}"
        )
    steps = _Steps(models, installation.report.implementation)
    installation.steps.before.append(steps.before)
    installation.steps.after.insert(0, steps.after)


def runs_packed(models: tuple[PreTrainedModel, ...]) -> bool:
    """Whether any of the models is handed packed rows in place of padded ones."""
    return not all(_reasons(models).values())


def _reasons(models: tuple[PreTrainedModel, ...]) -> dict[PreTrainedModel, str]:
    """The models that compute tokens, and why each stays padded; "" where it does not."""
    return {model: _reason_to_stay_padded(model) for model in models if _computes_tokens(model)}


def _computes_tokens(model: PreTrainedModel) -> bool:
    """Whether a model holds no other, gives states and no loss, and hands on keywords that it does not know."""
    parameters = inspect.signature(type(model).forward).parameters
    takes_any = any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    holds = any(module is not model and isinstance(module, PreTrainedModel) for module in model.modules())
    return takes_any and "labels" not in parameters and not holds


def _reason_to_stay_padded(model: nn.Module) -> str:
    """Why a model is not given packed rows; "" where it is."""
    if any(getattr(module, "has_relative_attention_bias", False) for module in model.modules()):
        return "a learned relative bias has the size of the row squared"
    if any(mixer.recurrent for mixer in token_mixers(model)):
        return "layers carry a state along the row, into the next document"
    return ""


class _Side(NamedTuple):
    """The real tokens of the queries or the keys of a call.

    Attributes:
        indices: int64 (total,), cells of (batch, length) counted row by row, in order.
        lengths: int64 (n_documents,).
        batch: rows.
        length: cells of a row.
    """

    indices: Tensor
    lengths: Tensor
    batch: int
    length: int

    def packed(self, values: Tensor) -> Tensor:
        """(batch, length, ...) as (1, total, ...)."""
        return values.flatten(0, 1).index_select(0, self.indices).unsqueeze(0)

    def padded(self, values: Tensor) -> Tensor:
        """(total, ...) as (batch, length, ...), 0 where there was padding."""
        return pad_input(values, self.indices, self.batch, self.length)


def _side(kept: Tensor, tokens: Tokens | None) -> _Side:
    """The side of a call whose mask keeps ``kept`` (batch, length), packed or padded."""
    real = kept.flatten()
    if tokens is None:
        lengths = kept.sum(1)
    else:
        real, lengths = real & (tokens.ids < tokens.number), tokens.lengths
    return _Side(real.nonzero().flatten(), lengths, *kept.shape)


def _has_holes(kept: Tensor, tokens: Tokens | None) -> bool:
    """Whether there is padding between two tokens of one document. Waits for a device."""
    if tokens is None:
        number = kept.shape[0]
        ids = torch.where(kept, torch.arange(number, device=kept.device)[:, None], number).flatten()
        lengths = kept.sum(1)
    else:
        number, lengths = tokens.number, tokens.lengths
        ids = torch.where(kept.flatten(), tokens.ids, number)
    before = torch.nn.functional.pad(ids, (1, 0), value=-1)[:-1]
    runs = ((ids < number) & (ids != before)).sum()
    return bool(runs > (lengths > 0).sum())


class _Steps:
    """Around the calls of some models."""

    def __init__(self, models: frozenset[Any], implementation: str) -> None:
        self.models = models
        self.implementation = implementation
        self.causal = frozenset(
            model for model in models if any(getattr(module, "is_causal", False) for module in model.modules())
        )

    def before(self, call: Call) -> None:
        """Close up the tokens of a call that has padding and no cache."""
        if call.module not in self.models or self._caches(call):
            return
        config: Any = call.module.config
        if config._attn_implementation != self.implementation:  # another attention would not see the documents
            return
        kept = kept_of_call(call)
        if kept is None:
            return
        states, mask = call.tensor(_KEYS), call.tensor(_KEY_MASK)
        if states is not None and mask is not None and mask.shape != states.shape[:2]:
            return
        tokens = tokens_of_call(call)
        if states is not None and tokens is not None:
            return  # packed rows of a decoder: which document of the encoder goes with which is told by others
        if _has_holes(kept, tokens):
            return  # closed up, tokens on both sides of a hole would come nearer to each other
        side = _side(kept, tokens)
        total = side.indices.shape[0]
        if total in (0, kept.numel()):
            return
        for name, value in list(call.arguments.items()):
            if isinstance(value, Tensor) and name not in _ELSEWHERE:
                call.set(name, _packed(name, value, side))
        offsets = cu_seqlens_from_lengths(side.lengths)
        call.set("attention_mask", None)
        call.set("cu_seq_lens_q", offsets)
        call.set("cu_seq_lens_k", offsets)
        if states is not None:
            all_kept = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
            keys = _side(all_kept if mask is None else mask != 0, None)
            call.set(_KEYS, keys.packed(states))
            call.set(_KEY_MASK, None)
            call.set("cu_seq_lens_k", cu_seqlens_from_lengths(keys.lengths))
        call.notes["unpadded"] = side
        call.notes["tokens"] = _tokens_of(side, offsets)

    def after(self, call: Call, output: Any) -> Any:
        """Lay out again what was computed for each token."""
        side = call.notes.get("unpadded")
        if side is None:
            return None
        if isinstance(output, tuple):
            return tuple(_padded("", value, side) for value in output)
        return type(output)(**{name: _padded(name, value, side) for name, value in output.items()})

    def _caches(self, call: Call) -> bool:
        """Whether keys and values of a call are kept for others, in the layout in which they are computed."""
        if call.arguments.get("past_key_values") is not None:
            return True
        model: Any = call.module
        if model not in self.causal or (model.training and getattr(model, "gradient_checkpointing", False)):
            return False
        asked = call.arguments.get("use_cache")
        return bool(getattr(model.config, "use_cache", False) if asked is None else asked)


def _tokens_of(side: _Side, offsets: Tensor) -> Tokens:
    """The documents of the row that a side is packed into."""
    total = side.indices.shape[0]
    token = torch.arange(total, device=offsets.device)
    ids = torch.searchsorted(offsets, token.to(torch.int32), right=True) - 1
    return Tokens(ids, token - offsets[ids], side.lengths, side.lengths.shape[0], 1, total)


def _packed(name: str, value: Tensor, side: _Side) -> Tensor:
    """An argument for the packed row: moved with the tokens if it has one value for each of them."""
    cells = (side.batch, side.length)
    if name == "position_ids" and value.dim() <= 2 and value.shape[-1] == side.length:
        value = value.expand(cells)
    if tuple(value.shape[:2]) == cells:
        return side.packed(value)
    if value.dim() > 2 and tuple(value.shape[-2:]) == cells:  # places along several axes
        return value.flatten(-2).index_select(-1, side.indices).unsqueeze(-2)
    return value


def _padded(name: str, value: Any, side: _Side) -> Any:
    """A field of an output: laid out as the batch was where it has one value for each token."""
    if isinstance(value, (tuple, list)):
        return type(value)(_padded(name, part, side) for part in value)
    total = side.indices.shape[0]
    if not isinstance(value, Tensor):
        return value
    if value.dim() >= 3 and tuple(value.shape[:2]) == (1, total):
        return side.padded(value.squeeze(0))
    if "router" in name and value.dim() == 2 and value.shape[0] == total:  # of experts, a row for each token
        return side.padded(value).flatten(0, 1)
    return value
