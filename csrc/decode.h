// Plain parameters of a cache of keys and values, and of attention over it: no torch, host and device. Key j of
// sequence b lies in row or page place[b * places + j / page_size] of the cache, at j % page_size. See
// maskops/ops/decode/reference.py.
#pragma once

#include <cstdint>

#include "attention.h"
#include "element.h"

namespace maskops {

// Where the keys of each sequence are. Every place that holds one of the keys in use is inside the cache; the others
// are never looked at.
struct CachePlaces {
  const int32_t* place;  // (batch, places): rows of a contiguous cache, or pages; nullptr: row b for sequence b
  int64_t places;        // of a sequence; 1 in a contiguous cache
  int64_t page_size;     // keys of a page, or the capacity of a contiguous cache
};

struct AppendKv {
  CachePlaces at;
  StridedRows k_cache, v_cache, k, v;  // batch stride of a cache: from one row or page to the next
  const int64_t* lengths;              // (batch): keys before the call
  int64_t batch, kv_heads, new_keys, key_bytes, value_bytes, element_bytes;
};

// Row i of sequence b attends to the keys j with first[b] <= j < length[b] that its spans allow; nullptr stands for 0
// and for all the keys that a sequence can hold.
struct DecodeForward {
  AttentionShape shape;  // k_len: the keys that a sequence can hold
  Spans spans;           // start is nullptr where every row sees every key in use; the work list is not read
  CachePlaces at;
  const int32_t* first;
  const int32_t* length;
  Features features;  // no bias, no dropout
  StridedRows q, k, v, out;
  float* lse;  // (batch, heads, q_len)

  int32_t begin_of(int64_t b) const { return first == nullptr || first[b] < 0 ? 0 : first[b]; }
  int32_t end_of(int64_t b) const {
    const auto most = static_cast<int32_t>(shape.k_len);
    return length == nullptr || length[b] > most ? most : length[b];
  }
  int64_t place_of(int64_t b, int64_t index) const { return at.place == nullptr ? b : at.place[b * at.places + index]; }
};

}  // namespace maskops
