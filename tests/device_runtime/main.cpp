// Runs csrc/cuda/device.cu on the machine of cuda_runtime.h and tells what it asks of it.
#include <cstdio>
#include <stdexcept>
#include <utility>

#include "../../csrc/cuda/device.h"
#include "../../csrc/cuda/shared_memory.h"
#include "cuda_runtime.h"

#define OF_TORCH extern "C" __attribute__((visibility("default")))

namespace {

constexpr int MAJOR[] = {7, 9, 8}, MINOR[] = {0, 0, 6};
int current = 0, reads = 0;
cudaError_t pending = cudaSuccess;  // stays until it is read, as CUDA's own does

constexpr char FIRST_KERNEL = 0, SECOND_KERNEL = 0;
bool is_refused = false;  // what a kernel asks for

cudaError_t said(cudaError_t error) {
  if (error != cudaSuccess) pending = error;
  return error;
}

}  // namespace

const char* cudaGetErrorString(cudaError_t error) { return error == cudaErrorInvalidDevice ? "no such device" : "no"; }
cudaError_t cudaGetLastError() { return std::exchange(pending, cudaSuccess); }
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 3;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  reads++;
  if (device > 2) return said(cudaErrorInvalidDevice);
  *value = attribute == cudaDevAttrComputeCapabilityMajor   ? MAJOR[device]
           : attribute == cudaDevAttrComputeCapabilityMinor ? MINOR[device]
                                                            : 100 * (device + 1);
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return said(cudaErrorMemoryAllocation); }

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  attributes->sharedSizeBytes = kernel == &FIRST_KERNEL ? 10 : 20;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (is_refused) return said(cudaErrorMemoryAllocation);
  std::printf("kernel %d on device %d: %d bytes\n", kernel == &FIRST_KERNEL ? 1 : 2, current, value);
  return cudaSuccess;
}

OF_TORCH int aoti_torch_get_current_cuda_stream(int device, void** stream) {
  *stream = reinterpret_cast<void*>(static_cast<intptr_t>(device + 40));
  return 0;
}
OF_TORCH int aoti_torch_create_cuda_guard(int device, void** guard) {
  *guard = new int(current);
  std::printf("torch: from device %d to %d\n", current, device);
  current = device;
  return 0;
}
OF_TORCH int aoti_torch_delete_cuda_guard(void* guard) {
  current = *static_cast<int*>(guard);
  delete static_cast<int*>(guard);
  std::printf("torch: back to device %d\n", current);
  return 0;
}

int main() {
  using namespace maskops;
  std::printf("machine: %s\n", cuda_reason() == nullptr ? "runs the kernels" : cuda_reason());
  for (int index = 0; index < 3; index++) {
    std::printf("device %d: %s\n", index, device_reason(index) == nullptr ? "runs them" : device_reason(index));
  }
  const int before = reads;
  for (int index = 0; index < 3; index++) device_reason(index), device(index);
  std::printf("%d reads more, %d and %d multiprocessors\n", reads - before, device(1).multiprocessors,
              device(2).multiprocessors);
  {
    const DeviceGuard guard(0);
  }
  {
    const DeviceGuard guard(1);
    const DeviceGuard again(1);
    std::printf("stream %d\n", static_cast<int>(reinterpret_cast<intptr_t>(current_stream(1))));
  }
  for (int call = 0; call < 2; call++) {
    try {
      call == 0 ? static_cast<void>(device(3)) : clear_cuda(nullptr, 1, nullptr);
    } catch (const std::runtime_error& error) {
      std::puts(error.what());
    }
    std::puts(cudaGetLastError() == cudaSuccess ? "nothing is left for the next launch" : "the next launch fails, too");
  }
  allow_shared_memory(&FIRST_KERNEL, 32 << 10);
  is_refused = true;
  try {
    allow_shared_memory(&FIRST_KERNEL, 48 << 10);
  } catch (const std::runtime_error& error) {
    std::puts(error.what());
  }
  is_refused = false;
  for (int call = 0; call < 2; call++) {
    for (current = 1; current < 3; current++) {
      allow_shared_memory(&FIRST_KERNEL, 48 << 10);
      allow_shared_memory(&FIRST_KERNEL, 64 << 10);
    }
    current = 1;
    allow_shared_memory(&SECOND_KERNEL, 64 << 10);
  }
}
