// Decisions read from the bytes of an input: the same bytes make the same calls, and no byte leads outside of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "torch.h"

namespace fuzz {

class Input {
 public:
  Input(const uint8_t* data, size_t size) : at_(data), end_(data + size) {}

  uint8_t byte() { return at_ < end_ ? *at_++ : 0; }
  // 0 to count - 1.
  int64_t below(int64_t count) {
    const int64_t value = count > 256 ? byte() * 256 + byte() : byte();
    return count > 0 ? value % count : 0;
  }
  // True in about one of `of` cases, false where the input has ended.
  bool once_in(int64_t of) { return byte() % of == of - 1; }
  template <class T>
  T of(std::initializer_list<T> choices) {
    return choices.begin()[below(static_cast<int64_t>(choices.size()))];
  }
  // Integers that programs fall over: around 0, around a length, and the ends of the types.
  int64_t hostile(int64_t length) {
    switch (below(8)) {
      case 0: return static_cast<int8_t>(byte());
      case 1: return length + static_cast<int8_t>(byte()) / 32;
      case 2: return of<int64_t>({INT32_MAX, INT32_MIN, INT32_MAX - 1, INT32_MIN + 1});
      case 3: return of<int64_t>({INT64_MAX, INT64_MIN, int64_t{1} << 32, (int64_t{1} << 31) - length});
      case 4: return static_cast<int32_t>(static_cast<uint32_t>(byte()) << 24 | static_cast<uint32_t>(byte()) << 8);
      case 5: return INT32_MAX - length + byte() % 3 - 1;
      default: return below(length + 1);
    }
  }
  // Mostly what the kernels treat in a way of their own: ends of vectors, of tiles, of blocks.
  int64_t length(int64_t most) {
    const int64_t value = of<int64_t>({0, 1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 129, 200, 300});
    return value <= most ? value : value % (most + 1);
  }
  double real() {
    return of<double>({0.0, 1.0, 0.5, -1.0, 30.0, 1e-3, 1e30, -1e30, 1e-40, __builtin_inf(), __builtin_nan(""), 0.1});
  }
  DType floating() { return of({DType::float32, DType::bfloat16, DType::float16}); }

  // A tensor of floats, of any strides with a contiguous last dimension (rarely one that is not, which has to be
  // refused). Values are small, or, with `wild`, of every kind.
  Value floats(std::vector<int64_t> sizes, DType dtype, bool wild = false);
  // Likewise of integers, 0 everywhere.
  Value integers(std::vector<int64_t> sizes, DType dtype);
  // Now and then another size, another dtype, a dimension more or less.
  Value misshapen(const Value& value);

 private:
  std::vector<int64_t> strides(const std::vector<int64_t>& sizes);
  const uint8_t* at_;
  const uint8_t* end_;
};

// Writes integers into a tensor of any integer dtype; they wrap around as C++ does.
void set(const Value& value, int64_t index, int64_t integer);

// Runs the call, and then again in another world: more threads, other rubbish in new memory, at times with allocations
// that fail. Results must not notice; in_place names the arguments' tensors that the operator writes.
bool run_twice(Input& input, Call& call, const char* name, int n_results, std::vector<Value>& results,
               const std::vector<Value>& in_place = {});

// Fails where two tensors hold other bytes; numbers that are none are equal.
void require_same(const Value& one, const Value& other, const char* what);

}  // namespace fuzz
