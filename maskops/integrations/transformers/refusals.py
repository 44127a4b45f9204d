"""What cannot be right: models that are not attached, and calls that an attached model does not take.

Each refusal says what, why, and what works instead.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maskops.integrations.transformers import arrival
from maskops.integrations.transformers.calls import Call
from maskops.integrations.transformers.mixers import Mixer, token_mixers
from maskops.integrations.transformers.probe_batches import PACKED, PACKED_CU
from maskops.integrations.transformers.report import REFUSED, WRONG, AttachError, LayerProof, Report

# Names of the configurations of parts whose input is no text.
_TOWER_CONFIG = re.compile(r"vision|visual|image|audio|speech|video|vq|codec")
_INDEXER = re.compile(r"Indexer\b|Indexer$|TopkSelector")


def is_of_tower(name: str) -> bool:
    """Whether a nested configuration of this name is that of a vision or audio tower."""
    return _TOWER_CONFIG.search(name) is not None


def towers(model: nn.Module) -> dict[str, nn.Module]:
    """The vision and audio towers inside a model, by name: models inside it that take neither ids nor embeddings.

    Their batches are images and frames, laid out by rules of their own, so that they keep their own attention.
    """
    models = {name: module for name, module in model.named_modules() if hasattr(module, "main_input_name")}
    found: dict[str, nn.Module] = {}
    for name, inner in list(models.items())[1:]:
        arguments = inspect.signature(inner.forward).parameters
        takes_text = any(argument.endswith(("input_ids", "inputs_embeds")) for argument in arguments)
        hands_on = "args" in arguments  # a shell around a decoder
        if not takes_text and not hands_on and not any(name.startswith(f"{tower}.") for tower in found):
            found[name] = inner
    return found


def _source(module_of_model: nn.Module) -> str:
    """The file in which the class of a module is written; empty where it cannot be read."""
    module = sys.modules.get(type(module_of_model).__module__)
    try:
        return inspect.getsource(module) if module is not None else ""
    except (OSError, TypeError):
        return ""


def refuse(model: nn.Module, models: Iterable[Any]) -> None:
    """Raises for models that cannot be served whatever they are called with; nothing is changed.

    Args:
        model: what is attached.
        models: every ``PreTrainedModel`` in it that is to be served.

    Raises:
        AttachError: the model, the reason, and what works instead.
    """
    apart = {id(module) for tower in towers(model).values() for module in tower.modules()}
    for inner in models:
        if getattr(inner.config, "output_attentions", False):
            raise AttachError(
                f"{type(inner).__name__} cannot be attached: its configuration asks for attention weights "
                "(output_attentions), and maskops never makes them. Set config.output_attentions = False"
            )
        mixers = [mixer for mixer in token_mixers(inner) if id(mixer.module) not in apart]
        deaf = [mixer for mixer in mixers if "ALL_ATTENTION_FUNCTIONS" not in _source(mixer.module)]
        if deaf and not inner._can_set_attn_implementation():
            raise AttachError(_never_called(inner, deaf))
        kinds = (type(module).__name__ for module in inner.modules() if id(module) not in apart)
        chooser = next((kind for kind in kinds if _INDEXER.search(kind)), None)
        if chooser is not None:
            raise AttachError(
                f"{type(inner).__name__} cannot be attached: its {chooser} chooses single keys for each query (sparse "
                "attention), and maskops computes spans of keys. Use it as it is, with attn_implementation='eager' or "
                "'sdpa'"
            )


def _never_called(model: nn.Module, mixers: list[Mixer]) -> str:
    source = _source(mixers[0].module)
    kind = next(
        (type(mixer.module).__name__ for mixer in mixers if not mixer.recurrent), type(mixers[0].module).__name__
    )
    table = re.search(r"^(\w+_ATTENTION_CLASSES)\b", source, re.MULTILINE)
    if not source:
        why = "its source cannot be read, so that transformers does not let its attention be set"
    elif all(mixer.recurrent for mixer in mixers):
        why = f"it has no attention for maskops to compute, only layers that carry a state ({kind})"
    elif table is not None:
        why = (
            f"it picks its attention from a table of its own ({table[1]}) when it is built and never asks "
            "transformers' attention interface, where maskops is registered"
        )
    else:
        why = (
            f"its {kind} computes attention in its own code and never calls transformers' attention interface, where "
            "maskops is registered, so that maskops would be attached and never run"
        )
    instead = "Use it as it is, with padded batches"
    if "scaled_dot_product_attention(" in source:
        instead += ", or load it with attn_implementation='sdpa' and call it inside maskops.replace_sdpa()"
    return f"{type(model).__name__} cannot be attached: {why}. {instead}"


def settle(report: Report) -> frozenset[str]:
    """Decides what follows from a probe.

    Where everything but packed batches is right, and no layer that maskops computes is wrong, packed batches are
    refused: layers that carry a state along the row read the document before.

    Args:
        report: of the probe; verdicts of packed batches may become ``refused``.

    Returns:
        The ways of arrival that the attached model must refuse.

    Raises:
        AttachError: with the table, where a layer is wrong that maskops computes, or should.
    """
    wrong = [way for way, proof in report.arrivals.items() if proof.verdict == WRONG]
    ours = [layer for layer in report.layers if layer.called and any(layer.wrong(way) for way in wrong)]
    called = any(layer.called for layer in report.layers)
    if not called or any(way not in PACKED for way in wrong) or any(not layer.recurrent for layer in ours):
        found = "\n".join(f"- {failure}" for failure in report.failures())
        raise AttachError(
            f"{report.model} was not attached: its probe failed.\n{found}\n"
            f"The model is as it was before. attach(model, probe=False) attaches it unproven.\n\n{report}",
            report,
        )
    for way in wrong:
        proof = report.arrivals[way]
        proof.verdict = REFUSED
        proof.reason = _leak([layer for layer in report.layers if layer.wrong(way)]) or (
            f"{proof.reason}, though attention is right"
        )
    refused = [way for way, proof in report.arrivals.items() if proof.verdict == REFUSED]
    if refused:
        report.notes.append(f"batches that arrive {' or '.join(refused)} are refused with an error; give padded ones")
    return frozenset(refused)


def _leak(layers: list[LayerProof]) -> str:
    """Why packed documents meet in layers that maskops does not compute, or only in part; empty if there are none."""
    if not layers:
        return ""
    count, kinds = len(layers), ", ".join(sorted({layer.kind for layer in layers}))
    subject = f"{count} layer{'s' * (count > 1)} ({kinds})"
    if all(layer.recurrent for layer in layers):
        return f"{subject} with a state that goes on along the row, into the next document"
    return f"{subject} with code of its own, which knows no documents"


def packed_guard(model: nn.Module, ways: frozenset[str], reason: str) -> Callable[[Call], None]:
    """A step before each call that raises where the batch is packed in a way that is not right.

    Args:
        model: the attached model.
        ways: the ways that are refused; batches with ``cu_seq_lens_q`` pass where that way is not among them.
        reason: why.
    """
    message = (
        f"{type(model).__name__} does not take packed batches: {reason}. Give it padded batches (attention_mask of 0 "
        "and 1, one document a row)"
    )

    def refuse_packed(call: Call) -> None:
        sides = [] if call.parent is not None else [side for side in _sides(call) if side.length != 1]
        if not sides:
            return
        if any(arrival.cu_seqlens_of_call(call, side) is not None for side in "qk"):
            if PACKED_CU in ways:
                raise ValueError(message)
            return
        for batch, length, name, positions in sides:
            mask = call.tensor(name)
            mask = mask[:, -length:] if mask is not None and mask.dim() == 2 and mask.shape[1] >= length else None
            integers = arrival.segments_of_call(call, name, slice(-length, None)) if mask is not None else None
            places = arrival.text_positions(call.tensor(positions), batch, length)
            if torch.compiler.is_compiling():
                documents = arrival.of_tokens(places, integers, arrival.kept_tokens(mask))
                if documents is not None:
                    torch._assert_async((documents.ids <= 0).all(), message)
                continue
            # Reading them waits for a device once a call: the price of not being wrong without a word.
            found = arrival.of_tokens(_on_cpu(places), _on_cpu(integers), _on_cpu(arrival.kept_tokens(mask)))
            if found is not None:
                raise ValueError(message)

    return refuse_packed


class _Side(NamedTuple):
    """The tokens of one side of a call, and the names of the arguments that speak of them."""

    batch: int
    length: int
    mask: str
    positions: str


def _sides(call: Call) -> list[_Side]:
    """The sides of a call whose ids or embeddings were given: two in an encoder-decoder."""
    found = [] if call.sizes is None else [_Side(*call.sizes, "attention_mask", "position_ids")]
    for name in ("decoder_input_ids", "decoder_inputs_embeds"):
        tokens = call.tensor(name)
        if tokens is not None and tokens.dim() >= 2 and len(found) < 2:
            sizes = (tokens.shape[0], tokens.shape[1])
            found.append(_Side(*sizes, "decoder_attention_mask", "decoder_position_ids"))
    return found


def _on_cpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.cpu()


def guards(model: nn.Module, report: Report, ways: frozenset[str]) -> list[Callable[[Call], None]]:
    """The steps that an attached model needs so that no call goes wrong silently.

    Args:
        model: the attached model.
        report: of the probe, or of a model that was not probed.
        ways: what ``settle`` returned; empty for a model that was not probed.
    """
    if report.unproven:
        recurrent = [mixer for mixer in token_mixers(model) if mixer.recurrent]
        if not recurrent:
            return []
        layers = [LayerProof(mixer.name, type(mixer.module).__name__, recurrent=True) for mixer in recurrent]
        reason = f"{_leak(layers)}, as far as is known: no probe showed otherwise"
        report.notes.append(f"packed batches are refused with an error: {reason}")
        return [packed_guard(model, frozenset(PACKED), reason)]
    if not ways:
        return []
    return [packed_guard(model, ways, next(report.arrivals[way].reason for way in PACKED if way in ways))]
