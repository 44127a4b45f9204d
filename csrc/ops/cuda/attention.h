// What the bindings of attention and of a cache on a CUDA device share.
#pragma once

#include "../../cuda/attention.h"
#include "../attention.h"
#include "tensors.h"

namespace maskops {

inline DeviceRows device_rows(const Tensor& tensor) {
  const int64_t bytes = bytes_of(element_of(tensor));
  const auto data = reinterpret_cast<uintptr_t>(tensor.data());
  const auto fits = [&](int64_t d) { return tensor.size(d) <= 1 || tensor.stride(d) * bytes % 16 == 0; };
  const bool sixteen = data % 16 == 0 && tensor.size(3) * bytes % 16 == 0 && fits(0) && fits(1) && fits(2);
  return {static_cast<char*>(tensor.data()), tensor.stride(0), tensor.stride(1), tensor.stride(2), sixteen};
}

}  // namespace maskops
