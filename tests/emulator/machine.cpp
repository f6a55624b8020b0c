// The fibers behind cuda_runtime.h. Never instrumented by a sanitizer: it tells ThreadSanitizer itself which fiber
// runs, and which meetings order memory.
#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>

#include "cuda_runtime.h"

#if defined(EMULATE_RACES)
#include <sanitizer/tsan_interface.h>
#endif

dim3 threadIdx, blockIdx, gridDim, blockDim;

namespace emulator {
namespace {

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s (block %u, %u, thread %u)\n", what, blockIdx.x, blockIdx.y, threadIdx.x);
  std::abort();
}

// Threads that have to meet: they all leave a value, then all of them see all values.
struct Meeting {
  int members = 0;
  int arrived = 0;
  int generation = 0;
  Kind kind = Kind::kBarrier;
  std::vector<uint64_t> values[2];

  void reset(int n) {
    members = n;
    arrived = generation = 0;
    values[0].resize(n);
    values[1].resize(n);
  }
};

struct Fiber {
  ucontext_t start;
  jmp_buf place;
  std::vector<char> stack = std::vector<char>(256 * 1024);
  bool begun = false, done = true;
  void* sanitizer = nullptr;  // what ThreadSanitizer knows it by
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps;
  Meeting block;
  const std::function<void()>* kernel = nullptr;
  jmp_buf scheduler;
  ucontext_t main;
  void* main_sanitizer = nullptr;
  char block_begins = 0, block_ends = 0;  // addresses for the sanitizer
  int current = 0;
  bool progress = false;
  unsigned seed = 0;
};

Machine machine;

#if defined(EMULATE_RACES)
// longjmp would be checked by the sanitizer, which knows nothing of fibers; so contexts are swapped, slowly.
constexpr unsigned kNoOrder = __tsan_switch_to_fiber_no_sync;

void to_scheduler() {
  Fiber& fiber = machine.fibers[machine.current];
  __tsan_switch_to_fiber(machine.main_sanitizer, kNoOrder);
  swapcontext(&fiber.start, &machine.main);
}

void to_fiber(Fiber& fiber) {
  if (machine.main_sanitizer == nullptr) machine.main_sanitizer = __tsan_get_current_fiber();
  if (fiber.sanitizer == nullptr) fiber.sanitizer = __tsan_create_fiber(0);
  __tsan_switch_to_fiber(fiber.sanitizer, kNoOrder);
  swapcontext(&machine.main, &fiber.start);
}

void publish(void* where) { __tsan_release(where); }
void observe(void* where) { __tsan_acquire(where); }
#else
void to_scheduler() {
  if (_setjmp(machine.fibers[machine.current].place) == 0) _longjmp(machine.scheduler, 1);
}

void to_fiber(Fiber& fiber) {
  if (_setjmp(machine.scheduler) != 0) return;
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  setcontext(&fiber.start);
}

void publish(void*) {}
void observe(void*) {}
#endif

// A vote or a shuffle orders nothing but itself (CUDA C++ Programming Guide, warp functions).
bool orders_memory(Kind kind) {
  return kind == Kind::kBarrier || kind == Kind::kBarrierOr || kind == Kind::kWarpBarrier;
}

const std::vector<uint64_t>& meet(Meeting& m, int member, uint64_t value, Kind kind) {
  if (m.arrived == 0) m.kind = kind;
  if (m.kind != kind) fail("threads meet at different places");
  const int generation = m.generation;
  auto& values = m.values[generation % 2];
  values[member] = value;
  if (orders_memory(kind)) publish(&values);
  machine.progress = true;
  if (++m.arrived == m.members) {
    m.arrived = 0;
    ++m.generation;
  } else {
    while (m.generation == generation) to_scheduler();
  }
  if (orders_memory(kind)) observe(&values);
  return values;
}

// A fiber is the thread of its number in every block, one after the other: to make a context takes two calls of the
// system.
[[noreturn]] void enter() {
  while (true) {
    observe(&machine.block_begins);  // what blocks and kernels before this one wrote
    (*machine.kernel)();
    publish(&machine.block_ends);
    machine.fibers[machine.current].done = true;
    machine.progress = true;
    to_scheduler();
  }
}

void make(Fiber& fiber) {
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.data();
  fiber.start.uc_stack.ss_size = fiber.stack.size();
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, enter, 0);
}

void run_block(int threads) {
  if (static_cast<int>(machine.fibers.size()) < threads) {
    machine.fibers = std::vector<Fiber>(threads);
    for (Fiber& fiber : machine.fibers) make(fiber);
  }
  machine.warps.resize(threads / kWarp);
  for (Meeting& warp : machine.warps) warp.reset(kWarp);
  machine.block.reset(threads);
  for (int i = 0; i < threads; ++i) machine.fibers[i].done = false;
  int running = threads;
  while (running > 0) {
    machine.progress = false;
    running = 0;
    for (int i = 0; i < threads; ++i) {
      const int thread = machine.seed % 2 == 0 ? i : threads - 1 - i;
      if (machine.fibers[thread].done) continue;
      machine.current = thread;
      threadIdx = dim3(thread, 0, 0);
      to_fiber(machine.fibers[thread]);
      running += !machine.fibers[thread].done;
    }
    if (running > 0 && !machine.progress) fail("threads wait for others that do not come");
  }
}

}  // namespace

const std::vector<uint64_t>& meet_block(uint64_t value, Kind kind) {
  return meet(machine.block, static_cast<int>(threadIdx.x), value, kind);
}

const std::vector<uint64_t>& meet_warp(uint64_t value, Kind kind) {
  return meet(machine.warps[threadIdx.x / kWarp], static_cast<int>(threadIdx.x % kWarp), value, kind);
}

void run_grid(dim3 grid, int threads, const std::function<void()>& kernel) {
  machine.kernel = &kernel;
  gridDim = grid;
  blockDim = dim3(threads);
  std::vector<uint64_t> blocks(static_cast<uint64_t>(grid.x) * grid.y);
  std::iota(blocks.begin(), blocks.end(), 0);
  if (machine.seed != 0) std::shuffle(blocks.begin(), blocks.end(), std::mt19937(machine.seed));
  for (const uint64_t b : blocks) {
    blockIdx = dim3(b % grid.x, b / grid.x);
    publish(&machine.block_begins);
    run_block(threads);
    observe(&machine.block_ends);
  }
}

}  // namespace emulator

// Even numbers run threads upwards, odd ones downwards; other than 0 they also shuffle the blocks.
extern "C" void emulate_order(unsigned seed) { emulator::machine.seed = seed; }
