"""Span attention and the cache in CUDA, compiled as host code."""

from tests.mutations import Mutation

ATTENTION = ("tests/test_cuda_attention.py",)
SEVERAL_TILES = (*ATTENTION, "-k", "several_tiles")  # every feature but dense masks, forward and backward
BATCHES = (*ATTENTION, "-k", "test_case")
DECODE = ("tests/test_cuda_decode.py",)
NEIGHBOURS = ("tests/test_nonfinite_neighbours.py", "-k", "cuda")
FAR_APART = ("tests/test_far_apart.py", "-k", "cuda")

TILE = "csrc/cuda/attention_tile.cuh"
FORWARD = "csrc/cuda/attention_forward.cu"
ROWS = "csrc/cuda/attention_rows.cu"
QUERIES = "csrc/cuda/attention_queries.cu"
KEYS = "csrc/cuda/attention_keys.cu"
EXTRAS = "csrc/cuda/attention_extras.cu"
CACHE = "csrc/cuda/decode.cu"
SOFTMAX = "csrc/cuda/attention_softmax.cuh"
GRADIENT = "csrc/cuda/attention_gradient.cuh"
CACHE_ATTENTION = "csrc/cuda/decode_attention.cu"

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
        SEVERAL_TILES,
    ),
    Mutation(
        "cuda attention: sign of the sink", TILE, "sinks, 0, head) - lse)", "sinks, 0, head) + lse)", SEVERAL_TILES
    ),
    Mutation(
        "cuda attention: large rows keep their sums", ROWS, "fabsf(lse) >= LARGE_LSE", "fabsf(lse) >= 1e30f", ATTENTION
    ),
    Mutation(
        "cuda attention: gradient of the lse", ROWS, "product * share - grad_lse", "product * share", SEVERAL_TILES
    ),
    Mutation(
        "cuda attention: dQ without its scale",
        QUERIES,
        "const float scale = call.shape.softmax_scale;",
        "const float scale = 1.0f;",
        SEVERAL_TILES,
    ),
    Mutation(
        "cuda attention: pairs of the bias that nobody visits",
        QUERIES,
        "if (writes_bias) {  //",
        "if (false) {  //",
        ATTENTION,
    ),
    Mutation(
        "cuda attention: one head of the group in dK",
        KEYS,
        "head < (kv_head + 1) * shared_by",
        "head < kv_head * shared_by + 1",
        SEVERAL_TILES,
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
    Mutation(
        "cuda attention: products before their rows are there",
        TILE,
        "memory.depth.b);\n    __syncthreads();",
        "memory.depth.b);",
        SEVERAL_TILES,
    ),
    Mutation(
        "cuda attention: rows replaced while they are multiplied",
        TILE,
        "column += DEPTH) {\n    __syncthreads();",
        "column += DEPTH) {",
        SEVERAL_TILES,
    ),
    Mutation(
        "cuda attention: columns before they are there",
        TILE,
        "__syncthreads_and(is_mine_finite) != 0",
        "is_mine_finite",
        SEVERAL_TILES,
    ),
    Mutation(
        "cuda attention: columns replaced while they are added",
        TILE,
        "chunk++) {\n    __syncthreads();\n    const bool",
        "chunk++) {\n    const bool",
        SEVERAL_TILES,
    ),
    Mutation(
        "cuda attention: 0 times what is not finite",
        TILE,
        "FINITE || a[i] != 0.0f ? a[i] * b[j] : 0.0f",
        "a[i] * b[j]",
        NEIGHBOURS,
    ),
    Mutation("cuda attention: what is not finite in vectors", TILE, "zeros += x.x * 0.0f", "zeros += 0.0f", NEIGHBOURS),
    Mutation("cuda attention: what is not finite in single numbers", TILE, "zeros += value * 0.0f;", "", NEIGHBOURS),
    Mutation(
        "cuda attention: offsets of rows in 32 bits",
        TILE,
        "+ head * x.head_stride + row * x.row_stride",
        "+ head * x.head_stride + static_cast<int32_t>(row * x.row_stride)",
        FAR_APART,
    ),
    Mutation(
        "cuda attention: the first half of an item twice",
        TILE,
        "tile.first = begin + half;",
        "tile.first = begin;",
        SEVERAL_TILES,
    ),
    Mutation(
        "cuda attention: items of another batch element",
        TILE,
        "if (p.spans.plan_batch > 1) tile.batch",
        "if (false) tile.batch",
        BATCHES,
    ),
    Mutation("cuda attention: slope of the softcap", TILE, "bend = 1.0f - bent * bent;", "bend = 1.0f;", SEVERAL_TILES),
    Mutation(
        "cuda attention: dropout counts from the first key of all",
        TILE,
        "static_cast<uint32_t>(first) - row.first;",
        "static_cast<uint32_t>(first);",
        SEVERAL_TILES,
    ),
    Mutation("cuda attention: sign of the slope", TILE, "score -= row.slope", "score += row.slope", SEVERAL_TILES),
    Mutation(
        "cuda attention: sum not rescaled", SOFTMAX, "total.sum * rescale + sum", "total.sum + sum", SEVERAL_TILES
    ),
    Mutation(
        "cuda attention: result not rescaled",
        SOFTMAX,
        "result.values[chunk][i][j] *= factor;",
        "result.values[chunk][i][j] *= 1.0f + 0.0f * factor;",
        SEVERAL_TILES,
    ),
    Mutation(
        "cuda attention: maxima of parts before they are there",
        SOFTMAX,
        "memory.part_maximum[part][mine] = maximum;\n    __syncthreads();",
        "memory.part_maximum[part][mine] = maximum;",
        SEVERAL_TILES,
    ),
    Mutation(
        "cuda attention: sums of parts before they are there",
        SOFTMAX,
        "memory.factor[mine] = rescale;\n    __syncthreads();",
        "memory.factor[mine] = rescale;",
        SEVERAL_TILES,
    ),
    Mutation(
        "cuda attention: dQ goes on to a key that is not there yet",
        QUERIES,
        "next_key(call, row, base + KEYS));\n    __syncthreads();",
        "next_key(call, row, base + KEYS));",
        SEVERAL_TILES,
    ),
    Mutation(
        "cuda attention: dK takes rows before they are known",
        KEYS,
        "1u << mine % 32);\n      __syncthreads();",
        "1u << mine % 32);",
        SEVERAL_TILES,
    ),
    Mutation(
        "cuda attention: dV without the share beside a sink",
        GRADIENT,
        "weight * p.features.kept_scale * of_row.share : 0.0f;\n  const float arriving",
        "weight * p.features.kept_scale : 0.0f;\n  const float arriving",
        SEVERAL_TILES,
    ),
    Mutation("cuda attention: delta forgotten", GRADIENT, "(arriving - of_row.delta)", "arriving", SEVERAL_TILES),
    Mutation(
        "cuda attention: sums of heads before they are there",
        EXTRAS,
        "__syncthreads();\n    if (static_cast<int>(threadIdx.x) < step)",
        "if (static_cast<int>(threadIdx.x) < step)",
        SEVERAL_TILES,
    ),
    Mutation("cuda decode: slot in the page", CACHE, "slot = key % p.at.page_size", "slot = key", DECODE),
    Mutation(
        "cuda decode: splits not rescaled",
        CACHE_ATTENTION,
        "p.sums[split * rows + at] * expf(p.maxima[split * rows + at] - reference)",
        "p.sums[split * rows + at]",
        DECODE,
    ),
    Mutation(
        "cuda decode: the last tile of a split",
        CACHE_ATTENTION,
        "const int64_t end = tiles * (split + 1) / p.splits;",
        "const int64_t end = tiles * (split + 1) / p.splits - (p.splits > 1);",
        DECODE,
    ),
    Mutation(
        "cuda decode: heads of the first group",
        CACHE_ATTENTION,
        "return kv_head * group + (first + slot) % group;",
        "return (first + slot) % group;",
        DECODE,
    ),
    Mutation(
        "cuda decode: a slot of all pages", CACHE_ATTENTION, "? key % call.at.page_size : key", "? key : key", DECODE
    ),
    Mutation(
        "cuda decode: result not rescaled",
        CACHE_ATTENTION,
        "sums[place][i] *= memory.rescale[party * EACH + i];",
        "sums[place][i] *= 1.0f;",
        DECODE,
    ),
    Mutation(
        "cuda decode: sum not rescaled",
        CACHE_ATTENTION,
        "memory.sum[of] * rescale + sum",
        "memory.sum[of] + sum",
        DECODE,
    ),
    Mutation(
        "cuda decode: columns of the first group",
        CACHE_ATTENTION,
        "first_column + chunk * COLUMNS;\n      if (column >=",
        "chunk * COLUMNS;\n      if (column >=",
        DECODE,
    ),
    Mutation(
        "cuda decode: weights before all scores are there",
        CACHE_ATTENTION,
        "    __syncthreads();\n\n    for (int of = thread / WARP;",
        "    for (int of = thread / WARP;",
        DECODE,
    ),
    Mutation(
        "cuda decode: products before their rows are there",
        CACHE_ATTENTION,
        "      __syncthreads();\n      const auto depth",
        "      const auto depth",
        DECODE,
    ),
    Mutation(
        "cuda decode: keys replaced while they are looked at",
        CACHE_ATTENTION,
        "    __syncthreads();\n    read_valid_keys",
        "    read_valid_keys",
        DECODE,
    ),
    Mutation(
        "cuda decode: what other threads find is not finite",
        CACHE_ATTENTION,
        "__syncthreads_and(is_mine_finite) != 0",
        "__syncthreads_or(is_mine_finite) != 0",
        DECODE,
    ),
    Mutation(
        "cuda decode: keys before the first",
        TILE,
        "first < 0 ? 0 : first > k_len ? k_len : first",
        "first < 0 ? 0 : 0",
        DECODE,
    ),
)
