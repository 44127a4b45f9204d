"""Heads on packed rows, embeddings of documents, and padded calls that run packed."""

from tests.mutations import Mutation

POOLING = ("tests/test_pooling.py",)
HEADS = ("tests/test_attach_heads.py",)
UNPAD = ("tests/test_attach_unpad.py",)

POOL = "maskops/integrations/pooling.py"
TOKENS = "maskops/integrations/transformers/tokens.py"
HEAD = "maskops/integrations/transformers/heads.py"
PADDING = "maskops/integrations/transformers/unpadding.py"

MUTATIONS = (
    Mutation(
        "pool: weights begin at 0",
        POOL,
        "(documents.place + 1).to(values.dtype)",
        "documents.place.to(values.dtype)",
        POOLING,
    ),
    Mutation(
        "pool: what belongs to no document belongs to the last one",
        POOL,
        "torch.where(ids >= 0, ids, count)",
        "torch.where(ids >= 0, ids, count - 1)",
        POOLING,
    ),
    Mutation(
        "pool: the gradient of a maximum goes to the last of equal tokens",
        POOL,
        "torch.full(largest.shape, rows.shape[0], device=rows.device)\n        row = row.scatter_reduce(0, spread, "
        'candidate, "amin")',
        "torch.zeros_like(largest, dtype=torch.int64)\n        row = row.scatter_reduce(0, spread, "
        'candidate % rows.shape[0], "amax")',
        POOLING,
    ),
    Mutation(
        "pool: a document without a token gives the row at which it would begin",
        POOL,
        "torch.where((lengths > 0).unsqueeze(1), chosen, 0)",
        "chosen",
        POOLING,
    ),
    Mutation(
        "heads: the last token of a document is not in the last column",
        TOKENS,
        "torch.where(is_last, width - 1, self.place)",
        "self.place",
        HEADS,
    ),
    Mutation(
        "heads: places count from the row and not from the document",
        TOKENS,
        "place = before - before[begin.flatten().clamp(0, batch * length - 1)]",
        "place = before - before[begin.flatten().clamp(0, 0)]",
        HEADS,
    ),
    Mutation(
        "heads: documents without a token divide by 0",
        HEAD,
        "real = real | (is_empty & (torch.arange(width, device=real.device) == 0))",
        "real = real | (is_empty & (torch.arange(width, device=real.device) < 0))",
        HEADS,
    ),
    Mutation(
        "heads: the ids of a decoder are shifted over the ends of documents",
        HEAD,
        'call.set("decoder_input_ids", taken(shifted, place, pad).view_as(ids))',
        'call.set("decoder_input_ids", ids.roll(1, 1))',
        HEADS,
    ),
    Mutation(
        "heads: answers behind the end of their document count",
        HEAD,
        "torch.where(places < tokens.lengths, places, -100)",
        "places.clamp(max=index.shape[1] - 1)",
        HEADS,
    ),
    Mutation(
        "heads: every pooler is taken for one of the first token",
        HEAD,
        "if self.reads_first is False:",
        "if self.reads_first is None:",
        HEADS,
    ),
    Mutation(
        "unpad: the keys of cross-attention are told apart as the queries are",
        PADDING,
        'call.set("cu_seq_lens_k", cu_seqlens_from_lengths(keys.lengths))',
        'call.set("cu_seq_lens_k", offsets)',
        UNPAD,
    ),
    Mutation(
        "unpad: a call with a cache is closed up",
        PADDING,
        "if call.module not in self.models or self._caches(call):",
        "if call.module not in self.models:",
        UNPAD,
    ),
    Mutation(
        "unpad: embeddings and types of tokens stay where they were",
        PADDING,
        "if tuple(value.shape[:2]) == cells:",
        'if name in ("input_ids", "position_ids") and tuple(value.shape[:2]) == cells:',
        UNPAD,
    ),
)
