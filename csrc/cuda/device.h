// What is known of CUDA in this process; torch-free, and without CUDA's headers.
#pragma once

namespace maskops {

// Why the CUDA kernels cannot run, nullptr when they can.
const char* cuda_reason();

}  // namespace maskops
