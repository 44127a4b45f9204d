// Bindings of the cache of keys and values.
#include "../decode.h"

#include <string>
#include <tuple>
#include <vector>

#include "../cpu/decode.h"
#include "tensors.h"

namespace maskops {
namespace {

// A tensor of int32 or int64, read as int64. Absent is empty and one-dimensional, so that a table of no pages is
// present.
struct Integers {
  const void* data;
  bool wide;
  int64_t row_stride, column_stride;

  Integers(const Tensor& tensor, int64_t dim, const char* message) {
    require(tensor.dtype() == DType::int32 || tensor.dtype() == DType::int64, message);
    require(tensor.dim() == dim, message);
    data = tensor.data();
    wide = tensor.dtype() == DType::int64;
    row_stride = tensor.stride(0);
    column_stride = dim == 2 ? tensor.stride(1) : 0;
  }
  int64_t at(int64_t row, int64_t column = 0) const {
    const int64_t offset = row * row_stride + column * column_stride;
    return wide ? static_cast<const int64_t*>(data)[offset] : static_cast<const int32_t*>(data)[offset];
  }
};

std::string element(const char* name, int64_t index, int64_t value) {
  return std::string(name) + "[" + std::to_string(index) + "]=" + std::to_string(value) + ": ";
}

// The places of each sequence's keys, copied, so that what was checked is what is used. The messages are those of
// check_filled and check_append in reference.py.
struct Places {
  std::vector<int32_t> place;
  CachePlaces view;
  int64_t capacity;
  bool paged;

  Places(const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_table, const Tensor& batch_index,
         int64_t batch) {
    require(k_cache.dim() == 4 && v_cache.dim() == 4, "decode: the caches must have 4 dimensions");
    require(k_cache.dtype() == v_cache.dtype(), "decode: the caches must have one dtype");
    for (int64_t d = 0; d < 3; d++) {
      require(k_cache.size(d) == v_cache.size(d), "decode: the caches must agree in all but the last dimension");
    }
    require(last_is_contiguous(k_cache) && last_is_contiguous(v_cache),
            "decode: the last dimension of the caches must be contiguous");
    const int64_t rows = k_cache.size(0), page_size = k_cache.size(2);
    require(rows < INT32_MAX && page_size < INT32_MAX && batch < INT32_MAX, "decode: the cache is too large");
    paged = block_table.dim() == 2;
    const int64_t places = paged ? block_table.size(1) : 1;
    require(places < INT32_MAX && places * page_size < INT32_MAX, "decode: at most 2^31 - 2 keys a sequence");
    capacity = places * page_size;
    if (paged) {
      require(batch_index.numel() == 0, "decode: batch_index goes with a contiguous cache");
      require(block_table.size(0) == batch, "decode: block_table must have a row for each sequence");
    } else if (batch_index.numel() == 0) {
      require(batch == 0 || rows == batch, "decode: without batch_index the cache must have a row for each sequence");
    }
    place.assign(static_cast<size_t>(batch * places), -1);
    if (!paged) {
      if (batch_index.numel() == 0) {
        for (int64_t b = 0; b < batch; b++) place[b] = static_cast<int32_t>(b);
      } else {
        require(batch_index.dim() == 1 && batch_index.size(0) == batch, "decode: batch_index must have batch elements");
        const Integers index(batch_index, 1, "decode: batch_index must be int32 or int64");
        for (int64_t b = 0; b < batch; b++) {
          const int64_t row = index.at(b);
          if (row < 0 || row >= rows) {
            throw std::invalid_argument(element("batch_index", b, row) + "expected 0 to " + std::to_string(rows - 1) +
                                        ", a row of the cache");
          }
          place[b] = static_cast<int32_t>(row);
        }
      }
    }
    view = {place.data(), places, page_size};
  }

  // Reads the pages that hold the keys [begin, end) of a sequence.
  void use(const Tensor& block_table, const Tensor& k_cache, int64_t batch, int64_t begin, int64_t end) {
    if (!paged || begin >= end) return;
    const Integers table(block_table, 2, "decode: block_table must be int32 or int64");
    const int64_t pages = k_cache.size(0);
    for (int64_t index = begin / view.page_size; index <= (end - 1) / view.page_size; index++) {
      const int64_t page = table.at(batch, index);
      if (page < 0 || page >= pages) {
        throw std::invalid_argument("block_table[" + std::to_string(batch) + ", " + std::to_string(index) +
                                    "]=" + std::to_string(page) + ": expected 0 to " + std::to_string(pages - 1) +
                                    ", a page of the cache, for key " +
                                    std::to_string(std::max(begin, index * view.page_size)) + " of the sequence");
      }
      place[batch * view.places + index] = static_cast<int32_t>(page);
    }
  }
};

// Refuses two rows of the batch that would write to one key.
void require_apart(const AppendKv& p, bool paged) {
  struct Target {
    int64_t place, begin, end, batch;
  };
  std::vector<Target> targets;
  for (int64_t b = 0; b < p.batch; b++) {
    for (int64_t key = p.lengths[b], end = key + p.new_keys; key < end;) {
      const int64_t slot = key % p.at.page_size, n = std::min(end - key, p.at.page_size - slot);
      targets.push_back({p.at.place[b * p.at.places + key / p.at.page_size], slot, slot + n, b});
      key += n;
    }
  }
  std::stable_sort(targets.begin(), targets.end(), [](const Target& a, const Target& b) {
    return a.place != b.place ? a.place < b.place : a.begin < b.begin;
  });
  for (size_t i = 1; i < targets.size(); i++) {
    const Target &one = targets[i - 1], &other = targets[i];
    if (one.place != other.place || other.begin >= one.end) continue;
    throw std::invalid_argument("rows " + std::to_string(std::min(one.batch, other.batch)) + " and " +
                                std::to_string(std::max(one.batch, other.batch)) + " of the batch both append to key " +
                                std::to_string(other.begin) + " of " + (paged ? "page " : "row ") +
                                std::to_string(other.place) + " of the cache; nothing was written");
  }
}

int64_t bytes_of_dtype(const Tensor& tensor) {
  return tensor.dtype() == DType::float64 ? 8 : bytes_of(element_of(tensor));
}

void append_kv_cpu(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k, const Tensor& v,
                   const Tensor& lengths, const Tensor& block_table, const Tensor& batch_index) {
  require(k.dim() == 4 && v.dim() == 4, "append_kv: k and v must have 4 dimensions");
  const int64_t batch = k.size(0), new_keys = k.size(2);
  Places places(k_cache, v_cache, block_table, batch_index, batch);
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
  const Integers filled(lengths, 1, "append_kv: lengths must be int32 or int64");
  std::vector<int64_t> before(static_cast<size_t>(batch));
  for (int64_t b = 0; b < batch; b++) {
    const int64_t length = filled.at(b);
    if (length < 0) throw std::invalid_argument(element("lengths", b, length) + "expected 0 or more keys");
    if (length > places.capacity - new_keys) {
      throw std::invalid_argument(element("lengths", b, length) + "appending " + std::to_string(new_keys) +
                                  " keys exceeds the " + std::to_string(places.capacity) +
                                  " that a sequence can hold; nothing was written");
    }
    places.use(block_table, k_cache, b, length, length + new_keys);
    before[b] = length;
  }
  const int64_t bytes = bytes_of_dtype(k_cache);
  const AppendKv p{places.view, rows_of(k_cache), rows_of(v_cache), rows_of(k),        rows_of(v),        before.data(),
                   batch,       k_cache.size(1),  new_keys,         k.size(3) * bytes, v.size(3) * bytes, bytes};
  if (batch == 0 || new_keys == 0) return;
  require_apart(p, places.paged);
  append_kv(p, torch_threads());
}

std::tuple<Tensor, Tensor> decode_forward_cpu(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                              const Tensor& lengths, const Tensor& leftpad, const Tensor& block_table,
                                              const Tensor& batch_index, const Tensor& start, const Tensor& end,
                                              const Tensor& key_valid, const Tensor& dense, const Tensor& diagonal,
                                              const Tensor& alibi_slopes, const Tensor& sinks, double softmax_scale,
                                              double softcap) {
  require(q.dim() == 4 && last_is_contiguous(q), "decode: q must have 4 dimensions, the last one contiguous");
  const int64_t batch = q.size(0), heads = q.size(1), q_len = q.size(2);
  Places places(k_cache, v_cache, block_table, batch_index, batch);
  const int64_t kv_heads = k_cache.size(1);
  require(q.dtype() == k_cache.dtype(), "decode: q must have the dtype of the cache");
  require(q.size(3) == k_cache.size(3), "decode: q and the cache must have one head dimension");
  require(heads == 0 || (kv_heads > 0 && heads % kv_heads == 0),
          "decode: the heads of the cache must divide those of q");
  require(heads < INT32_MAX && q_len < INT32_MAX && (heads == 0 || q_len < INT32_MAX / heads),
          "decode: too many rows of q");

  require(lengths.dim() == 1 && lengths.size(0) == batch, "decode: lengths must have batch elements");
  const Integers filled(lengths, 1, "decode: lengths must be int32 or int64");
  std::vector<int32_t> length(static_cast<size_t>(batch)), first(static_cast<size_t>(batch), 0);
  for (int64_t b = 0; b < batch; b++) {
    const int64_t keys = filled.at(b);
    if (keys < 0 || keys > places.capacity) {
      throw std::invalid_argument(element("lengths", b, keys) + "expected 0 to " + std::to_string(places.capacity) +
                                  ", the keys that a sequence can hold");
    }
    length[b] = static_cast<int32_t>(keys);
    if (leftpad.numel() != 0) {
      require(leftpad.dim() == 1 && leftpad.size(0) == batch, "decode: leftpad must have batch elements");
      const int64_t skipped = Integers(leftpad, 1, "decode: leftpad must be int32 or int64").at(b);
      if (skipped < 0) throw std::invalid_argument(element("leftpad", b, skipped) + "expected 0 or more keys");
      first[b] = static_cast<int32_t>(std::min(skipped, keys));
    }
    places.use(block_table, k_cache, b, 0, keys);
  }

  DecodeForward p{};
  p.shape = {element_of(q),
             batch,
             heads,
             kv_heads,
             q_len,
             places.capacity,
             q.size(3),
             v_cache.size(3),
             static_cast<float>(softmax_scale),
             static_cast<float>(softcap)};
  p.at = places.view;
  p.first = first.data();
  p.length = length.data();
  p.spans.n_spans = 1;
  const auto fits = [&](int64_t size) { return size == 1 || size == batch; };
  if (start.dim() == 3) {
    const auto adjacent = [](const Tensor& tensor, int64_t d) { return tensor.size(d) <= 1 || tensor.stride(d) == 1; };
    require(end.dim() == 3 && key_valid.dim() == 2 && start.dtype() == DType::int32 && end.dtype() == DType::int32 &&
                key_valid.dtype() == DType::uint8,
            "decode: the spans must be int32 (spans, batch, q_len), key_valid uint8 (batch, keys)");
    require(start.size(0) >= 1 && fits(start.size(1)) && start.size(2) == q_len && key_valid.size(0) == start.size(1) &&
                key_valid.size(1) == places.capacity,
            "decode: the spans are for another shape");
    for (int64_t d = 0; d < 3; d++) {
      require(end.size(d) == start.size(d) && (start.size(d) <= 1 || start.stride(d) == end.stride(d)),
              "decode: start and end must agree");
    }
    require(adjacent(start, 2) && adjacent(key_valid, 1), "decode: the spans must be contiguous");
    require(start.size(0) < INT32_MAX, "decode: too many spans");
    p.spans.start = start.data<int32_t>();
    p.spans.end = end.data<int32_t>();
    p.spans.key_valid = key_valid.data<uint8_t>();
    p.spans.span_stride = start.stride(0);
    p.spans.batch_stride = start.size(1) == 1 ? 0 : start.stride(1);
    p.spans.key_valid_batch_stride = start.size(1) == 1 ? 0 : key_valid.stride(0);
    p.spans.n_spans = static_cast<int32_t>(start.size(0));
  }
  const auto step = [](const Tensor& tensor, int64_t d) { return tensor.size(d) == 1 ? 0 : tensor.stride(d); };
  if (dense.dim() == 4) {
    require(dense.dtype() == DType::boolean && fits(dense.size(0)) && (dense.size(1) == 1 || dense.size(1) == heads) &&
                dense.size(2) == q_len && dense.size(3) == places.capacity && last_is_contiguous(dense),
            "decode: dense must be bool (batch or 1, heads or 1, q_len, keys)");
    p.features.dense = {dense.data(), step(dense, 0), step(dense, 1), dense.stride(2), 1};
  }
  if (alibi_slopes.dim() == 2) {
    require(alibi_slopes.dtype() == DType::float32 && fits(alibi_slopes.size(0)) && alibi_slopes.size(1) == heads,
            "decode: alibi_slopes must be float32 (batch or 1, heads)");
    require(diagonal.dtype() == DType::int32 && diagonal.dim() == 2 && fits(diagonal.size(0)) &&
                diagonal.size(1) == q_len && (q_len <= 1 || diagonal.stride(1) == 1),
            "decode: the diagonal must be int32 (batch or 1, q_len)");
    p.features.alibi_slopes = {alibi_slopes.data<float>(), alibi_slopes.stride(0), alibi_slopes.stride(1),
                               alibi_slopes.size(0), false};
    p.features.positions = diagonal.data<int32_t>();
    p.features.positions_batch_stride = step(diagonal, 0);
  }
  if (sinks.numel() != 0) {
    require(sinks.dtype() == DType::float32 && sinks.dim() == 1 && sinks.size(0) == heads,
            "decode: sinks must be float32 (heads)");
    p.features.sinks = {sinks.data<float>(), 0, sinks.stride(0), 1, false};
  }

  Tensor out = empty_in_order_of(q, p.shape.value_dim);
  Tensor lse = Tensor::empty({batch, heads, q_len}, DType::float32);
  p.q = rows_of(q);
  p.k = rows_of(k_cache);
  p.v = rows_of(v_cache);
  p.out = rows_of(out);
  p.lse = lse.data<float>();
  if (batch > 0 && heads > 0 && q_len > 0) cache_forward(p, torch_threads());
  return {std::move(out), std::move(lse)};
}

const bool registered = [] {
  static OperatorLibrary library("maskops", "CPU");
  library.implement<&append_kv_cpu>("append_kv");
  library.implement<&decode_forward_cpu>("decode_forward");
  return true;
}();

}  // namespace
}  // namespace maskops
