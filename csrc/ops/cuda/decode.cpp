// Bindings of a cache of keys and values on a CUDA device. Shapes are checked here; values stay on the device, and the
// kernels pass over what lies outside of the cache (maskops.validate() checks them).
#include "../../cuda/decode.h"

#include <tuple>

#include "attention.h"

namespace maskops {
namespace {

DeviceIntegers integers_of(const Tensor& tensor, int64_t dim, const char* message) {
  require(tensor.dim() == dim && (tensor.dtype() == DType::int32 || tensor.dtype() == DType::int64), message);
  return {tensor.data(), tensor.dtype() == DType::int64, tensor.stride(0), dim == 2 ? tensor.stride(1) : 0};
}

DevicePlaces places_of(const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_table,
                       const Tensor& batch_index, int64_t batch) {
  require(k_cache.dim() == 4 && v_cache.dim() == 4, "decode: the caches must have 4 dimensions");
  require(k_cache.dtype() == v_cache.dtype(), "decode: the caches must have one dtype");
  for (int64_t d = 0; d < 3; d++) {
    require(k_cache.size(d) == v_cache.size(d), "decode: the caches must agree in all but the last dimension");
  }
  require(last_is_contiguous(k_cache) && last_is_contiguous(v_cache),
          "decode: the last dimension of the caches must be contiguous");
  DevicePlaces at{};
  at.rows = k_cache.size(0);
  at.places = 1;
  at.page_size = k_cache.size(2);
  require(at.rows < INT32_MAX && at.page_size < INT32_MAX && batch < INT32_MAX, "decode: the cache is too large");
  if (block_table.dim() == 2) {
    require(batch_index.numel() == 0, "decode: batch_index goes with a contiguous cache");
    require(block_table.size(0) == batch, "decode: block_table must have a row for each sequence");
    at.places = block_table.size(1);
    require(at.places < INT32_MAX && at.places * at.page_size < INT32_MAX, "decode: at most 2^31 - 2 keys a sequence");
    at.block_table = integers_of(block_table, 2, "decode: block_table must be int32 or int64");
  } else if (batch_index.numel() != 0) {
    require(batch_index.size(0) == batch, "decode: batch_index must have batch elements");
    at.batch_index = integers_of(batch_index, 1, "decode: batch_index must be int32 or int64");
  } else {
    require(batch == 0 || at.rows == batch, "decode: without batch_index the cache must have a row for each sequence");
  }
  return at;
}

StridedRows bytes_of_rows(const Tensor& tensor, int64_t bytes) {
  return {tensor.data(), tensor.stride(0) * bytes, tensor.stride(1) * bytes, tensor.stride(2) * bytes};
}

void append_kv(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k, const Tensor& v, const Tensor& lengths,
               const Tensor& block_table, const Tensor& batch_index) {
  const Call call(k_cache);
  call.require_here({&v_cache, &k, &v, &lengths, &block_table, &batch_index});
  require(k.dim() == 4 && v.dim() == 4, "append_kv: k and v must have 4 dimensions");
  const int64_t batch = k.size(0), new_keys = k.size(2);
  const DevicePlaces at = places_of(k_cache, v_cache, block_table, batch_index, batch);
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
  const int64_t bytes = k_cache.dtype() == DType::float64 ? 8 : bytes_of(element_of(k_cache));
  append_kv_cuda({at, integers_of(lengths, 1, "append_kv: lengths must be int32 or int64"),
                  bytes_of_rows(k_cache, bytes), bytes_of_rows(v_cache, bytes), bytes_of_rows(k, bytes),
                  bytes_of_rows(v, bytes), batch, k_cache.size(1), new_keys, k.size(3) * bytes, v.size(3) * bytes},
                 call.stream());
}

// Up to this many queries wait for memory, and share keys by groups of heads; more are tiles of rows.
constexpr int64_t MOST_QUERIES = 16;

// How many blocks share the keys of a sequence. The capacity alone says it: neither the rest of the batch nor a device
// changes a bit.
int64_t splits_of(int64_t capacity) {
  constexpr int64_t least_keys = 256, most_splits = 32;
  return std::clamp<int64_t>(capacity / least_keys, 1, most_splits);
}

// A contiguous cache and pages are read in place.
std::tuple<Tensor, Tensor> decode_forward(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                          const Tensor& lengths, const Tensor& leftpad, const Tensor& block_table,
                                          const Tensor& batch_index, const Tensor& start, const Tensor& end,
                                          const Tensor& key_valid, const Tensor& dense, const Tensor& diagonal,
                                          const Tensor& alibi_slopes, const Tensor& sinks, double softmax_scale,
                                          double softcap) {
  const Call call(q);
  call.require_here({&k_cache, &v_cache, &lengths, &leftpad, &block_table, &batch_index, &start, &end, &key_valid,
                     &dense, &diagonal, &alibi_slopes, &sinks});
  require(q.dim() == 4 && last_is_contiguous(q), "decode: q must have 4 dimensions, the last one contiguous");
  const int64_t batch = q.size(0), heads = q.size(1), q_len = q.size(2);
  DeviceAttentionForward p{};
  DeviceAttention& attention = p.call;
  attention.at = places_of(k_cache, v_cache, block_table, batch_index, batch);
  attention.in_cache = attention.at.block_table.data != nullptr || attention.at.batch_index.data != nullptr;
  const int64_t kv_heads = k_cache.size(1), capacity = attention.at.places * attention.at.page_size;
  require(q.dtype() == k_cache.dtype(), "decode: q must have the dtype of the cache");
  require(q.size(3) == k_cache.size(3), "decode: q and the cache must have one head dimension");
  require(heads == 0 || (kv_heads > 0 && heads % kv_heads == 0),
          "decode: the heads of the cache must divide those of q");
  require(q_len < INT32_MAX - 128 && capacity < INT32_MAX - 128, "decode: too many queries or keys");
  attention.shape = {element_of(q),
                     batch,
                     heads,
                     kv_heads,
                     q_len,
                     capacity,
                     q.size(3),
                     v_cache.size(3),
                     static_cast<float>(softmax_scale),
                     static_cast<float>(softcap)};
  require(lengths.dim() == 1 && lengths.size(0) == batch, "decode: lengths must have batch elements");
  attention.limits.end = integers_of(lengths, 1, "decode: lengths must be int32 or int64");
  if (leftpad.numel() != 0) {
    require(leftpad.dim() == 1 && leftpad.size(0) == batch, "decode: leftpad must have batch elements");
    attention.limits.first = integers_of(leftpad, 1, "decode: leftpad must be int32 or int64");
  }

  const auto fits = [&](int64_t size) { return size == 1 || size == batch; };
  const auto step = [](const Tensor& tensor, int64_t d) { return tensor.size(d) == 1 ? 0 : tensor.stride(d); };
  DeviceSpans& spans = attention.spans;
  spans.n_spans = 1;
  spans.plan_batch = 1;
  if (start.dim() == 3) {
    require(end.dim() == 3 && key_valid.dim() == 2 && start.dtype() == DType::int32 && end.dtype() == DType::int32 &&
                key_valid.dtype() == DType::uint8,
            "decode: the spans must be int32 (spans, batch, q_len), key_valid uint8 (batch, keys)");
    require(start.size(0) >= 1 && start.size(0) < INT32_MAX && fits(start.size(1)) && start.size(2) == q_len &&
                key_valid.size(0) == start.size(1) && key_valid.size(1) == capacity,
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
    spans.batch_stride = step(start, 1);
    spans.key_valid_batch_stride = step(key_valid, 0);
    spans.n_spans = static_cast<int32_t>(start.size(0));
  }
  DeviceFeatures& features = attention.features;
  features.kept_scale = 1.0f;
  if (dense.dim() == 4) {
    require(dense.dtype() == DType::boolean && fits(dense.size(0)) && (dense.size(1) == 1 || dense.size(1) == heads) &&
                dense.size(2) == q_len && dense.size(3) == capacity && last_is_contiguous(dense),
            "decode: dense must be bool (batch or 1, heads or 1, q_len, keys)");
    features.dense = {dense.data(), step(dense, 0), step(dense, 1), dense.stride(2), 1};
  }
  if (alibi_slopes.dim() == 2) {
    require(alibi_slopes.dtype() == DType::float32 && fits(alibi_slopes.size(0)) && alibi_slopes.size(1) == heads,
            "decode: alibi_slopes must be float32 (batch or 1, heads)");
    require(diagonal.dtype() == DType::int32 && diagonal.dim() == 2 && fits(diagonal.size(0)) &&
                diagonal.size(1) == q_len && adjacent(diagonal),
            "decode: the diagonal must be int32 (batch or 1, q_len)");
    features.alibi_slopes = {alibi_slopes.data<float>(), alibi_slopes.stride(0), alibi_slopes.stride(1),
                             alibi_slopes.size(0), false};
    features.positions = diagonal.data<int32_t>();
    features.positions_batch_stride = step(diagonal, 0);
  }
  if (sinks.numel() != 0) {
    require(sinks.dtype() == DType::float32 && sinks.dim() == 1 && sinks.size(0) == heads,
            "decode: sinks must be float32 (heads)");
    features.sinks = {sinks.data<float>(), 0, sinks.stride(0), 1, false};
  }

  Tensor out = empty_in_order_of(q, attention.shape.value_dim);
  Tensor lse = call.empty({batch, heads, q_len}, DType::float32);
  attention.q = device_rows(q);
  attention.k = device_rows(k_cache);
  attention.v = device_rows(v_cache);
  p.out = device_rows(out);
  p.lse = lse.data<float>();
  if (batch == 0 || heads == 0 || q_len == 0) return {std::move(out), std::move(lse)};
  if (q_len > MOST_QUERIES) {
    attention_forward_cuda(p, call.stream());
  } else {
    const int64_t splits = splits_of(capacity), rows = splits == 1 ? 0 : splits * batch * heads * q_len;
    const Tensor parts = call.empty({rows, attention.shape.value_dim}, DType::float32);
    const Tensor sums = call.empty({2, rows}, DType::float32);
    float* const scratch = sums.data_or_null<float>();
    decode_attention_cuda({p, static_cast<int32_t>(splits), parts.data_or_null<float>(), scratch, scratch + rows},
                          call.stream());
  }
  return {std::move(out), std::move(lse)};
}

const bool registered = [] {
  static OperatorLibrary library("maskops", DEVICE_KEY);
  library.implement<&append_kv>("append_kv_cuda");
  library.implement<&decode_forward>("decode_forward_cuda");
  return true;
}();

}  // namespace
}  // namespace maskops
