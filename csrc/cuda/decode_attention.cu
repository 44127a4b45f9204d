// Attention of few queries over a long cache, which waits for memory: a block's rows are the queries of a group of
// heads, so that a key is read once for all of them, and the keys of a sequence are split among blocks. A second launch
// merges the splits in their order.
//
// Where a tile of keys is multiplied, a thread has one key (then one column of the values) and a few rows. Keys and
// values lie in shared memory as float32, 64 columns at a time; pages are read in place.
#include "attention_tile.cuh"

namespace maskops {
namespace {

constexpr int WARP = 32;
constexpr int PARTIES = THREADS / KEYS;  // threads that share a key, each with rows of its own
constexpr int CHUNKS = 2;                // of columns of a result, in a block
constexpr int COLUMNS_HERE = CHUNKS * COLUMNS;

static_assert(KEYS == COLUMNS, "a thread has a key, then a column");

template <int ROWS_HERE>
struct DecodeMemory {
  float tile[KEYS][LD];          // of keys or values
  float queries[ROWS_HERE][LD];  // the same columns of them as of the keys
  float weights[ROWS_HERE][LD];  // scores, then weights
  float maximum[ROWS_HERE], sum[ROWS_HERE], rescale[ROWS_HERE], slope[ROWS_HERE];
  int32_t diagonal[ROWS_HERE];
  int64_t query_at[ROWS_HERE];           // where a row of q begins, NOWHERE for a row that is not there
  int64_t key_at[KEYS], value_at[KEYS];  // where keys and values begin, NOWHERE for what no row sees
  uint32_t allowed[ROWS_HERE][PARTS];
  uint32_t valid[KEYS / 32], seen[KEYS / 32];
  int32_t next_key, last_key;
};

constexpr int64_t NOWHERE = -1;

// At least one block writes the log-sum-exp, whatever there is beside it.
__host__ __device__ int64_t column_groups_of(const AttentionShape& shape) {
  return shape.value_dim == 0 ? 1 : (shape.value_dim + COLUMNS_HERE - 1) / COLUMNS_HERE;
}

// The rows of a block: (query, head of the group), the head counting first.
struct PackedRows {
  int64_t batch, kv_head, first, group, count;  // count: of all rows of the group

  __device__ bool has(int slot) const { return first + slot < count; }
  __device__ int64_t query(int slot) const { return (first + slot) / group; }
  __device__ int64_t head(int slot) const { return kv_head * group + (first + slot) % group; }
};

// One past the last key that one of the row's spans holds, 0 if none does.
__device__ int32_t last_key(const DeviceAttention& p, const RowState& row) {
  int32_t last = 0;
  for (int32_t s = 0; row.used && s < p.spans.n_spans; s++) {
    int32_t begin, end;
    read_span(p, row, s, begin, end);
    if (begin < end && end > last) last = end;
  }
  return last;
}

// Where a key begins in a head of the cache.
__device__ int64_t place_in(const DeviceRows& cache, int64_t place, int64_t slot, int64_t head) {
  return place * cache.batch_stride + head * cache.head_stride + slot * cache.row_stride;
}

// A chunk of the columns of the keys, or of the values, that rows of the block see. Returns whether all that this
// thread read is finite.
template <class T>
__device__ bool load_tile_of(const DeviceRows& rows, const int64_t (&places)[KEYS], int32_t column, int64_t width,
                             float (&tile)[KEYS][LD]) {
  const auto row_at = [&](int row) -> const T* {
    return places[row] == NOWHERE ? nullptr : reinterpret_cast<const T*>(rows.data) + places[row];
  };
  return load_rows_at<T, COLUMNS>(row_at, rows.sixteen, column, static_cast<int32_t>(width), tile);
}

__device__ bool load_tile(const DeviceAttention& p, const DeviceRows& rows, const int64_t (&places)[KEYS],
                          int32_t column, int64_t width, float (&tile)[KEYS][LD]) {
  switch (p.shape.element) {
    case Element::float32: return load_tile_of<float>(rows, places, column, width, tile);
    case Element::bfloat16: return load_tile_of<__nv_bfloat16>(rows, places, column, width, tile);
    default: return load_tile_of<__half>(rows, places, column, width, tile);
  }
}

template <bool FINITE, int EACH>
__device__ void add_values(float (&sums)[EACH], const float (&weights)[PARTIES * EACH][LD],
                           const float (&tile)[KEYS][LD]) {
  const int column = static_cast<int>(threadIdx.x) % COLUMNS, party = static_cast<int>(threadIdx.x) / COLUMNS;
#pragma unroll(EACH < 4 ? 4 : 2)
  for (int key = 0; key < KEYS; key += 4) {
    const float values[4] = {tile[key][column], tile[key + 1][column], tile[key + 2][column], tile[key + 3][column]};
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const float4 w = four(&weights[party * EACH + i][key]);
      const float each[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int j = 0; j < 4; j++) sums[i] += FINITE || each[j] != 0.0f ? each[j] * values[j] : 0.0f;
    }
  }
}

// EACH: rows of a thread.
template <int EACH>
__global__ void __launch_bounds__(THREADS, EACH < 8 ? 2 : 1) decode_kernel(const __grid_constant__ DeviceDecode p) {
  constexpr int ROWS_HERE = PARTIES * EACH;
  MASKOPS_DYNAMIC_SHARED(bytes);
  auto& memory = *reinterpret_cast<DecodeMemory<ROWS_HERE>*>(bytes);
  const DeviceAttention& call = p.forward.call;
  const AttentionShape& shape = call.shape;
  const int thread = static_cast<int>(threadIdx.x), mine = thread % KEYS, party = thread / KEYS;
  const int64_t group = shape.heads / shape.kv_heads, count = shape.q_len * group;
  const int64_t column_groups = column_groups_of(shape), row_blocks = (count + ROWS_HERE - 1) / ROWS_HERE;
  int64_t index = blockIdx.x;
  const auto first_column = static_cast<int32_t>(index % column_groups) * COLUMNS_HERE;
  index /= column_groups;
  const int64_t row_block = index % row_blocks;
  index /= row_blocks;
  const int64_t split = index % p.splits;
  index /= p.splits;
  const PackedRows rows{index / shape.kv_heads, index % shape.kv_heads, row_block * ROWS_HERE, group, count};

  // Where the mask is looked at a thread has one row and 16 keys.
  const int slot = thread % ROWS_HERE, part = thread / ROWS_HERE;
  const bool has_row = part < PARTS;
  RowState row{};
  if (has_row) row = read_row(call, rows.has(slot), rows.batch, rows.head(slot), rows.query(slot));
  if (thread == 0) {
    memory.next_key = NO_KEY;
    memory.last_key = 0;
  }
  __syncthreads();
  if (part == 0) {
    atomicMin(&memory.next_key, next_key(call, row, 0));
    atomicMax(&memory.last_key, last_key(call, row));
    memory.maximum[slot] = -INFINITY;
    memory.sum[slot] = 0.0f;
    memory.slope[slot] = row.slope;
    memory.diagonal[slot] = row.diagonal;
    memory.query_at[slot] =
        row.used ? rows.batch * call.q.batch_stride + row.head * call.q.head_stride + row.row * call.q.row_stride
                 : NOWHERE;
  }
  __syncthreads();
  // An equal share of the tiles of what the rows see.
  const int32_t low = memory.next_key, high = memory.last_key;
  const int64_t tiles = low < high ? (static_cast<int64_t>(high) - low + KEYS - 1) / KEYS : 0;
  const int64_t end = tiles * (split + 1) / p.splits;
  float sums[CHUNKS][EACH] = {};
  for (int64_t tile = tiles * split / p.splits; tile < end;) {
    const auto base = static_cast<int32_t>(low + tile * KEYS);
    __syncthreads();
    read_valid_keys(call, rows.batch, base, memory.valid);
    if (thread == 0) {
      memory.next_key = NO_KEY;
      memory.seen[0] = memory.seen[1] = 0;
    }
    __syncthreads();
    if (has_row) {
      const uint32_t valid = memory.valid[part / 2] >> part % 2 * PART & 0xffffu;
      const uint32_t allowed = allowed_keys(call, row, base + part * PART, valid);
      memory.allowed[slot][part] = allowed;
      if (allowed != 0) atomicOr(&memory.seen[part / 2], allowed << part % 2 * PART);
      if (part == 0) atomicMin(&memory.next_key, next_key(call, row, base + KEYS));
    }
    __syncthreads();
    const uint64_t seen = memory.seen[0] | static_cast<uint64_t>(memory.seen[1]) << 32;
    tile = memory.next_key == NO_KEY ? end : (static_cast<int64_t>(memory.next_key) - low) / KEYS;
    if (seen == 0) continue;
    if (thread < KEYS) {
      const int64_t key = base + mine, place = call.in_cache ? place_of(call.at, rows.batch, key) : rows.batch;
      const int64_t place_slot = call.in_cache ? key % call.at.page_size : key;
      const bool is_there = (seen >> mine & 1) != 0 && place >= 0;
      memory.key_at[mine] = is_there ? place_in(call.k, place, place_slot, rows.kv_head) : NOWHERE;
      memory.value_at[mine] = is_there ? place_in(call.v, place, place_slot, rows.kv_head) : NOWHERE;
    }

    float products[EACH] = {};
    for (int32_t column = 0; column < shape.head_dim; column += COLUMNS) {
      __syncthreads();
      load_tile(call, call.k, memory.key_at, column, shape.head_dim, memory.tile);
      for (int at = thread; at < ROWS_HERE * COLUMNS; at += THREADS) {
        const int64_t from = memory.query_at[at / COLUMNS];
        const bool is_there = from != NOWHERE && column + at % COLUMNS < shape.head_dim;
        memory.queries[at / COLUMNS][at % COLUMNS] =
            is_there ? load_element(call.q.data, shape.element, from + column + at % COLUMNS) : 0.0f;
      }
      __syncthreads();
      const auto depth = static_cast<int>(shape.head_dim - column < COLUMNS ? shape.head_dim - column : COLUMNS);
#pragma unroll(EACH < 4 ? 4 : 2)
      for (int d = 0; d < depth; d += 4) {
        const float4 x = four(&memory.tile[mine][d]);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
          const float4 y = four(&memory.queries[party * EACH + i][d]);
          products[i] += x.x * y.x;
          products[i] += x.y * y.y;
          products[i] += x.z * y.z;
          products[i] += x.w * y.w;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int of = party * EACH + i;
      float score = -INFINITY;
      if ((memory.allowed[of][mine / PART] >> mine % PART & 1) != 0) {
        RowState scored{};
        scored.slope = memory.slope[of];
        scored.diagonal = memory.diagonal[of];
        float bend;
        bool is_allowed = true;  // there is no bias
        score = score_of(call, scored, base + mine, products[i], bend, is_allowed);
      }
      memory.weights[of][mine] = score;
    }
    __syncthreads();

    for (int of = thread / WARP; of < ROWS_HERE; of += THREADS / WARP) {
      float& one = memory.weights[of][thread % WARP];
      float& other = memory.weights[of][thread % WARP + WARP];
      const float before = memory.maximum[of];
      float maximum = fmaxf(before, fmaxf(one, other));
#pragma unroll
      for (int lane = WARP / 2; lane > 0; lane /= 2) {
        maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, lane));
      }
      const float reference = maximum == -INFINITY ? 0.0f : maximum;  // until a row has seen a key
      one = expf(one - reference);
      other = expf(other - reference);
      float sum = one + other;
#pragma unroll
      for (int lane = WARP / 2; lane > 0; lane /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
      if (thread % WARP == 0) {
        const float rescale = expf(before - reference);
        memory.rescale[of] = rescale;
        memory.maximum[of] = maximum;
        memory.sum[of] = memory.sum[of] * rescale + sum;
      }
    }

#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
      const int32_t column = first_column + chunk * COLUMNS;
      if (column >= shape.value_dim) break;
      __syncthreads();
      const bool is_mine_finite = load_tile(call, call.v, memory.value_at, column, shape.value_dim, memory.tile);
      const bool is_finite = __syncthreads_and(is_mine_finite) != 0;
#pragma unroll
      for (int place = 0; place < CHUNKS; place++) {  // registers have no index
        if (place != chunk) continue;
#pragma unroll
        for (int i = 0; i < EACH; i++) sums[place][i] *= memory.rescale[party * EACH + i];
        is_finite ? add_values<true>(sums[place], memory.weights, memory.tile)
                  : add_values<false>(sums[place], memory.weights, memory.tile);
      }
    }
  }
  __syncthreads();

#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int of = party * EACH + i;
    if (!rows.has(of)) continue;
    const int64_t head = rows.head(of), query = rows.query(of);
    const int64_t at = (rows.batch * shape.heads + head) * shape.q_len + query;
    const float maximum = memory.maximum[of], sum = memory.sum[of];
    const bool writes_sums = first_column == 0 && mine == 0;
    if (p.splits > 1) {
      const int64_t of_split = split * shape.batch * shape.heads * shape.q_len + at;
      if (writes_sums) {
        p.maxima[of_split] = maximum;
        p.sums[of_split] = sum;
      }
#pragma unroll
      for (int chunk = 0; chunk < CHUNKS; chunk++) {
        const int32_t column = first_column + chunk * COLUMNS + mine;
        // What is not stored is not read: see merge_kernel.
        if (sum != 0.0f && column < shape.value_dim) p.parts[of_split * shape.value_dim + column] = sums[chunk][i];
      }
    } else {
      const RowEnd row_end = end_of_row(call, head, maximum, sum);
      if (writes_sums) p.forward.lse[at] = row_end.lse;
      const int64_t out = place_in(p.forward.out, rows.batch, query, head);
#pragma unroll
      for (int chunk = 0; chunk < CHUNKS; chunk++) {
        const int32_t column = first_column + chunk * COLUMNS + mine;
        if (column < shape.value_dim) {
          store_element(p.forward.out.data, shape.element, out + column, sums[chunk][i] * row_end.factor);
        }
      }
    }
  }
}

constexpr int MERGE_THREADS = 128;

// A block for each row: the sums of its splits, in their order.
__global__ void __launch_bounds__(MERGE_THREADS) merge_kernel(const __grid_constant__ DeviceDecode p) {
  const AttentionShape& shape = p.forward.call.shape;
  const int64_t rows = shape.batch * shape.heads * shape.q_len;
  for (int64_t at = blockIdx.x; at < rows; at += gridDim.x) {
    const int64_t head = at / shape.q_len % shape.heads;
    float maximum = -INFINITY, sum = 0.0f;
    for (int64_t split = 0; split < p.splits; split++) maximum = fmaxf(maximum, p.maxima[split * rows + at]);
    const float reference = maximum == -INFINITY ? 0.0f : maximum;
    for (int64_t split = 0; split < p.splits; split++) {
      sum += p.sums[split * rows + at] * expf(p.maxima[split * rows + at] - reference);
    }
    const RowEnd end = end_of_row(p.forward.call, head, maximum, sum);
    if (threadIdx.x == 0) p.forward.lse[at] = end.lse;
    const int64_t out = place_in(p.forward.out, at / shape.q_len / shape.heads, at % shape.q_len, head);
    for (int64_t column = threadIdx.x; column < shape.value_dim; column += blockDim.x) {
      float total = 0.0f;
      for (int64_t split = 0; split < p.splits; split++) {
        const int64_t of_split = split * rows + at;
        if (p.sums[of_split] == 0.0f) continue;  // the row saw none of these keys
        total += p.parts[of_split * shape.value_dim + column] * expf(p.maxima[of_split] - reference);
      }
      store_element(p.forward.out.data, shape.element, out + column, total * end.factor);
    }
  }
}

template <int EACH>
void run(const DeviceDecode& p, void* stream) {
  constexpr int ROWS_HERE = PARTIES * EACH;
  const AttentionShape& shape = p.forward.call.shape;
  const int64_t row_blocks = (shape.q_len * (shape.heads / shape.kv_heads) + ROWS_HERE - 1) / ROWS_HERE;
  const int64_t blocks = column_groups_of(shape) * row_blocks * p.splits * shape.batch * shape.kv_heads;
  launch(decode_kernel<EACH>, grid_of(blocks), dim3(THREADS), sizeof(DecodeMemory<ROWS_HERE>), stream, p);
}

}  // namespace

void decode_attention_cuda(const DeviceDecode& p, void* stream) {
  const AttentionShape& shape = p.forward.call.shape;
  const int64_t rows = shape.q_len * (shape.heads / shape.kv_heads);
  if (rows <= PARTIES)
    run<1>(p, stream);
  else if (rows <= 2 * PARTIES)
    run<2>(p, stream);
  else if (rows <= 4 * PARTIES)
    run<4>(p, stream);
  else
    run<8>(p, stream);
  if (p.splits == 1) return;
  const int64_t all = shape.batch * shape.heads * shape.q_len;
  launch(merge_kernel, grid_of(all < INT32_MAX ? all : INT32_MAX), dim3(MERGE_THREADS), 0, stream, p);
}

}  // namespace maskops
