// Packing on CUDA: which tokens of a padded batch are kept, and moving them.
#pragma once

#include <cstdint>

namespace maskops {

// Elements of a contiguous (batch, length) mask; what is not 0 counts.
struct DeviceMask {
  const void* data;  // nullptr: there is none
  int32_t bytes;     // of an element: 1, 4 or 8
};

struct DeviceUnpad {
  DeviceMask real, unused;
  int64_t batch, length, capacity;
  int32_t* counts;      // (batch): scratch
  int64_t* indices;     // (capacity)
  int32_t* cu_seqlens;  // (batch + 1)
  int32_t* seqused;     // (batch)
};

// Writes all of indices, cu_seqlens and seqused, in two launches; tokens beyond the capacity are dropped.
void unpad_index_cuda(const DeviceUnpad& p, void* stream);

struct MovedRows {
  const uint8_t* source;  // (source_rows, bytes)
  uint8_t* out;           // (out_rows, bytes)
  const int64_t* index;
  int64_t source_rows, out_rows, bytes;
};

// out[i] = source[index[i]], 0 where that is no row.
void gather_rows_cuda(const MovedRows& p, void* stream);

// out[index[i]] = source[i], the last where several meet, 0 elsewhere; an index that is no row drops the row.
// `inverse`: (out_rows), scratch.
void scatter_rows_cuda(const MovedRows& p, int64_t* inverse, void* stream);

}  // namespace maskops
