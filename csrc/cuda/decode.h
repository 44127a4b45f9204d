// A cache of keys and values on the device: lengths and places are read there, so that the host waits for nothing.
#pragma once

#include <cstdint>

#include "../decode.h"

namespace maskops {

// int32 or int64 numbers of a tensor on the device.
struct DeviceIntegers {
  const void* data;  // nullptr: absent
  bool wide;
  int64_t row_stride, column_stride;
};

// Where the keys of each sequence are, as the caller gave it: pages of a block table, rows of an index, or row b.
struct DevicePlaces {
  DeviceIntegers block_table, batch_index;
  int64_t rows;       // rows or pages of the cache
  int64_t places;     // of a sequence
  int64_t page_size;  // keys of a page, or the capacity of a contiguous cache
};

struct DeviceAppendKv {
  DevicePlaces at;
  DeviceIntegers lengths;
  StridedRows k_cache, v_cache, k, v;  // strides in bytes
  int64_t batch, kv_heads, new_keys, key_bytes, value_bytes;
};

void append_kv_cuda(const DeviceAppendKv& p, void* stream);

}  // namespace maskops
