#include "decode.h"

#include "attention_tile.cuh"

namespace maskops {
namespace {

constexpr int APPEND_THREADS = 128;

template <class Word>
__device__ void copy_row(char* to, const char* from, int64_t bytes) {
  auto* target = reinterpret_cast<Word*>(to);
  const auto* source = reinterpret_cast<const Word*>(from);
  for (int64_t i = threadIdx.x; i < bytes / static_cast<int64_t>(sizeof(Word)); i += blockDim.x) target[i] = source[i];
}

__device__ void append_row(const StridedRows& cache, const StridedRows& rows, int64_t bytes, int64_t place,
                           int64_t head, int64_t slot, int64_t batch, int64_t row) {
  char* to =
      static_cast<char*>(cache.data) + place * cache.batch_stride + head * cache.head_stride + slot * cache.row_stride;
  const char* from =
      static_cast<const char*>(rows.data) + batch * rows.batch_stride + head * rows.head_stride + row * rows.row_stride;
  const auto either =
      reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | static_cast<uintptr_t>(bytes);
  if (either % 16 == 0)
    copy_row<uint4>(to, from, bytes);
  else
    copy_row<uint16_t>(to, from, bytes);
}

// A block for each new key of each head of each sequence.
__global__ void append_kernel(DeviceAppendKv p) {
  const int64_t rows = p.batch * p.kv_heads * p.new_keys;
  for (int64_t index = blockIdx.x; index < rows; index += gridDim.x) {
    const int64_t head = index % p.kv_heads, row = index / p.kv_heads % p.new_keys,
                  batch = index / p.kv_heads / p.new_keys;
    const int64_t key = read(p.lengths, batch, 0) + row, place = place_of(p.at, batch, key);
    if (place < 0) continue;
    const int64_t slot = key % p.at.page_size;
    append_row(p.k_cache, p.k, p.key_bytes, place, head, slot, batch, row);
    append_row(p.v_cache, p.v, p.value_bytes, place, head, slot, batch, row);
  }
}

}  // namespace

void append_kv_cuda(const DeviceAppendKv& p, void* stream) {
  const int64_t rows = p.batch * p.kv_heads * p.new_keys;
  if (rows == 0) return;
  launch(append_kernel, dim3(static_cast<unsigned>(rows < INT32_MAX ? rows : INT32_MAX)), dim3(APPEND_THREADS), 0,
         stream, p);
}

}  // namespace maskops
