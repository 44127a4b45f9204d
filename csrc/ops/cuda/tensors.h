// What the bindings of the CUDA kernels share. Under emulation (tests/emulation) the same operators take tensors of the
// processor.
//
// An operator's call: make a Call of its first tensor, which makes that tensor's device the current one; require that
// all others lie there; allocate with it; launch on its stream. It reads no memory of the device.
#pragma once

#include <initializer_list>

#include "../../cuda/device.h"
#include "../tensors.h"

namespace maskops {

#ifdef MASKOPS_EMULATION
constexpr const char* DEVICE_KEY = "CPU";
constexpr int32_t DEVICE_TYPE = 0;
#else
constexpr const char* DEVICE_KEY = "CUDA";
constexpr int32_t DEVICE_TYPE = 1;
#endif

class Call {
 public:
  explicit Call(const Tensor& first) : place_(checked(first.place())), guard_(place_.index) {}

  // Every tensor with elements must be on the device: a kernel cannot read others.
  void require_here(std::initializer_list<const Tensor*> tensors) const {
    for (const Tensor* tensor : tensors) {
      require(tensor->numel() == 0 || tensor->place() == place_,
              "maskops: every tensor of a call must be on one device, plans too: plan with device=q.device");
    }
  }
  template <size_t N>
  Tensor empty(const int64_t (&sizes)[N], DType dtype) const {
    return Tensor::empty(sizes, dtype, place_);
  }
  Tensor empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, DType dtype) const {
    return Tensor::empty_strided(dim, sizes, strides, dtype, place_);
  }
  void* stream() const { return current_stream(place_.index); }
  const Device& device() const { return ::maskops::device(place_.index); }

 private:
  static Place checked(Place place) {
    require(place.type == DEVICE_TYPE, "maskops: the CUDA kernels take tensors of a CUDA device");
    const char* reason = cuda_reason();
    if (reason == nullptr) reason = device_reason(place.index);
    if (reason != nullptr) throw std::runtime_error(std::string("maskops: ") + reason);
    return place;
  }

  Place place_;
  DeviceGuard guard_;
};

}  // namespace maskops
