// Bindings of a cache of keys and values on a CUDA device. Shapes are checked here; values stay on the device, and the
// kernels pass over what lies outside of the cache (maskops.validate() checks them).
#include "../../cuda/decode.h"

#include <tuple>

#include "../decode.h"
#include "attention.h"

namespace maskops {
namespace {

DeviceIntegers integers_of(const Tensor& tensor, int64_t dim, const char* message) {
  require(tensor.dim() == dim && (tensor.dtype() == DType::int32 || tensor.dtype() == DType::int64), message);
  return {tensor.data(), tensor.dtype() == DType::int64, tensor.stride(0), dim == 2 ? tensor.stride(1) : 0};
}

DevicePlaces places_of(const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_table,
                       const Tensor& batch_index, int64_t batch) {
  const CacheSizes sizes = cache_sizes(k_cache, v_cache, block_table, batch_index, batch);
  DevicePlaces at{};
  at.rows = sizes.rows;
  at.places = sizes.places;
  at.page_size = sizes.page_size;
  if (sizes.is_paged) {
    at.block_table = integers_of(block_table, 2, "decode: block_table must be int32 or int64");
  } else if (batch_index.numel() != 0) {
    at.batch_index = integers_of(batch_index, 1, "decode: batch_index must be int32 or int64");
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
  check_new_keys(k_cache, v_cache, k, v, lengths);
  const int64_t bytes = bytes_of_dtype(k_cache);
  append_kv_cuda({at, integers_of(lengths, 1, "append_kv: lengths must be int32 or int64"),
                  bytes_of_rows(k_cache, bytes), bytes_of_rows(v_cache, bytes), bytes_of_rows(k, bytes),
                  bytes_of_rows(v, bytes), batch, k_cache.size(1), new_keys, k.size(3) * bytes, v.size(3) * bytes},
                 call.stream());
}

// Up to this many queries wait for memory, and share keys by groups of heads; more are tiles of rows.
constexpr int64_t MOST_QUERIES = 16;

// How many blocks share the keys of a sequence: no more than fill a device with one sequence, nor than keep its parts
// of the result few. The shape of one sequence alone says it: neither the rest of the batch nor a device changes a bit.
int64_t splits_of(const AttentionShape& shape, int64_t capacity) {
  constexpr int64_t least_keys = 256, most_splits = 32, most_groups = 512, most_rows = 4096;
  const int64_t most = std::min(
      {capacity / least_keys, most_splits, most_groups / shape.kv_heads, most_rows / (shape.heads * shape.q_len)});
  return std::max<int64_t>(most, 1);
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
  const int64_t batch = q.size(0);
  DeviceAttentionForward p{};
  DeviceAttention& attention = p.call;
  attention.at = places_of(k_cache, v_cache, block_table, batch_index, batch);
  attention.in_cache = attention.at.block_table.data != nullptr || attention.at.batch_index.data != nullptr;
  const int64_t capacity = attention.at.places * attention.at.page_size;
  attention.shape = decode_shape(q, k_cache, v_cache, capacity, softmax_scale, softcap);
  const AttentionShape& shape = attention.shape;
  require(lengths.dim() == 1 && lengths.size(0) == batch, "decode: lengths must have batch elements");
  attention.limits.end = integers_of(lengths, 1, "decode: lengths must be int32 or int64");
  if (leftpad.numel() != 0) {
    require(leftpad.dim() == 1 && leftpad.size(0) == batch, "decode: leftpad must have batch elements");
    attention.limits.first = integers_of(leftpad, 1, "decode: leftpad must be int32 or int64");
  }

  attention.spans = decode_spans<DeviceSpans>(shape, start, end, key_valid);
  attention.features = decode_features<DeviceFeatures>(shape, dense, diagonal, alibi_slopes, sinks);
  attention.features.kept_scale = 1.0f;

  Tensor out = empty_in_order_of(q, shape.value_dim);
  Tensor lse = call.empty({batch, shape.heads, shape.q_len}, DType::float32);
  attention.q = device_rows(q);
  attention.k = device_rows(k_cache);
  attention.v = device_rows(v_cache);
  p.out = device_rows(out);
  p.lse = lse.data<float>();
  if (!has_work(shape)) return {std::move(out), std::move(lse)};
  if (shape.q_len > MOST_QUERIES) {
    attention_forward_cuda(p, call.stream());
  } else {
    const int64_t splits = splits_of(shape, capacity);
    const int64_t rows = splits == 1 ? 0 : splits * batch * shape.heads * shape.q_len;
    const Tensor parts = call.empty({rows, shape.value_dim}, DType::float32);
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
