// A row of the mask is a block's. Where its tokens go depends on how many the rows before it keep: the first launch
// counts, the second adds up and writes. Within a row a ballot says how many tokens of a warp lie before each.
#include "pack.h"

#include "launch.h"

namespace maskops {
namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int64_t MOST_BLOCKS = 1 << 20;

__device__ bool holds(const DeviceMask& mask, int64_t at) {
  if (mask.data == nullptr) return false;
  if (mask.bytes == 1) return static_cast<const uint8_t*>(mask.data)[at] != 0;
  if (mask.bytes == 4) return static_cast<const int32_t*>(mask.data)[at] != 0;
  return static_cast<const int64_t*>(mask.data)[at] != 0;
}

// The sum over the threads of the block, for all of them.
__device__ int64_t block_sum(int64_t value) {
  MASKOPS_SHARED(int64_t, sums, [WARPS]);
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(~0u, value, lanes);
  __syncthreads();
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  int64_t total = 0;
  for (int warp = 0; warp < WARPS; warp++) total += sums[warp];
  return total;
}

__global__ void count_kernel(DeviceUnpad p) {
  for (int64_t b = blockIdx.x; b < p.batch; b += gridDim.x) {
    int64_t kept = 0, real = 0;
    for (int64_t i = threadIdx.x; i < p.length; i += THREADS) {
      const bool is_real = holds(p.real, b * p.length + i);
      real += is_real;
      kept += is_real || holds(p.unused, b * p.length + i);
    }
    kept = block_sum(kept);
    real = block_sum(real);
    if (threadIdx.x == 0) {
      p.counts[b] = static_cast<int32_t>(kept);
      p.seqused[b] = static_cast<int32_t>(real);
    }
  }
}

__device__ int32_t clamped(int64_t tokens, int64_t capacity) {
  return static_cast<int32_t>(tokens < capacity ? tokens : capacity);
}

__global__ void index_kernel(DeviceUnpad p) {
  MASKOPS_SHARED(int, votes, [WARPS]);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  int64_t before = 0, total = 0;
  for (int64_t b = threadIdx.x; b < p.batch; b += THREADS) {
    total += p.counts[b];
    if (b < static_cast<int64_t>(blockIdx.x)) before += p.counts[b];
  }
  before = block_sum(before);
  total = block_sum(total);
  if (blockIdx.x == 0 && threadIdx.x == 0) p.cu_seqlens[0] = 0;
  for (int64_t b = blockIdx.x; b < p.batch; b += gridDim.x) {
    for (int64_t from = 0; from < p.length; from += THREADS) {
      const int64_t i = from + threadIdx.x, at = b * p.length + i;
      const bool kept = i < p.length && (holds(p.real, at) || holds(p.unused, at));
      const unsigned ballot = __ballot_sync(~0u, kept);
      if (lane == 0) votes[warp] = __popc(ballot);
      __syncthreads();
      int64_t place = before + __popc(ballot & ((1u << lane) - 1));
      for (int other = 0; other < WARPS; other++) {
        if (other < warp) place += votes[other];
        before += votes[other];
      }
      __syncthreads();
      if (kept && place < p.capacity) p.indices[place] = at;
    }
    if (threadIdx.x == 0) p.cu_seqlens[b + 1] = clamped(before, p.capacity);
    // The rows between this one and the next of this block.
    const int64_t next = b + gridDim.x;
    if (next >= p.batch) continue;
    int64_t between = 0;
    for (int64_t other = b + 1 + threadIdx.x; other < next; other += THREADS) between += p.counts[other];
    before += block_sum(between);
  }
  const int64_t step = static_cast<int64_t>(gridDim.x) * THREADS;
  for (int64_t i = total + static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; i < p.capacity; i += step) {
    p.indices[i] = p.batch * p.length;
  }
}

// ---- rows ----

// Row `i` of the results comes from the row of the source that `from` gives for it; one that there is not is 0.
template <class Word>
__global__ void move_kernel(MovedRows p, const int64_t* from) {
  const int64_t words = p.bytes / static_cast<int64_t>(sizeof(Word)), count = p.out_rows * words;
  const int64_t step = static_cast<int64_t>(gridDim.x) * THREADS;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; at < count; at += step) {
    const int64_t row = at / words, source = from[row];
    Word word{};
    if (source >= 0 && source < p.source_rows) {
      word = reinterpret_cast<const Word*>(p.source + source * p.bytes)[at - row * words];
    }
    reinterpret_cast<Word*>(p.out + row * p.bytes)[at - row * words] = word;
  }
}

__global__ void clear_kernel(int64_t* inverse, int64_t rows) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * THREADS;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; i < rows; i += step) inverse[i] = -1;
}

__global__ void invert_kernel(MovedRows p, int64_t* inverse) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * THREADS;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; i < p.source_rows; i += step) {
    const int64_t row = p.index[i];
    if (row < 0 || row >= p.out_rows) continue;
    // Whichever comes first: the last row of the source stays.
    atomicMax(reinterpret_cast<long long*>(inverse + row), static_cast<long long>(i));
  }
}

dim3 blocks_for(int64_t threads) {
  const int64_t blocks = (threads + THREADS - 1) / THREADS;
  return dim3(static_cast<unsigned>(blocks < 1 ? 1 : blocks < MOST_BLOCKS ? blocks : MOST_BLOCKS));
}

template <class Word>
void move_words(const MovedRows& p, const int64_t* from, void* stream) {
  launch(move_kernel<Word>, blocks_for(p.out_rows * (p.bytes / static_cast<int64_t>(sizeof(Word)))), dim3(THREADS), 0,
         stream, p, from);
}

void move(const MovedRows& p, const int64_t* from, void* stream) {
  if (p.out_rows == 0 || p.bytes == 0) return;
  const auto either =
      reinterpret_cast<uintptr_t>(p.source) | reinterpret_cast<uintptr_t>(p.out) | static_cast<uintptr_t>(p.bytes);
  if (either % 16 == 0) return move_words<uint4>(p, from, stream);
  if (either % 4 == 0) return move_words<uint32_t>(p, from, stream);
  if (either % 2 == 0) return move_words<uint16_t>(p, from, stream);
  move_words<uint8_t>(p, from, stream);
}

}  // namespace

void unpad_index_cuda(const DeviceUnpad& p, void* stream) {
  const int64_t rows = p.batch < 1 ? 1 : p.batch < MOST_BLOCKS ? p.batch : MOST_BLOCKS;
  launch(count_kernel, dim3(static_cast<unsigned>(rows)), dim3(THREADS), 0, stream, p);
  launch(index_kernel, dim3(static_cast<unsigned>(rows)), dim3(THREADS), 0, stream, p);
}

void gather_rows_cuda(const MovedRows& p, void* stream) { move(p, p.index, stream); }

void scatter_rows_cuda(const MovedRows& p, int64_t* inverse, void* stream) {
  if (p.out_rows == 0 || p.bytes == 0) return;
  launch(clear_kernel, blocks_for(p.out_rows), dim3(THREADS), 0, stream, inverse, p.out_rows);
  if (p.source_rows > 0) launch(invert_kernel, blocks_for(p.source_rows), dim3(THREADS), 0, stream, p, inverse);
  move(p, inverse, stream);
}

}  // namespace maskops
