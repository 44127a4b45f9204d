// Layouts and bounds: the sequence and the spans of every row of a window, evaluated from the operands alone.
#pragma once

#include "plan_block.cuh"

namespace maskops {
namespace plan_kernels {

// ---- layouts: the sequence of a row ----

__device__ inline int64_t read(const DevicePlanOperand& operand, int64_t at) {
  if (operand.bytes == 1) return static_cast<const uint8_t*>(operand.data)[at];
  if (operand.bytes == 4) return static_cast<const int32_t*>(operand.data)[at];
  return static_cast<const int64_t*>(operand.data)[at];
}

__device__ inline int clamped(int64_t value, int64_t low, int64_t high) {
  return static_cast<int>(value < low ? low : value > high ? high : value);
}

__device__ inline int row_of(const DevicePlanOperand& operand, int b) { return operand.rows == 1 ? 0 : b; }

__device__ inline bool is_mask(const DevicePlanLayout& layout) {
  return layout.kind == Kind::padding_mask || layout.kind == Kind::key_mask;
}

__device__ inline bool mask_bit(const DevicePlan& p, const DevicePlanLayout& layout, int b, int place) {
  const DevicePlanOperand& mask = p.operands[layout.operand];
  return read(mask, static_cast<int64_t>(row_of(mask, b)) * p.k_len + place) != 0;
}

struct Place {
  bool inside, sees;
  int k_start, k_end, diag, ordinal;
};

struct Keys {
  int q_start, q_end, k_start, k_end, ordinal;
};

__device__ inline Keys of_cu_seqlens(const DevicePlan& p, const DevicePlanLayout& layout, int row) {
  const DevicePlanOperand &queries = p.operands[layout.operand], &keys = p.operands[layout.keys];
  int low = 0, high = queries.rows;
  while (low < high) {  // how many elements are at most row
    const int middle = (low + high) / 2;
    if (read(queries, middle) <= row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  const int index = low - 1;
  if (index < 0 || index + 1 >= queries.rows) return {0, 0, 0, 0, 0};
  const int k_start = clamped(read(keys, index), 0, p.k_len);
  return {clamped(read(queries, index), 0, p.q_len), clamped(read(queries, index + 1), 0, p.q_len), k_start,
          clamped(read(keys, index + 1), k_start, p.k_len), index};
}

// Whether a document, or padding, begins at a place of one row of ids; so does what lies behind the row.
__device__ inline bool begins(const DevicePlan& p, const DevicePlanOperand& ids, int64_t base, int place) {
  if (place < 0 || place > p.q_len) return false;
  return place == 0 || place == p.q_len || read(ids, base + place) != read(ids, base + place - 1);
}

// Documents that begin before flat place `stop` of the ids, for all threads of the block.
__device__ inline int documents_before(const DevicePlan& p, const DevicePlanOperand& ids, int64_t stop) {
  int count = 0, total;
  for (int64_t at = threadIdx.x; at < stop; at += blockDim.x) {
    const int place = static_cast<int>(at % p.q_len);
    count += begins(p, ids, at - place, place) && read(ids, at) >= 0;
  }
  block_scan(count, total);
  return total;
}

// All threads of the block call it, for a window of rows that begins at first_row. `list` has room for one each.
__device__ inline Keys of_ids(const DevicePlan& p, const DevicePlanLayout& layout, int b, int first_row, int* list) {
  const DevicePlanOperand& ids = p.operands[layout.operand];
  const int threads = static_cast<int>(blockDim.x), row = first_row + static_cast<int>(threadIdx.x);
  const int64_t base = static_cast<int64_t>(row_of(ids, b)) * p.q_len;
  const bool is_first = begins(p, ids, base, row);
  const bool inside = row >= 0 && row < p.q_len && read(ids, base + row) >= 0;
  int in_window, counted;
  const int count = block_scan(is_first, in_window);
  if (is_first) list[count - 1] = row;
  __syncthreads();
  int start = count > 0 ? list[count - 1] : -1;
  int end = count < in_window ? list[count] : -1;
  __syncthreads();
  // The document in which the window begins may have begun, and that in which it ends may end, far outside of it.
  int began = -1, ends = -1;
  for (int at = first_row; began < 0 && at > 0;) {
    at -= threads;
    const int place = at + static_cast<int>(threadIdx.x);
    began = block_max(begins(p, ids, base, place) ? place : -1);
  }
  for (int at = first_row + threads; ends < 0 && at <= p.q_len; at += threads) {
    const int place = at + static_cast<int>(threadIdx.x);
    const int nearest = block_min(begins(p, ids, base, place) ? place : FAR);
    ends = nearest == FAR ? -1 : nearest;
  }
  if (start < 0) start = began;
  if (end < 0) end = ends;
  int ordinal = 0;
  if (p.reads_ordinals) {
    ordinal = documents_before(p, ids, base + (first_row > 0 ? first_row : 0));
    if (ids.rows == 1) ordinal += b * documents_before(p, ids, p.q_len);
    ordinal += block_scan(is_first && inside, counted) - 1;
  }
  if (!inside) return {0, 0, 0, 0, ordinal};
  return {start, end, start, end, ordinal};
}

// All layouts of a row intersected; called by all threads of the block. `hulls`: first and end of the 1s of each mask.
__device__ inline Place place_of(const DevicePlan& p, int b, int first_row, const int* hulls, int* list) {
  const int row = first_row + static_cast<int>(threadIdx.x);
  const bool real = row >= 0 && row < p.q_len;
  int q_start = 0, q_end = p.q_len, k_start = 0, k_end = p.k_len, ordinal = b;
  bool sees = real;
  const auto intersect = [&](int q_from, int q_to, int k_from, int k_to) {
    q_start = max(q_start, q_from);
    q_end = min(q_end, q_to);
    k_start = max(k_start, k_from);
    k_end = min(k_end, k_to);
  };
  for (int index = 0; index < p.n_layouts; index++) {
    const DevicePlanLayout& layout = p.layouts[index];
    const DevicePlanOperand& operand = p.operands[layout.operand];
    switch (layout.kind) {
      case Kind::key_length: intersect(0, p.q_len, 0, layout.length); break;
      case Kind::cu_seqlens:
      case Kind::ids: {
        const Keys keys =
            layout.kind == Kind::ids ? of_ids(p, layout, b, first_row, list) : of_cu_seqlens(p, layout, row);
        intersect(keys.q_start, keys.q_end, keys.k_start, keys.k_end);
        if (layout.counts) ordinal = keys.ordinal;
        break;
      }
      case Kind::padding_mask:
        intersect(hulls[2 * index], hulls[2 * index + 1], hulls[2 * index], hulls[2 * index + 1]);
        sees = sees && mask_bit(p, layout, b, row);
        break;
      case Kind::key_mask: intersect(0, p.q_len, hulls[2 * index], hulls[2 * index + 1]); break;
      default: {
        const int length = operand.rows > 0 ? clamped(read(operand, row_of(operand, b)), 0, p.k_len) : 0;
        if (layout.kind == Kind::padding_right) intersect(0, length, 0, length);
        if (layout.kind == Kind::padding_left) intersect(p.k_len - length, p.q_len, p.k_len - length, p.k_len);
        if (layout.kind == Kind::key_lengths) intersect(0, p.q_len, 0, length);
      }
    }
  }
  const bool inside = real && row >= q_start && row < q_end;
  if (!inside) return {false, false, 0, 0, 0, ordinal};
  k_end = max(k_end, k_start);
  return {true, sees, k_start, k_end, k_end - q_end + row, ordinal};
}

// ---- bounds: the spans of a row, disjoint and sorted ----

struct Spans {
  int start[PLAN_SPANS], end[PLAN_SPANS];
  int first, last;  // hull: FAR and 0 where the row sees nothing
};

__device__ inline int bound_value(const DevicePlan& p, const DevicePlanStep& step, const Place& at) {
  const int64_t farthest = static_cast<int64_t>(p.q_len) + p.k_len + 1;
  switch (step.op) {
    case Op::first: return at.k_start;
    case Op::last: return at.k_end;
    case Op::diag: return at.diag + step.value;
    case Op::prefix: return at.k_start + step.value;
    case Op::prefix_of: {
      const DevicePlanOperand& lengths = p.operands[step.value];
      if (lengths.rows <= 0) return at.k_start;
      return at.k_start + clamped(read(lengths, clamped(at.ordinal, 0, lengths.rows - 1)), -farthest, farthest);
    }
    default: {
      const int place = at.diag - at.k_start;
      const int chunk = place / step.value - (place % step.value < 0);
      return at.k_start + (step.op == Op::chunk_start ? chunk : chunk + 1) * step.value;
    }
  }
}

__device__ inline void find_spans(const DevicePlan& p, const Place& at, Spans& spans) {
  int stack[PLAN_DEPTH], step = 0;
  for (int span = 0; span < p.n_spans; span++) {
    int depth = 0;
    for (; step < p.span_ends[span]; step++) {
      const DevicePlanStep& one = p.steps[step];
      if (one.op == Op::maximum || one.op == Op::minimum) {
        depth--;
        const int left = stack[depth - 1], right = stack[depth];
        stack[depth - 1] = one.op == Op::maximum ? max(left, right) : min(left, right);
      } else {
        stack[depth++] = bound_value(p, one, at);
      }
    }
    const int start = min(max(stack[0], at.k_start), at.k_end), end = min(max(stack[1], start), at.k_end);
    // Into its place among those before it.
    int slot = span;
    const int new_start = at.sees ? start : 0, new_end = at.sees ? end : 0;
    for (; slot > 0; slot--) {
      const int other = spans.start[slot - 1];
      if (other < new_start || (other == new_start && spans.end[slot - 1] <= new_end)) break;
      spans.start[slot] = other;
      spans.end[slot] = spans.end[slot - 1];
    }
    spans.start[slot] = new_start;
    spans.end[slot] = new_end;
  }
  spans.first = FAR;
  spans.last = 0;
  for (int span = 0; span < p.n_spans; span++) {
    if (span > 0) {
      spans.start[span] = max(spans.start[span], spans.end[span - 1]);
      spans.end[span] = max(spans.end[span], spans.start[span]);
    }
    if (spans.end[span] <= spans.start[span]) continue;
    spans.first = min(spans.first, spans.start[span]);
    spans.last = max(spans.last, spans.end[span]);
  }
}

}  // namespace plan_kernels
}  // namespace maskops
