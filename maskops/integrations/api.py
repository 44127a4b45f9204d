"""What is public of maskops inside transformers, which is imported when it is first asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import Cache

    from maskops.integrations.transformers.attach import Attachment
    from maskops.integrations.transformers.generation import Prompts


def attach(
    model: nn.Module,
    *,
    loss: bool = True,
    fuse_lm_head: bool = False,
    unpad: bool = False,
    probe: bool = True,
    backend: str | None = None,
) -> Attachment:
    """Let a model of transformers compute its attention with maskops.

    Every way in which a batch arrives is served: 2-D masks padded left or right, 4-D masks, position ids that restart,
    ``cu_seq_lens_q`` and ``cu_seq_lens_k``, segments in an integer mask, several packed rows, caches, cross-attention.

    Models with layers that carry a state along the row (state spaces, linear attention, short convolutions), or that
    make attention masks of their own, are attached for padded batches; a packed batch raises there, unless the probe
    shows that it is right. Vision and audio towers keep their own attention. A deep copy of an attached model computes
    with maskops too and cannot be detached: copy a model before it is attached, or after ``detach``.

    Args:
        model: a ``PreTrainedModel``, or a module that holds some.
        loss: also serve ``loss_function`` where it is transformers' loss of causal or masked language models or of a
            class for every token: nothing is predicted across documents or from padding, a batch without targets has
            loss 0, and no float32 copy is made of the logits. ``shift_labels`` and ``num_items_in_batch`` are taken as
            they are given. The loss of other models, and one that was set, stays; the report says whose it is.
        fuse_lm_head: also fuse the output layer into that loss: while the model trains on labels, its logits never
            exist, and those of its output are None. Evaluation, generation and calls without labels have theirs.
            Refused unless loss and gradients of a probe batch are equal, which is tried even without ``probe``.
        unpad: padded calls without a cache run packed inside the model and come back padded, 0 where there was padding.
            Batches with padding between two tokens of one document stay as they are.
        probe: run two random documents through the model, one at a time with its own eager attention and together
            with maskops, and compare layer by layer; costs some ten forwards of a few tokens. Without it, and where it
            cannot run, the report says *unproven* and why.
        backend: name of a backend of maskops for the attention; None for the fastest.

    Returns:
        The handle, with ``report`` and ``detach()``; also a context manager.

    Raises:
        AttachError: a model that cannot be served or whose probe fails, with the reason and the table of the probe; it
            is left as it was.
    """
    from maskops.integrations.transformers import attach as implementation

    return implementation.attach(model, implementation.Options(loss, fuse_lm_head, unpad, probe, backend))


def packed_prefill(
    model: Any,
    prompts: Prompts,
    *,
    cache: str | Cache = "dynamic",
    max_length: int | None = None,
    chunk_size: int | None = None,
    expand_size: int = 1,
    pad_token_id: int | None = None,
) -> dict[str, Any]:
    """Runs many prompts through an attached model without padding, and returns what ``model.generate`` goes on from.

    All prompts but their last tokens stand one after the other in one row (or several, see ``chunk_size``); their keys
    and values go, left-padded, into a cache of one row a prompt. ``generate`` then computes one token of each prompt a
    step. The result is that of ``generate`` on each prompt alone. For encoder-decoders the prompts are what the encoder
    reads: it runs packed, and ``generate`` starts from its outputs.

    Beams and samples need ``expand_size``. Not for ``assistant_model`` and ``prompt_lookup_num_tokens``: transformers'
    assisted decoding (5.23) goes wrong from any cache that is filled already, whatever attention computes it.

    Example::

        with maskops.attach(model):
            prompts = tokenizer(texts)["input_ids"]  # lists of token ids, no padding
            inputs = maskops.packed_prefill(model, prompts)
            tokens = model.generate(**inputs, max_new_tokens=64)
            answers = tokens[:, inputs["input_ids"].shape[1] :]

    Args:
        model: a causal language model or an encoder-decoder of transformers, attached by ``maskops.attach``; or a
            module around one that adds no tokens, such as a compiled model.
        prompts: a list or a tensor of token ids each; a ``PackedBatch`` or ``PaddedBatch``; or what a tokenizer
            returns: a mapping with ``input_ids`` and, if they are padded on either side, ``attention_mask``. No prompt
            is empty.
        cache: ``"dynamic"``, ``"static"``, or an empty ``Cache`` of transformers for as many rows as there are prompts,
            which is filled in place: a ``DynamicCache`` or ``StaticCache`` with sliding layers or without, quantised
            or offloaded. Encoder-decoders: only ``"dynamic"``; ask ``generate`` for its ``cache_implementation``.
        max_length: tokens of a row of the static cache, those of the longest prompt and the generated ones together.
            Needed for ``cache="static"``, refused otherwise.
        chunk_size: tokens of a packed row at most; prompts go into as few rows as fit, one forward call each, and
            longer prompts come in pieces (encoders: in a row of their own). None: one row. The memory of activations
            grows with the row.
        expand_size: ``num_beams`` or ``num_return_sequences`` of the call of ``generate``, whichever is larger:
            ``generate`` repeats the tokens of each prompt that often, but not a cache that it is given.
        pad_token_id: what stands before shorter prompts; nothing attends to it. By default that of the generation
            config, or its end-of-sequence token, or 0.

    Returns:
        ``input_ids`` and ``attention_mask``, int64 (prompts, longest prompt), left-padded, and ``past_key_values`` with
        the keys and values of all columns but the last. Encoder-decoders: the same two right-padded, and
        ``encoder_outputs`` with hidden states (prompts, longest prompt, width), 0 in the padding.

    Raises:
        TypeError: arguments of the wrong type.
        ValueError: a prompt without tokens, a model that is not attached, a cache that is not empty, too short or keeps
            more than keys and values (states of recurrent layers mix the prompts of a row).
    """
    from maskops.integrations.transformers import generation

    return generation.packed_prefill(model, prompts, cache, max_length, chunk_size, expand_size, pad_token_id)
