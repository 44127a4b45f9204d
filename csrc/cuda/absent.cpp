// What a binary without CUDA kernels has instead of them.
#include "device.h"

namespace maskops {

const char* cuda_reason() { return "this build holds no CUDA kernels"; }

}  // namespace maskops
