// The fibres and their schedule.
#include "emulation.h"

#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <cstdio>
#include <exception>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace emulation {

Index thread_index, block_index;
dim3 block_size, grid_size;
int64_t launches = 0;

namespace {

constexpr size_t STACK_BYTES = 256 << 10, MOST_THREADS = 1024;
constexpr size_t SHARED_BYTES = 227 << 10, CANARY_BYTES = 256;  // of a block on sm_90; what must stay untouched behind
constexpr size_t WITHOUT_ASKING = 48 << 10;                     // of a block whose kernel was not allowed more
constexpr unsigned char POISON = 0xff;                          // NaN in every format, -1

// ---- switching stacks
// ------------------------------------------------------------------------------------------------

#if defined(__x86_64__)
// Saves the registers that a call preserves on one stack and goes on where another was left.
using Context = void*;
extern "C" void emulation_switch(Context* from, Context to);
asm(R"(
.text
.hidden emulation_switch
.globl emulation_switch
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
void prepare(Context& context, char* stack, void (*entry)()) {
  auto* top = reinterpret_cast<uint64_t*>(stack + STACK_BYTES);
  *--top = 0;  // where entry would return to; also what aligns its stack as a call does
  *--top = reinterpret_cast<uint64_t>(entry);
  for (int i = 0; i < 6; i++) *--top = 0;
  context = top;
}
void switch_stacks(Context& from, Context& to) { emulation_switch(&from, to); }
#else
using Context = ucontext_t;
void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = STACK_BYTES;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
void switch_stacks(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

// ---- a block
// ----------------------------------------------------------------------------------------------------------

struct Fibre {
  Context context;
  Index index;
  const uint64_t* waits_for;  // goes on when this is another number than it was; nullptr: runs
  uint64_t seen;
  int line;  // where it waits
  bool done;
};

// What the lanes of one mask exchange. Two sets of values: a lane may be one exchange ahead of the others, not two.
struct Exchange {
  uint32_t mask;
  uint64_t generation;
  uint32_t arrived;
  int line;
  Lanes values[2];
};

struct Block {
  std::vector<Fibre> fibres;
  int running;  // index of the fibre that runs
  Context scheduler;
  uint64_t barrier_generation;
  int barrier_arrived, barrier_line, barrier_sum, barrier_result;
  std::vector<std::vector<Exchange>> exchanges;             // of each warp
  std::map<const void*, std::pair<size_t, size_t>> shared;  // key -> place, bytes
  size_t dynamic_bytes, shared_used;
  size_t limit, asked;  // of shared memory: what the launch may take, and what it and its variables take
  std::exception_ptr error;
  const std::function<void()>* thread;
} block;

std::map<const void*, size_t> allowed;  // kernel -> shared memory that a launch may ask for
std::mutex mutex;                       // autograd calls from threads of its own
char* stacks = nullptr;
alignas(128) unsigned char shared[SHARED_BYTES + CANARY_BYTES];

std::string here() {
  return "in thread (" + std::to_string(thread_index.x) + ", " + std::to_string(thread_index.y) + ", " +
         std::to_string(thread_index.z) + ") of block (" + std::to_string(block_index.x) + ", " +
         std::to_string(block_index.y) + ", " + std::to_string(block_index.z) + ")";
}

void wait(const uint64_t* generation, uint64_t seen, int line) {
  Fibre& self = block.fibres[block.running];
  self.waits_for = generation;
  self.seen = seen;
  self.line = line;
  switch_stacks(self.context, block.scheduler);
}

void enter() {
  try {
    (*block.thread)();
  } catch (...) {
    if (!block.error) block.error = std::current_exception();
  }
  Fibre& self = block.fibres[block.running];
  self.done = true;
  switch_stacks(self.context, block.scheduler);
}

// A permutation of [0, count): from `first` by a step that has no factor with count.
struct Order {
  uint64_t first, step, count;
  Order(uint64_t seed, uint64_t count) : count(count) {
    uint64_t x = (seed + 1) * 0x9e3779b97f4a7c15u;
    x ^= x >> 31;
    first = x % count;
    switch (x >> 40 & 3) {
      case 0: step = 1; break;
      case 1: step = count - 1; break;
      default: step = x >> 44 | 1; break;
    }
    while (!coprime(step % count, count)) step++;
  }
  static bool coprime(uint64_t a, uint64_t b) {
    while (a != 0) {
      const uint64_t rest = b % a;
      b = a;
      a = rest;
    }
    return b == 1;
  }
  uint64_t operator[](uint64_t i) const { return (first + i % count * (step % count)) % count; }
};

void describe_deadlock() {
  std::string message = "maskops emulation: not every thread of the block comes to its barrier or exchange:";
  int listed = 0;
  for (size_t i = 0; i < block.fibres.size() && listed < 8; i++) {
    const Fibre& fibre = block.fibres[i];
    if (i > 0 && fibre.done == block.fibres[i - 1].done && fibre.line == block.fibres[i - 1].line) continue;
    message += " thread " + std::to_string(i) + (fibre.done ? " has ended;" : " waits at line ");
    if (!fibre.done) message += std::to_string(fibre.line) + ";";
    listed++;
  }
  throw std::runtime_error(message);
}

void run_block(uint64_t seed) {
  const size_t threads = block.fibres.size();
  std::memset(shared, POISON, block.dynamic_bytes + CANARY_BYTES);
  block.shared.clear();
  block.shared_used = block.dynamic_bytes + CANARY_BYTES;
  block.asked = block.dynamic_bytes;
  block.barrier_generation = 0;
  block.barrier_arrived = block.barrier_sum = 0;
  for (auto& of_warp : block.exchanges) of_warp.clear();
  for (size_t i = 0; i < threads; i++) {
    Fibre& fibre = block.fibres[i];
    fibre.waits_for = nullptr;
    fibre.done = false;
    fibre.line = 0;
    const auto x = static_cast<unsigned>(i);
    fibre.index = {x % block_size.x, x / block_size.x % block_size.y, x / block_size.x / block_size.y};
    prepare(fibre.context, stacks + i * STACK_BYTES, enter);
  }
  size_t done = 0;
  for (uint64_t pass = 0; done < threads; pass++) {
    const Order order(seed * 0x100000001b3u + pass, threads);
    bool progressed = false;
    for (size_t i = 0; i < threads; i++) {
      const size_t at = order[i];
      Fibre& fibre = block.fibres[at];
      if (fibre.done || (fibre.waits_for != nullptr && *fibre.waits_for == fibre.seen)) continue;
      progressed = true;
      fibre.waits_for = nullptr;
      block.running = static_cast<int>(at);
      thread_index = fibre.index;
      switch_stacks(block.scheduler, fibre.context);
      done += fibre.done ? 1 : 0;
      if (block.error) std::rethrow_exception(block.error);
    }
    if (!progressed) describe_deadlock();
  }
  const auto intact = [](size_t begin) {
    return std::all_of(shared + begin, shared + begin + CANARY_BYTES,
                       [](unsigned char byte) { return byte == POISON; });
  };
  bool clean = intact(block.dynamic_bytes);
  for (const auto& [key, place] : block.shared) clean = clean && intact(place.first + place.second);
  if (!clean) throw std::runtime_error("maskops emulation: a block wrote past the end of its shared memory " + here());
}

}  // namespace

void fail(const char* what, int line) {
  throw std::runtime_error(std::string("maskops emulation: ") + what + " at line " + std::to_string(line) + " " +
                           here());
}

int lane() { return block.running % WARP; }

int barrier(int value, int line) {
  const auto threads = static_cast<int>(block.fibres.size());
  if (block.barrier_arrived > 0 && block.barrier_line != line) {
    fail(("threads meet at different barriers, the other one at line " + std::to_string(block.barrier_line)).c_str(),
         line);
  }
  block.barrier_line = line;
  block.barrier_sum += value;
  if (++block.barrier_arrived == threads) {
    block.barrier_result = block.barrier_sum;
    block.barrier_arrived = block.barrier_sum = 0;
    block.barrier_generation++;
    // The one that comes last does not go on first, as little as on a device.
    wait(nullptr, 0, line);
  } else {
    wait(&block.barrier_generation, block.barrier_generation, line);
  }
  return block.barrier_result;
}

const Lanes& exchange(uint32_t mask, uint64_t value, int line) {
  const int warp = block.running / WARP, mine = block.running % WARP;
  const int lanes = std::min<int>(WARP, static_cast<int>(block.fibres.size()) - warp * WARP);
  const uint32_t present = lanes == WARP ? ~0u : (1u << lanes) - 1;
  if ((mask >> mine & 1) == 0) fail("a lane is not in the mask of its own exchange", line);
  auto& of_warp = block.exchanges[warp];
  size_t at = 0;
  while (at < of_warp.size() && of_warp[at].mask != mask) at++;
  if (at == of_warp.size()) {
    if (of_warp.size() == of_warp.capacity()) fail("a warp exchanges under more than 64 masks", line);
    of_warp.push_back({mask, 0, 0, line, {}});
  }
  Exchange& meeting = of_warp[at];
  if (meeting.arrived != 0 && meeting.line != line) {
    fail(("lanes meet at different exchanges, the other one at line " + std::to_string(meeting.line)).c_str(), line);
  }
  meeting.line = line;
  Lanes& values = meeting.values[meeting.generation & 1];
  values[mine] = value;
  meeting.arrived |= 1u << mine;
  if (meeting.arrived == (mask & present)) {
    meeting.arrived = 0;
    meeting.generation++;
  } else {
    wait(&meeting.generation, meeting.generation, line);
  }
  return values;
}

void* dynamic_memory() { return shared; }

void* shared_memory(const void* key, size_t bytes) {
  const auto found = block.shared.find(key);
  if (found != block.shared.end()) return shared + found->second.first;
  const size_t at = (block.shared_used + 127) / 128 * 128;
  block.asked += bytes;
  if (block.asked > block.limit) {
    throw std::runtime_error(
        "maskops: launching a kernel: its variables and the shared memory that the launch asks "
        "for are more than 48 KiB, and it was not allowed more");
  }
  if (at + bytes > SHARED_BYTES) throw std::runtime_error("maskops emulation: more shared memory than a block has");
  block.shared[key] = {at, bytes};
  block.shared_used = at + bytes + CANARY_BYTES;
  std::memset(shared + at, POISON, bytes + CANARY_BYTES);
  return shared + at;
}

void run_grid(const void* kernel, dim3 grid, dim3 threads, size_t dynamic_bytes, const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(mutex);
  const size_t count = size_t{threads.x} * threads.y * threads.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  const auto known = allowed.find(kernel);
  block.limit = known == allowed.end() ? WITHOUT_ASKING : SHARED_BYTES;
  const size_t most_dynamic = known == allowed.end() ? WITHOUT_ASKING : known->second;
  if (count == 0 || dynamic_bytes > most_dynamic || count > MOST_THREADS || threads.z > 64 || blocks == 0 ||
      grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 || dynamic_bytes > SHARED_BYTES - 4096) {
    throw std::runtime_error("maskops: launching a kernel: invalid configuration argument");
  }
  if (stacks == nullptr) {
    void* memory = mmap(nullptr, STACK_BYTES * MOST_THREADS, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("maskops emulation: no memory for stacks");
    stacks = static_cast<char*>(memory);
  }
  launches++;
  grid_size = grid;
  block_size = threads;
  block.fibres.resize(count);
  block.exchanges.resize((count + WARP - 1) / WARP);
  for (auto& of_warp : block.exchanges) of_warp.reserve(64);  // references to them stay
  block.dynamic_bytes = dynamic_bytes;
  block.error = nullptr;
  block.thread = &thread;
  const Order order(blocks, blocks);
  for (uint64_t i = 0; i < blocks; i++) {
    const uint64_t at = order[i];
    block_index = {static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
                   static_cast<unsigned>(at / grid.x / grid.y)};
    run_block(at);
  }
}

}  // namespace emulation

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = static_cast<int>(emulation::SHARED_BYTES);
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  const std::lock_guard<std::mutex> lock(emulation::mutex);
  if (value < 0 || static_cast<size_t>(value) > emulation::SHARED_BYTES) return cudaErrorInvalidValue;
  emulation::allowed[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}
