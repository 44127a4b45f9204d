// The device through the CUDA runtime, which is part of the binary and finds the driver when it is first asked.
#include "device.h"

#include <dlfcn.h>

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "launch.h"

namespace maskops {
namespace {

constexpr int OLDEST_CAPABILITY = 75;  // that of the oldest PTX in the binary, see setup.py

std::string why_not() {
  int driver = 0, count = 0;
  if (cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0) return "there is no CUDA driver";
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    static_cast<void>(cudaGetLastError());  // an error that was told is not to be found again by the next launch
    return std::string("the CUDA driver says: ") + cudaGetErrorString(error);
  }
  if (count == 0) return "there is no CUDA device";
  std::string found;
  for (int index = 0; index < count; index++) {
    int major = 0, minor = 0;
    const bool is_read = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index) == cudaSuccess &&
                         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index) == cudaSuccess;
    if (major * 10 + minor >= OLDEST_CAPABILITY) return "";  // one is enough; calls on another fail at their launch
    found += (index == 0 ? "" : ", ") + (is_read ? std::to_string(major) + "." + std::to_string(minor) : "unknown");
  }
  static_cast<void>(cudaGetLastError());
  return "its kernels need compute capability 7.5, the devices here have " + found;
}

using StreamOfTorch = int32_t (*)(int32_t device, void** stream);

// torch loads its libraries locally, so that its symbols are found by name of the library alone.
StreamOfTorch stream_of_torch() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* symbol = dlsym(library != nullptr ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
  return reinterpret_cast<StreamOfTorch>(symbol);
}

}  // namespace

const char* cuda_reason() {
  static const std::string reason = why_not();
  return reason.empty() ? nullptr : reason.c_str();
}

const Device& device(int32_t index) {
  static std::mutex mutex;
  static std::vector<std::unique_ptr<Device>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (index < 0) throw std::invalid_argument("maskops: a CUDA tensor without a device");
  if (known.size() <= static_cast<size_t>(index)) known.resize(static_cast<size_t>(index) + 1);
  if (known[index] == nullptr) {
    int major, minor, multiprocessors, bytes;
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index), "reading a device");
    check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index), "reading a device");
    check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index), "reading a device");
    check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index), "reading a device");
    known[index] = std::make_unique<Device>(Device{major, minor, multiprocessors, bytes});
  }
  return *known[index];
}

void* current_stream(int32_t index) {
  static const StreamOfTorch lookup = stream_of_torch();
  if (lookup == nullptr) throw std::runtime_error("maskops: a CUDA tensor, but this torch has no libtorch_cuda");
  void* stream = nullptr;
  if (lookup(index, &stream) != 0) throw std::runtime_error("maskops: torch gave no CUDA stream");
  return stream;
}

void clear_cuda(void* data, int64_t bytes, void* stream) {
  check_cuda(cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)),
             "clearing memory");
}

DeviceGuard::DeviceGuard(int32_t index) : before_(-1) {
  int before = -1;
  check_cuda(cudaGetDevice(&before), "reading the current device");
  if (before == index) return;
  check_cuda(cudaSetDevice(index), "choosing a device");
  before_ = before;
}

DeviceGuard::~DeviceGuard() {
  if (before_ >= 0) static_cast<void>(cudaSetDevice(before_));
}

}  // namespace maskops
