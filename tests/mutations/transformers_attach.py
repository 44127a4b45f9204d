"""Mutations of attached models: how a batch arrives, its mask, the attention function, the calls that run."""

from tests.mutations import Mutation

FOLDER = "maskops/integrations/transformers"
ARRIVAL = ("tests/test_transformers_arrival.py",)
ATTENTION = ("tests/test_transformers_attention.py",)
ATTACH = ("tests/test_attach.py",)

MUTATIONS = (
    Mutation(
        "transformers: a jump of positions over a hole begins a document",
        f"{FOLDER}/arrival.py",
        "(step != 1) & (step != place - previous)",
        "(step != 1)",
        ARRIVAL,
    ),
    Mutation(
        "transformers: places after the last offset are a document",
        f"{FOLDER}/arrival.py",
        "inside = number <= last",
        "inside = number >= 0",
        ARRIVAL,
    ),
    Mutation(
        "transformers: keys of a static cache that are not filled are seen",
        f"{FOLDER}/masking.py",
        "keys = masks.key_padding(end)",
        "keys = masks.key_padding(request.k_len)",
        ARRIVAL,
    ),
    Mutation(
        "transformers: keys of a cache are aligned by the last real one",
        f"{FOLDER}/masking.py",
        "        end = delta + q_len\n",
        "        end = delta + q_len - 1\n",
        ARRIVAL,
    ),
    Mutation(
        "transformers: chunks count from the keys that a cache still holds",
        f"{FOLDER}/masking.py",
        "start = -whole(request.kv_offset)",
        "start = whole(0)",
        ARRIVAL,
    ),
    Mutation(
        "transformers: a dense part is planned for one batch element",
        f"{FOLDER}/masking.py",
        " and not positions and not pattern.is_dense",
        " and not positions",
        ARRIVAL,
    ),
    Mutation(
        "transformers: cross-attention looks at another row's keys",
        f"{FOLDER}/masking.py",
        "start, end = keys.cu_seqlens[at] - row_start, keys.cu_seqlens[at + 1] - row_start",
        "start, end = keys.cu_seqlens[at], keys.cu_seqlens[at + 1]",
        ARRIVAL,
    ),
    Mutation(
        "transformers: the window of a layer without a mask is one too wide",
        f"{FOLDER}/attention.py",
        "masks.sliding_window(sliding_window - 1, 0 if is_causal else sliding_window - 1)",
        "masks.sliding_window(sliding_window, 0 if is_causal else sliding_window - 1)",
        ATTENTION,
    ),
    Mutation(
        "transformers: a position bias hides an additive mask",
        f"{FOLDER}/attention.py",
        "bias + added",
        "bias",
        ATTENTION,
    ),
    Mutation(
        "transformers: a forward that was interrupted stays on the stack",
        f"{FOLDER}/calls.py",
        "            del calls[index:]\n",
        "",
        ATTACH,
    ),
    Mutation(
        "transformers: a shared config is restored with the first model",
        f"{FOLDER}/attach.py",
        "    if count > 1:",
        "    if count > 2:",
        ATTACH,
    ),
    Mutation(
        "transformers: models inside read the mask again",
        f"{FOLDER}/arrival.py",
        "if _holds_no_segments(call, mask) or _separated",
        "if _separated",
        ATTACH,
    ),
)
