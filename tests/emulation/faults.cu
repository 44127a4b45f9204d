// Kernels with a mistake each, and one without: what the emulation has to notice. Run with the name of a fault.
#include <cstdio>
#include <string>
#include <vector>

#include "../../csrc/cuda/launch.h"

namespace {

// Every thread takes over the value of its neighbour.
__global__ void neighbour(float* out, int fault) {
  MASKOPS_SHARED(float, values, [64]);
  const int mine = static_cast<int>(threadIdx.x);
  values[mine] = static_cast<float>(mine);
  if (fault == 1) {
  } else if (fault != 2 || mine != 7) {
    __syncthreads();
  }
  if (fault == 3 && mine < 32) __syncthreads();
  if (fault == 3 && mine >= 32) __syncthreads();
  out[mine] = values[(mine + 1) % 64];
  if (fault == 4) values[64 + mine % 2] = 0.0f;
}

__global__ void lanes(int* out, int fault) {
  const int mine = static_cast<int>(threadIdx.x);
  if (fault == 5 && mine == 3) return;
  int sum = mine;
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(fault == 6 ? 0xfffffffeu : 0xffffffffu, sum, step);
  const unsigned odd = __ballot_sync(0xffffffffu, mine & 1);
  const int below = __shfl_up_sync(0xffffffffu, mine, 1), above = __shfl_down_sync(0xffffffffu, mine, 1, 8);
  out[mine] = sum == 496 && odd == 0xaaaaaaaau && below == (mine == 0 ? 0 : mine - 1) &&
              above == (mine % 8 == 7 ? mine : mine + 1) && __syncthreads_count(mine < 5) == 5;
}

// 16 KiB of its own, beside those that the launch asks for.
__global__ void large(int* out) {
  MASKOPS_SHARED(int, own, [4096]);
  MASKOPS_DYNAMIC_SHARED(asked);
  own[threadIdx.x] = static_cast<int>(threadIdx.x);
  asked[threadIdx.x] = 1;
  out[threadIdx.x] = own[threadIdx.x] == static_cast<int>(threadIdx.x) && asked[threadIdx.x] == 1;
}

}  // namespace

int main(int count, char** arguments) {
  const int fault = count > 1 ? std::stoi(arguments[1]) : 0;
  std::vector<float> neighbours(64);
  std::vector<int> good(32);
  try {
    maskops::launch(neighbour, dim3(3), dim3(64), 0, nullptr, neighbours.data(), fault);
    maskops::launch(lanes, dim3(2), dim3(32), 0, nullptr, good.data(), fault);
    // A launch through launch.h asks before it takes more than 48 KiB; one that does not ask gets no more.
    std::vector<int> held(32);
    const size_t bytes = (fault == 7 ? 48 << 10 : 32 << 10) + 16;
    if (fault == 7 || fault == 8) emulation::launch(large, dim3(1), dim3(32), bytes, held.data());
    maskops::launch(large, dim3(1), dim3(32), 100 << 10, nullptr, held.data());
    for (int value : held) good[0] = good[0] == 1 && value == 1 ? 1 : 0;
  } catch (const std::exception& error) {
    std::puts(error.what());
    return 1;
  }
  int wrong = 0;
  for (int i = 0; i < 64; i++) wrong += neighbours[i] == static_cast<float>((i + 1) % 64) ? 0 : 1;
  for (int i = 0; i < 32; i++) wrong += good[i] == 1 ? 0 : 1;
  std::printf("%d wrong\n", wrong);
  return wrong == 0 ? 0 : 2;
}
