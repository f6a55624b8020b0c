// CUDA on one CPU thread, enough of it to run csrc/cuda as it stands: what is in CUDA's own cuda_runtime.h, under the
// same names. Every thread of a block is a fiber. It runs until it meets a barrier or a warp's vote, then the next one
// runs, in an order that emulate_order() chooses: what depends on the order of threads or of blocks shows.
//
// That finds wrong results, and barriers and votes that not all threads reach. machine.cpp has the fibers; built with
// EMULATE_RACES and ThreadSanitizer (tests/emulator/races.cpp), it also finds two threads of a block that touch the
// same memory without a barrier in between. It does not find missing fences between blocks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
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

extern dim3 threadIdx, blockIdx, gridDim, blockDim;

namespace emulator {

constexpr int kWarp = 32;

// What a meeting of threads is for: whether it orders their memory accesses.
enum class Kind { kBarrier, kBarrierOr, kWarpBarrier, kBallot, kMatch, kShuffle };

// Leaves a value, waits for all threads of the block or of the warp, and returns what each of them left.
const std::vector<uint64_t>& meet_block(uint64_t value, Kind kind);
const std::vector<uint64_t>& meet_warp(uint64_t value, Kind kind);

// Runs every block of a grid, one after the other.
void run_grid(dim3 grid, int threads, const std::function<void()>& kernel);

}  // namespace emulator

inline void __syncthreads() { emulator::meet_block(0, emulator::Kind::kBarrier); }

inline int __syncthreads_or(int x) {
  const auto& all = emulator::meet_block(x != 0, emulator::Kind::kBarrierOr);
  return std::any_of(all.begin(), all.end(), [](uint64_t v) { return v != 0; });
}

inline void __syncwarp() { emulator::meet_warp(0, emulator::Kind::kWarpBarrier); }

inline unsigned __ballot_sync(unsigned, bool x) {
  const auto& all = emulator::meet_warp(x, emulator::Kind::kBallot);
  unsigned vote = 0;
  for (int i = 0; i < emulator::kWarp; ++i) vote |= static_cast<unsigned>(all[i]) << i;
  return vote;
}

inline bool __any_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) != 0; }
inline bool __all_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) == 0xffffffffu; }

inline unsigned __match_any_sync(unsigned, uint32_t x) {
  const auto& all = emulator::meet_warp(x, emulator::Kind::kMatch);
  unsigned peers = 0;
  for (int i = 0; i < emulator::kWarp; ++i) peers |= static_cast<unsigned>(all[i] == x) << i;
  return peers;
}

template <class T>
T emulate_shuffle(T x, int from) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof x);
  const auto& all = emulator::meet_warp(bits, emulator::Kind::kShuffle);
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
  return __atomic_fetch_add(p, x, __ATOMIC_RELAXED);
}
template <class T>
T atomicOr(T* p, T x) {
  return __atomic_fetch_or(p, x, __ATOMIC_RELAXED);
}
template <class T>
T atomicMax(T* p, T x) {
  T before = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (before < x && !__atomic_compare_exchange_n(p, &before, x, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
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
