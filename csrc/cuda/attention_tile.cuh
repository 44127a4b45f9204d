// A block's tile of span attention, 64 query rows by 64 keys: which pairs are allowed, products, scores.
//
// Two ways to share the tile among 256 threads. In products a thread has a 4 x 4 piece. Where scores become weights it
// has one row and 16 consecutive keys, so that what the mask says of them fits in the bits of a number, and everything
// that is known of a row (spans, slope, counters of dropout) is read once.
#pragma once

#include "attention.h"
#include "elements.h"

namespace maskops {

constexpr int ROWS = 64, KEYS = 64, THREADS = 256;
constexpr int PART = 16, PARTS = KEYS / PART;  // keys of a thread that has a row
constexpr int DEPTH = 32;                      // of the dimension that a product sums over, at a time
constexpr int LD = 68, DEPTH_LD = DEPTH + 4;   // rows in shared memory: multiples of 16 bytes, spread over the banks
constexpr int COLUMNS = 64;                    // of a result, at a time
constexpr int GROUP = 4 * COLUMNS;             // of a result, in a block
constexpr int32_t NO_KEY = INT32_MAX;

static_assert(ROWS * PARTS == THREADS);

struct TileMemory {
  // [key][row]: scores, then weights; and in the backward pass dP, then dS
  float scores[KEYS][LD], slopes[KEYS][LD];
  union {
    struct {
      float a[ROWS][DEPTH_LD], b[KEYS][DEPTH_LD];
    } depth;
    float columns[KEYS][LD];  // rows of the right operand of a product with weights
  };
  float part_maximum[PARTS][ROWS], part_sum[PARTS][ROWS], factor[ROWS];
  uint32_t valid[KEYS / 32], seen_keys[KEYS / 32], seen_rows[ROWS / 32];
  int32_t next_key;
};

// Rows [first, first + count) of a head of a batch element.
struct RowTile {
  int64_t batch, head;
  int32_t first, count;
};

// What a thread knows of its row.
struct RowState {
  bool used;
  int64_t batch, head, row;
  const int32_t *start, *end;  // of the row in the first span
  int32_t lowest, highest;     // keys outside are not there
  float slope;
  int32_t diagonal;
  uint32_t first, place, ordinal;  // first key of the sequence, counters of dropout
};

__device__ inline int tile_row() { return static_cast<int>(threadIdx.x) % ROWS; }
__device__ inline int tile_part() { return static_cast<int>(threadIdx.x) / ROWS; }
// Of the 4 x 4 piece of a product.
__device__ inline int piece_row() { return static_cast<int>(threadIdx.x) / 16 * 4; }
__device__ inline int piece_column() { return static_cast<int>(threadIdx.x) % 16; }

__device__ inline int32_t clamped(int32_t x, int32_t low, int32_t high) { return x < low ? low : x > high ? high : x; }

__device__ inline int64_t read(const DeviceIntegers& x, int64_t row, int64_t column) {
  const int64_t at = row * x.row_stride + column * x.column_stride;
  return x.wide ? static_cast<const int64_t*>(x.data)[at] : static_cast<const int32_t*>(x.data)[at];
}

// The row or page that holds a key of a sequence, -1 where there is none: nothing outside of the cache is touched.
__device__ inline int64_t place_of(const DevicePlaces& at, int64_t batch, int64_t key) {
  if (key < 0 || key >= at.places * at.page_size) return -1;
  int64_t place = batch;
  if (at.block_table.data != nullptr) place = read(at.block_table, batch, key / at.page_size);
  if (at.batch_index.data != nullptr) place = read(at.batch_index, batch, 0);
  return place >= 0 && place < at.rows ? place : -1;
}

// ---- which rows
// -------------------------------------------------------------------------------------------------------

// How many tiles of rows a call has at most, a number of shapes alone.
inline int64_t row_tiles(const DeviceAttention& p) {
  const int64_t plans = p.spans.plan_batch == 1 ? p.shape.batch : 1;
  const int64_t grid = (p.shape.q_len + ROWS - 1) / ROWS;
  if (p.spans.tiles == nullptr) return grid * p.shape.batch * p.shape.heads;
  return p.spans.capacity * int64_t{2} * plans * p.shape.heads;  // items of up to 128 rows
}

// False where the list has no such tile. The heads of an item follow one another.
__device__ inline bool find_rows(const DeviceAttention& p, int64_t index, RowTile& tile) {
  tile.head = index % p.shape.heads;
  index /= p.shape.heads;
  const auto q_len = static_cast<int32_t>(p.shape.q_len);
  if (p.spans.tiles == nullptr) {
    tile.batch = index % p.shape.batch;
    tile.first = static_cast<int32_t>(index / p.shape.batch) * ROWS;
    tile.count = q_len - tile.first < ROWS ? q_len - tile.first : ROWS;
    return tile.count > 0;
  }
  const int64_t plans = p.spans.plan_batch == 1 ? p.shape.batch : 1;
  tile.batch = index % plans;
  index /= plans;
  const auto half = static_cast<int32_t>(index % 2) * ROWS;
  const auto place = static_cast<int32_t>(index / 2);
  const int32_t items = clamped(*p.spans.tile_count, 0, p.spans.capacity);
  if (place >= items) return false;
  const int32_t item = p.spans.order == nullptr ? place : clamped(p.spans.order[place], 0, items - 1);
  const int32_t* of_item = p.spans.tiles + item * static_cast<int64_t>(p.spans.tile_width);
  if (p.spans.plan_batch > 1) tile.batch = clamped(of_item[0], 0, p.spans.plan_batch - 1);
  const int32_t begin = clamped(of_item[1], 0, q_len), rows = clamped(of_item[2], 0, q_len - begin);
  tile.first = begin + half;
  tile.count = rows - half < ROWS ? rows - half : ROWS;
  return tile.count > 0;
}

__device__ inline float per_head(const PerHead& values, int64_t outer, int64_t head) {
  return values.data[outer * values.outer_stride + head * values.head_stride];
}

__device__ inline RowState read_row(const DeviceAttention& p, bool used, int64_t batch, int64_t head, int64_t row) {
  RowState state{};
  state.used = used;
  state.batch = batch;
  state.head = head;
  state.row = row;
  if (!state.used) return state;
  const auto k_len = static_cast<int32_t>(p.shape.k_len);
  state.highest = k_len;
  if (p.limits.first.data != nullptr) {
    const int64_t first = read(p.limits.first, state.batch, 0);
    state.lowest = static_cast<int32_t>(first < 0 ? 0 : first > k_len ? k_len : first);
  }
  if (p.limits.end.data != nullptr) {
    const int64_t end = read(p.limits.end, state.batch, 0);
    state.highest = static_cast<int32_t>(end < 0 ? 0 : end > k_len ? k_len : end);
  }
  if (p.spans.start != nullptr) {
    const int64_t at = state.batch * p.spans.batch_stride + state.row;
    state.start = p.spans.start + at;
    state.end = p.spans.end + at;
  }
  const DeviceFeatures& features = p.features;
  if (features.positions == nullptr) return state;
  const int32_t* positions = features.positions + state.batch * features.positions_batch_stride + state.row;
  state.diagonal = positions[0];
  if (features.alibi_slopes.data != nullptr) {
    const PerHead& slopes = features.alibi_slopes;
    int64_t outer = slopes.outer == 1 ? 0 : state.batch;
    if (slopes.by_sequence) {
      outer = clamped(positions[2 * features.positions_stride], 0, static_cast<int32_t>(slopes.outer) - 1);
    }
    state.slope = per_head(slopes, outer, state.head);
  }
  if (features.has_dropout) {
    state.first = static_cast<uint32_t>(positions[features.positions_stride]);
    state.place = static_cast<uint32_t>(state.diagonal) - state.first;
    state.ordinal = static_cast<uint32_t>(positions[2 * features.positions_stride]);
    if (features.sequences != nullptr) {
      state.ordinal += static_cast<uint32_t>(state.batch) * static_cast<uint32_t>(*features.sequences);
    }
  }
  return state;
}

__device__ inline RowState read_row(const DeviceAttention& p, const RowTile& tile) {
  return read_row(p, tile_row() < tile.count, tile.batch, tile.head, tile.first + tile_row());
}

// ---- which keys
// -------------------------------------------------------------------------------------------------------

// The span s of a row, cut to the keys that are there.
__device__ inline void read_span(const DeviceAttention& p, const RowState& row, int32_t s, int32_t& begin,
                                 int32_t& end) {
  begin = row.lowest;
  end = row.highest;
  if (row.start == nullptr) return;
  const int64_t at = s * p.spans.span_stride;
  begin = clamped(__ldg(row.start + at), row.lowest, row.highest);
  end = clamped(__ldg(row.end + at), row.lowest, row.highest);
}

// The first key from `from` on that one of the row's spans holds, NO_KEY if none does.
__device__ inline int32_t next_key(const DeviceAttention& p, const RowState& row, int32_t from) {
  int32_t next = NO_KEY;
  for (int32_t s = 0; row.used && s < p.spans.n_spans; s++) {
    int32_t begin, end;
    read_span(p, row, s, begin, end);
    if (begin < from) begin = from;
    if (begin < end && begin < next) next = begin;
  }
  return next;
}

// Which of the 64 keys from `base` are there at all; the caller waits before it reads what is shared.
__device__ inline void read_valid_keys(const DeviceAttention& p, int64_t batch, int32_t base,
                                       uint32_t (&shared)[KEYS / 32]) {
  const int mine = static_cast<int>(threadIdx.x);
  if (mine >= KEYS) return;  // whole warps
  bool valid = base + mine < p.shape.k_len;
  if (valid && p.spans.key_valid != nullptr) {
    valid = p.spans.key_valid[batch * p.spans.key_valid_batch_stride + base + mine] != 0;
  }
  const uint32_t votes = __ballot_sync(0xffffffffu, valid);
  if (mine % 32 == 0) shared[mine / 32] = votes;
}

// The dense mask of 16 keys from `first`, a bit each.
__device__ inline uint32_t dense_keys(const DeviceAttention& p, const RowState& row, int32_t first) {
  const Broadcast& dense = p.features.dense;
  const int64_t at = row.batch * dense.batch_stride + row.head * dense.head_stride + row.row * dense.row_stride;
  if (p.features.dense_is_bits) {
    const auto* words = static_cast<const uint32_t*>(dense.data) + at;
    const int32_t word = first / 32, last = static_cast<int32_t>((p.shape.k_len + 31) / 32) - 1;
    uint64_t bits = __ldg(words + word);
    if (word < last) bits |= static_cast<uint64_t>(__ldg(words + word + 1)) << 32;
    return static_cast<uint32_t>(bits >> first % 32);
  }
  const auto* bytes = static_cast<const uint8_t*>(dense.data) + at;
  uint32_t mask = 0;
  for (int32_t i = 0; i < PART && first + i < p.shape.k_len; i++) {
    mask |= bytes[(first + i) * dense.key_stride] != 0 ? 1u << i : 0u;
  }
  return mask;
}

// Which of 16 keys from `first` the row sees, a bit each; `valid` are those that are there.
__device__ inline uint32_t allowed_keys(const DeviceAttention& p, const RowState& row, int32_t first, uint32_t valid) {
  uint32_t mask = 0;
  for (int32_t s = 0; row.used && s < p.spans.n_spans; s++) {
    int32_t begin, end;
    read_span(p, row, s, begin, end);
    begin = clamped(begin - first, 0, PART);
    end = clamped(end - first, 0, PART);
    if (begin < end) mask |= (1u << end) - (1u << begin);
  }
  mask &= valid & 0xffffu;
  if (mask != 0 && p.features.dense.data != nullptr) mask &= dense_keys(p, row, first);
  return mask;
}

__device__ inline uint32_t valid_part(const TileMemory& memory) {
  return memory.valid[tile_part() / 2] >> tile_part() % 2 * PART & 0xffffu;
}

// ---- products
// ---------------------------------------------------------------------------------------------------------

// Where row `row` of a tensor begins, in elements of T; nullptr for a key that is not in the cache.
template <class T>
__device__ const T* row_of(const DeviceAttention& p, const DeviceRows& x, bool in_cache, int64_t batch, int64_t head,
                           int64_t row) {
  if (in_cache) {
    const int64_t place = place_of(p.at, batch, row);
    if (place < 0) return nullptr;
    batch = place;
    row %= p.at.page_size;
  }
  return reinterpret_cast<const T*>(x.data) + batch * x.batch_stride + head * x.head_stride + row * x.row_stride;
}

// Where the rows of an operand lie: 64 of them from `first`, of which those with a bit in `wanted` are read.
struct Operand {
  DeviceRows rows;
  bool in_cache;
  int64_t batch, head;
  int32_t first;
  uint64_t wanted;
};

__device__ inline float4& four(float* at) { return *reinterpret_cast<float4*>(at); }
__device__ inline const float4& four(const float* at) { return *reinterpret_cast<const float4*>(at); }

// 64 rows as float32, columns [column, column + WIDTH) of `width`; row_at(row) says where a row begins, nullptr where
// nothing is wanted of it: what is not seen is never read, and is 0. `sixteen` as in DeviceRows. Returns whether all
// that this thread read is finite.
template <class T, int WIDTH, int STRIDE, class RowAt>
__device__ bool load_rows_at(const RowAt& row_at, bool sixteen, int32_t column, int32_t width,
                             float (&to)[KEYS][STRIDE]) {
  constexpr int N = Sixteen<T>::N;
  float zeros = 0.0f;  // NaN once a value is not finite
  if (sixteen) {
#pragma unroll 2
    for (int index = static_cast<int>(threadIdx.x); index < KEYS * WIDTH / N; index += THREADS) {
      const int row = index / (WIDTH / N), at = index % (WIDTH / N) * N;
      Sixteen<T> values{};
      if (column + at < width) {
        const T* from = row_at(row);
        if (from != nullptr) values = load_sixteen(from + column + at);
      }
#pragma unroll
      for (int i = 0; i < N; i += 4) {
        const float4 x = make_float4(to_float(values.values[i]), to_float(values.values[i + 1]),
                                     to_float(values.values[i + 2]), to_float(values.values[i + 3]));
        zeros += x.x * 0.0f + x.y * 0.0f + x.z * 0.0f + x.w * 0.0f;
        four(&to[row][at + i]) = x;
      }
    }
  } else {
#pragma unroll 1
    for (int index = static_cast<int>(threadIdx.x); index < KEYS * WIDTH; index += THREADS) {
      const int row = index / WIDTH, at = index % WIDTH;
      float value = 0.0f;
      if (column + at < width) {
        const T* from = row_at(row);
        if (from != nullptr) value = to_float(from[column + at]);
      }
      zeros += value * 0.0f;
      to[row][at] = value;
    }
  }
  return zeros == 0.0f;
}

template <class T, int WIDTH, int STRIDE>
__device__ bool load_rows_of(const DeviceAttention& p, const Operand& x, int32_t column, int32_t width,
                             float (&to)[KEYS][STRIDE]) {
  const auto row_at = [&](int row) -> const T* {
    if ((x.wanted >> row & 1) == 0) return nullptr;
    return row_of<T>(p, x.rows, x.in_cache, x.batch, x.head, x.first + row);
  };
  return load_rows_at<T, WIDTH>(row_at, x.rows.sixteen, column, width, to);
}

template <int WIDTH, int STRIDE>
__device__ bool load_rows(const DeviceAttention& p, const Operand& x, int32_t column, int32_t width,
                          float (&to)[KEYS][STRIDE]) {
  switch (p.shape.element) {
    case Element::float32: return load_rows_of<float, WIDTH>(p, x, column, width, to);
    case Element::bfloat16: return load_rows_of<__nv_bfloat16, WIDTH>(p, x, column, width, to);
    default: return load_rows_of<__half, WIDTH>(p, x, column, width, to);
  }
}

// to[key][row] = the product of each row of a with each row of b, over `width` columns. Begins with a barrier, and the
// caller has one before it reads.
__device__ inline void multiply_rows(const DeviceAttention& p, const Operand& a, const Operand& b, int64_t width,
                                     TileMemory& memory, float (&to)[KEYS][LD]) {
  float sums[4][4] = {};
  const int row = piece_row(), key = piece_column();
  for (int32_t column = 0; column < width; column += DEPTH) {
    __syncthreads();
    load_rows<DEPTH>(p, a, column, static_cast<int32_t>(width), memory.depth.a);
    load_rows<DEPTH>(p, b, column, static_cast<int32_t>(width), memory.depth.b);
    __syncthreads();
    const auto depth = static_cast<int>(width - column < DEPTH ? width - column : DEPTH);
#pragma unroll 1
    for (int d = 0; d < depth; d += 4) {
      float4 x[4], y[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        x[i] = four(&memory.depth.a[row + i][d]);
        y[i] = four(&memory.depth.b[key + 16 * i][d]);
      }
#pragma unroll
      for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
          sums[i][j] += x[i].x * y[j].x;
          sums[i][j] += x[i].y * y[j].y;
          sums[i][j] += x[i].z * y[j].z;
          sums[i][j] += x[i].w * y[j].w;
        }
      }
    }
  }
#pragma unroll
  for (int j = 0; j < 4; j++) {
    four(&to[key + 16 * j][row]) = make_float4(sums[0][j], sums[1][j], sums[2][j], sums[3][j]);
  }
}

// The columns [begin, width) of a result that a block makes.
struct Columns {
  int32_t begin, width;
};

// At least one block writes the log-sum-exp, whatever there is beside it.
__host__ __device__ inline int64_t groups_of(int64_t width) { return width == 0 ? 1 : (width + GROUP - 1) / GROUP; }

// A 64 x (64 CHUNKS) result, 4 x 4 numbers a thread in each chunk of columns. Without chunks it is not there.
template <int CHUNKS>
struct Result {
  float values[CHUNKS > 0 ? CHUNKS : 1][4][4];
};

// Without FINITE a factor of 0 is nothing, whatever it would be multiplied with.
template <bool FINITE>
__device__ inline void add_outer(float (&sums)[4][4], const float4& x, const float4& y) {
  const float a[4] = {x.x, x.y, x.z, x.w}, b[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
#pragma unroll
    for (int j = 0; j < 4; j++) sums[i][j] += FINITE || a[i] != 0.0f ? a[i] * b[j] : 0.0f;
  }
}

template <bool FINITE>
__device__ inline void add_keys(float (&sums)[4][4], const float (&weights)[KEYS][LD], const TileMemory& memory) {
  const int row = piece_row(), column = piece_column() * 4;
#pragma unroll(FINITE ? 4 : 1)
  for (int key = 0; key < KEYS; key++) {
    add_outer<FINITE>(sums, four(&weights[key][row]), four(&memory.columns[key][column]));
  }
}

template <bool FINITE>
__device__ inline void add_rows(float (&sums)[4][4], const float (&weights)[KEYS][LD], const TileMemory& memory) {
  const int key = piece_row(), column = piece_column() * 4;
#pragma unroll(FINITE ? 2 : 1)
  for (int row = 0; row < ROWS; row += 4) {
    float4 x[4];
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = four(&weights[key + i][row]);
    add_outer<FINITE>(sums, make_float4(x[0].x, x[1].x, x[2].x, x[3].x), four(&memory.columns[row][column]));
    add_outer<FINITE>(sums, make_float4(x[0].y, x[1].y, x[2].y, x[3].y), four(&memory.columns[row + 1][column]));
    add_outer<FINITE>(sums, make_float4(x[0].z, x[1].z, x[2].z, x[3].z), four(&memory.columns[row + 2][column]));
    add_outer<FINITE>(sums, make_float4(x[0].w, x[1].w, x[2].w, x[3].w), four(&memory.columns[row + 3][column]));
  }
}

enum class Over { keys, rows };

// Over keys, result[row][column] += the sum of weights[key][row] * b[key][column]; over rows, result[key][column] +=
// the sum of weights[key][row] * b[row][column]. A weight of 0 stands for a pair that is not allowed, and rows of
// several documents share a tile: where b holds a value that is not finite, weights select instead of multiplying, so
// that it reaches those alone who see it. Begins with a barrier.
template <Over OVER, int CHUNKS>
__device__ void add_over(const DeviceAttention& p, const float (&weights)[KEYS][LD], const Operand& b,
                         const Columns& columns, TileMemory& memory, Result<CHUNKS>& result) {
#pragma unroll 1
  for (int chunk = 0; chunk < CHUNKS && columns.begin + chunk * COLUMNS < columns.width; chunk++) {
    __syncthreads();
    const bool is_mine_finite =
        load_rows<COLUMNS>(p, b, columns.begin + chunk * COLUMNS, columns.width, memory.columns);
    const bool is_finite = __syncthreads_and(is_mine_finite) != 0;
    // Registers have no index: the code of the sums is there once for each chunk, that of the loads is not.
#pragma unroll
    for (int place = 0; place < CHUNKS; place++) {
      if (place != chunk) continue;
      float (&sums)[4][4] = result.values[place];
      if constexpr (OVER == Over::keys) {
        is_finite ? add_keys<true>(sums, weights, memory) : add_keys<false>(sums, weights, memory);
      } else {
        is_finite ? add_rows<true>(sums, weights, memory) : add_rows<false>(sums, weights, memory);
      }
    }
  }
}

template <class T, int CHUNKS>
__device__ void store_rows_of(const DeviceRows& x, const RowTile& tile, const Columns& columns,
                              const float (&factor)[4], const Result<CHUNKS>& result) {
  T* data = reinterpret_cast<T*>(x.data) + tile.batch * x.batch_stride + tile.head * x.head_stride;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int row = piece_row() + i;
    if (row >= tile.count) continue;
    T* to = data + (tile.first + row) * x.row_stride;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int column = columns.begin + chunk * COLUMNS + piece_column() * 4 + j;
        if (column < columns.width) to[column] = from_float<T>(result.values[chunk][i][j] * factor[i]);
      }
    }
  }
}

// Writes the tile's rows of a tensor: the result, each row times its factor.
template <int CHUNKS>
__device__ void store_rows(Element element, const DeviceRows& x, const RowTile& tile, const Columns& columns,
                           const float (&factor)[4], const Result<CHUNKS>& result) {
  switch (element) {
    case Element::float32: return store_rows_of<float>(x, tile, columns, factor, result);
    case Element::bfloat16: return store_rows_of<__nv_bfloat16>(x, tile, columns, factor, result);
    case Element::float16: return store_rows_of<__half>(x, tile, columns, factor, result);
  }
}

// ---- scores
// -----------------------------------------------------------------------------------------------------------

__device__ inline float load_element(const void* data, Element element, int64_t at) {
  switch (element) {
    case Element::float32: return static_cast<const float*>(data)[at];
    case Element::bfloat16: return to_float(static_cast<const __nv_bfloat16*>(data)[at]);
    default: return to_float(static_cast<const __half*>(data)[at]);
  }
}

template <class T>
__device__ void store_element_of(void* data, int64_t at, float value) {
  static_cast<T*>(data)[at] = from_float<T>(value);
}

__device__ inline void store_element(void* data, Element element, int64_t at, float value) {
  switch (element) {
    case Element::float32: return store_element_of<float>(data, at, value);
    case Element::bfloat16: return store_element_of<__nv_bfloat16>(data, at, value);
    case Element::float16: return store_element_of<__half>(data, at, value);
  }
}

// |distance| of a key from the row's diagonal.
__device__ inline float distance_of(const RowState& row, int32_t key) {
  return fabsf(
      static_cast<float>(static_cast<int32_t>(static_cast<uint32_t>(row.diagonal) - static_cast<uint32_t>(key))));
}

// The score of a pair from the product of its query and key. `bend` gets what a softcap leaves of its gradient. A bias
// of -inf returns -inf and clears `allowed`.
__device__ inline float score_of(const DeviceAttention& p, const RowState& row, int32_t key, float product, float& bend,
                                 bool& allowed) {
  float score = product * p.shape.softmax_scale;
  bend = 1.0f;
  if (p.shape.softcap != 0.0f) {
    const float bent = tanhf(score / p.shape.softcap);
    score = bent * p.shape.softcap;
    bend = 1.0f - bent * bent;
  }
  const Broadcast& bias = p.features.bias;
  if (bias.data != nullptr) {
    const float added = load_element(bias.data, p.features.bias_element,
                                     row.batch * bias.batch_stride + row.head * bias.head_stride +
                                         row.row * bias.row_stride + key * bias.key_stride);
    allowed = added != -INFINITY;
    score += added;
  }
  if (p.features.alibi_slopes.data != nullptr) score -= row.slope * distance_of(row, key);
  return score;
}

// Philox4x32-7 (Salmon et al., SC 2011, section 3.3; seven rounds are the fewest that pass BigCrush, table 2).
__device__ inline void philox(uint64_t seed, uint32_t (&words)[4]) {
  auto key_0 = static_cast<uint32_t>(seed), key_1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 7; round++) {
    const uint32_t high_0 = __umulhi(words[0], 0xd2511f53u), low_0 = words[0] * 0xd2511f53u;
    const uint32_t high_2 = __umulhi(words[2], 0xcd9e8d57u), low_2 = words[2] * 0xcd9e8d57u;
    words[0] = high_2 ^ words[1] ^ key_0;
    words[1] = low_2;
    words[2] = high_0 ^ words[3] ^ key_1;
    words[3] = low_0;
    key_0 += 0x9e3779b9u;
    key_1 += 0xbb67ae85u;
  }
}

// Which of 16 keys from `first` dropout keeps, a bit each. Four consecutive keys of a sequence share one draw.
__device__ inline uint32_t kept_keys(const DeviceAttention& p, const RowState& row, int32_t first) {
  if (!p.features.has_dropout) return 0xffffu;
  const auto seed = static_cast<uint64_t>(*p.features.seed);
  const uint32_t place = static_cast<uint32_t>(first) - row.first;
  uint32_t kept = 0;
#pragma unroll 1
  for (int i = -static_cast<int>(place & 3); i < PART; i += 4) {
    uint32_t words[4] = {(place + static_cast<uint32_t>(i)) >> 2, row.place, static_cast<uint32_t>(row.head),
                         row.ordinal};
    philox(seed, words);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (i + j >= 0 && i + j < PART && words[j] > p.features.last_dropped) kept |= 1u << (i + j);
    }
  }
  return kept;
}

// What ends a row: the factor of its result, with its sink, and its log-sum-exp.
struct RowEnd {
  float factor, lse;
};

__device__ inline RowEnd end_of_row(const DeviceAttention& p, int64_t head, float maximum, float sum) {
  if (sum == 0.0f) return {0.0f, -INFINITY};
  const float lse = maximum + logf(sum);
  float factor = 1.0f / sum;
  if (p.features.sinks.data != nullptr) factor /= 1.0f + expf(per_head(p.features.sinks, 0, head) - lse);
  return {factor, lse};
}

}  // namespace maskops
