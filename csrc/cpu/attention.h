// Span attention on the CPU: what ops/attention.cpp calls, and what the schedule (attention.cpp) hands to the
// arithmetic (attention_*.inc, once per instruction set).
#pragma once

#include <atomic>

#include "../attention.h"
#include "threads.h"

namespace maskops {

void attention_forward(const AttentionForward& p, const Threads& threads);
void attention_backward(const AttentionBackward& p, const Threads& threads);
// The schedules of attention_backward for the gradients of what is broadcast (attention_gradients.cpp).
void attention_bias_gradient(const AttentionBackward& p, double flops, const Threads& threads);
void clear_bias_gradient(const AttentionBackward& p, const Threads& threads);
void sum_row_gradients(const AttentionBackward& p);

// Workers that a call of so many floating-point operations keeps busy.
int useful_workers(const Threads& threads, double flops, int64_t n_tasks);

// Query rows x heads of one GQA group that a task keeps in fast memory at a time.
constexpr int BLOCK_LANES = 128;
// Keys that meet them at a time.
constexpr int BLOCK_KEYS = 64;

// Lanes [lane_begin, lane_end) of `rows` query rows from first_row on: lane l is row l / group, head l % group of the
// group that shares one key head, for each of the key heads [kv_head, kv_head_end). Row-major, so that the key limits
// of neighbouring lanes stay close.
struct LaneBlock {
  int32_t batch, kv_head, kv_head_end, first_row, rows, lane_begin, lane_end;
  int32_t key_begin = 0, key_end = INT32_MAX;  // no other keys count
  // Where other tasks have the other keys, and the block has one key head: 2 + value_dim floats for each lane, the
  // maximum and the sum of its weights so far and the values that they weigh. nullptr where the task has all keys and
  // writes the output itself.
  float* partial = nullptr;
};
// The most parts that a block's keys are cut into.
constexpr int MOST_KEY_PARTS = 256;

// Keys whose gradients the tasks of a long sequence add to in turns.
constexpr int TURN_KEYS = 64;

// The link, from 1 on, of the last task that has added its part to these keys.
struct alignas(64) Turn {
  std::atomic<int32_t> passed{0};
};

// The turns [begin, end) that one task of a sequence takes, and hulls of those of all tasks before and after it.
struct Link {
  int32_t begin, end, before_begin, before_end, after_begin, after_end;
};

// One task of the backward pass: the lanes [lane_begin, lane_end) of tiles, the last tile first, and the keys
// [key_begin, key_end) that they see, for the key heads [kv_head, kv_head_end) of a batch element.
struct BackwardTask {
  int32_t batch, kv_head, kv_head_end, tile_begin, tile_end, lane_begin, lane_end, key_begin, key_end;
  // Keys before key_begin that belong to nobody and get a gradient of zero, from zero_begin on; likewise up to
  // zero_end.
  int32_t zero_begin, zero_end;
  // Where other tasks add to the same keys, one head and one block of lanes: the sums of the keys [sums_begin,
  // sums_end), dK and then dV with padded widths, or nullptr where the gradients themselves hold them; a turn for each
  // TURN_KEYS of the keys, and the links of all these tasks. No turns where the task owns its keys alone.
  float* sums;
  int32_t sums_begin, sums_end;
  Turn* turns;
  const Link* links;
  int32_t link, n_links;
};

// Waits until it is the task's turn to add to keys; true where none comes before it.
bool take_turn(const BackwardTask& task, int32_t turn);
// Whether no task comes after this one.
bool is_last_turn(const BackwardTask& task, int32_t turn);
void pass_turn(const BackwardTask& task, int32_t turn);

// One task of the gradient of a broadcast bias owns the piece of it that belongs to these batch elements, key heads,
// rows and keys: all of them along a dimension of size 1.
struct BiasTask {
  int32_t batch_begin, batch_end, kv_head_begin, kv_head_end, row_begin, row_end, key_begin, key_end;
};

// Which of the outer numbers of ALiBi's slopes a row takes: those of its batch element or sequence, or the shared ones.
// Rows outside every sequence have the ordinal -1.
inline int64_t slopes_of_row(const Features& features, int64_t batch, int64_t row) {
  const PerHead& slopes = features.alibi_slopes;
  if (slopes.outer == 1) return 0;
  if (!slopes.by_sequence) return batch;
  const int64_t ordinal =
      features.positions[batch * features.positions_batch_stride + 2 * features.positions_stride + row];
  return ordinal < 0 ? 0 : ordinal < slopes.outer ? ordinal : slopes.outer - 1;
}

// A tile of the plan: batch element, first row, rows, cost, then the limits of its spans.
inline const int32_t* tile_at(const Spans& spans, int64_t tile) { return spans.tiles + tile * spans.tile_width; }

// The hull of the keys that a tile sees: begin >= end where it sees none.
inline void keys_of_tile(const Spans& spans, int64_t tile, int32_t k_len, int32_t& begin, int32_t& end) {
  const int32_t* item = tile_at(spans, tile);
  begin = k_len;
  end = 0;
  for (int s = 0; s < spans.n_spans; s++) {
    const int32_t lo = item[4 + 4 * s] > 0 ? item[4 + 4 * s] : 0;
    const int32_t hi = item[4 + 4 * s + 3] < k_len ? item[4 + 4 * s + 3] : k_len;
    if (lo >= hi) continue;
    if (lo < begin) begin = lo;
    if (hi > end) end = hi;
  }
}

// Query rows that a block of lanes holds.
inline int32_t rows_of_block(const AttentionShape& shape) {
  const int64_t rows = BLOCK_LANES * shape.kv_heads / shape.heads;
  return rows > 1 ? static_cast<int32_t>(rows) : 1;
}

}  // namespace maskops
