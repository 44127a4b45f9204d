// Checks of attention's arguments that the bindings of attention and of a cache share.
#pragma once

#include "../../cuda/attention.h"
#include "tensors.h"

namespace maskops {

inline DeviceRows device_rows(const Tensor& tensor) {
  const int64_t bytes = bytes_of(element_of(tensor));
  const auto data = reinterpret_cast<uintptr_t>(tensor.data());
  const auto fits = [&](int64_t d) { return tensor.size(d) <= 1 || tensor.stride(d) * bytes % 16 == 0; };
  const bool sixteen = data % 16 == 0 && tensor.size(3) * bytes % 16 == 0 && fits(0) && fits(1) && fits(2);
  return {static_cast<char*>(tensor.data()), tensor.stride(0), tensor.stride(1), tensor.stride(2), sixteen};
}

inline bool adjacent(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1;
}

// Strides of a tensor that broadcasts to these four sizes; an empty tensor is absent.
inline Broadcast device_broadcast(const Tensor& tensor, const int64_t (&full)[4], const char* message) {
  if (tensor.numel() == 0) return {};
  require(tensor.dim() == 4, message);
  int64_t strides[4];
  for (int d = 0; d < 4; d++) {
    require(tensor.size(d) == 1 || tensor.size(d) == full[d], message);
    strides[d] = tensor.size(d) == 1 ? 0 : tensor.stride(d);
  }
  return {tensor.data(), strides[0], strides[1], strides[2], strides[3]};
}

}  // namespace maskops
