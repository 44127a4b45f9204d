// Bindings of a cache of keys and values on a CUDA device. Shapes are checked here; values stay on the device, and the
// kernels pass over what lies outside of the cache (maskops.validate() checks them).
#include "../../cuda/decode.h"

#include "tensors.h"

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

const bool registered = [] {
  static OperatorLibrary library("maskops", DEVICE_KEY);
  library.implement<&append_kv>("append_kv_cuda");
  return true;
}();

}  // namespace
}  // namespace maskops
