// csrc/large_memory.cpp and torch_abi.h, with a torch of before 2.11 and a look at what they ask of the system.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

#include "torch_abi.h"

namespace {

constexpr size_t SIZE = size_t{64} << 20;
void* other = nullptr;  // what somebody gives back while something is unmapped
int unmapped = 0, advised = 0;

}  // namespace

extern "C" {

int __real_munmap(void* begin, size_t size);
int __wrap_munmap(void* begin, size_t size) {
  unmapped++;
  if (other != nullptr) maskops::give_back_large(std::exchange(other, nullptr), SIZE);
  return __real_munmap(begin, size);
}
int __real_madvise(void* begin, size_t size, int advice);
int __wrap_madvise(void* begin, size_t size, int advice) {
  if (advice == MADV_HUGEPAGE) advised++;
  return __real_madvise(begin, size, advice);
}

// torch, as far as Tensor::empty_strided asks; a handle is the memory itself.
AOTITorchError aoti_torch_empty_strided(int64_t, const int64_t* sizes, const int64_t*, int32_t, int32_t, int32_t,
                                        AtenTensorHandle* tensor) {
  *tensor = static_cast<AtenTensorHandle>(std::malloc(static_cast<size_t>(sizes[0]) * sizeof(float)));
  return 0;
}
AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle tensor, void** data) {
  *data = tensor;
  return 0;
}
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor) {
  std::free(tensor);
  return 0;
}

}  // extern "C"

int main() {
  size_t size;
  void* first = maskops::take_large(SIZE, &size);
  void* second = maskops::take_large(SIZE, &size);
  maskops::give_back_large(first, SIZE);
  other = second;
  unmapped = 0;
  maskops::release_large();
  std::puts(unmapped == 1 && maskops::release_large() == SIZE ? "kept while another block was unmapped" : "unmapped");

  advised = 0;
  const int64_t sizes[] = {int64_t{16} << 20, int64_t{1} << 20};  // the second one is not large
  for (const int64_t& n : sizes) {
    const int64_t stride = 1;
    maskops::Tensor::empty_strided(1, &n, &stride, maskops::DType::float32);
  }
  std::printf("huge pages for torch's own memory: %d\n", advised);
}
