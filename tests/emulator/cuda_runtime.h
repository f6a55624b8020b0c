// CUDA on one CPU thread, enough of it to run csrc/cuda as it stands: what is in CUDA's own cuda_runtime.h, under the
// same names. Every thread of a block is a fiber. It runs until it meets a barrier or a warp's vote, then the next one
// runs, in an order that emulate_order() chooses: what depends on the order of threads or of blocks shows.
//
// It finds wrong results, barriers and votes that not all threads reach, and accesses out of bounds where the caller
// looks for them. It does not find what depends on real concurrency: a missing fence, or a barrier left out between two
// accesses that happen to come in the right order.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline dim3 threadIdx, blockIdx, gridDim, blockDim;

namespace emulator {

constexpr int kWarp = 32;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s (block %u, %u, thread %u)\n", what, blockIdx.x, blockIdx.y, threadIdx.x);
  std::abort();
}

// Threads that have to meet: they all leave a value, then all of them see all values.
struct Meeting {
  int members = 0;
  int arrived = 0;
  int generation = 0;
  const char* kind = "";
  std::vector<uint64_t> values[2];
};

struct Fiber {
  ucontext_t start;
  jmp_buf place;
  std::vector<char> stack = std::vector<char>(256 * 1024);
  bool begun = false, done = true;
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps;
  Meeting block;
  std::function<void()> kernel;
  jmp_buf scheduler;
  ucontext_t main;
  int current = 0;
  bool progress = false;
  unsigned seed = 0;
};

inline Machine machine;

inline void pause() {
  const int me = machine.current;
  if (_setjmp(machine.fibers[me].place) == 0) _longjmp(machine.scheduler, 1);
}

inline const std::vector<uint64_t>& meet(Meeting& m, int member, uint64_t value, const char* kind) {
  if (m.arrived == 0) m.kind = kind;
  if (std::strcmp(m.kind, kind) != 0) fail("threads meet at different places");
  const int generation = m.generation;
  auto& values = m.values[generation % 2];
  values[member] = value;
  machine.progress = true;
  if (++m.arrived == m.members) {
    m.arrived = 0;
    ++m.generation;
  } else {
    while (m.generation == generation) pause();
  }
  return values;
}

inline const std::vector<uint64_t>& meet_warp(uint64_t value, const char* kind) {
  return meet(machine.warps[threadIdx.x / kWarp], threadIdx.x % kWarp, value, kind);
}

inline void enter() {
  machine.kernel();
  machine.fibers[machine.current].done = true;
  machine.progress = true;
  _longjmp(machine.scheduler, 1);
}

// Runs one fiber until it pauses or ends.
inline void resume(int thread) {
  Fiber& fiber = machine.fibers[thread];
  machine.current = thread;
  threadIdx = dim3(thread, 0, 0);
  if (_setjmp(machine.scheduler) != 0) return;
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  setcontext(&fiber.start);
}

inline void run_block(int threads) {
  if (static_cast<int>(machine.fibers.size()) < threads) machine.fibers = std::vector<Fiber>(threads);
  machine.warps.assign(threads / kWarp, Meeting{});
  for (Meeting& warp : machine.warps) {
    warp.members = kWarp;
    warp.values[0].resize(kWarp);
    warp.values[1].resize(kWarp);
  }
  machine.block = Meeting{};
  machine.block.members = threads;
  machine.block.values[0].resize(threads);
  machine.block.values[1].resize(threads);
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = machine.fibers[i];
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.data();
    fiber.start.uc_stack.ss_size = fiber.stack.size();
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, enter, 0);
    fiber.begun = fiber.done = false;
  }
  int running = threads;
  while (running > 0) {
    machine.progress = false;
    running = 0;
    for (int i = 0; i < threads; ++i) {
      const int thread = machine.seed % 2 == 0 ? i : threads - 1 - i;
      if (machine.fibers[thread].done) continue;
      resume(thread);
      running += !machine.fibers[thread].done;
    }
    if (running > 0 && !machine.progress) fail("threads wait for others that do not come");
  }
}

inline void run_grid(dim3 grid, int threads, std::function<void()> kernel) {
  machine.kernel = std::move(kernel);
  gridDim = grid;
  blockDim = dim3(threads);
  std::vector<uint64_t> blocks(static_cast<uint64_t>(grid.x) * grid.y);
  std::iota(blocks.begin(), blocks.end(), 0);
  if (machine.seed != 0) std::shuffle(blocks.begin(), blocks.end(), std::mt19937(machine.seed));
  for (const uint64_t b : blocks) {
    blockIdx = dim3(b % grid.x, b / grid.x);
    run_block(threads);
  }
}

}  // namespace emulator

inline void __syncthreads() { emulator::meet(emulator::machine.block, threadIdx.x, 0, "barrier"); }

inline int __syncthreads_or(int x) {
  const auto& all = emulator::meet(emulator::machine.block, threadIdx.x, x != 0, "barrier or");
  return std::any_of(all.begin(), all.end(), [](uint64_t v) { return v != 0; });
}

inline void __syncwarp() { emulator::meet_warp(0, "warp barrier"); }

inline unsigned __ballot_sync(unsigned, bool x) {
  const auto& all = emulator::meet_warp(x, "ballot");
  unsigned vote = 0;
  for (int i = 0; i < emulator::kWarp; ++i) vote |= static_cast<unsigned>(all[i]) << i;
  return vote;
}

inline bool __any_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) != 0; }
inline bool __all_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) == 0xffffffffu; }

inline unsigned __match_any_sync(unsigned, uint32_t x) {
  const auto& all = emulator::meet_warp(x, "match");
  unsigned peers = 0;
  for (int i = 0; i < emulator::kWarp; ++i) peers |= static_cast<unsigned>(all[i] == x) << i;
  return peers;
}

template <class T>
T emulate_shuffle(T x, int from) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof x);
  const auto& all = emulator::meet_warp(bits, "shuffle");
  std::memcpy(&x, &all[from], sizeof x);
  return x;
}

template <class T>
T __shfl_sync(unsigned, T x, int from) {
  return emulate_shuffle(x, from);
}
template <class T>
T __shfl_up_sync(unsigned, T x, int by) {
  const int lane = threadIdx.x % emulator::kWarp;
  return emulate_shuffle(x, lane >= by ? lane - by : lane);
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return emulate_shuffle(x, static_cast<int>(threadIdx.x % emulator::kWarp) ^ mask);
}

inline void __threadfence() {}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
T atomicAdd(T* p, T x) {
  const T before = *p;
  *p += x;
  return before;
}
template <class T>
T atomicMax(T* p, T x) {
  const T before = *p;
  *p = std::max(*p, x);
  return before;
}

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
#define CUDART_VERSION 13000
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor };

inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 0;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int byte, size_t n, cudaStream_t) {
  std::memset(p, byte, n);
  return cudaSuccess;
}
template <class Args>
cudaError_t cudaLaunchKernel(void (*kernel)(Args), dim3 grid, dim3 block, void** args, size_t, cudaStream_t) {
  const Args copy = *static_cast<const Args*>(args[0]);
  emulator::run_grid(grid, block.x, [&] { kernel(copy); });
  return cudaSuccess;
}
