"""Span attention and the cache in CUDA, compiled as host code."""

from tests.mutations import Mutation

ATTENTION = ("tests/test_cuda_attention.py",)
DECODE = ("tests/test_cuda_decode.py",)

TILE = "csrc/cuda/attention_tile.cuh"
FORWARD = "csrc/cuda/attention_forward.cu"
ROWS = "csrc/cuda/attention_rows.cu"
QUERIES = "csrc/cuda/attention_queries.cu"
KEYS = "csrc/cuda/attention_keys.cu"
EXTRAS = "csrc/cuda/attention_extras.cu"
CACHE = "csrc/cuda/decode.cu"

MUTATIONS = (
    Mutation(
        "cuda attention: one key more than the span",
        TILE,
        "mask |= (1u << end) - (1u << begin);",
        "mask |= (2u << end) - (1u << begin);",
        ATTENTION,
    ),
    Mutation("cuda attention: holes are seen", TILE, "mask &= valid & 0xffffu;", "mask &= 0xffffu;", ATTENTION),
    Mutation(
        "cuda attention: bits of the next word",
        TILE,
        "__ldg(words + word + 1)) << 32",
        "__ldg(words + word + 1)) << 31",
        ATTENTION,
    ),
    Mutation(
        "cuda attention: lse without the maximum",
        TILE,
        "const float lse = maximum + logf(sum);",
        "const float lse = logf(sum);",
        ATTENTION,
    ),
    Mutation("cuda attention: sign of the sink", TILE, "sinks, 0, head) - lse)", "sinks, 0, head) + lse)", ATTENTION),
    Mutation(
        "cuda attention: large rows keep their sums", ROWS, "fabsf(lse) >= LARGE_LSE", "fabsf(lse) >= 1e30f", ATTENTION
    ),
    Mutation("cuda attention: gradient of the lse", ROWS, "product * share - grad_lse", "product * share", ATTENTION),
    Mutation(
        "cuda attention: dQ without its scale",
        QUERIES,
        "const float scale = call.shape.softmax_scale;",
        "const float scale = 1.0f;",
        ATTENTION,
    ),
    Mutation(
        "cuda attention: pairs of the bias that nobody visits", QUERIES, "if (writes_bias) {", "if (false) {", ATTENTION
    ),
    Mutation(
        "cuda attention: one head of the group in dK",
        KEYS,
        "head < (kv_head + 1) * shared_by",
        "head < kv_head * shared_by + 1",
        ATTENTION,
    ),
    Mutation("cuda attention: bounds of the first span alone", KEYS, "s < p.spans.n_spans", "s < 1", ATTENTION),
    Mutation(
        "cuda attention: a bias shared by the batch",
        EXTRAS,
        "of_all_batch ? shape.batch : bias_batch + 1",
        "bias_batch + 1",
        ATTENTION,
    ),
    Mutation(
        "cuda attention: slopes of every sequence",
        EXTRAS,
        "if (!shared.by_sequence || clamped",
        "if (true || clamped",
        ATTENTION,
    ),
    Mutation("cuda decode: slot in the page", CACHE, "slot = key % p.at.page_size", "slot = key", DECODE),
)
