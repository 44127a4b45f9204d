// The processor as a device with two multiprocessors, of compute capability 9.0 unless a test chooses another one.
#include "../../csrc/cuda/device.h"

#include <cstring>

namespace maskops {

static Device emulated{9, 0, 2, 227 << 10};

extern "C" __attribute__((visibility("default"))) void maskops_emulate_capability(int major, int minor) {
  emulated.major = major;
  emulated.minor = minor;
}

const char* cuda_reason() { return nullptr; }

const Device& device(int32_t) { return emulated; }

void* current_stream(int32_t) { return nullptr; }

void clear_cuda(void* data, int64_t bytes, void*) { std::memset(data, 0, static_cast<size_t>(bytes)); }

DeviceGuard::DeviceGuard(int32_t) : before_(-1) {}
DeviceGuard::~DeviceGuard() = default;

}  // namespace maskops
