"""Tiny models of transformers with random weights, and the ways in which one list of documents arrives at them.

What every arrival is compared with is the model's own eager attention, one document at a time (`alone`).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is an optional extra")

VOCABULARY = 64
WRAPPED_WIDTH = 7
Kind = Literal["decoder", "encoder", "encoder-decoder"]


@dataclass(frozen=True)
class Family:
    """An architecture: how it is built, and how its positions are told.

    Attributes:
        name: What tests call it.
        kind: Which tokens attend to which, and whether there are two sequences a document.
        model: The class of transformers.
        config: The class of its configuration.
        options: What the configuration is given beside the size of the vocabulary.
        first_position: The position of the first token of a document.
        pad: The token in slots that hold none; RoBERTa and its kin count positions by it.
    """

    name: str
    kind: Kind
    model: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    first_position: int = 0
    pad: int = 0

    def build(self, attention: str = "eager", **overrides: Any) -> Any:
        """A new model in fp32 and eval mode; its weights depend on the family alone."""
        config = getattr(transformers, self.config)(**{"vocab_size": VOCABULARY, **self.options, **overrides})
        config._attn_implementation = attention
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = getattr(transformers, self.model)(config).float().eval()
            _randomise(model)
        return model


def _randomise(model: torch.nn.Module) -> None:
    """Weights large enough that what a token attends to can be seen in the outputs."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                fan_in = parameter.shape[-1] if "embed" not in name and "wte" not in name else 4
                parameter.normal_(0.0, fan_in**-0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def _decoder(name: str, family: str, *, config: str = "Config", **options: Any) -> Family:
    common = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return Family(name, "decoder", f"{family}ForCausalLM", family + config, {**common, **options})


def _encoder(name: str, family: str, *, pad: int = 0, first_position: int = 0, **options: Any) -> Family:
    common = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "pad_token_id": pad,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return Family(
        name,
        "encoder",
        f"{family}Model",
        f"{family}Config",
        {**common, **options},
        first_position=first_position,
        pad=pad,
    )


def _pair(name: str, family: str, **options: Any) -> Family:
    common = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    model = f"{family}ForConditionalGeneration"
    return Family(name, "encoder-decoder", model, f"{family}Config", {**common, **options})


_MIXED = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 128,
    "forced_eos_token_id": None,
    "forced_bos_token_id": None,
}
_T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    # Smooth: at the kink of a ReLU a rounding error of an activation is an error of the whole gradient.
    "feed_forward_proj": "gated-gelu",
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 1, "eos_token_id": 2}

_SERVED = (
    _decoder("llama", "Llama"),
    _decoder("qwen2", "Qwen2", use_sliding_window=True, max_window_layers=1, sliding_window=3),
    _decoder("qwen3", "Qwen3", head_dim=8),
    _decoder("mistral", "Mistral", sliding_window=3),
    _decoder("gemma2", "Gemma2", head_dim=8, query_pre_attn_scalar=8, attn_logit_softcapping=2.0, **_MIXED),
    _decoder("gemma3", "Gemma3", config="TextConfig", head_dim=8, query_pre_attn_scalar=8, **_MIXED),
    Family("gpt2", "decoder", "GPT2LMHeadModel", "GPT2Config", {**_GPT2, "pad_token_id": 0}),
    _decoder(
        "gpt-oss",
        "GptOss",
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=131072,
        **_MIXED,
    ),
    _decoder("phi", "Phi"),
    _decoder("phi3", "Phi3", sliding_window=4),
    _decoder("opt", "OPT", ffn_dim=32, word_embed_proj_dim=32),
    _decoder("mixtral", "Mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    _decoder("qwen3-moe", "Qwen3Moe", head_dim=8, **_EXPERTS),
    _decoder("deepseek-v2", "DeepseekV2", **_LATENT),
    _decoder("deepseek-v3", "DeepseekV3", **_LATENT),
    _decoder(
        "llama4",
        "Llama4",
        config="TextConfig",
        head_dim=8,
        intermediate_size_mlp=32,
        num_local_experts=2,
        attention_chunk_size=4,
        layer_types=["chunked_attention", "full_attention"],
        no_rope_layers=[1, 0],
    ),
    _encoder("bert", "Bert", num_attention_heads=2),
    _encoder("minilm", "Bert", num_attention_heads=4),
    _encoder("roberta", "Roberta", pad=1, first_position=2, bos_token_id=0),
    _encoder("electra", "Electra", embedding_size=16),
    _encoder("distilbert", "DistilBert", dim=32, hidden_dim=32, n_layers=2, n_heads=4),
    _encoder(
        "modernbert",
        "ModernBert",
        local_attention=4,
        global_attn_every_n_layers=2,
        cls_token_id=1,
        sep_token_id=2,
    ),
    _pair("t5", "T5", **_T5),
    _pair("bart", "Bart", **_BART),
)
_REFUSED = (
    Family("bloom", "decoder", "BloomForCausalLM", "BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    _encoder("deberta-v2", "DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    _encoder("mpnet", "MPNet", pad=1, first_position=2),
    Family("gpt-j", "decoder", "GPTJForCausalLM", "GPTJConfig", {**_GPT2, "rotary_dim": 4}),
    _decoder("falcon", "Falcon"),
    _decoder("lfm2", "Lfm2", layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    _decoder(
        "jamba",
        "Jamba",
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=1,
        num_experts_per_tok=1,
        mamba_d_state=4,
        mamba_dt_rank=4,
    ),
)
_COUNTING = (
    _pair("pegasus", "Pegasus", **_BART),
    _pair("m2m-100", "M2M100", **_BART),
    _decoder("biogpt", "BioGpt"),
    _encoder("esm", "Esm", pad=1, first_position=2, mask_token_id=3, token_dropout=True),
)
SERVED = {family.name: family for family in _SERVED}
REFUSED = {family.name: family for family in _REFUSED}
# Served too: what counts positions in yet another way.
COUNTING = {family.name: family for family in _COUNTING}
FAMILIES = SERVED | COUNTING | REFUSED


@functools.cache
def model(name: str, attention: str = "eager") -> Any:
    """The model of a family that the tests of a process share: leave it as it was."""
    return FAMILIES[name].build(attention)


class Document(NamedTuple):
    """One document.

    Attributes:
        tokens: (length,) int64, of the decoder where there are two sequences.
        source: (source length,) int64 for an encoder-decoder, else None.
        start: The place of the first token in what it was cut from: 0 for whole documents.
    """

    tokens: Tensor
    source: Tensor | None = None
    start: int = 0


def documents(
    name: str, lengths: Sequence[int] = (5, 1, 9, 4), sources: Sequence[int] = (3, 7, 2, 6)
) -> list[Document]:
    """Documents of these lengths, the same ones each time; `sources` are the encoder's lengths where there are two."""
    generator = torch.Generator().manual_seed(1)

    def tokens(length: int) -> Tensor:
        return torch.randint(4, VOCABULARY, (length,), generator=generator)

    if FAMILIES[name].kind != "encoder-decoder":
        return [Document(tokens(length)) for length in lengths]
    return [Document(tokens(length), tokens(source)) for length, source in zip(lengths, sources, strict=True)]


def cut(parts: Sequence[Document], width: int) -> list[Document]:
    """Documents cut where rows of `width` end (one stream, wrapped): later pieces begin at a place beyond 0."""
    pieces, used = [], 0
    for part in parts:
        done = 0
        while done < len(part.tokens):
            taken = min(width - used, len(part.tokens) - done)
            pieces.append(Document(part.tokens[done : done + taken], None, part.start + done))
            done, used = done + taken, (used + taken) % width
    return pieces


class Grid(NamedTuple):
    """Documents laid into (rows, length) slots.

    Attributes:
        ids: (rows, length) int64, `pad` where there is no token.
        kept: (rows, length) int64, 1 where there is a token.
        segments: (rows, length) int64, 1, 2, ... by document in each row, 0 where there is no token.
        positions: (rows, length) int64, position ids; 0 where there is no token.
        cu_seqlens: (n + 1,) int32 over rows * length slots, where rows are filled from the left; what is left of a row,
            be it nothing, is a sequence too, but in the last row.
        places: (tokens,) int64, the slots of the tokens in the order of the documents.
    """

    ids: Tensor
    kept: Tensor
    segments: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    places: Tensor


def lay(
    pieces: Sequence[Tensor],
    rows: Sequence[Sequence[int]],
    *,
    width: int | None = None,
    left: bool = False,
    starts: Sequence[int] | None = None,
    pad: int = 0,
) -> Grid:
    """Lays pieces into rows: `rows[r]` are the indices of the pieces of row r, in order."""
    lengths = [sum(len(pieces[index]) for index in row) for row in rows]
    width = max(lengths) if width is None else width
    shape = (len(rows), width)
    ids = torch.full(shape, pad)
    kept, segments, positions = torch.zeros(shape, dtype=torch.int64), torch.zeros_like(ids), torch.zeros_like(ids)
    places: list[Tensor] = [torch.empty(0, dtype=torch.int64)] * len(pieces)
    bounds = [0]
    for row_index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        column = width - length if left else 0
        for segment, index in enumerate(row, start=1):
            count = len(pieces[index])
            slots = slice(column, column + count)
            ids[row_index, slots], kept[row_index, slots], segments[row_index, slots] = pieces[index], 1, segment
            positions[row_index, slots] = torch.arange(count) + (0 if starts is None else starts[index])
            places[index] = row_index * width + column + torch.arange(count)
            column += count
            bounds.append(row_index * width + column)
        if row_index + 1 < len(rows):
            bounds.append((row_index + 1) * width)
    return Grid(ids, kept, segments, positions, torch.tensor(bounds, dtype=torch.int32), torch.cat(places))


class Batch(NamedTuple):
    """What a model is called with, and where its documents are in the result.

    Attributes:
        inputs: Keyword arguments of the model.
        places: (tokens,) int64 slots of the flattened (rows * length) output, in the order of the documents.
    """

    inputs: dict[str, Tensor]
    places: Tensor


_TELLING: dict[str, tuple[str, ...]] = {
    "padded right": ("mask",),
    "padded left": ("mask",),
    "packed by position_ids": ("positions",),
    "packed by cu": ("cu",),
    "packed by position_ids and cu": ("positions", "cu"),
    "packed by segments": ("segments",),
    "packed by position_ids, mask of ones": ("positions", "mask"),
    "packed + tail by position_ids and mask": ("positions", "mask"),
    "packed + tail by cu": ("cu",),
    "packed + tail by segments": ("segments",),
    "rows by position_ids": ("positions",),
    "rows by position_ids and mask": ("positions", "mask"),
    "rows by cu": ("cu",),
    "rows by segments": ("segments",),
    "wrapped rows by position_ids": ("positions",),
    "wrapped rows by position_ids and cu": ("positions", "cu"),
}


def arrivals(name: str) -> list[str]:
    """The ways in which documents can arrive at a family."""
    if FAMILIES[name].kind != "encoder-decoder":
        return list(_TELLING)
    # Where only positions say what is padding, each padding slot is a document, which needs one on the other side.
    return [way for way in _TELLING if not way.startswith("wrapped") and way != "rows by position_ids"]


def _rows(way: str, count: int) -> list[list[int]]:
    if way.startswith("padded"):
        return [[index] for index in range(count)]
    if way.startswith("rows"):
        half = (count + 1) // 2
        return [list(range(half)), list(range(half, count))]
    return [list(range(count))]


def _grid(way: str, pieces: Sequence[Tensor], starts: Sequence[int], pad: int) -> Grid:
    if way.startswith("wrapped"):
        # The pieces were cut at the ends of rows: each row begins with the piece that the one before ends in.
        rows: list[list[int]] = [[]]
        for index, piece in enumerate(pieces):
            if sum(len(pieces[other]) for other in rows[-1]) + len(piece) > WRAPPED_WIDTH:
                rows.append([])
            rows[-1].append(index)
        return lay(pieces, rows, width=WRAPPED_WIDTH, starts=starts, pad=pad)
    rows = _rows(way, len(pieces))
    longest = max(sum(len(pieces[index]) for index in row) for row in rows)
    return lay(pieces, rows, width=longest + (3 if "tail" in way else 0), left="left" in way, starts=starts, pad=pad)


def _told(grid: Grid, way: str, first_position: int, prefix: str = "", cu_name: str = "qk") -> dict[str, Tensor]:
    """What tells the documents of one grid apart."""
    telling, told = _TELLING[way], {}
    if "mask" in telling or "segments" in telling:
        told[f"{prefix}attention_mask"] = grid.segments if "segments" in telling else grid.kept
    if "positions" in telling:
        told[f"{prefix}position_ids"] = grid.positions + first_position
    if "cu" in telling:
        told |= {f"cu_seq_lens_{side}": grid.cu_seqlens for side in cu_name}
        told |= {f"max_length_{side}": grid.cu_seqlens.diff().amax() for side in cu_name}
    return told


def arrive(way: str, name: str, parts: Sequence[Document]) -> Batch:
    """The batch in which documents arrive; for wrapped rows, give documents that `cut` has cut."""
    family = FAMILIES[name]
    starts = [part.start for part in parts]
    grid = _grid(way, [part.tokens for part in parts], starts, family.pad)
    if family.kind != "encoder-decoder":
        inputs = {"input_ids": grid.ids, **_told(grid, way, family.first_position)}
        return Batch(inputs, grid.places)
    sources = [part.source for part in parts if part.source is not None]
    source = _grid(way, sources, starts, family.pad)
    inputs = {"input_ids": source.ids, "decoder_input_ids": grid.ids}
    inputs |= _told(source, way, 0, cu_name="k") | _told(grid, way, 0, prefix="decoder_", cu_name="q")
    return Batch(inputs, grid.places)


class Result(NamedTuple):
    """What a model gives for documents.

    Attributes:
        outputs: (tokens, width) float32: logits, or hidden states of an encoder, in the order of the documents.
        gradients: By parameter name, of the sum of the outputs times fixed random weights; empty if not asked for.
    """

    outputs: Tensor
    gradients: dict[str, Tensor]


def _weights(outputs: Tensor) -> Tensor:
    return torch.randn(outputs.shape, generator=torch.Generator().manual_seed(2)).to(outputs)


def _hidden(family: Family, output: Any) -> Tensor:
    tensor: Tensor = output.last_hidden_state if family.kind == "encoder" else output.logits
    return tensor


def _result(module: torch.nn.Module, outputs: Tensor, gradients: bool) -> Result:
    if not gradients:
        return Result(outputs.detach(), {})
    module.zero_grad()
    (outputs * _weights(outputs)).sum().backward()
    found = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    module.zero_grad()
    return Result(outputs.detach(), found)


def run(module: Any, name: str, batch: Batch, *, gradients: bool = True, **options: Any) -> Result:
    """Calls a model of a family with a batch; `options` are further arguments of the call."""
    with torch.set_grad_enabled(gradients):
        output = _hidden(FAMILIES[name], module(**batch.inputs, **options))
        return _result(module, output.flatten(0, 1)[batch.places], gradients)


def one_at_a_time(module: Any, name: str, parts: Sequence[Document], *, gradients: bool = True) -> Result:
    """Calls a model with each document by itself; zero-length documents give nothing."""
    family = FAMILIES[name]
    outputs = []
    with torch.set_grad_enabled(gradients):
        for part in parts:
            if not len(part.tokens):
                continue
            inputs = {"input_ids": part.tokens[None]}
            if part.source is not None:
                inputs = {"input_ids": part.source[None], "decoder_input_ids": part.tokens[None]}
            if part.start:
                inputs["position_ids"] = torch.arange(len(part.tokens))[None] + part.start + family.first_position
            outputs.append(_hidden(family, module(**inputs))[0])
        return _result(module, torch.cat(outputs), gradients)


@functools.cache
def _alone(name: str, lengths: tuple[int, ...], sources: tuple[int, ...], width: int | None) -> Result:
    parts = documents(name, lengths, sources)
    return one_at_a_time(FAMILIES[name].build(), name, parts if width is None else cut(parts, width))


def alone(
    name: str,
    lengths: Sequence[int] = (5, 1, 9, 4),
    sources: Sequence[int] = (3, 7, 2, 6),
    width: int | None = None,
) -> Result:
    """`documents` (cut to rows of `width`, if given) one at a time through the model's own eager attention."""
    return _alone(name, tuple(lengths), tuple(sources), width)


def compare(found: Result, expected: Result, *, outputs: float = 1e-5, gradients: float = 1e-4) -> None:
    """Fails unless outputs agree to an absolute and gradients to a relative bound, by the norm of each parameter.

    A gradient whose norm is below a thousandth of the largest counts as that large: there, rounding is all there is.
    """
    error = (found.outputs - expected.outputs).abs().amax().item()
    assert error <= outputs, f"outputs differ by {error:.3g}"
    if not found.gradients:
        return
    assert found.gradients.keys() == expected.gradients.keys()
    floor = 1e-3 * max(gradient.norm().item() for gradient in expected.gradients.values())
    for name, gradient in expected.gradients.items():
        relative = (found.gradients[name] - gradient).norm().item() / max(gradient.norm().item(), floor)
        assert relative <= gradients, f"the gradient of {name} differs by {relative:.3g}"
