// What the bindings of attention on the processor share: plans whose values are read before a kernel does.
#pragma once

#include <cstring>

#include "attention.h"

namespace maskops {

inline Spans spans_of(const AttentionShape& shape, const SpanTensors& plan) {
  auto spans = planned_spans<Spans>(shape, plan);
  const int64_t plan_batch = spans.plan_batch;
  spans.n_tiles = *plan.tile_count.data<int32_t>();
  require(0 <= spans.n_tiles && spans.n_tiles <= plan.tiles.size(0), "attention: tile_count exceeds the work list");
  int32_t batch = 0, row = 0;  // the list must cover every row once, in order: each row's output is written by its tile
  for (int64_t tile = 0; tile < spans.n_tiles; tile++) {
    const int32_t* item = spans.tiles + tile * spans.tile_width;
    while (batch < item[0] && row == shape.q_len) {
      batch++;
      row = 0;
    }
    require(item[0] == batch && item[1] == row && 1 <= item[2] && item[2] <= tile_rows && item[2] <= shape.q_len - row,
            "attention: the work list does not cover the rows of q in order");
    row += item[2];
  }
  require(plan_batch == 0 || shape.q_len == 0 || (batch == plan_batch - 1 && row == shape.q_len),
          "attention: the work list does not cover the rows of q");
  return spans;
}

inline void clear(const Tensor& gradient) {
  const int64_t elements = gradient.numel();
  if (elements != 0) std::memset(gradient.data(), 0, elements * bytes_of(gradient.dtype()));
}

}  // namespace maskops
