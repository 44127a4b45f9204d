// Bindings of the cache of keys and values.
#include "decode.h"

#include <cmath>
#include <iterator>
#include <string>
#include <tuple>
#include <vector>

#include "../cpu/decode.h"
#include "../decode.h"

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
  CacheSizes sizes;
  std::vector<int32_t> place;
  CachePlaces view;

  Places(const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_table, const Tensor& batch_index,
         int64_t batch)
      : sizes(cache_sizes(k_cache, v_cache, block_table, batch_index, batch)) {
    place.assign(static_cast<size_t>(batch * sizes.places), -1);
    if (!sizes.is_paged) {
      if (batch_index.numel() == 0) {
        for (int64_t b = 0; b < batch; b++) place[b] = static_cast<int32_t>(b);
      } else {
        const Integers index(batch_index, 1, "decode: batch_index must be int32 or int64");
        for (int64_t b = 0; b < batch; b++) {
          const int64_t row = index.at(b);
          if (row < 0 || row >= sizes.rows) {
            throw std::invalid_argument(element("batch_index", b, row) + "expected 0 to " +
                                        std::to_string(sizes.rows - 1) + ", a row of the cache");
          }
          place[b] = static_cast<int32_t>(row);
        }
      }
    }
    view = {place.data(), sizes.places, sizes.page_size};
  }

  // Reads the pages that hold the keys [begin, end) of a sequence.
  void use(const Tensor& block_table, int64_t batch, int64_t begin, int64_t end) {
    if (!sizes.is_paged || begin >= end) return;
    const Integers table(block_table, 2, "decode: block_table must be int32 or int64");
    const int64_t pages = sizes.rows;
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

void append_kv_cpu(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k, const Tensor& v,
                   const Tensor& lengths, const Tensor& block_table, const Tensor& batch_index) {
  require(k.dim() == 4 && v.dim() == 4, "append_kv: k and v must have 4 dimensions");
  const int64_t batch = k.size(0), new_keys = k.size(2);
  Places places(k_cache, v_cache, block_table, batch_index, batch);
  check_new_keys(k_cache, v_cache, k, v, lengths);
  const Integers filled(lengths, 1, "append_kv: lengths must be int32 or int64");
  std::vector<int64_t> before(static_cast<size_t>(batch));
  for (int64_t b = 0; b < batch; b++) {
    const int64_t length = filled.at(b);
    if (length < 0) throw std::invalid_argument(element("lengths", b, length) + "expected 0 or more keys");
    if (length > places.sizes.capacity - new_keys) {
      throw std::invalid_argument(element("lengths", b, length) + "appending " + std::to_string(new_keys) +
                                  " keys exceeds the " + std::to_string(places.sizes.capacity) +
                                  " that a sequence can hold; nothing was written");
    }
    places.use(block_table, b, length, length + new_keys);
    before[b] = length;
  }
  const int64_t bytes = bytes_of_dtype(k_cache);
  const AppendKv p{places.view, rows_of(k_cache), rows_of(v_cache), rows_of(k),        rows_of(v),        before.data(),
                   batch,       k_cache.size(1),  new_keys,         k.size(3) * bytes, v.size(3) * bytes, bytes};
  if (batch == 0 || new_keys == 0) return;
  require_apart(p, places.sizes.is_paged);
  append_kv(p, torch_threads());
}

// The output; `lse` has room for one float a row of q, which has 4 dimensions.
Tensor decode(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& lengths,
              const Tensor& leftpad, const Tensor& block_table, const Tensor& batch_index, const Tensor& start,
              const Tensor& end, const Tensor& key_valid, const Tensor& dense, const Tensor& diagonal,
              const Tensor& alibi_slopes, const Tensor& sinks, double softmax_scale, double softcap, float* lse) {
  require(last_is_contiguous(q), "decode: the last dimension of q must be contiguous");
  const int64_t batch = q.size(0);
  Places places(k_cache, v_cache, block_table, batch_index, batch);
  const AttentionShape shape = decode_shape(q, k_cache, v_cache, places.sizes.capacity, softmax_scale, softcap);
  require(lengths.dim() == 1 && lengths.size(0) == batch, "decode: lengths must have batch elements");
  const Integers filled(lengths, 1, "decode: lengths must be int32 or int64");
  std::vector<int32_t> length(static_cast<size_t>(batch)), first(static_cast<size_t>(batch), 0);
  for (int64_t b = 0; b < batch; b++) {
    const int64_t keys = filled.at(b);
    if (keys < 0 || keys > places.sizes.capacity) {
      throw std::invalid_argument(element("lengths", b, keys) + "expected 0 to " +
                                  std::to_string(places.sizes.capacity) + ", the keys that a sequence can hold");
    }
    length[b] = static_cast<int32_t>(keys);
    if (leftpad.numel() != 0) {
      require(leftpad.dim() == 1 && leftpad.size(0) == batch, "decode: leftpad must have batch elements");
      const int64_t skipped = Integers(leftpad, 1, "decode: leftpad must be int32 or int64").at(b);
      if (skipped < 0) throw std::invalid_argument(element("leftpad", b, skipped) + "expected 0 or more keys");
      first[b] = static_cast<int32_t>(std::min(skipped, keys));
    }
    places.use(block_table, b, 0, keys);
  }

  DecodeForward p{};
  p.shape = shape;
  p.spans = decode_spans<Spans>(shape, start, end, key_valid);
  p.features = decode_features<Features>(shape, dense, diagonal, alibi_slopes, sinks);
  p.at = places.view;
  p.first = first.data();
  p.length = length.data();

  Tensor out = empty_in_order_of(q, shape.value_dim);
  p.q = rows_of(q);
  p.k = rows_of(k_cache);
  p.v = rows_of(v_cache);
  p.out = rows_of(out);
  p.lse = lse;
  if (has_work(shape)) cache_forward(p, torch_threads());
  return out;
}

std::tuple<Tensor, Tensor> decode_forward_cpu(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                              const Tensor& lengths, const Tensor& leftpad, const Tensor& block_table,
                                              const Tensor& batch_index, const Tensor& start, const Tensor& end,
                                              const Tensor& key_valid, const Tensor& dense, const Tensor& diagonal,
                                              const Tensor& alibi_slopes, const Tensor& sinks, double softmax_scale,
                                              double softcap) {
  require(q.dim() == 4, "decode: q must have 4 dimensions");
  Tensor lse = Tensor::empty({q.size(0), q.size(1), q.size(2)}, DType::float32);
  Tensor out = decode(q, k_cache, v_cache, lengths, leftpad, block_table, batch_index, start, end, key_valid, dense,
                      diagonal, alibi_slopes, sinks, softmax_scale, softcap, lse.data<float>());
  return {std::move(out), std::move(lse)};
}

// The same for queries that see their whole sequence, in a cache without pages, and nothing else. NaN is the default
// scale: each argument, and what Python computes of one, costs a good part of a small problem.
std::tuple<Tensor> decode_direct_cpu(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                     const Tensor& lengths, double softmax_scale) {
  static const Tensor& nothing = *new Tensor(Tensor::empty({0}, DType::float32));  // outlives torch's own end
  require(q.dim() == 4 && q.size(3) > 0 && k_cache.dim() == 4 && k_cache.size(0) == q.size(0),
          "decode: q and the caches must have 4 dimensions and one batch");
  if (std::isnan(softmax_scale)) softmax_scale = 1.0 / std::sqrt(static_cast<double>(q.size(3)));
  const auto attend = [&](float* lse) {
    return decode(q, k_cache, v_cache, lengths, nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing,
                  nothing, nothing, softmax_scale, 0.0, lse);
  };
  const int64_t rows = q.numel() / q.size(3);
  float few[1 << 8];  // uninitialised: a tensor takes longer than they do
  if (rows <= static_cast<int64_t>(std::size(few))) return {attend(few)};
  std::vector<float> many(static_cast<size_t>(rows));
  return {attend(many.data())};
}

const bool registered = [] {
  static OperatorLibrary library("maskops", "CPU");
  library.implement<&append_kv_cpu>("append_kv");
  library.implement<&decode_forward_cpu>("decode_forward");
  library.implement<&decode_direct_cpu>("decode_direct");
  return true;
}();

}  // namespace
}  // namespace maskops
