"""Which modules of a model mix tokens: attention, and layers that carry a state or a convolution along a row."""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import nn

_ATTENTION = re.compile(r"Attention|Attn")
# Names of layers that read earlier slots of a row whatever document they belong to: state space models, linear
# attention, gated delta rules, short convolutions, recurrent blocks.
_RECURRENT = re.compile(
    r"Mamba|Delta(Net|Attention|Rule)|LinearAttention|LightningAttention|Short\w*Conv|Rglru|Recurrent(Block|Layer)|Rwkv"
    r"|LSTM|Retention|RetNet|Hyena|SSM|FalconH1Mixer|BambaMixer"
)
_RECURRENT_PARAMETERS = ("A_log", "dt_bias", "time_decay", "recurrent_gate_weight")
# Parts of mixers, and what stands around them, have the word in their names as well.
_NEITHER = re.compile(
    r"(Norm|NormGated|Rotary\w*|Mlp|MLP|Experts?|Embeddings?|Indexer|DecoderLayer|EncoderLayer|Model)$|For[A-Z]\w*$"
)


class Mixer(NamedTuple):
    """A module in which tokens meet.

    Attributes:
        name: where it is in the model.
        module: the module itself.
        recurrent: whether it reads along the row (a state, a convolution) instead of attending.
    """

    name: str
    module: nn.Module
    recurrent: bool


def _named(module: nn.Module, pattern: re.Pattern[str]) -> bool:
    name = type(module).__name__
    if type(module).__module__.startswith("torch.nn.") or _NEITHER.search(name) or not pattern.search(name):
        return False
    # Masks and the like carry the word too; what mixes has weights.
    return next(module.parameters(), None) is not None


def _is_recurrent(module: nn.Module) -> bool:
    own = any(name in module._parameters for name in _RECURRENT_PARAMETERS)
    return own or isinstance(module, nn.RNNBase) or _named(module, _RECURRENT)


def _is_attention(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) or _named(module, _ATTENTION)


def _above(name: str) -> list[str]:
    """The names of the modules around a module, the model itself ("") included."""
    parts = name.split(".") if name else []
    return [".".join(parts[:count]) for count in range(len(parts))]


def token_mixers(model: nn.Module) -> list[Mixer]:
    """The modules of a model that attend or carry a state, in the order of the model.

    Attention is the innermost module of that kind (in ``BertAttention`` the ``BertSelfAttention``), a recurrent mixer
    the outermost (its convolution reads along the row, as its state does).
    """
    modules = dict(model.named_modules())
    recurrent = {name for name, module in modules.items() if _is_recurrent(module)}
    attention = {name for name, module in modules.items() if name not in recurrent and _is_attention(module)}
    attention -= {outer for name in attention for outer in _above(name)}
    # Around attention: a layer that holds both. Inside attention: convolutions of its queries and keys.
    recurrent -= {outer for name in attention for outer in _above(name)}
    carrying = {outer for name in recurrent for outer in _above(name) if outer in attention}
    recurrent = {name for name in recurrent | carrying if not (recurrent | carrying).intersection(_above(name))}
    return [Mixer(name, module, name in recurrent) for name, module in modules.items() if name in recurrent | attention]
