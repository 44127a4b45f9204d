"""From token lists to batches: labels, positions, places, tokens."""

from tests.mutations import Mutation

BATCHES = ("tests/test_data_batches.py",)
TOKENS = ("tests/test_data_tokens.py",)
COLLATORS = ("tests/test_data_collators.py",)
RNN = ("tests/test_data_rnn.py",)

LABELS = "maskops/data/labels.py"
PLACES = "maskops/data/places.py"
FIT = "maskops/data/fit.py"
PACKED = "maskops/data/packed_batch.py"
PADDED = "maskops/data/padded_batch.py"
PREPARE = "maskops/data/tokens.py"
COLLATE = "maskops/data/collators.py"
RECURRENT = "maskops/data/rnn.py"

MUTATIONS = (
    Mutation(
        "data: labels cross boundaries",
        LABELS,
        "torch.where((ids[..., :-1] == ids[..., 1:]) & (ids[..., :-1] >= 0), following",
        "torch.where(ids[..., :-1] >= 0, following",
        BATCHES,
    ),
    Mutation(
        "data: padding is predicted",
        LABELS,
        "ids[..., 1:]) & (ids[..., :-1] >= 0), following",
        "ids[..., 1:]), following",
        BATCHES,
    ),
    Mutation(
        "data: the first token is a target for models that shift",
        LABELS,
        "(before == sequence_ids) & (sequence_ids >= 0), labels",
        "sequence_ids >= 0, labels",
        BATCHES,
    ),
    Mutation("data: left padding on the right", PLACES, 'if side == "right":', 'if side != "":', BATCHES),
    Mutation("data: packed from the right of left padding", PLACES, 'if side == "left":', 'if side == "":', BATCHES),
    Mutation(
        "data: narrow integers wrap",
        PLACES,
        "if isinstance(tensor, Tensor) and tensor.dtype in _NARROW:",
        "if False:",
        BATCHES,
    ),
    Mutation("data: padding at position 0", PLACES, "max(0, position_start - 1)", "0", BATCHES),
    Mutation("data: positions restart", PLACES, "if first_positions is not None:", "if False:", BATCHES),
    Mutation("data: the tail is a sequence", PLACES, "ids < cu_seqlens.shape[0] - 1, ids", "ids > -2, ids", BATCHES),
    Mutation(
        "data: padding leaks into packed values",
        PLACES,
        "lengths.shape[0] * width)",
        "0)",
        BATCHES,
    ),
    Mutation(
        "data: the tail is not covered",
        PACKED,
        'if self.has_room and labels != "sequences":',
        "if False:",
        BATCHES,
    ),
    Mutation(
        "data: shapes depend on the tail",
        PACKED,
        'if self.has_room and labels != "sequences":',
        'if self.has_room and labels != "sequences" and int(self.lengths.sum()) < self.total:',
        BATCHES,
    ),
    Mutation(
        "data: longest without the tail",
        PACKED,
        "(0, 1), value=self.total), self.total",
        "(0, 1), value=self.total), self.max_seqlen",
        BATCHES,
    ),
    Mutation("data: the sequence before the first misfit", FIT, "if end > rows", "if end >= rows", BATCHES),
    Mutation("data: rows that see nothing", PACKED, "additive(allowed | alone", "additive(allowed", BATCHES),
    Mutation("data: segments from 0", PACKED, "return self.sequence_ids + 1", "return self.sequence_ids", BATCHES),
    Mutation("data: labels of padding", PADDED, "filled(targets, IGNORE_INDEX)", "filled(targets, 0)", BATCHES),
    Mutation("data: rounded down", PADDED, "-(-width // multiple_of)", "(width // multiple_of)", BATCHES),
    Mutation(
        "data: one token is BOS and EOS",
        PREPARE,
        "tokens.shape[0] > begins and",
        "tokens.shape[0] > 0 and",
        TOKENS,
    ),
    Mutation("data: BOS is a target", PREPARE, "torch.full_like(self.bos, IGNORE_INDEX)", "self.bos", TOKENS),
    Mutation(
        "data: an end that is none is learnt",
        PREPARE,
        "body_labels[:room], eos_label=unlearnt",
        "body_labels[:room]",
        TOKENS,
    ),
    Mutation(
        "data: labels depend on what was cut", PREPARE, "labels is not None or cuts_ends", "labels is not None", TOKENS
    ),
    Mutation("data: truncated a token early", PREPARE, "document.body.shape[0] - room", "room", TOKENS),
    Mutation(
        "data: positions of pieces",
        PREPARE,
        'list(begins) if positions == "continue"',
        'list(begins) if positions == "restart"',
        TOKENS,
    ),
    Mutation(
        "data: the attention mask is not read", COLLATE, 'if "attention_mask" in fields:', 'if "" in fields:', COLLATORS
    ),
    Mutation(
        "data: one mask of two",
        COLLATE,
        'for name in ("completion_mask", "assistant_masks"):',
        'for name in ("completion_mask",):',
        COLLATORS,
    ),
    Mutation(
        "data: the first position goes with the last part",
        COLLATE,
        "item.first_position if place == 0 else 0",
        "item.first_position if place else 0",
        COLLATORS,
    ),
    Mutation("data: token types are lost", COLLATE, "if bool(types.any()):", "if False:", COLLATORS),
    Mutation("data: shortest first", RECURRENT, "descending=True, stable=True", "stable=True", RNN),
    Mutation(
        "data: states in the order of lengths",
        RECURRENT,
        "index_copy(1, present, states)",
        "index_copy(1, present.flip(0), states)",
        RNN,
    ),
    Mutation("data: empty sequences are counted", RECURRENT, "(lengths > 0).cumsum(0)[order] - 1", "order", RNN),
)
