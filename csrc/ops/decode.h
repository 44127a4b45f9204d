// What the bindings of a cache of keys and values share, whatever the device: checks of shapes, strides and dtypes, and
// the parameters that follow from them.
#pragma once

#include "attention.h"

namespace maskops {

struct CacheSizes {
  int64_t rows;       // rows or pages of the cache
  int64_t places;     // of a sequence
  int64_t page_size;  // keys of a page, or the capacity of a contiguous cache
  int64_t capacity;   // keys that a sequence can hold
  bool is_paged;
};

inline CacheSizes cache_sizes(const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_table,
                              const Tensor& batch_index, int64_t batch) {
  require(k_cache.dim() == 4 && v_cache.dim() == 4, "decode: the caches must have 4 dimensions");
  require(k_cache.dtype() == v_cache.dtype(), "decode: the caches must have one dtype");
  for (int64_t d = 0; d < 3; d++) {
    require(k_cache.size(d) == v_cache.size(d), "decode: the caches must agree in all but the last dimension");
  }
  require(last_is_contiguous(k_cache) && last_is_contiguous(v_cache),
          "decode: the last dimension of the caches must be contiguous");
  const bool is_paged = block_table.dim() == 2;
  CacheSizes sizes{k_cache.size(0), is_paged ? block_table.size(1) : 1, k_cache.size(2), 0, is_paged};
  require(sizes.rows < INT32_MAX && sizes.page_size < INT32_MAX && batch < INT32_MAX, "decode: the cache is too large");
  sizes.capacity = sizes.places < INT32_MAX ? sizes.places * sizes.page_size : INT32_MAX;
  require(sizes.capacity < INT32_MAX - tile_rows, "decode: at most 2^31 - 130 keys a sequence");
  if (is_paged) {
    require(batch_index.numel() == 0, "decode: batch_index goes with a contiguous cache");
    require(block_table.size(0) == batch, "decode: block_table must have a row for each sequence");
  } else if (batch_index.numel() != 0) {
    require(batch_index.dim() == 1 && batch_index.size(0) == batch, "decode: batch_index must have batch elements");
  } else {
    require(batch == 0 || sizes.rows == batch,
            "decode: without batch_index the cache must have a row for each sequence");
  }
  return sizes;
}

inline int64_t bytes_of_dtype(const Tensor& tensor) {
  return tensor.dtype() == DType::float64 ? 8 : bytes_of(element_of(tensor));
}

inline void check_new_keys(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k, const Tensor& v,
                           const Tensor& lengths) {
  const int64_t batch = k.size(0), new_keys = k.size(2);
  require(k.dtype() == k_cache.dtype() && v.dtype() == k_cache.dtype(),
          "append_kv: k and v must have the dtype of the cache");
  const Tensor* const pairs[2][2] = {{&k, &k_cache}, {&v, &v_cache}};
  for (const auto& [source, cache] : pairs) {
    require(source->size(0) == batch && source->size(1) == cache->size(1) && source->size(2) == new_keys &&
                source->size(3) == cache->size(3),
            "append_kv: k and v must be (batch, kv_heads, new, width) of the cache");
    require(last_is_contiguous(*source), "append_kv: the last dimension of k and v must be contiguous");
    for (int64_t d = 0; d < 3; d++) {
      require(cache->size(d) <= 1 || cache->stride(d) != 0, "append_kv: a cache must not be expanded");
    }
  }
  require(lengths.dim() == 1 && lengths.size(0) == batch, "append_kv: lengths must have batch elements");
}

inline AttentionShape decode_shape(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, int64_t capacity,
                                   double softmax_scale, double softcap) {
  const AttentionShape shape{element_of(q),
                             q.size(0),
                             q.size(1),
                             k_cache.size(1),
                             q.size(2),
                             capacity,
                             q.size(3),
                             v_cache.size(3),
                             static_cast<float>(softmax_scale),
                             static_cast<float>(softcap)};
  require(q.dtype() == k_cache.dtype(), "decode: q must have the dtype of the cache");
  require(shape.head_dim == k_cache.size(3), "decode: q and the cache must have one head dimension");
  require(shape.heads == 0 || (shape.kv_heads > 0 && shape.heads % shape.kv_heads == 0),
          "decode: the heads of the cache must divide those of q");
  require(shape.heads < INT32_MAX && shape.q_len < INT32_MAX - tile_rows &&
              (shape.heads == 0 || shape.q_len < INT32_MAX / shape.heads),
          "decode: too many rows of q");
  require(shape.head_dim < INT32_MAX / 2 && shape.value_dim < INT32_MAX / 2, "decode: head_dim is too large");
  return shape;
}

inline bool serves_batch(const Tensor& tensor, int64_t d, const AttentionShape& shape) {
  return tensor.size(d) == 1 || tensor.size(d) == shape.batch;
}

// Spans over the whole capacity; `start` has no dimensions of spans where every row sees every key in use.
template <class AnySpans>
AnySpans decode_spans(const AttentionShape& shape, const Tensor& start, const Tensor& end, const Tensor& key_valid) {
  AnySpans spans{};
  spans.n_spans = 1;
  spans.plan_batch = 1;
  if (start.dim() != 3) return spans;
  require(end.dim() == 3 && key_valid.dim() == 2 && start.dtype() == DType::int32 && end.dtype() == DType::int32 &&
              key_valid.dtype() == DType::uint8,
          "decode: the spans must be int32 (spans, batch, q_len), key_valid uint8 (batch, keys)");
  require(start.size(0) >= 1 && start.size(0) < INT32_MAX && serves_batch(start, 1, shape) &&
              start.size(2) == shape.q_len && key_valid.size(0) == start.size(1) && key_valid.size(1) == shape.k_len,
          "decode: the spans are for another shape");
  for (int64_t d = 0; d < 3; d++) {
    require(end.size(d) == start.size(d) && (start.size(d) <= 1 || start.stride(d) == end.stride(d)),
            "decode: start and end must agree");
  }
  require(adjacent(start) && adjacent(key_valid), "decode: the spans must be contiguous");
  spans.start = start.data<int32_t>();
  spans.end = end.data<int32_t>();
  spans.key_valid = key_valid.data<uint8_t>();
  spans.span_stride = start.stride(0);
  spans.batch_stride = broadcast_stride(start, 1);
  spans.key_valid_batch_stride = broadcast_stride(key_valid, 0);
  spans.n_spans = static_cast<int32_t>(start.size(0));
  return spans;
}

// No bias, no dropout.
template <class AnyFeatures>
AnyFeatures decode_features(const AttentionShape& shape, const Tensor& dense, const Tensor& diagonal,
                            const Tensor& alibi_slopes, const Tensor& sinks) {
  AnyFeatures features{};
  if (dense.dim() == 4) {
    require(dense.dtype() == DType::boolean && serves_batch(dense, 0, shape) &&
                (dense.size(1) == 1 || dense.size(1) == shape.heads) && dense.size(2) == shape.q_len &&
                dense.size(3) == shape.k_len && last_is_contiguous(dense),
            "decode: dense must be bool (batch or 1, heads or 1, q_len, keys)");
    features.dense = {dense.data(), broadcast_stride(dense, 0), broadcast_stride(dense, 1), dense.stride(2), 1};
  }
  if (alibi_slopes.dim() == 2) {
    require(alibi_slopes.dtype() == DType::float32 && serves_batch(alibi_slopes, 0, shape) &&
                alibi_slopes.size(1) == shape.heads,
            "decode: alibi_slopes must be float32 (batch or 1, heads)");
    require(diagonal.dtype() == DType::int32 && diagonal.dim() == 2 && serves_batch(diagonal, 0, shape) &&
                diagonal.size(1) == shape.q_len && adjacent(diagonal),
            "decode: the diagonal must be int32 (batch or 1, q_len)");
    features.alibi_slopes = {alibi_slopes.data<float>(), alibi_slopes.stride(0), alibi_slopes.stride(1),
                             alibi_slopes.size(0), false};
    features.positions = diagonal.data<int32_t>();
    features.positions_batch_stride = broadcast_stride(diagonal, 0);
  }
  if (sinks.numel() != 0) {
    require(sinks.dtype() == DType::float32 && sinks.dim() == 1 && sinks.size(0) == shape.heads,
            "decode: sinks must be float32 (heads)");
    features.sinks = {sinks.data<float>(), 0, sinks.stride(0), 1, false};
  }
  return features;
}

}  // namespace maskops
