// A dense mask, read once: its bits, and of each block of it the hulls of its rows and the keys that any of them
// allows.
//
// A block reads 32 rows and 1024 keys of every head, 32 words a row. How its threads share them depends on where the
// bytes of the mask lie; from the words on all is the same.
#include "plan_block.cuh"

namespace maskops {
namespace plan_kernels {
namespace {

constexpr int MASK_THREADS = 256;
constexpr int MASK_WARPS = MASK_THREADS / 32;
constexpr int MASK_WORDS = MASK_KEYS / 32;
constexpr int PITCH = MASK_WORDS + 1;  // so that the lanes of a warp may each write a row of their own

enum class Reading {
  sixteen,  // keys lie side by side, aligned: a lane takes sixteen of them
  keys,     // a lane takes a key
  rows,     // rows lie closer than keys: a lane takes a row
};

struct MaskBlock {
  const uint8_t* data;  // of this head
  int first_row, first_key, lane, warp;
};

// A bit for each of four bytes that is not 0.
__device__ unsigned bits_of_four(unsigned bytes) {
  const unsigned ones = ((((bytes & 0x7f7f7f7fu) + 0x7f7f7f7fu) | bytes) & 0x80808080u) >> 7;
  return (ones * 0x01020408u) >> 24 & 0xf;
}

__device__ const uint8_t* row_at(const DevicePlanMask& p, const MaskBlock& at, int row) {
  return at.data + static_cast<int64_t>(at.first_row + row) * p.row_stride;
}

__device__ void read_sixteen(const DevicePlanMask& p, const MaskBlock& at, uint32_t* words) {
#pragma unroll
  for (int i = 0; i < MASK_ROWS / MASK_WARPS; i++) {
    const int row = at.warp + i * MASK_WARPS;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int place = 16 * (at.lane + 32 * half), key = at.first_key + place;
      unsigned bits = 0;
      if (at.first_row + row < p.q_len && key < p.k_len) {
        const uint8_t* const from = row_at(p, at, row) + key;
        if (key + 16 <= p.k_len) {
          const uint4 bytes = __ldcs(reinterpret_cast<const uint4*>(from));
          bits = bits_of_four(bytes.x) | bits_of_four(bytes.y) << 4 | bits_of_four(bytes.z) << 8 |
                 bits_of_four(bytes.w) << 12;
        } else {
          for (int j = 0; j < p.k_len - key; j++) bits |= (from[j] != 0 ? 1u : 0u) << j;
        }
      }
      const unsigned other = __shfl_xor_sync(~0u, bits, 1);
      if (at.lane % 2 == 0) words[row * PITCH + place / 32] = bits | other << 16;
    }
  }
}

__device__ void read_keys(const DevicePlanMask& p, const MaskBlock& at, uint32_t* words) {
  for (int row = at.warp; row < MASK_ROWS; row += MASK_WARPS) {
    const uint8_t* const from = row_at(p, at, row);
    unsigned mine = 0;
#pragma unroll 8
    for (int word = 0; word < MASK_WORDS; word++) {
      const int key = at.first_key + 32 * word + at.lane;
      const bool is_there = at.first_row + row < p.q_len && key < p.k_len;
      const unsigned ballot = __ballot_sync(~0u, is_there && from[key * p.key_stride] != 0);
      if (word == at.lane) mine = ballot;
    }
    words[row * PITCH + at.lane] = mine;
  }
}

__device__ void read_rows(const DevicePlanMask& p, const MaskBlock& at, uint32_t* words) {
  const uint8_t* const from = row_at(p, at, at.lane);
  for (int word = at.warp; word < MASK_WORDS; word += MASK_WARPS) {
    unsigned bits = 0;
#pragma unroll 8
    for (int i = 0; i < 32; i++) {
      const int key = at.first_key + 32 * word + i;
      const bool is_there = at.first_row + at.lane < p.q_len && key < p.k_len;
      bits |= (is_there && from[key * p.key_stride] != 0 ? 1u : 0u) << i;
    }
    words[at.lane * PITCH + word] = bits;
  }
}

// Three blocks of a multiprocessor leave the registers that eight loads of 16 bytes in flight take.
template <Reading READING>
__global__ void __launch_bounds__(MASK_THREADS, 3) mask_kernel(DevicePlanMask p) {
  MASKOPS_SHARED(uint32_t, words, [MASK_ROWS * PITCH]);
  MASKOPS_SHARED(uint32_t, columns, [MASK_WARPS * MASK_WORDS]);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int key_group = static_cast<int>(blockIdx.x) % p.key_groups, rest = static_cast<int>(blockIdx.x) / p.key_groups;
  const int row_group = rest % p.row_groups, b = rest / p.row_groups;
  const int first_row = row_group * MASK_ROWS, first_key = key_group * MASK_KEYS, word = key_group * MASK_WORDS + lane;
  constexpr int MINE = MASK_ROWS / MASK_WARPS;
  unsigned any[MINE] = {};  // over the heads
  for (int head = 0; head < p.heads; head++) {
    const MaskBlock at{p.data + b * p.batch_stride + head * p.head_stride, first_row, first_key, lane, warp};
    if (READING == Reading::sixteen) read_sixteen(p, at, words);
    if (READING == Reading::keys) read_keys(p, at, words);
    if (READING == Reading::rows) read_rows(p, at, words);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < MINE; i++) {
      const int row = warp + i * MASK_WARPS;
      const unsigned bits = words[row * PITCH + lane];
      any[i] |= bits;
      if (p.bits == nullptr || first_row + row >= p.q_len || word >= p.words) continue;
      const int64_t of_row = (static_cast<int64_t>(b) * p.heads + head) * p.q_len + first_row + row;
      p.bits[of_row * p.words + word] = static_cast<int32_t>(bits);
    }
    __syncthreads();
  }
  unsigned column = 0;
#pragma unroll
  for (int i = 0; i < MINE; i++) {
    const int row = first_row + warp + i * MASK_WARPS, key = first_key + 32 * lane;
    column |= any[i];
    const int first = warp_min(any[i] != 0 ? key + __ffs(static_cast<int>(any[i])) - 1 : FAR);
    const int last = warp_max(any[i] != 0 ? key + 32 - __clz(static_cast<int>(any[i])) : 0);
    if (lane != 0 || row >= p.q_len) continue;
    int32_t* const out = p.hulls + 2 * ((static_cast<int64_t>(b) * p.key_groups + key_group) * p.q_len + row);
    out[0] = first;
    out[1] = last;
  }
  columns[warp * MASK_WORDS + lane] = column;
  __syncthreads();
  if (warp != 0 || word >= p.words) return;
  for (int other = 1; other < MASK_WARPS; other++) column |= columns[other * MASK_WORDS + lane];
  p.seen[(static_cast<int64_t>(b) * p.row_groups + row_group) * p.words + word] = static_cast<int32_t>(column);
}

bool is_aligned(const DevicePlanMask& p) {
  const auto fits = [](int64_t stride, int32_t size) { return size <= 1 || stride % 16 == 0; };
  return p.key_stride == 1 && reinterpret_cast<uintptr_t>(p.data) % 16 == 0 && fits(p.batch_stride, p.batch) &&
         fits(p.head_stride, p.heads) && fits(p.row_stride, p.q_len);
}

}  // namespace

void launch_mask(const DevicePlanMask& p, void* stream) {
  const int64_t blocks = static_cast<int64_t>(p.batch) * p.row_groups * p.key_groups;
  if (blocks == 0) return;
  auto* const kernel = is_aligned(p)                 ? mask_kernel<Reading::sixteen>
                       : p.row_stride < p.key_stride ? mask_kernel<Reading::rows>
                                                     : mask_kernel<Reading::keys>;
  launch(kernel, grid_of(blocks), dim3(MASK_THREADS), 0, stream, p);
}

}  // namespace plan_kernels
}  // namespace maskops
