// What is known of CUDA in this process; torch-free, and without CUDA's headers. Under emulation (tests/emulation) the
// processor is the device.
#pragma once

#include <cstdint>

namespace maskops {

// Why the CUDA kernels cannot run, nullptr when they can. Asks the driver, once.
const char* cuda_reason();

struct Device {
  int major, minor;  // compute capability
  int multiprocessors;
  int64_t shared_bytes;  // of a block, at most, where a kernel opts in
};

// The properties of a device, read once. Throws where there is no such device.
const Device& device(int32_t index);

// The stream on which torch puts its work for a device.
void* current_stream(int32_t index);

// Zeros on a stream.
void clear_cuda(void* data, int64_t bytes, void* stream);

// Makes a device the current one of this thread as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t index);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int32_t before_;  // -1: nothing to put back
};

}  // namespace maskops
