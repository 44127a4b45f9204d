// The first launch of build_plan evaluates the rows of a block and 128 more, writes their spans and summarises the
// block: where the items of work that enter it leave it, and runs of rows that cover keys alike.
#include "plan_sequences.cuh"

namespace maskops {
namespace plan_kernels {
namespace {

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
  const int64_t of_block = (static_cast<int64_t>(span) * p.batch + b) * p.row_blocks + block;
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

// The spans of a row of a dense mask: its hull, from the parts that the blocks of launch_mask have read.
__device__ void find_hull(const DevicePlan& p, int b, int row, Spans& spans) {
  int first = FAR, last = 0;
  if (row >= 0 && row < p.q_len) {
    const int64_t element = p.mask.batch == 1 ? 0 : b;
    const int32_t* part = p.mask.hulls + 2 * (element * p.mask.key_groups * p.q_len + row);
    for (int group = 0; group < p.mask.key_groups; group++, part += 2 * static_cast<int64_t>(p.q_len)) {
      first = min(first, part[0]);
      last = max(last, part[1]);
    }
  }
  spans.start[0] = last > 0 ? first : 0;
  spans.end[0] = last;
  spans.first = first;
  spans.last = last;
}

// Where the holes of a block of keys lie.
__device__ void write_holes(const DevicePlan& p, int b, int block) {
  const int thread = static_cast<int>(threadIdx.x), key = block * p.window + thread;
  bool hole = false;
  for (int index = 0; index < p.n_layouts; index++) {
    if (is_mask(p.layouts[index]) && key < p.k_len) hole = hole || !mask_bit(p, p.layouts[index], b, key);
  }
  int total;
  const unsigned ballot = __ballot_sync(~0u, hole);
  const int before = block_scan(hole, total) - hole;
  int32_t* const out = holes_of(p) + (static_cast<int64_t>(b) * p.key_blocks + block) * holes_width(p);
  if (thread % 32 == 0) {
    out[thread / 16] = static_cast<int32_t>(ballot);
    out[thread / 16 + 1] = before;
  }
  if (thread == 0) out[holes_width(p) - 1] = total;
}

__global__ void __launch_bounds__(WINDOW) rows_kernel(const __grid_constant__ DevicePlan p) {
  MASKOPS_SHARED(int, hulls, [2 * PLAN_LAYOUTS]);
  MASKOPS_SHARED(int, a, [WINDOW]);
  MASKOPS_SHARED(int, c, [WINDOW]);
  MASKOPS_SHARED(int, d, [WINDOW]);
  MASKOPS_SHARED(int, e, [WINDOW]);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int number = static_cast<int>(blockIdx.x), of_rows = static_cast<int>(blocks_of_rows(p));
  if (number >= of_rows) return write_holes(p, (number - of_rows) / p.key_blocks, (number - of_rows) % p.key_blocks);
  const int b = number / p.row_blocks, block = number % p.row_blocks;
  const int own_count = own_rows(p), first_row = block * own_count, row = first_row + thread;
  const bool own = thread < own_count && row < p.q_len;
  const int64_t at = static_cast<int64_t>(b) * p.q_len + row;
  if (number == 0 && thread == 0) p.scratch[0] = 0;

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
    Place place{};
    if (p.is_dense) {
      find_hull(p, b, from + thread, found);
    } else {
      place = place_of(p, b, from, hulls, a);
      find_spans(p, place, found);
    }
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
}

}  // namespace

void launch_rows(const DevicePlan& p, void* stream) {
  const int64_t blocks = blocks_of_rows(p) + (p.has_holes ? blocks_of_keys(p) : 0);
  launch(rows_kernel, grid_of(blocks), dim3(static_cast<unsigned>(p.window)), 0, stream, p);
}

}  // namespace plan_kernels
}  // namespace maskops
