// Many queries over a cache: the kernel of span attention, over gathered pages.
#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "../plan.h"
#include "attention.h"
#include "decode.h"

namespace maskops {
namespace {

// A cache (batch, kv_heads, k_len, width) of its own, of which only the keys in use are written.
struct Gathered {
  std::unique_ptr<char[]> memory;
  StridedRows rows;
  int64_t width, element_bytes;

  Gathered(const DecodeForward& p, int64_t k_len, int64_t width)
      : width(width), element_bytes(bytes_of(p.shape.element)) {
    int64_t bytes = element_bytes;
    for (const int64_t size : {p.shape.batch, p.shape.kv_heads, k_len, width}) {
      // Expanded tensors can ask for more than addresses can count.
      if (__builtin_mul_overflow(bytes, size, &bytes)) throw std::bad_alloc();
    }
    memory.reset(new char[static_cast<size_t>(std::max<int64_t>(bytes, 1))]);
    rows = {memory.get(), p.shape.kv_heads * k_len * width, k_len * width, width};
  }

  void copy(const DecodeForward& p, const StridedRows& cache, int64_t batch, int64_t head) {
    if (width == 0) return;  // there is no memory, not even of no bytes
    const int64_t end = p.end_of(batch), page_size = p.at.page_size;
    for (int64_t key = p.begin_of(batch); key < end;) {
      const int64_t slot = key % page_size, n = std::min(end - key, page_size - slot);
      const char* source =
          static_cast<const char*>(cache.data) + (p.place_of(batch, key / page_size) * cache.batch_stride +
                                                  head * cache.head_stride + slot * cache.row_stride) *
                                                     element_bytes;
      char* target = static_cast<char*>(rows.data) +
                     (batch * rows.batch_stride + head * rows.head_stride + key * width) * element_bytes;
      for (int64_t i = 0; i < n; i++) {
        std::memcpy(target + i * width * element_bytes, source + i * cache.row_stride * element_bytes,
                    static_cast<size_t>(width * element_bytes));
      }
      key += n;
    }
  }
};

// The spans of every sequence, cut to the keys that it has, with a plain grid of tiles.
struct CutSpans {
  std::vector<int32_t> start, end, tiles;
  std::vector<uint8_t> key_valid;
  Spans view{};

  CutSpans(const DecodeForward& p, int64_t k_len) {
    const int64_t batch = p.shape.batch, q_len = p.shape.q_len, n_spans = p.spans.n_spans, rows = batch * q_len;
    start.assign(static_cast<size_t>(n_spans * rows), 0);
    end.assign(static_cast<size_t>(n_spans * rows), 0);
    for (int64_t s = 0; s < n_spans; s++) {
      for (int64_t b = 0; b < batch; b++) {
        for (int64_t row = 0; row < q_len; row++) {
          int32_t lo = p.begin_of(b), hi = p.end_of(b);
          if (p.spans.start != nullptr) {
            const int64_t at = s * p.spans.span_stride + b * p.spans.batch_stride + row;
            lo = std::max(lo, p.spans.start[at]);
            hi = std::min(hi, p.spans.end[at]);
          }
          if (lo >= hi) continue;
          start[s * rows + b * q_len + row] = lo;
          end[s * rows + b * q_len + row] = hi;
        }
      }
    }
    const auto width = static_cast<int32_t>(4 + 4 * n_spans);
    for (int64_t b = 0; b < batch; b++) {
      for (int64_t row = 0; row < q_len; row += tile_rows) {
        const int64_t n = std::min<int64_t>(tile_rows, q_len - row);
        const size_t item = tiles.size();
        tiles.resize(item + static_cast<size_t>(width), 0);
        int64_t cost = 0;
        for (int64_t s = 0; s < n_spans; s++) {
          int32_t lo = INT32_MAX, hi = 0;
          for (int64_t i = s * rows + b * q_len + row, last = i + n; i < last; i++) {
            cost += end[i] - start[i];
            if (start[i] >= end[i]) continue;
            lo = std::min(lo, start[i]);
            hi = std::max(hi, end[i]);
          }
          if (hi == 0) continue;
          const int32_t bounds[4] = {lo, hi, hi, hi};  // no run of keys is declared free of masking
          std::copy(bounds, bounds + 4, tiles.begin() + static_cast<int64_t>(item) + 4 + 4 * s);
        }
        tiles[item] = static_cast<int32_t>(b);
        tiles[item + 1] = static_cast<int32_t>(row);
        tiles[item + 2] = static_cast<int32_t>(n);
        tiles[item + 3] = static_cast<int32_t>(std::min<int64_t>(cost, INT32_MAX));
      }
    }
    view.start = start.data();
    view.end = end.data();
    view.tiles = tiles.data();
    view.span_stride = rows;
    view.batch_stride = q_len;
    view.n_spans = static_cast<int32_t>(n_spans);
    view.n_tiles = static_cast<int32_t>(tiles.size() / static_cast<size_t>(width));
    view.tile_width = width;
    view.plan_batch = static_cast<int32_t>(batch);
    view.key_valid = p.spans.key_valid;
    view.key_valid_batch_stride = p.spans.key_valid_batch_stride;
    if (view.key_valid == nullptr) {
      key_valid.assign(static_cast<size_t>(std::max<int64_t>(k_len, 1)), 1);
      view.key_valid = key_valid.data();
      view.key_valid_batch_stride = 0;
    }
  }
};

}  // namespace

void prefill_forward(const DecodeForward& p, const Threads& threads) {
  bool in_place = p.at.places == 1;
  int32_t longest = 0;
  for (int64_t b = 0; b < p.shape.batch; b++) {
    in_place = in_place && p.place_of(b, 0) == b;
    longest = std::max(longest, p.end_of(b));
  }
  AttentionForward attention{};
  attention.shape = p.shape;
  attention.shape.k_len = longest;
  attention.features = p.features;
  attention.q = p.q;
  attention.k = p.k;
  attention.v = p.v;
  attention.out = p.out;
  attention.lse = p.lse;
  std::unique_ptr<Gathered> keys, values;
  if (!in_place) {
    keys = std::make_unique<Gathered>(p, longest, p.shape.head_dim);
    values = std::make_unique<Gathered>(p, longest, p.shape.value_dim);
    attention.k = keys->rows;
    attention.v = values->rows;
    struct Context {
      const DecodeForward& p;
      Gathered &keys, &values;
    } context{p, *keys, *values};
    threads.run(
        p.shape.batch * p.shape.kv_heads, threads.count,
        [](int64_t task, int, void* pointer) {
          auto& context = *static_cast<Context*>(pointer);
          const int64_t batch = task / context.p.shape.kv_heads, head = task % context.p.shape.kv_heads;
          context.keys.copy(context.p, context.p.k, batch, head);
          context.values.copy(context.p, context.p.v, batch, head);
        },
        &context);
  }
  const CutSpans spans(p, longest);
  attention.spans = spans.view;
  attention_forward(attention, threads);
}

}  // namespace maskops
