// The part of libtorch's stable C interface that maskops uses (torch >= 2.10), declared here so that the build needs no
// torch headers, and a thin typed layer over it. tests/test_build.py compiles this file together with torch's own
// headers, where they are present, so that a declaration that disagrees is a compile error.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#ifndef _WIN32
#include <pthread.h>
#endif

#include "cpu/memory.h"
#include "large_memory.h"
#include "task_trace.h"

extern "C" {
struct AtenTensorOpaque;
using AtenTensorHandle = AtenTensorOpaque*;
struct TorchLibraryOpaque;
using TorchLibraryHandle = TorchLibraryOpaque*;
struct StringOpaque;
using StringHandle = StringOpaque*;
using AOTITorchError = int32_t;
using StableIValue = uint64_t;
typedef void (*ParallelFunc)(int64_t begin, int64_t end, void* ctx);

AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle tensor, void** ret_data_ptr);
AOTITorchError aoti_torch_get_numel(AtenTensorHandle tensor, int64_t* ret_numel);
AOTITorchError aoti_torch_get_dim(AtenTensorHandle tensor, int64_t* ret_dim);
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle tensor, int64_t** ret_sizes);
AOTITorchError aoti_torch_get_strides(AtenTensorHandle tensor, int64_t** ret_strides);
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t* ret_dtype);
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle tensor, int32_t* ret_device_type);
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle tensor, int32_t* ret_device_index);
AOTITorchError aoti_torch_empty_strided(int64_t ndim, const int64_t* sizes_ptr, const int64_t* strides_ptr,
                                        int32_t dtype, int32_t device_type, int32_t device_index,
                                        AtenTensorHandle* ret_new_tensor);
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor);
AOTITorchError aoti_torch_library_init_impl(const char* ns, const char* k, const char* file, uint32_t line,
                                            TorchLibraryHandle* ret_new_torch_lib);
AOTITorchError aoti_torch_library_impl(TorchLibraryHandle self, const char* name,
                                       void (*fn)(StableIValue*, uint64_t, uint64_t));
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain_size, ParallelFunc func, void* ctx);
AOTITorchError torch_get_num_threads(uint32_t* out_num_threads);
AOTITorchError torch_string_length(StringHandle handle, size_t* length);
AOTITorchError torch_string_c_str(StringHandle handle, const char** data);
AOTITorchError torch_delete_string(StringHandle handle);
// What the last call that failed in this thread had to say; there since torch 2.13, before it torch logs it.
__attribute__((weak)) const char* torch_exception_get_what_without_backtrace();
// There since torch 2.11.
__attribute__((weak)) AOTITorchError torch_from_blob(void* data, int64_t ndim, const int64_t* sizes_ptr,
                                                     const int64_t* strides_ptr, int64_t storage_offset, int32_t dtype,
                                                     int32_t device_type, int32_t device_index, AtenTensorHandle* ret,
                                                     int32_t layout, const uint8_t* opaque_metadata,
                                                     int64_t opaque_metadata_size,
                                                     void (*deleter)(void* data, void* ctx), void* deleter_ctx);
}

namespace maskops {

inline void check_torch(AOTITorchError error, const char* what) {
  if (error != 0) throw std::runtime_error(std::string("maskops: a call into libtorch failed: ") + what);
}
#define MASKOPS_CHECK_TORCH(call) ::maskops::check_torch((call), #call)
// The same for questions to a tensor. One that has no answer, a wrapper without memory, is an argument that is refused.
inline void check_tensor(AOTITorchError error, const char* what) {
  if (error != 0) throw std::invalid_argument(std::string("maskops: a tensor did not answer: ") + what);
}
#define MASKOPS_ASK_TENSOR(call) ::maskops::check_tensor((call), #call)

// The values of torch::headeronly::ScalarType; they are part of torch's serialization format and do not change.
enum class DType : int32_t {
  uint8 = 0,
  int32 = 3,
  int64 = 4,
  float16 = 5,
  float32 = 6,
  float64 = 7,
  boolean = 11,
  bfloat16 = 15
};

inline int bytes_of(DType dtype) {
  switch (dtype) {
    case DType::uint8:
    case DType::boolean: return 1;
    case DType::float16:
    case DType::bfloat16: return 2;
    case DType::int32:
    case DType::float32: return 4;
    case DType::int64:
    case DType::float64: return 8;
  }
  return 1;
}

// Where a tensor's memory is; the types are the values of c10::DeviceType.
struct Place {
  int32_t type = 0, index = 0;
  // The processor is one place, whatever the index: tensors there say -1.
  bool operator==(const Place& other) const { return type == other.type && (type == 0 || index == other.index); }
};
constexpr Place PROCESSOR{};

// Says that torch made no tensor. The first words are those that maskops/ops/calls.py makes torch.OutOfMemoryError of.
[[noreturn]] inline void refuse_tensor(int64_t dim, const int64_t* sizes, DType dtype, Place place) {
  const char* said =
      torch_exception_get_what_without_backtrace == nullptr ? nullptr : torch_exception_get_what_without_backtrace();
  std::string words = said == nullptr ? "" : said;
  words.resize(std::min(words.size(), words.find('\n')));
  const auto says = [&](const char* part) { return words.find(part) != std::string::npos; };
  if (said != nullptr && !says("out of memory") && !says("allocate"))
    throw std::runtime_error("maskops: torch made no tensor: " + words);
  double bytes = bytes_of(dtype);
  for (int64_t d = 0; d < dim; d++) bytes *= static_cast<double>(sizes[d]);
  char size[64];
  std::snprintf(size, sizeof(size), "%.2f MiB", bytes / (1 << 20));
  const std::string where = place.type == 0 ? "the processor" : "device " + std::to_string(place.index);
  throw std::runtime_error(std::string("maskops: out of memory: no ") + size + " on " + where +
                           (words.empty() ? "" : ": " + words));
}

// Bytes of a tensor where large_memory.h is for so many, else 0. Strides are those of a dense tensor.
inline size_t large_bytes(int64_t dim, const int64_t* sizes, const int64_t* strides, DType dtype) {
  int64_t last = 0;
  for (int64_t d = 0; d < dim; d++) {
    int64_t reach;
    if (sizes[d] <= 0 || __builtin_mul_overflow(sizes[d] - 1, strides[d], &reach) ||
        __builtin_add_overflow(last, reach, &last)) {
      return 0;
    }
  }
  if (last + 1 < static_cast<int64_t>(LARGE_BYTES) / bytes_of(dtype) || last > INT64_MAX / 16) return 0;
  return static_cast<size_t>(last + 1) * static_cast<size_t>(bytes_of(dtype));
}

// A tensor over memory of large_memory.h, or nullptr where there is none.
inline AtenTensorHandle in_large_memory(size_t bytes, int64_t dim, const int64_t* sizes, const int64_t* strides,
                                        DType dtype) {
  if (torch_from_blob == nullptr) return nullptr;
  size_t size;
  void* memory = take_large(bytes, &size);
  if (memory == nullptr) return nullptr;
  // torch owns the memory from some point of the call on: where it fails after that, it has given it back already.
  thread_local const void* given_back;
  given_back = nullptr;
  const auto give_back = [](void* begin, void* size) {
    given_back = begin;
    give_back_large(begin, reinterpret_cast<size_t>(size));
  };
  AtenTensorHandle handle = nullptr;
  constexpr int32_t strided = 0, no_index = -1;  // as the processor has it
  const AOTITorchError error =
      torch_from_blob(memory, dim, sizes, strides, 0, static_cast<int32_t>(dtype), PROCESSOR.type, no_index, &handle,
                      strided, nullptr, 0, give_back, reinterpret_cast<void*>(size));
  if (error == 0) return handle;
  if (given_back != memory) give_back_large(memory, size);
  return nullptr;
}

// An owning reference to a tensor.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}
  Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  ~Tensor() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  static Tensor empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, DType dtype,
                              Place place = PROCESSOR) {
    const size_t large = place == PROCESSOR ? large_bytes(dim, sizes, strides, dtype) : 0;
    AtenTensorHandle handle = large == 0 ? nullptr : in_large_memory(large, dim, sizes, strides, dtype);
    if (handle != nullptr) return Tensor(handle);
    const AOTITorchError error =
        aoti_torch_empty_strided(dim, sizes, strides, static_cast<int32_t>(dtype), place.type, place.index, &handle);
    if (error != 0) refuse_tensor(dim, sizes, dtype, place);
    Tensor made(handle);
    if (large != 0) advise_huge_pages(made.data(), large);  // torch's own memory, as before torch 2.11
    return made;
  }
  template <size_t N>
  static Tensor empty(const int64_t (&sizes)[N], DType dtype, Place place = PROCESSOR) {
    int64_t strides[N];
    int64_t running = 1;
    for (size_t d = N; d-- > 0;) {
      strides[d] = running;
      // torch refuses sizes whose product is too large.
      running =
          static_cast<int64_t>(static_cast<uint64_t>(running) * static_cast<uint64_t>(sizes[d] > 1 ? sizes[d] : 1));
    }
    return empty_strided(N, sizes, strides, dtype, place);
  }

  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }
  template <class T = void>
  T* data() const {
    void* pointer;
    MASKOPS_ASK_TENSOR(aoti_torch_get_data_ptr(handle_, &pointer));
    return static_cast<T*>(pointer);
  }
  // nullptr where the caller passed an empty tensor for "absent".
  template <class T = void>
  T* data_or_null() const {
    return numel() == 0 ? nullptr : data<T>();
  }
  int64_t numel() const {
    int64_t value;
    MASKOPS_ASK_TENSOR(aoti_torch_get_numel(handle_, &value));
    return value;
  }
  int64_t dim() const {
    int64_t value;
    MASKOPS_ASK_TENSOR(aoti_torch_get_dim(handle_, &value));
    return value;
  }
  const int64_t* sizes() const {
    int64_t* values;
    MASKOPS_ASK_TENSOR(aoti_torch_get_sizes(handle_, &values));
    return values;
  }
  const int64_t* strides() const {
    int64_t* values;
    MASKOPS_ASK_TENSOR(aoti_torch_get_strides(handle_, &values));
    return values;
  }
  int64_t size(int64_t d) const { return sizes()[d]; }
  int64_t stride(int64_t d) const { return strides()[d]; }
  DType dtype() const {
    int32_t value;
    MASKOPS_ASK_TENSOR(aoti_torch_get_dtype(handle_, &value));
    return static_cast<DType>(value);
  }
  Place place() const {
    Place place;
    MASKOPS_ASK_TENSOR(aoti_torch_get_device_type(handle_, &place.type));
    MASKOPS_ASK_TENSOR(aoti_torch_get_device_index(handle_, &place.index));
    return place;
  }

 private:
  AtenTensorHandle handle_ = nullptr;
};

// Conversion between the 64-bit slots of a boxed call and typed arguments. Arguments arrive as owned references.
template <class T>
struct Slot;
template <>
struct Slot<Tensor> {
  static Tensor read(StableIValue value) { return Tensor(reinterpret_cast<AtenTensorHandle>(value)); }
};
template <>
struct Slot<int64_t> {
  static int64_t read(StableIValue value) { return static_cast<int64_t>(value); }
};
template <>
struct Slot<bool> {
  static bool read(StableIValue value) { return static_cast<uint8_t>(value) != 0; }
};
template <>
struct Slot<double> {
  static double read(StableIValue value) {
    double result;
    std::memcpy(&result, &value, sizeof(result));
    return result;
  }
};
// Text that becomes a string only when the function is called: the copy may find no memory, and every argument has to
// have its owner by then.
class Text {
 public:
  explicit Text(StringHandle handle) : handle_(handle) {}
  Text(Text&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  ~Text() {
    if (handle_ != nullptr) torch_delete_string(handle_);
  }
  operator std::string() const {
    size_t length;
    const char* data;
    MASKOPS_CHECK_TORCH(torch_string_length(handle_, &length));
    MASKOPS_CHECK_TORCH(torch_string_c_str(handle_, &data));
    return std::string(data, length);
  }

 private:
  StringHandle handle_;
};
template <>
struct Slot<std::string> {
  static Text read(StableIValue value) { return Text(reinterpret_cast<StringHandle>(value)); }
};

// boxed<function> is the calling convention of torch_library_impl around a typed C++ function that returns void or a
// tuple of tensors.
template <auto function>
struct Boxed;
template <class R, class... Args, R (*function)(Args...)>
struct Boxed<function> {
  template <size_t... I>
  static void call(StableIValue* stack, std::index_sequence<I...>) {
    // Every owned argument is taken over before anything can throw.
    std::tuple<decltype(Slot<std::decay_t<Args>>::read(0))...> arguments{Slot<std::decay_t<Args>>::read(stack[I])...};
    if constexpr (std::is_void_v<R>) {
      function(std::get<I>(arguments)...);
    } else {
      R results = function(std::get<I>(arguments)...);
      write(stack, results, std::make_index_sequence<std::tuple_size_v<R>>{});
    }
  }
  template <class Results, size_t... I>
  static void write(StableIValue* stack, Results& results, std::index_sequence<I...>) {
    ((stack[I] = reinterpret_cast<StableIValue>(std::get<I>(results).release())), ...);
  }
  static void entry(StableIValue* stack, uint64_t, uint64_t) { call(stack, std::index_sequence_for<Args...>{}); }
};

// Implementations of operators of a namespace for the tensors of one dispatch key, "CPU" or "CUDA".
class OperatorLibrary {
 public:
  OperatorLibrary(const char* ns, const char* key) {
    MASKOPS_CHECK_TORCH(aoti_torch_library_init_impl(ns, key, __FILE__, __LINE__, &handle_));
  }
  template <auto function>
  void implement(const char* name) {
    MASKOPS_CHECK_TORCH(aoti_torch_library_impl(handle_, name, &Boxed<function>::entry));
  }

 private:
  TorchLibraryHandle handle_;  // lives as long as the process: torch unregisters the operators when it is deleted
};

// The pool of torch's threads does not survive a fork: a child that asks OpenMP for it waits for ever, inside torch's
// own operators as well. This is how a child knows that it is one.
#ifdef _WIN32
inline bool in_forked_child() { return false; }
#else
inline std::atomic<bool> was_forked{false};
inline const int fork_handler = pthread_atfork(nullptr, nullptr, [] { was_forked = true; });
inline bool in_forked_child() { return was_forked; }
#endif

// As torch_parallel_for does it with a grain of 1, body(worker, worker + 1, context) for every worker in [0, workers),
// on threads that live as long as the call. Where there are no more threads to be had, those that run are enough: each
// of their bodies takes tasks as long as there are any.
inline void run_on_own_threads(int64_t workers, ParallelFunc body, void* context) {
  std::vector<std::exception_ptr> errors(static_cast<size_t>(workers));
  auto run = [&](int64_t worker) noexcept {
    try {
      body(worker, worker + 1, context);
    } catch (...) {
      errors[static_cast<size_t>(worker)] = std::current_exception();
    }
  };
  std::vector<std::thread> threads;
  threads.reserve(static_cast<size_t>(workers));
  try {
    for (int64_t worker = 1; worker < workers; worker++) threads.emplace_back(run, worker);
  } catch (const std::system_error&) {
  }
  run(0);
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

// Runs fn(task, worker, context) for every task in [0, n_tasks) on at most max_workers threads of torch's own pool. The
// workers pull tasks from one counter in order, so put the longest first. Which worker runs a task is not determined;
// a task must not depend on it for its result.
inline void run_tasks(int64_t n_tasks, int max_workers, void (*fn)(int64_t task, int worker, void* context),
                      void* context) {
  if (TaskTrace* trace = task_trace.load(std::memory_order_relaxed)) {
    for (int64_t task = 0; task < n_tasks; task++) {
      const int64_t begin = TaskTrace::now();
      fn(task, 0, context);
      trace->add(max_workers, TaskTrace::now() - begin);
    }
    trace->regions++;
    return;
  }
  if (max_workers <= 1 || n_tasks <= 1) {
    for (int64_t task = 0; task < n_tasks; task++) fn(task, 0, context);
    return;
  }
  uint32_t threads = 1;
  MASKOPS_CHECK_TORCH(torch_get_num_threads(&threads));
  const int64_t workers = std::min({static_cast<int64_t>(threads), static_cast<int64_t>(max_workers), n_tasks});
  // The counter has a cache line of its own: every worker reads the rest, which nobody writes.
  struct Team {
    int64_t n_tasks;
    void (*fn)(int64_t, int, void*);
    void* context;
    alignas(128) std::atomic<int64_t> next;
  } team{n_tasks, fn, context, {0}};
  auto body = [](int64_t begin, int64_t end, void* pointer) {
    auto& team = *static_cast<Team*>(pointer);
    for (int64_t worker = begin; worker < end; worker++) {
      for (int64_t task; (task = team.next.fetch_add(1, std::memory_order_relaxed)) < team.n_tasks;) {
        team.fn(task, static_cast<int>(worker), team.context);
      }
    }
  };
  if (workers <= 1) {
    body(0, 1, &team);
  } else if (in_forked_child()) {
    run_on_own_threads(workers, body, &team);
  } else {
    MASKOPS_CHECK_TORCH(torch_parallel_for(0, workers, 1, body, &team));
  }
}

}  // namespace maskops
