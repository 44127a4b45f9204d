// build_plan in two launches, by the algorithm of maskops/ops/plan/triton_kernels (told there): a thread has a row.
//
// The first launch evaluates the rows of a block and 128 more, writes their spans and summarises the block: where the
// items of work that enter it leave it, and runs of rows that cover keys alike. The second follows the items from block
// to block, writes those of its own block, and lets the last block sort them; another half of its blocks answers for
// the keys.
#include "plan.h"

#include "launch.h"

namespace maskops {
namespace {

using Kind = PlanLayout::Kind;
using Op = PlanStep::Op;

constexpr int FAR = INT32_MAX;
constexpr int ROWS = static_cast<int>(tile_rows);
constexpr int KEYS = static_cast<int>(key_tile);
constexpr int WINDOW = 1024;  // threads of a block at most
constexpr int WARPS = WINDOW / 32;
constexpr int SUMMARY = 8;  // runs, least and greatest start, least and greatest end, live rows, rows
constexpr int STAGED = 256;
constexpr int DIGITS = 16;

// ---- scratch, in this order ----

__host__ __device__ int own_rows(const DevicePlan& p) { return p.window - ROWS; }
__host__ __device__ int64_t rows_of(const DevicePlan& p) { return static_cast<int64_t>(p.batch) * p.q_len; }
__host__ __device__ int64_t blocks_of(const DevicePlan& p) { return static_cast<int64_t>(p.batch) * p.n_blocks; }
__host__ __device__ int64_t run_plane(const DevicePlan& p) { return p.n_spans * blocks_of(p) * own_rows(p); }
// A ticket counter and two halves for the sorted items, first of all.
__host__ __device__ int64_t sort_size(const DevicePlan& p) {
  return 1 + (p.result.order == nullptr ? 0 : 2 * static_cast<int64_t>(p.capacity));
}
__device__ int32_t* chain_of(const DevicePlan& p, int plane) { return p.scratch + sort_size(p) + plane * rows_of(p); }
__device__ int32_t* runs_of(const DevicePlan& p, int plane) { return chain_of(p, 3) + plane * run_plane(p); }
__device__ int32_t* summary_of(const DevicePlan& p) { return runs_of(p, 4); }
__device__ int32_t* holes_of(const DevicePlan& p) { return summary_of(p) + p.n_spans * blocks_of(p) * SUMMARY; }

// ---- what the threads of a block find together ----

__device__ int block_scan(int value, int& total) {
  MASKOPS_SHARED(int, sums, [WARPS]);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(~0u, value, static_cast<unsigned>(distance));
    if (lane >= distance) value += other;
  }
  __syncthreads();
  if (lane == 31) sums[warp] = value;
  __syncthreads();
  total = 0;
  for (int other = 0; other < warps; other++) {
    if (other == warp) value += total;
    total += sums[other];
  }
  return value;
}

template <class T>
__device__ T warp_max(T value) {
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const T other = __shfl_xor_sync(~0u, value, lanes);
    value = value > other ? value : other;
  }
  return value;
}

__device__ int block_max(int value) {
  MASKOPS_SHARED(int, tops, [WARPS]);
  value = warp_max(value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = value;
  __syncthreads();
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; warp++) value = value > tops[warp] ? value : tops[warp];
  return value;
}

__device__ int warp_min(int value) { return -warp_max(-value); }
__device__ int block_min(int value) { return -block_max(-value); }

// ---- layouts: the sequence of a row ----

__device__ int64_t read(const DevicePlanOperand& operand, int64_t at) {
  if (operand.bytes == 1) return static_cast<const uint8_t*>(operand.data)[at];
  if (operand.bytes == 4) return static_cast<const int32_t*>(operand.data)[at];
  return static_cast<const int64_t*>(operand.data)[at];
}

__device__ int clamped(int64_t value, int64_t low, int64_t high) {
  return static_cast<int>(value < low ? low : value > high ? high : value);
}

__device__ int row_of(const DevicePlanOperand& operand, int b) { return operand.rows == 1 ? 0 : b; }

__device__ bool is_mask(const DevicePlanLayout& layout) {
  return layout.kind == Kind::padding_mask || layout.kind == Kind::key_mask;
}

__device__ bool mask_bit(const DevicePlan& p, const DevicePlanLayout& layout, int b, int place) {
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

__device__ Keys of_cu_seqlens(const DevicePlan& p, const DevicePlanLayout& layout, int row) {
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
__device__ bool begins(const DevicePlan& p, const DevicePlanOperand& ids, int64_t base, int place) {
  if (place < 0 || place > p.q_len) return false;
  return place == 0 || place == p.q_len || read(ids, base + place) != read(ids, base + place - 1);
}

// Documents that begin before flat place `stop` of the ids, for all threads of the block.
__device__ int documents_before(const DevicePlan& p, const DevicePlanOperand& ids, int64_t stop) {
  int count = 0, total;
  for (int64_t at = threadIdx.x; at < stop; at += blockDim.x) {
    const int place = static_cast<int>(at % p.q_len);
    count += begins(p, ids, at - place, place) && read(ids, at) >= 0;
  }
  block_scan(count, total);
  return total;
}

// All threads of the block call it, for a window of rows that begins at first_row. `list` has room for one each.
__device__ Keys of_ids(const DevicePlan& p, const DevicePlanLayout& layout, int b, int first_row, int* list) {
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
__device__ Place place_of(const DevicePlan& p, int b, int first_row, const int* hulls, int* list) {
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

__device__ int bound_value(const DevicePlan& p, const DevicePlanStep& step, const Place& at) {
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

__device__ void find_spans(const DevicePlan& p, const Place& at, Spans& spans) {
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

// ---- the first launch ----

// Keys of one class lie in the same tile and are all at its border, or none is.
__device__ int class_of(int key) { return 2 * (key / KEYS) + (key % KEYS != 0); }

// Whether a row covers the same tiles as the row before it, and the two together no key that neither does.
__device__ bool continues(int start, int end, int next_start, int next_end, int k_len) {
  return end > start && next_end > next_start && class_of(start) == class_of(next_start) &&
         class_of(end) == class_of(next_end) && next_start >= start && next_end >= end && next_start <= end &&
         (end >= k_len) == (next_end >= k_len);
}

__device__ void write_runs(const DevicePlan& p, int b, int block, int span, int start, int end, bool own, int* starts,
                           int* ends) {
  const int thread = static_cast<int>(threadIdx.x), row = block * own_rows(p) + thread;
  __syncthreads();
  starts[thread] = start;
  ends[thread] = end;
  __syncthreads();
  const bool live = own && end > start;
  const bool has_next = thread < own_rows(p) - 1 && row < p.q_len - 1;
  const bool is_first = live && !(thread > 0 && continues(starts[thread - 1], ends[thread - 1], start, end, p.k_len));
  const bool is_last = live && !(has_next && continues(start, end, starts[thread + 1], ends[thread + 1], p.k_len));
  int runs, total_live, total_own;
  const int slot = block_scan(is_first, runs) - 1;
  const int64_t of_block = (static_cast<int64_t>(span) * p.batch + b) * p.n_blocks + block;
  const int64_t place = of_block * own_rows(p) + slot;
  if (is_first) {
    runs_of(p, 0)[place] = row;
    runs_of(p, 2)[place] = start;
  }
  if (is_last) {
    runs_of(p, 1)[place] = row + 1;
    runs_of(p, 3)[place] = end;
  }
  block_scan(live, total_live);
  block_scan(own, total_own);
  const int values[] = {runs,
                        block_min(live ? start : FAR),
                        block_max(live ? start : 0),
                        block_min(live ? end : FAR),
                        block_max(live ? end : 0),
                        total_live,
                        total_own};
  if (thread == 0) {
    for (int field = 0; field < 7; field++) summary_of(p)[of_block * SUMMARY + field] = values[field];
  }
}

__device__ void write_row(const DevicePlan& p, int64_t at, const Place& place, const Spans& spans) {
  for (int span = 0; span < p.n_spans; span++) {
    p.result.start[span * rows_of(p) + at] = spans.start[span];
    p.result.end[span * rows_of(p) + at] = spans.end[span];
  }
  if (p.result.positions == nullptr) return;
  p.result.positions[at] = place.diag;
  p.result.positions[rows_of(p) + at] = place.k_start;
  p.result.positions[2 * rows_of(p) + at] = place.inside ? place.ordinal : -1;
}

// Where the item after the one that begins at this row begins.
__device__ int next_item(const DevicePlan& p, int row, int first, int last, bool boundary, int* firsts, int* lasts,
                         int* bounds, int* numbers) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  int in_window;
  const int count = block_scan(boundary, in_window);
  if (boundary) bounds[count - 1] = row;
  numbers[thread] = count;
  firsts[thread] = first;
  lasts[thread] = last;
  __syncthreads();
  const int next_boundary = count < in_window ? bounds[count] : FAR;
  int next = next_boundary;
  if (next_boundary - row >= ROWS) {
    next = row + ROWS;
  } else if (boundary) {
    int low = FAR, high = 0, stop = thread;
    for (; stop < thread + ROWS && stop < threads; stop++) {
      low = min(low, firsts[stop]);
      high = max(high, lasts[stop]);
      if (high - low > 2 * ROWS) break;
    }
    const int latest = numbers[min(stop, threads - 1)];
    if (latest > 0) next = max(next, bounds[latest - 1]);
  }
  __syncthreads();
  return min(next, p.q_len);
}

__global__ void __launch_bounds__(WINDOW) rows_kernel(const __grid_constant__ DevicePlan p) {
  MASKOPS_SHARED(int, hulls, [2 * PLAN_LAYOUTS]);
  MASKOPS_SHARED(int, a, [WINDOW]);
  MASKOPS_SHARED(int, c, [WINDOW]);
  MASKOPS_SHARED(int, d, [WINDOW]);
  MASKOPS_SHARED(int, e, [WINDOW]);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int b = static_cast<int>(blockIdx.x) / p.n_blocks, block = static_cast<int>(blockIdx.x) % p.n_blocks;
  const int own_count = own_rows(p), first_row = block * own_count, row = first_row + thread;
  const bool own = thread < own_count && row < p.q_len;
  const int64_t at = static_cast<int64_t>(b) * p.q_len + row;
  if (blockIdx.x == 0 && thread == 0) p.scratch[0] = 0;

  for (int index = 0; index < p.n_layouts; index++) {
    if (!is_mask(p.layouts[index])) continue;
    int first = p.k_len, last = 0;
    for (int place = thread; place < p.k_len; place += threads) {
      if (!mask_bit(p, p.layouts[index], b, place)) continue;
      first = min(first, place);
      last = max(last, place + 1);
    }
    first = block_min(first);
    last = block_max(last);
    if (thread == 0) {
      hulls[2 * index] = min(first, last);
      hulls[2 * index + 1] = last;
    }
  }
  __syncthreads();

  // The rows of the window; then, where the first of them cannot know it otherwise, windows further and further up, to
  // the nearest row before it that sees anything.
  Spans spans;
  int above_first = FAR, above_last = 0;
  for (int from = first_row;; from -= threads) {
    Spans found;
    const Place place = place_of(p, b, from, hulls, a);
    find_spans(p, place, found);
    if (from == first_row) {
      spans = found;
      if (own) write_row(p, at, place, spans);
    } else {
      const int nearest = block_max(found.last > 0 ? from + thread : -1);
      const bool is_nearest = found.last > 0 && from + thread == nearest;
      above_first = block_min(is_nearest ? found.first : FAR);
      above_last = block_max(is_nearest ? found.last : 0);
    }
    if (above_last > 0 || from <= 0) break;
  }

  // Segments: runs of rows whose hulls overlap from one that sees anything to the next.
  const bool seeing = spans.last > 0;
  int total;
  const int before = block_scan(seeing, total) - seeing;
  if (seeing) {
    a[before] = spans.first;
    c[before] = spans.last;
  }
  __syncthreads();
  const int first_before = before > 0 ? a[before - 1] : above_first,
            last_before = before > 0 ? c[before - 1] : above_last;
  __syncthreads();
  const bool overlaps = spans.first < last_before && first_before < spans.last;
  const bool boundary = row == 0 || row == p.q_len || (seeing && last_before > 0 && !overlaps);
  const int jump = next_item(p, row, spans.first, spans.last, boundary, a, c, d, e);

  // From each row to the end of the block along the items: two, four, eight at a time.
  const int stop_row = min(first_row + own_count, p.q_len);
  int arrives = jump, items = own;
  a[thread] = arrives;
  c[thread] = items;
  while (__syncthreads_or(own && arrives < stop_row)) {
    const bool goes_on = own && arrives < stop_row;
    const int further = goes_on ? a[arrives - first_row] : arrives, more = goes_on ? c[arrives - first_row] : 0;
    __syncthreads();
    a[thread] = arrives = further;
    c[thread] = items += more;
  }
  if (own) {
    chain_of(p, 0)[at] = jump;
    chain_of(p, 1)[at] = arrives;
    chain_of(p, 2)[at] = items;
  }
  for (int span = 0; span < p.n_spans; span++) {
    write_runs(p, b, block, span, spans.start[span], spans.end[span], own, a, c);
  }
  if (!p.has_holes) return;
  const int key = block * threads + thread;
  bool hole = false;
  for (int index = 0; index < p.n_layouts; index++) {
    if (is_mask(p.layouts[index]) && key < p.k_len) hole = hole || !mask_bit(p, p.layouts[index], b, key);
  }
  const int up_to = block_scan(hole, total);
  int32_t* const out = holes_of(p) + static_cast<int64_t>(blockIdx.x) * (threads + 1);
  out[thread] = up_to - hole;
  if (thread == 0) out[threads] = total;
}

// ---- the second launch ----

__device__ int holes_before(const DevicePlan& p, int b, int key) {
  const int width = p.window + 1, block = key / p.window;
  const int32_t* const holes = holes_of(p) + static_cast<int64_t>(b) * p.n_blocks * width;
  int count = block < p.n_blocks ? holes[static_cast<int64_t>(block) * width + key % p.window] : 0;
  for (int other = 0; other < block && other < p.n_blocks; other++)
    count += holes[static_cast<int64_t>(other) * width + p.window];
  return count;
}

// A warp writes the bounds of an item.
__device__ void write_item(const DevicePlan& p, int b, int first_row, int stop_row, int64_t number) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t at = static_cast<int64_t>(b) * p.q_len;
  int32_t* const out = p.result.tiles + number * (4 + 4 * p.n_spans);
  long long cost = 0;
  for (int span = 0; span < p.n_spans; span++) {
    const int32_t* const start = p.result.start + span * rows_of(p) + at;
    const int32_t* const end = p.result.end + span * rows_of(p) + at;
    int low = FAR, full_low = 0, full_high = FAR, high = 0, mixed = 0;
    for (int row = first_row + lane; row < stop_row; row += 32) {
      const int begin = start[row], stop = end[row];
      cost += stop - begin;
      if (stop > begin) {
        low = min(low, begin);
        full_low = max(full_low, begin);
        full_high = min(full_high, stop);
        high = max(high, stop);
        continue;
      }
      for (int other = 0; other < p.n_spans; other++) {
        const int64_t there = other * rows_of(p) + at + row;
        mixed = mixed || p.result.end[there] > p.result.start[there];
      }
    }
    low = warp_min(low);
    full_low = warp_max(full_low);
    full_high = warp_min(full_high);
    high = warp_max(high);
    bool partial = warp_max(mixed) != 0 || high == 0 || full_high <= full_low;
    if (lane != 0) continue;
    if (!partial && p.has_holes) partial = holes_before(p, b, full_low) != holes_before(p, b, full_high);
    out[4 + 4 * span] = high > 0 ? low : 0;
    out[5 + 4 * span] = partial ? high : full_low;
    out[6 + 4 * span] = partial ? high : full_high;
    out[7 + 4 * span] = high;
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) cost += __shfl_xor_sync(~0u, cost, lanes);
  if (lane != 0) return;
  out[0] = b;
  out[1] = first_row;
  out[2] = stop_row - first_row;
  out[3] = static_cast<int32_t>(cost < FAR ? cost : FAR);
}

// Items by cost, costliest first, equal ones as they lie: digit by digit from the lowest.
__device__ void sort_items(const DevicePlan& p, int count) {
  MASKOPS_SHARED(int, of_warps, [WARPS * DIGITS]);
  MASKOPS_SHARED(int, base, [DIGITS]);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int lane = thread % 32, warp = thread / 32, warps = threads / 32;
  const int64_t width = 4 + 4 * p.n_spans;
  int32_t *source = p.scratch + 1, *target = source + p.capacity;
  int greatest = 0;
  for (int i = thread; i < count; i += threads) {
    source[i] = i;
    greatest = max(greatest, __ldcg(p.result.tiles + i * width + 3));
  }
  greatest = block_max(greatest);
  for (int shift = 0; shift < 32 && (static_cast<uint32_t>(greatest) >> shift) > 0; shift += 4) {
    __syncthreads();
    if (thread < DIGITS) base[thread] = 0;
    __syncthreads();
    const auto digit_of = [&](int item) {
      return DIGITS - 1 - ((__ldcg(p.result.tiles + item * width + 3) >> shift) & (DIGITS - 1));
    };
    for (int i = thread; i < count; i += threads) atomicAdd(&base[digit_of(source[i])], 1);
    __syncthreads();
    if (thread == 0) {
      int before = 0;
      for (int digit = 0; digit < DIGITS; digit++) {
        const int here = base[digit];
        base[digit] = before;
        before += here;
      }
    }
    for (int from = 0; from < count; from += threads) {
      const bool used = from + thread < count;
      const int item = used ? source[from + thread] : 0, digit = used ? digit_of(item) : -1;
      for (int i = thread; i < warps * DIGITS; i += threads) of_warps[i] = 0;
      __syncthreads();
      const unsigned alike = __match_any_sync(~0u, digit), below = alike & ((1u << lane) - 1);
      if (used && below == 0) of_warps[warp * DIGITS + digit] = __popc(alike);
      __syncthreads();
      if (used) {
        int to = base[digit] + __popc(below);
        for (int other = 0; other < warp; other++) to += of_warps[other * DIGITS + digit];
        target[to] = item;
      }
      __syncthreads();
      if (thread < DIGITS) {
        for (int other = 0; other < warps; other++) base[thread] += of_warps[other * DIGITS + thread];
      }
      __syncthreads();
    }
    int32_t* const other = source;
    source = target;
    target = other;
  }
  __syncthreads();
  for (int i = thread; i < p.capacity; i += threads) p.result.order[i] = i < count ? source[i] : i;
}

__device__ void write_items_of_block(const DevicePlan& p, int b, int block) {
  MASKOPS_SHARED(int, reached, [WINDOW]);
  MASKOPS_SHARED(int, jumps, [WINDOW]);
  MASKOPS_SHARED(int, begin_rows, [WINDOW]);
  MASKOPS_SHARED(int, stop_rows, [WINDOW]);
  MASKOPS_SHARED(int, mine, [3]);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int own_count = own_rows(p), first_row = block * own_count, row = first_row + thread;
  const bool own = thread < own_count && row < p.q_len;
  const int64_t at = static_cast<int64_t>(b) * p.q_len;
  const int in_grid = (p.q_len + ROWS - 1) / ROWS;

  // A thread follows the items of a batch element from block to block.
  int of_elements = 0, total = 0, sum;
  for (int from = 0; from < p.batch; from += threads) {
    const int element = from + thread;
    int entry = 0, items = 0;
    if (element < p.batch) {
      const int64_t base = static_cast<int64_t>(element) * p.q_len;
      for (int other = 0; other < p.n_blocks; other++) {
        if (element == b && other == block) {
          mine[0] = entry;
          mine[1] = items;
        }
        if (entry >= p.q_len) continue;
        items += chain_of(p, 2)[base + entry];
        entry = chain_of(p, 1)[base + entry];
      }
      const bool is_grid = items > p.per_batch;
      if (element == b) mine[2] = is_grid;
      if (is_grid) items = in_grid;
    }
    block_scan(items, sum);
    total += sum;
    block_scan(element < b ? items : 0, sum);
    of_elements += sum;
  }
  __syncthreads();
  const int entry = mine[0];
  const bool is_grid = mine[2] != 0;
  const int64_t first_number = of_elements + (is_grid ? (first_row + ROWS - 1) / ROWS : mine[1]);

  int jump = own ? chain_of(p, 0)[at + row] : 0;
  bool is_begin = own && row == entry;
  if (is_grid) {
    jump = min(row + ROWS, p.q_len);
    is_begin = own && row % ROWS == 0;
  } else {
    const int stop_row = min(first_row + own_count, p.q_len);
    int far = jump;
    reached[thread] = is_begin;
    jumps[thread] = far;
    while (__syncthreads_or(own && far < stop_row)) {
      const bool goes_on = own && far < stop_row;
      const bool is_reached = reached[thread] != 0;
      const int further = goes_on ? jumps[far - first_row] : far;
      __syncthreads();
      if (goes_on && is_reached) reached[far - first_row] = 1;
      jumps[thread] = far = further;
    }
    is_begin = own && reached[thread] != 0;
  }
  int count;
  const int slot = block_scan(is_begin, count) - 1;
  if (is_begin) {
    begin_rows[slot] = row;
    stop_rows[slot] = jump;
  }
  __syncthreads();
  for (int item = thread / 32; item < count; item += threads / 32) {
    write_item(p, b, begin_rows[item], stop_rows[item], first_number + item);
  }
  const int64_t width = 4 + 4 * p.n_spans, step = blocks_of(p) * threads;
  for (int64_t place = total * width + blockIdx.x * static_cast<int64_t>(threads) + thread; place < p.capacity * width;
       place += step) {
    p.result.tiles[place] = 0;
  }
  if (blockIdx.x == 0 && thread == 0) *p.result.tile_count = total;
  if (p.result.order == nullptr) return;
  __threadfence();
  __syncthreads();
  if (thread == 0) mine[0] = atomicAdd(p.scratch, 1);
  __syncthreads();
  if (mine[0] != static_cast<int>(blocks_of(p)) - 1) return;
  __threadfence();
  sort_items(p, total);
}

__device__ void write_keys_of_block(const DevicePlan& p, int b, int block) {
  MASKOPS_SHARED(int, staged, [4 * STAGED]);
  MASKOPS_SHARED(int, complete, [WINDOW / KEYS]);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int first_key = block * threads, stop_key = min(first_key + threads, p.k_len), key = first_key + thread;
  const int n_tiles = (p.k_len + KEYS - 1) / KEYS, tile = block * (threads / KEYS) + thread;
  const bool has_tile = thread < threads / KEYS && tile < n_tiles;
  const int tile_begin = tile * KEYS, tile_stop = min(tile_begin + KEYS, p.k_len);
  bool is_there = key < p.k_len;
  for (int index = 0; index < p.n_layouts; index++) {
    if (is_there && is_mask(p.layouts[index])) is_there = mask_bit(p, p.layouts[index], b, key);
  }
  if (thread < threads / KEYS) complete[thread] = 1;
  __syncthreads();
  if (key < p.k_len && !is_there) complete[thread / KEYS] = 0;
  __syncthreads();
  bool seen = false;
  for (int span = 0; span < p.n_spans; span++) {
    int low = FAR, high = 0, full_low = FAR, full_high = 0, covering = 0;
    const int64_t of_span = (static_cast<int64_t>(span) * p.batch + b) * p.n_blocks;
    for (int rows = 0; rows < p.n_blocks; rows++) {
      const int32_t* const about = summary_of(p) + (of_span + rows) * SUMMARY;
      const int count = about[0], live = about[5], from_row = rows * own_rows(p);
      if (count == 0 || about[1] >= stop_key || about[4] <= first_key) continue;
      if (live == about[6] && about[2] <= first_key && about[3] >= stop_key) {
        seen = true;
        low = min(low, from_row);
        high = max(high, from_row + live);
        full_low = min(full_low, from_row);
        full_high = max(full_high, from_row + live);
        covering += live;
        continue;
      }
      const int64_t base = (of_span + rows) * own_rows(p);
      for (int from = 0; from < count; from += STAGED) {
        const int here = min(STAGED, count - from);
        __syncthreads();
        for (int i = thread; i < 4 * here; i += threads) staged[i] = runs_of(p, i / here)[base + from + i % here];
        __syncthreads();
        for (int run = 0; run < here; run++) {
          const int row = staged[run], stop_row = staged[here + run];
          const int begin = staged[2 * here + run], stop = staged[3 * here + run];
          seen = seen || (key >= begin && key < stop);
          if (!has_tile || begin >= tile_stop || stop <= tile_begin) continue;
          low = min(low, row);
          high = max(high, stop_row);
          if (begin > tile_begin || stop < tile_stop) continue;
          full_low = min(full_low, row);
          full_high = max(full_high, stop_row);
          covering += stop_row - row;
        }
      }
    }
    if (p.result.key_tiles == nullptr || !has_tile) continue;
    const bool accepted = covering > 0 && covering == full_high - full_low && complete[thread] != 0;
    int32_t* const out = p.result.key_tiles + ((static_cast<int64_t>(span) * p.batch + b) * n_tiles + tile) * 4;
    out[0] = high > 0 ? low : 0;
    out[1] = accepted ? full_low : high;
    out[2] = accepted ? full_high : high;
    out[3] = high;
  }
  if (key < p.k_len) p.result.key_valid[static_cast<int64_t>(b) * p.k_len + key] = is_there && seen;
}

__global__ void __launch_bounds__(WINDOW) lists_kernel(const __grid_constant__ DevicePlan p) {
  const int b = static_cast<int>(blockIdx.x) / p.n_blocks, block = static_cast<int>(blockIdx.x) % p.n_blocks;
  if (blockIdx.y == 0) {
    write_items_of_block(p, b, block);
  } else {
    write_keys_of_block(p, b, block);
  }
}

}  // namespace

void plan_blocks(DevicePlan& p) {
  p.window = p.q_len <= ROWS ? 2 * ROWS : WINDOW;
  const int own = own_rows(p);
  p.n_blocks = max(max(1, (p.q_len + own - 1) / own), (p.k_len + p.window - 1) / p.window);
}

int64_t plan_scratch(const DevicePlan& p) {
  const int64_t holes = p.has_holes ? blocks_of(p) * (p.window + 1) : 0;
  return sort_size(p) + 3 * rows_of(p) + 4 * run_plane(p) + p.n_spans * blocks_of(p) * SUMMARY + holes;
}

void build_plan_cuda(const DevicePlan& p, void* stream) {
  const auto blocks = static_cast<unsigned>(blocks_of(p)), threads = static_cast<unsigned>(p.window);
  launch(rows_kernel, dim3(blocks), dim3(threads), 0, stream, p);
  launch(lists_kernel, dim3(blocks, 2), dim3(threads), 0, stream, p);
}

}  // namespace maskops
