// The second launch of build_plan follows the items from block to block, writes those of its own block, and lets the
// last block sort them; other blocks answer for the keys.
#include "plan_sequences.cuh"

namespace maskops {
namespace plan_kernels {
namespace {

constexpr int STAGED = 256;
constexpr int DIGITS = 16;

__device__ int holes_before(const DevicePlan& p, int b, int key) {
  const int block = key / p.window, word = key % p.window / 32;
  const int64_t width = holes_width(p);
  const int32_t* const holes = holes_of(p) + static_cast<int64_t>(b) * p.key_blocks * width;
  int count = 0;
  if (block < p.key_blocks) {
    const int32_t* const here = holes + block * width + 2 * word;
    count = here[1] + __popc(static_cast<unsigned>(here[0]) & ((1u << key % 32) - 1));
  }
  for (int other = 0; other < block && other < p.key_blocks; other++) count += holes[(other + 1) * width - 1];
  return count;
}

// Whether any row of a dense mask allows a key.
__device__ bool is_seen(const DevicePlanMask& mask, int b, int key) {
  const int64_t element = mask.batch == 1 ? 0 : b;
  const int32_t* const seen = mask.seen + element * mask.row_groups * mask.words + key / 32;
  int either = 0;
  for (int64_t group = 0; group < mask.row_groups; group++) either |= seen[group * mask.words];
  return (static_cast<unsigned>(either) >> key % 32 & 1) != 0;
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
    bool partial = warp_max(mixed) != 0 || high == 0 || full_high <= full_low || p.is_dense;
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
      for (int other = 0; other < p.row_blocks; other++) {
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
  const int64_t width = 4 + 4 * p.n_spans, step = blocks_of_rows(p) * threads;
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
  if (mine[0] != static_cast<int>(blocks_of_rows(p)) - 1) return;
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
    const int64_t of_span = (static_cast<int64_t>(span) * p.batch + b) * p.row_blocks;
    for (int rows = 0; rows < p.row_blocks; rows++) {
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
    const bool accepted = covering > 0 && covering == full_high - full_low && complete[thread] != 0 && !p.is_dense;
    int32_t* const out = p.result.key_tiles + ((static_cast<int64_t>(span) * p.batch + b) * n_tiles + tile) * 4;
    out[0] = high > 0 ? low : 0;
    out[1] = accepted ? full_low : high;
    out[2] = accepted ? full_high : high;
    out[3] = high;
  }
  if (key >= p.k_len) return;
  if (p.is_dense) seen = is_seen(p.mask, b, key);
  p.result.key_valid[static_cast<int64_t>(b) * p.k_len + key] = is_there && seen;
}

__global__ void __launch_bounds__(WINDOW) lists_kernel(const __grid_constant__ DevicePlan p) {
  const int number = static_cast<int>(blockIdx.x), of_rows = static_cast<int>(blocks_of_rows(p));
  if (number < of_rows) {
    write_items_of_block(p, number / p.row_blocks, number % p.row_blocks);
  } else {
    write_keys_of_block(p, (number - of_rows) / p.key_blocks, (number - of_rows) % p.key_blocks);
  }
}

}  // namespace

void launch_lists(const DevicePlan& p, void* stream) {
  const int64_t blocks = blocks_of_rows(p) + blocks_of_keys(p);
  launch(lists_kernel, grid_of(blocks), dim3(static_cast<unsigned>(p.window)), 0, stream, p);
}

}  // namespace plan_kernels
}  // namespace maskops
