// Span attention on the CPU: what ops/attention.cpp calls, and what the schedule (attention.cpp) hands to the
// arithmetic (attention_*.inc, once per instruction set).
#pragma once

#include "../attention.h"
#include "threads.h"

namespace maskops {

void attention_forward(const AttentionForward& p, const Threads& threads);
void attention_backward(const AttentionBackward& p, const Threads& threads);

// Query rows x heads of one GQA group that a task keeps in fast memory at a time.
constexpr int BLOCK_LANES = 128;
// Keys that meet them at a time.
constexpr int BLOCK_KEYS = 64;

// Lanes [lane_begin, lane_end) of `rows` query rows from first_row on: lane l is row l / group, head l % group of the
// group that shares one key head. Row-major, so that the key limits of neighbouring lanes stay close.
struct LaneBlock {
  int32_t batch, kv_head, first_row, rows, lane_begin, lane_end;
};

// One task of the backward pass owns the key rows [key_begin, key_end) of a (batch, key head) for a run of tiles.
struct BackwardTask {
  int32_t batch, kv_head, tile_begin, tile_end, key_begin, key_end;
  // Keys before key_begin that belong to nobody and get a gradient of zero, from zero_begin on; likewise up to
  // zero_end.
  int32_t zero_begin, zero_end;
  // Where several tasks own the same keys: their sums, (key_end - key_begin) x padded widths, added up afterwards in a
  // fixed order. nullptr where the task owns its keys alone and writes the gradients itself.
  float* partial;
};

}  // namespace maskops
