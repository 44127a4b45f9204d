// The cache of keys and values on the CPU: what ops/decode.cpp calls, and what the schedule (decode.cpp) hands to the
// arithmetic (decode*.inc, once per instruction set).
#pragma once

#include "../decode.h"
#include "threads.h"

namespace maskops {

void append_kv(const AppendKv& p, const Threads& threads);
// Attention over a cache, by whichever kernel suits the shape.
void cache_forward(const DecodeForward& p, const Threads& threads);
// Few rows over many keys, which is what decode_forward is for. A matter of shapes alone.
bool suits_decode(const AttentionShape& shape);
void decode_forward(const DecodeForward& p, const Threads& threads);
// Many rows: gathers pages and runs the kernel of span attention.
void prefill_forward(const DecodeForward& p, const Threads& threads);

// Whether decode_forward computes a call of span attention, and as what.
bool decode_serves(const AttentionForward& p);
DecodeForward decode_of(const AttentionForward& p);

// Keys that meet the rows of a task at a time.
constexpr int DECODE_KEYS = 64;
// Keys are cut into tasks at multiples of this: enough tasks for many threads, each long enough to cost more than its
// merge.
constexpr int DECODE_TASK_KEYS = 512;
// Rows that keep their queries and accumulators in fast memory at a time.
constexpr int DECODE_ROWS = 64;

// The keys [key_begin, key_end) of one sequence and key head against the rows [row_begin, row_end): row r is query r /
// group of head r % group of the group that shares the key head.
struct DecodeTask {
  int32_t batch, kv_head, row_begin, row_end, key_begin, key_end;
  // Where several tasks share the keys of these rows: the maximum, the sum and the accumulator of each row, merged
  // afterwards in the order of the keys. nullptr where the task writes the output itself.
  float* partial;
};

}  // namespace maskops
