// What is known of CUDA in this process; torch-free, and without CUDA's headers. Under emulation (tests/emulation) the
// processor is the device.
#pragma once

#include <cstdint>
#include <string>

namespace maskops {

constexpr int OLDEST_CAPABILITY = 75;  // that of the oldest PTX in the binary, see setup.py

// Why the CUDA kernels cannot run on any device, nullptr when they can. Asks the driver, once.
const char* cuda_reason();

// Why they cannot run on this one of several, nullptr when they can. Asks the driver once for each. Throws where there
// is no such device.
const char* device_reason(int32_t index);

struct Device {
  int major, minor;  // compute capability
  int multiprocessors;
  int64_t shared_bytes;  // of a block, at most, where a kernel opts in
};

// Why the kernels do not run on a device with these properties, "" when they do.
inline std::string why_not_on(const Device& device, int32_t index) {
  if (device.major * 10 + device.minor >= OLDEST_CAPABILITY) return "";
  return "the kernels of backend 'cuda' need compute capability 7.5, device " + std::to_string(index) + " has " +
         std::to_string(device.major) + "." + std::to_string(device.minor);
}

// The properties of a device, read once. Throws where there is no such device.
const Device& device(int32_t index);

// The stream on which torch puts its work for a device.
void* current_stream(int32_t index);

// Zeros on a stream.
void clear_cuda(void* data, int64_t bytes, void* stream);

// Makes a device the current one of this thread as long as it lives. Where it is that already, nothing is done: to make
// a device current is to create a context on it.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t index);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  void* guard_ = nullptr;  // torch's, which puts back what was there without waking a device that nobody uses
};

}  // namespace maskops
