"""`audit`: does a model keep the documents of a batch apart, whatever its attention is?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from maskops.data import PackedBatch, PaddedBatch
from maskops.data.lengths import Lengths, read_lengths
from maskops.testing.leak.arrivals import Arrival, Taken, arrivals_of, taken_by
from maskops.testing.leak.documents import Stream, streams_of, without_padding
from maskops.testing.leak.measure import REFUSALS, Measurement, Settings
from maskops.testing.leak.outputs import Call, Runner, coarsest_dtype, undisturbed
from maskops.testing.leak.perturb import Replacement, pad_of, vocabulary_of
from maskops.testing.leak.report import AuditReport, BatchAudit

LENGTHS = (11, 5, 17)
"""Of the documents that are made where the caller gives none."""


def audit(
    model: Any,
    batch: Mapping[str, Any] | PackedBatch | PaddedBatch | Sequence[Sequence[int] | Tensor] | None = None,
    *,
    lengths: Lengths | None = None,
    documents: Tensor | Mapping[str, Tensor] | None = None,
    arrivals: Sequence[str] | None = None,
    tolerance: float | None = None,
    per_layer: bool = True,
    causal: bool | None = None,
    tokens: str | None = None,
    special_ids: Iterable[int] = (),
    call: Call | None = None,
    seed: int = 0,
) -> AuditReport:
    """Tests a model for leaks between the documents of a batch, whatever computes its attention.

    One document is given other tokens, of the same number, and the outputs of all others are compared with what they
    were: whatever changes there has leaked. Beside that: padding is given other tokens and nothing may change; in a
    causal model the last token of each document is, and nothing before it may change; and each document runs alone
    through the same model, which shows wrong position ids and masks that forget a token as well. Where something
    leaks, hooks find the layers that let it in.

    The model runs in eval mode, without gradients, always with the same random numbers; modes, random states and hooks
    are as before afterwards. With ``n`` documents of which none leaks it runs about ``2 n + 6`` times, half of that on
    one document alone: sets of documents are changed together, such that for each pair of them one set holds one and
    not the other. Where a set leaks, its documents are changed each on its own.

    Args:
        model: a model of transformers, or anything that is called with the entries of a batch as keywords.
        batch: keyword arguments of the model, such as ``input_ids`` with ``attention_mask``, ``position_ids`` or
            ``cu_seq_lens_q``: how the documents of the batch are told apart is found in them. A batch of
            `maskops.data`, which is given to the model as its ``transformers_inputs`` say. A list of documents, each a
            list of token ids, or None, for which documents of random tokens are made: these are tried in each way that
            the model takes, padded and packed.
        lengths: tokens of each of the documents that are made; 11, 5 and 17 by default.
        documents: for a dict that does not say it, which document each token belongs to: integers (batch, length),
            negative at padding. For an encoder-decoder a dict of them by the name of the argument.
        arrivals: some of ``maskops.testing.leak.ARRIVALS``, where documents are made or given as a list; all that
            models of transformers claim to know by default.
        tolerance: the largest absolute change of an output that is no leak, and of a document alone that is no error.
            By default it follows from the dtype, from the size of the outputs and from how much they change when the
            same batch runs as a part of a larger one.
        per_layer: find the layers where a leak enters.
        causal: whether outputs may depend on later tokens of their document (False) or not (True); by default, what
            the model does with a document alone.
        tokens: the argument that holds the tokens, (batch, length) ids or (batch, length, width) vectors, where it is
            none of ``input_ids``, ``inputs_embeds``, ``src``, ``input``, ``x``.
        special_ids: ids that are neither replaced nor drawn, beside those that the model's config names.
        call: runs the model, where calling it with keywords is not how it is called, or what it returns has no row for
            each token, ``(batch, length, ...)``: a function of the model and of a dict of inputs that returns such a
            tensor.
        seed: of random documents and of other tokens.

    Returns:
        The report. ``report.leaks`` is the answer, ``print(report)`` says where and how much.

    Raises:
        TypeError: a batch of another kind.
        ValueError: a tolerance that is no bound, a batch without tokens, documents that do not go with it, a model for
            which no documents can be made, an output that has no rows for tokens or documents, or, without a tolerance,
            a model that gives other outputs when it runs again.

    Example::

        report = maskops.audit(model, {"input_ids": ids, "position_ids": position_ids})
        assert not report.leaks, report
    """
    if not callable(model):
        raise TypeError(f"model: expected a module or a function, got {type(model).__name__}")
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance={tolerance}: expected a finite number of 0 or more")
    replacement = Replacement(model, special_ids, seed)
    runner = Runner(model, call, seed, vocabulary_of(model))
    settings = Settings(tolerance, per_layer, causal)
    is_made = batch is None or not isinstance(batch, (Mapping, PackedBatch, PaddedBatch))
    for name, value, wanted in (("lengths", lengths, batch is None), ("arrivals", arrivals, is_made)):
        if value is not None and not wanted:
            raise ValueError(f"{name}: only for documents that are made here, and batch gives some")
    with undisturbed(model):
        if is_made:
            sequences = _sequences(batch, lengths, replacement)
            audits = list(_all_arrivals(runner, replacement, settings, sequences, arrivals))
        else:
            given = _given(batch, documents, tokens, model)
            audits = [Measurement(runner, given, replacement, settings).run()]
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return AuditReport(
        model=type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", "model"),
        implementation=implementation if isinstance(implementation, str) else "",
        dtype=str(coarsest_dtype(model, torch.empty(0, device=_device(model)))).removeprefix("torch."),
        batches=tuple(audits),
    )


def _sequences(batch: Any, lengths: Lengths | None, replacement: Replacement) -> list[Tensor]:
    if batch is None:
        sizes = read_lengths(LENGTHS if lengths is None else lengths)
        if replacement.vocabulary is None:
            raise ValueError(
                "batch is None, and the model has no single embedding of tokens from which documents could be made: "
                "give a batch"
            )
        if len(sizes) < 2 or min(sizes, default=0) < 1:
            raise ValueError(f"lengths={sizes}: expected two documents or more, of one token or more")
        return [replacement.drawn(size) for size in sizes]
    if not isinstance(batch, Sequence) or isinstance(batch, (str, bytes)):
        raise TypeError(
            f"batch: expected a dict of the model's inputs, a PackedBatch, a PaddedBatch, a list of token lists or "
            f"None, got {type(batch).__name__}"
        )
    found = [torch.as_tensor(item).detach().cpu().long() for item in batch]
    if len(found) < 2 or any(item.dim() != 1 or not len(item) for item in found):
        raise ValueError(
            f"batch: expected two documents or more, each a list of token ids, got {len(found)} of "
            f"{[tuple(item.shape) for item in found]}"
        )
    return found


def _all_arrivals(
    runner: Runner,
    replacement: Replacement,
    settings: Settings,
    sequences: list[Tensor],
    names: Sequence[str] | None,
) -> Iterable[BatchAudit]:
    taken = taken_by(runner.model)
    device = _device(runner.model)
    # Other lengths than those of the encoder, so that no mask fits both by chance.
    decoder = [replacement.drawn(max(1, len(item) - 2)) for item in sequences] if taken.has_decoder else None
    is_causal = settings.is_causal if settings.is_causal is not None else _is_causal(runner, replacement, sequences)
    has_cache = taken.has_decoder or _keeps_cache(runner, sequences)
    taken = taken_by(runner.model, is_causal, has_cache)
    for name, arrival in arrivals_of(taken, sequences, decoder, names):
        if isinstance(arrival, str):
            yield BatchAudit(name, refused=arrival)
            continue
        inputs = {
            key: value.to(device) if isinstance(value, Tensor) else value for key, value in arrival.inputs.items()
        }
        try:
            yield Measurement(runner, Arrival(name, inputs, arrival.streams), replacement, settings).run()
        except REFUSALS as error:
            reason = " ".join(str(error).split())
            yield BatchAudit(name, refused=f"{type(error).__name__}: {reason[:300]}")


def _is_causal(runner: Runner, replacement: Replacement, sequences: list[Tensor]) -> bool:
    """Whether the longest document alone, with another last token, has the same outputs before."""
    longest = max(sequences, key=len).unsqueeze(0).to(_device(runner.model))
    stream = Stream("input_ids", torch.zeros(longest.shape, dtype=torch.int64))
    last = torch.tensor([longest.shape[1] - 1])
    try:
        before = runner({"input_ids": longest}, stream)
        after = runner({"input_ids": replacement.replaced(longest, last)}, stream)
    except REFUSALS:
        return True
    if before.per_document or longest.shape[1] < 2:
        return True
    change = (before.values[:-1] - after.values[:-1]).abs().max()
    return bool(change <= 32 * torch.finfo(before.values.dtype).eps * before.scale)


def _keeps_cache(runner: Runner, sequences: list[Tensor]) -> bool:
    """Whether the model returns keys and values when it is asked to."""
    inputs = {"input_ids": sequences[0].unsqueeze(0).to(_device(runner.model)), "use_cache": True}
    try:
        return getattr(runner.raw(inputs), "past_key_values", None) is not None
    except REFUSALS:
        return False


def _given(batch: Any, documents: Tensor | Mapping[str, Tensor] | None, tokens: str | None, model: Any) -> Arrival:
    if isinstance(batch, Mapping):
        streams = streams_of(batch, documents, tokens)
        if documents is None:
            pad_id = pad_of(model)
            streams = tuple(without_padding(stream, batch[stream.name], pad_id) for stream in streams)
        return Arrival("batch", dict(batch), streams)
    if documents is not None:
        raise ValueError(f"documents: a {type(batch).__name__} knows its documents, leave it out")
    taken: Taken = taken_by(model)
    if isinstance(batch, PackedBatch):
        ids = batch.sequence_ids.cpu().unsqueeze(0)
        use_cache = False if "use_cache" in taken.names else None
        inputs = batch.transformers_inputs(labels=None, cu_seqlens=taken.takes("cu_seq_lens_q"), use_cache=use_cache)
        sequences = len(inputs["cu_seq_lens_q"]) - 1 if "cu_seq_lens_q" in inputs else batch.n_sequences
    else:
        ids = batch.sequence_ids.cpu()
        inputs = batch.transformers_inputs(labels=None)
        sequences = batch.n_sequences
    if "position_ids" not in taken.names:
        inputs.pop("position_ids", None)
    return Arrival(type(batch).__name__, inputs, (Stream("input_ids", ids, sequences),))


def _device(model: Any) -> torch.device:
    """Where tokens go: that of the first weight."""
    weights = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next((weight.device for weight in weights), torch.device("cpu"))
