// A stand-in for the part of libtorch that csrc/torch_abi.h declares, so that the operators run without torch in a
// program of a few files. A tensor is a buffer that ends where its last element does: AddressSanitizer sees an access
// of one element too many. It counts what is alive, runs tasks on real threads where told to, and can let the n-th
// allocation of an operator fail.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../csrc/torch_abi.h"

namespace fuzz {

using maskops::bytes_of;
using maskops::DType;

// What a tensor of these sizes and strides reaches over, in elements.
int64_t extent_of(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides);

// A tensor of the harness's own. What is handed to an operator is another handle of the same storage.
struct Value {
  std::vector<int64_t> sizes, strides;
  DType dtype = DType::float32;
  std::shared_ptr<char> storage;
  int64_t elements = 0;  // of the storage

  static Value of(std::vector<int64_t> sizes, std::vector<int64_t> strides, DType dtype);
  static Value dense(std::vector<int64_t> sizes, DType dtype);
  int64_t numel() const;
  template <class T>
  T* data() const {
    return reinterpret_cast<T*>(storage.get());
  }
};

// What the operators see of the world.
struct World {
  int threads = 1;             // what torch_get_num_threads says
  unsigned char fill = 0xff;   // what new tensors and new scratch memory hold
  int64_t fail_after = -1;     // so many allocations succeed, the next one fails; -1: none fails
  int64_t live_tensors = 0;    // handles that somebody owns
  bool verbose = false;        // calls are printed before they run
  bool inside = false;         // an operator is running: its allocations count
  int64_t largest = 16 << 20;  // bytes of one allocation; a larger one fails, as it may on any machine
};
World& world();

// What the sources have registered, in the order of the alphabet.
std::vector<std::string> operator_names();

// A call of a registered operator.
class Call {
 public:
  Call& add(const Value& value);
  Call& add(int64_t value);
  Call& add(double value);
  Call& add(bool value);
  Call& add(const std::string& text);

  // False where the operator refused (std::invalid_argument) or ran out of memory. Ends the process where it throws
  // anything else or keeps anything. Results come in their order.
  bool run(const char* name, int n_results, std::vector<Value>& results);
  const std::string& error() const { return error_; }
  bool out_of_memory() const { return out_of_memory_; }

 private:
  std::vector<StableIValue> build() const;
  void print(const char* name) const;
  struct Argument {
    enum class Kind { tensor, integer, real, boolean, text } kind;
    Value value;
    int64_t integer = 0;
    double real = 0;
    std::string text;
  };
  std::vector<Argument> arguments_;
  std::string error_;
  bool out_of_memory_ = false;
};

// Says what went wrong and aborts, so that the driver keeps the input.
[[noreturn]] void fail(const std::string& what);

}  // namespace fuzz
