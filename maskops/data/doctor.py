"""The pad doctor: what is wrong between a tokenizer and a model about padding, and what repairs it.

Nothing here needs a library: a tokenizer is whatever has ``pad_token_id`` and ``eos_token_id``, such as those of
transformers, and a model whatever has embeddings, and perhaps a ``config`` and a ``generation_config``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = ["Finding", "Findings", "check_tokenizer", "ensure_pad_token"]

_ENSURE = 'maskops.ensure_pad_token(tokenizer, model, strategy="new")'
_OTHERS = ("bos", "unk", "sep", "cls", "mask")
# Tokens that vocabularies hold for padding, though their tokenizers do not always declare them.
_KNOWN_PADDING = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<|vision_pad|>")
_ADDED = "<|pad|>"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        code: what it is, in one word for programs; `check_tokenizer` lists them.
        problem: what is wrong and what follows from it, in one line.
        fix: what repairs it, in one line.
    """

    code: str
    problem: str
    fix: str

    def __str__(self) -> str:
        return f"{self.code}: {self.problem}. Fix: {self.fix}"


class Findings(list[Finding]):
    """A list of findings; printed, it is a line for each, and empty where all is right."""

    @property
    def codes(self) -> list[str]:
        """The code of each."""
        return [finding.code for finding in self]

    def __str__(self) -> str:
        return "\n".join(map(str, self))


@dataclass(frozen=True)
class _Names:
    """The special tokens of a tokenizer."""

    pad: int | None
    eos: int | None
    bos: int | None


def check_tokenizer(tokenizer: Any, model: Any = None, *, generation: bool | None = None) -> Findings:
    """What is wrong about padding between a tokenizer and a model.

    The codes:
        - ``no_pad_token``: the tokenizer has none.
        - ``pad_is_eos``, ``pad_is_bos``, ``pad_is_unk`` ...: padding is a token that also means something else.
        - ``pad_outside_vocabulary``: the tokenizer does not have the id that it pads with.
        - ``pad_outside_embedding``, ``embedding_too_small``: the model has no row for padding, or for other tokens.
        - ``padding_side_right``: a decoder would generate from padding.
        - ``config_without_pad``, ``generation_config_without_pad``: the model does not know the padding token.
        - ``config_pad_differs``, ``config_eos_differs``, ``config_bos_differs`` and the same of ``generation_config``:
          model and tokenizer mean different tokens.
        - ``padding_idx_missing``, ``padding_idx_differs``: the input embedding learns from padding, or does not learn
          another token; ``padding_idx_is_eos``: that token is the end of a sequence.
        - ``classifier_pools_before_eos``: a decoder's head for classification pools the last token that is not padding,
          and so never the end-of-sequence token, if that is the padding token.

    Args:
        tokenizer: has ``pad_token_id`` and ``eos_token_id``; ``padding_side``, ``len()`` and other special tokens are
            looked at where they exist. A processor with a ``tokenizer`` will do.
        model: a model of transformers, or any module with one ``torch.nn.Embedding``; None: the tokenizer alone.
        generation: whether sequences will be generated, for which a decoder needs its padding on the left. None: if
            the model is a decoder that can; False for training, where the side does not matter to maskops.

    Returns:
        The findings, gravest first; empty if all is right.

    Raises:
        TypeError: ``tokenizer`` has no ``pad_token_id`` or no ``eos_token_id``.
    """
    tokenizer = _tokenizer_in(tokenizer)
    names = _Names(*(getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "eos", "bos")))
    generates = _generates_after_its_input(model) if generation is None else generation
    return Findings(
        [
            *_own_findings(tokenizer, names),
            *(() if model is None else _pooling_findings(names, model)),
            *(() if model is None else _embedding_findings(tokenizer, names, model)),
            *(() if model is None else _config_findings(names, model)),
            *(_side_findings(tokenizer) if generates else ()),
        ]
    )


def _tokenizer_in(tokenizer: Any) -> Any:
    if not hasattr(tokenizer, "pad_token_id") and hasattr(tokenizer, "tokenizer"):
        tokenizer = tokenizer.tokenizer
    missing = [name for name in ("pad_token_id", "eos_token_id") if not hasattr(tokenizer, name)]
    if missing:
        raise TypeError(
            f"tokenizer: expected an object with pad_token_id and eos_token_id, such as a tokenizer of transformers, "
            f"got {type(tokenizer).__name__} without {' and '.join(missing)}"
        )
    return tokenizer


def _own_findings(tokenizer: Any, names: _Names) -> Iterator[Finding]:
    if names.pad is None:
        yield Finding("no_pad_token", "the tokenizer has no padding token, so it cannot pad a batch", _ENSURE)
        return
    size = _vocabulary_size(tokenizer)
    if names.pad < 0 or (size is not None and names.pad >= size and names.pad not in _ids_of(tokenizer)):
        extent = "" if size is None else f", whose ids are 0 to {size - 1}"
        yield Finding("pad_outside_vocabulary", f"pad_token_id={names.pad} is not in the vocabulary{extent}", _ENSURE)
    if names.pad == names.eos:
        yield Finding(
            "pad_is_eos",
            f"pad_token_id and eos_token_id are both {names.pad}: masks and labels that are made by comparing ids lose "
            "the real end of each sequence",
            f"collate with maskops.data, which goes by lengths, or give padding a token of its own: {_ENSURE}",
        )
        return
    for name in _OTHERS:
        if names.pad == getattr(tokenizer, f"{name}_token_id", None):
            yield Finding(
                f"pad_is_{name}",
                f"pad_token_id and {name}_token_id are both {names.pad}: masks and labels that are made by comparing "
                "ids lose real tokens",
                f"collate with maskops.data, which goes by lengths, or give padding a token of its own: {_ENSURE}",
            )


def _vocabulary_size(tokenizer: Any) -> int | None:
    return len(tokenizer) if hasattr(tokenizer, "__len__") else None


def _ids_of(tokenizer: Any) -> set[int]:
    """The ids that the tokenizer lists; there may be gaps in them, so that its length alone decides nothing."""
    return set(tokenizer.get_vocab().values()) if hasattr(tokenizer, "get_vocab") else set()


def _pooling_findings(names: _Names, model: Any) -> Iterator[Finding]:
    decodes = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if _classifies(model) and decodes and names.pad is not None and names.pad == names.eos:
        yield Finding(
            "classifier_pools_before_eos",
            f"{type(model).__name__} pools the last token whose id is not {names.pad}: of a sequence that ends with "
            "end-of-sequence the token before it",
            f"give padding a token of its own: {_ENSURE}",
        )


def _classifies(model: Any) -> bool:
    return type(model).__name__.endswith("ForSequenceClassification")


def _embedding_findings(tokenizer: Any, names: _Names, model: Any) -> Iterator[Finding]:
    embedding = _input_embedding(model)
    if embedding is None:
        return
    rows, size = int(embedding.weight.shape[0]), _vocabulary_size(tokenizer)
    if names.pad is not None and names.pad >= rows:
        yield Finding(
            "pad_outside_embedding",
            f"pad_token_id={names.pad}, and the input embedding has {rows} rows: looking it up is an index error",
            f"model.resize_token_embeddings({max(names.pad + 1, size or 0)})",
        )
    elif size is not None and size > rows:
        yield Finding(
            "embedding_too_small",
            f"the tokenizer has {size} tokens and the input embedding {rows} rows: the last tokens are index errors",
            f"model.resize_token_embeddings({size})",
        )
    if names.pad is None or not hasattr(embedding, "padding_idx"):
        return
    ignored, place = embedding.padding_idx, f"{_name_of(embedding, model)}.padding_idx"
    if ignored is not None and ignored == names.eos:
        yield Finding(
            "padding_idx_is_eos",
            f"padding_idx={ignored} of the input embedding is the end-of-sequence token, whose embedding never learns",
            f"{place} = None, or {_ENSURE}",
        )
    elif ignored is None and names.pad != names.eos:
        yield Finding(
            "padding_idx_missing",
            "the input embedding has no padding_idx: the row of padding is trained by whatever reaches it",
            f"{place} = {names.pad}, or {_ENSURE}",
        )
    elif ignored is not None and ignored != names.pad:
        yield Finding(
            "padding_idx_differs",
            f"padding_idx={ignored} of the input embedding is not pad_token_id={names.pad}: another token never learns",
            f"{place} = {names.pad if names.pad != names.eos else None}",
        )


def _config_findings(names: _Names, model: Any) -> Iterator[Finding]:
    for place, config in _configs(model):
        code = "generation_config" if place.endswith("generation_config") else "config"
        declared = getattr(config, "pad_token_id", None)
        if names.pad is not None and declared is None:
            yield Finding(
                f"{code}_without_pad",
                f"{place}.pad_token_id is None, the tokenizer pads with {names.pad}"
                + (": batches of more than one sequence cannot be classified" if _classifies(model) else ""),
                f"{place}.pad_token_id = {names.pad}",
            )
        for name in ("pad", "eos", "bos"):
            ours, theirs = getattr(names, name), getattr(config, f"{name}_token_id", None)
            several = list(theirs) if isinstance(theirs, (list, tuple)) else [theirs]
            if ours is not None and theirs is not None and ours not in several:
                yield Finding(
                    f"{code}_{name}_differs",
                    f"{place}.{name}_token_id is {theirs}, that of the tokenizer {ours}",
                    f"{place}.{name}_token_id = {ours}",
                )


def _side_findings(tokenizer: Any) -> Iterator[Finding]:
    if getattr(tokenizer, "padding_side", None) == "right":
        yield Finding(
            "padding_side_right",
            'padding_side is "right": a decoder would generate from the padding behind the shorter prompts',
            'tokenizer.padding_side = "left" to generate (in training the side does not matter: generation=False)',
        )


def _configs(model: Any) -> Iterator[tuple[str, Any]]:
    """Where a model keeps its special tokens, with the name of each place."""
    config = getattr(model, "config", None)
    if config is not None:
        yield "model.config", config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        if text is not config:
            yield "model.config.get_text_config()", text
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        yield "model.generation_config", generation


def _generates_after_its_input(model: Any) -> bool:
    able = hasattr(model, "can_generate") and model.can_generate()
    return able and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def _input_embedding(model: Any) -> Any:
    """The module whose rows are tokens, or None if that is not clear."""
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # a plain module; a model of transformers without tokens
        found = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        return found[0] if len(found) == 1 else None


def _name_of(embedding: Any, model: Any) -> str:
    """An expression that gives the embedding, with the names that a user has."""
    if embedding is model:
        return "model"
    if hasattr(model, "get_input_embeddings"):
        return "model.get_input_embeddings()"
    name = next(name for name, module in model.named_modules() if module is embedding)
    return f'model.get_submodule("{name}")'


def ensure_pad_token(
    tokenizer: Any, model: Any = None, strategy: Literal["eos", "new"] = "eos", *, token: str | None = None
) -> list[str]:
    """Gives a tokenizer a padding token where it needs one, and makes the model agree with it.

    A padding token that stands in the vocabulary and means nothing else stays as it is, whatever the strategy; then
    only the model is made to agree. In any case these say the same afterwards: ``tokenizer``, ``model.config``,
    ``model.generation_config`` and ``padding_idx`` of the input embedding; batches of more than one sequence can then
    be classified. ``padding_idx`` is None where padding is the end-of-sequence token, which has to learn.

    With ``"eos"`` no token is added. The real end of each sequence keeps its label and its attention in batches that
    `maskops.data` makes, because they go by lengths; whatever compares ids to find padding does not see it. The heads
    for classification of transformers are among those: they pool the last token that is not padding, so a sequence
    that ends with end-of-sequence is pooled one token before its end. With ``"new"`` they pool its last token.

    Args:
        tokenizer: as of `check_tokenizer`; ``"new"`` needs ``add_special_tokens``.
        model: the model, changed in place, or None.
        strategy: ``"eos"``: pad with the end-of-sequence token. ``"new"``: pad with a token that means nothing else:
            one that the vocabulary holds for it, else one that is added. The rows of an added token, in the input
            embedding and in the output layer, tied or not, are the mean of the rows of all other tokens.
        token: the text of the token that ``"new"`` uses; by default one that the vocabulary knows, else ``<|pad|>``.

    Returns:
        What was changed, a line each; empty if nothing had to be.

    Raises:
        ValueError: an unknown strategy; ``"eos"`` for a tokenizer without an end-of-sequence token; a ``token`` that
            the tokenizer uses for something else.
        TypeError: a tokenizer that cannot add a token, or a model that cannot be resized.
    """
    if strategy not in ("eos", "new"):
        raise ValueError(f'strategy is {strategy!r}: expected "eos" or "new"')
    tokenizer = _tokenizer_in(tokenizer)
    changes: list[str] = []
    before = _vocabulary_size(tokenizer)
    _give_pad_token(tokenizer, strategy, token, changes)
    pad, eos = int(tokenizer.pad_token_id), tokenizer.eos_token_id
    if model is not None:
        _give_rows(model, tokenizer, before, changes)
        _set_padding_idx(model, None if pad == eos else pad, changes)
        for place, config in _configs(model):
            if getattr(config, "pad_token_id", None) != pad:
                changes.append(f"{place}.pad_token_id: {getattr(config, 'pad_token_id', None)} -> {pad}")
                config.pad_token_id = pad
    return changes


def _give_pad_token(tokenizer: Any, strategy: str, token: str | None, changes: list[str]) -> None:
    names = _Names(*(getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "eos", "bos")))
    wrong = {finding.code for finding in _own_findings(tokenizer, names)}
    if not wrong or (strategy == "eos" and wrong == {"pad_is_eos"}):
        return
    if strategy == "eos":
        if names.eos is None:
            raise ValueError(
                'strategy="eos": the tokenizer has no end-of-sequence token to pad with; use strategy="new"'
            )
        if hasattr(tokenizer, "eos_token"):
            tokenizer.pad_token = tokenizer.eos_token
        else:
            tokenizer.pad_token_id = names.eos
    else:
        if not hasattr(tokenizer, "add_special_tokens"):
            raise TypeError(
                f'strategy="new": {type(tokenizer).__name__} has no add_special_tokens; give it a padding token '
                'yourself, or use strategy="eos"'
            )
        tokenizer.add_special_tokens({"pad_token": _text_of_padding(tokenizer, token)})
    changes.append(f"tokenizer.pad_token_id: {names.pad} -> {tokenizer.pad_token_id}")


def _text_of_padding(tokenizer: Any, token: str | None) -> str:
    """The token that "new" makes the padding token: the one asked for, one that is there for it, or one to add."""
    known: dict[str, int] = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    used = {getattr(tokenizer, f"{name}_token_id", None): f"{name}_token" for name in ("eos", *_OTHERS)}
    if token is not None:
        if known.get(token, -1) in used:
            raise ValueError(
                f"token={token!r} is the {used[known[token]]} of the tokenizer: choose one that means nothing else"
            )
        return token
    return next((text for text in _KNOWN_PADDING if known.get(text) is not None and known[text] not in used), _ADDED)


@torch.no_grad()
def _give_rows(model: Any, tokenizer: Any, before: int | None, changes: list[str]) -> None:
    """Makes the embedding and the output layer have a row for each token, and fills those of added tokens."""
    embedding = _input_embedding(model)
    if embedding is None:
        return
    rows = int(embedding.weight.shape[0])
    pad, after = int(tokenizer.pad_token_id), _vocabulary_size(tokenizer)
    needed = max(pad + 1, after or 0)
    if needed > rows:
        if not hasattr(model, "resize_token_embeddings"):
            raise TypeError(
                f"model: {type(model).__name__} has an embedding of {rows} rows, {needed} are needed, and no "
                'resize_token_embeddings; make its embedding larger, or use strategy="eos"'
            )
        model.resize_token_embeddings(needed, mean_resizing=False)
    added = set(range(rows, needed)) | ({pad} if after != before else set())
    if not added:
        return
    # Rows past the tokenizer's tokens, which fill up a vocabulary to a round number, were never trained: they are no
    # part of the mean, and are replaced where a token comes to lie there.
    others = sorted((_ids_of(tokenizer) or set(range(rows if before is None else before))) - added)
    for name, weight in _rows_of_tokens(model, needed):
        mean = weight[[row for row in others if row < rows]].to(torch.float64).mean(0)
        weight[sorted(added)] = mean.to(weight.dtype)
        changes.append(f"{name}: row {', '.join(map(str, sorted(added)))} is the mean of the others")


def _rows_of_tokens(model: Any, needed: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors whose first dimension counts tokens; tied ones once."""
    embedding = _input_embedding(model)
    yield "input embedding", embedding.weight
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is None:
        return
    if output.weight is not embedding.weight:
        yield "output layer", output.weight
    bias = getattr(output, "bias", None)
    if bias is not None and bias.shape[0] >= needed:
        yield "bias of the output layer", bias


def _set_padding_idx(model: Any, index: int | None, changes: list[str]) -> None:
    embedding = _input_embedding(model)
    if embedding is None:
        return
    # Encoder and decoder may each have a module of their own around one weight.
    modules = [module for module in model.modules() if getattr(module, "weight", None) is embedding.weight]
    for module in modules:
        if hasattr(module, "padding_idx") and module.padding_idx != index:
            changes.append(f"{type(module).__name__}.padding_idx: {module.padding_idx} -> {index}")
            module.padding_idx = index
