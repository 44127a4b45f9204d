// The device through the CUDA runtime, which is part of the binary and finds the driver when it is first asked.
#include "device.h"

#include <dlfcn.h>

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "runtime.h"

namespace maskops {
namespace {

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
    if (major * 10 + minor >= OLDEST_CAPABILITY) return "";  // one is enough; calls on another ask device_reason
    found += (index == 0 ? "" : ", ") + (is_read ? std::to_string(major) + "." + std::to_string(minor) : "unknown");
  }
  static_cast<void>(cudaGetLastError());
  return "its kernels need compute capability 7.5, the devices here have " + found;
}

// What torch does with devices, by the names of its stable interface.
struct TorchCuda {
  int32_t (*stream)(int32_t device, void** stream);
  int32_t (*create_guard)(int32_t device, void** guard);
  int32_t (*delete_guard)(void* guard);
};

// torch loads its libraries locally, so that its symbols are found by name of the library alone. Looked up once.
const TorchCuda& torch_cuda() {
  static const TorchCuda found = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    const auto symbol = [&](const char* name) { return dlsym(library != nullptr ? library : RTLD_DEFAULT, name); };
    return TorchCuda{
        reinterpret_cast<decltype(TorchCuda::stream)>(symbol("aoti_torch_get_current_cuda_stream")),
        reinterpret_cast<decltype(TorchCuda::create_guard)>(symbol("aoti_torch_create_cuda_guard")),
        reinterpret_cast<decltype(TorchCuda::delete_guard)>(symbol("aoti_torch_delete_cuda_guard")),
    };
  }();
  if (found.stream == nullptr || found.create_guard == nullptr || found.delete_guard == nullptr)
    throw std::runtime_error("maskops: a CUDA tensor, but this torch has no libtorch_cuda");
  return found;
}

struct KnownDevice {
  Device device;
  std::string reason;
};

const KnownDevice& known_device(int32_t index) {
  static std::mutex mutex;
  static std::vector<std::unique_ptr<KnownDevice>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (index < 0) throw std::invalid_argument("maskops: a CUDA tensor without a device");
  if (known.size() <= static_cast<size_t>(index)) known.resize(static_cast<size_t>(index) + 1);
  if (known[index] == nullptr) {
    int major, minor, multiprocessors, bytes;
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index), "reading a device");
    check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index), "reading a device");
    check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index), "reading a device");
    check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index), "reading a device");
    const Device device{major, minor, multiprocessors, bytes};
    known[index] = std::make_unique<KnownDevice>(KnownDevice{device, why_not_on(device, index)});
  }
  return *known[index];
}

}  // namespace

const char* cuda_reason() {
  static const std::string reason = why_not();
  return reason.empty() ? nullptr : reason.c_str();
}

const char* device_reason(int32_t index) {
  const std::string& reason = known_device(index).reason;
  return reason.empty() ? nullptr : reason.c_str();
}

const Device& device(int32_t index) { return known_device(index).device; }

void* current_stream(int32_t index) {
  void* stream = nullptr;
  if (torch_cuda().stream(index, &stream) != 0) throw std::runtime_error("maskops: torch gave no CUDA stream");
  return stream;
}

void clear_cuda(void* data, int64_t bytes, void* stream) {
  check_cuda(cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)),
             "clearing memory");
}

DeviceGuard::DeviceGuard(int32_t index) {
  int before = -1;
  check_cuda(cudaGetDevice(&before), "reading the current device");
  if (before == index) return;
  if (torch_cuda().create_guard(index, &guard_) != 0) throw std::runtime_error("maskops: torch chose no CUDA device");
}

DeviceGuard::~DeviceGuard() {
  if (guard_ != nullptr) torch_cuda().delete_guard(guard_);
}

}  // namespace maskops
