// Parts that the kernels share: names for a thread's place, loads and stores, votes and scans, the histogram, and who
// comes last.
#pragma once

#include "../arithmetic.h"
#include "args.h"

namespace dgc {

constexpr unsigned kAll = 0xffffffffu;

__device__ inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

__device__ inline int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp() { return static_cast<int>(threadIdx.x) / kWarp; }
__device__ inline unsigned lanes_below() { return (1u << lane()) - 1; }

// Four elements in a row, as one load or store moves them.
template <class T>
struct alignas(4 * sizeof(T)) Quad {
  T x[4];
};

// The ways in which a warp may read its elements.
enum Reach {
  kAligned,    // all of them are there, four at a time
  kUnaligned,  // all are there, but the gradients may start anywhere, since DDP packs them without gaps: one at a time,
               // and the four loads of a warp meet in the L1 cache
  kTail,       // the end of a segment: one at a time, if there
};

template <class T, Reach kReach>
__device__ inline Quad<T> load(const T* x, int count) {
  if constexpr (kReach == kAligned) {
    return *reinterpret_cast<const Quad<T>*>(x);
  } else {
    Quad<T> quad;
#pragma unroll
    for (int i = 0; i < 4; ++i) quad.x[i] = kReach == kUnaligned || i < count ? x[i] : T{};
    return quad;
  }
}

template <class T, Reach kReach>
__device__ inline void store(T* to, int count, const Quad<T>& quad) {
  if constexpr (kReach == kAligned) {
    *reinterpret_cast<Quad<T>*>(to) = quad;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < count) to[i] = quad.x[i];
  }
}

// One tile of the bucket, as a block finds it.
struct TileView {
  int64_t index;    // in the bucket
  int64_t segment;  // its segment
  int64_t begin;    // its first element, counted from the start of the segment
  int64_t numel;    // its elements

  __device__ TileView(const Workspace& w, int64_t tile) : index(tile), segment(w.segment_of_tile[tile]) {
    const DeviceSegment& s = w.segments[segment];
    begin = (tile - s.first_tile) * kTile;
    numel = s.numel - begin < kTile ? s.numel - begin : kTile;
  }

  // Elements of one of its chunks; 0 or less beyond its end.
  __device__ int chunk_numel(int chunk) const {
    const int64_t left = numel - static_cast<int64_t>(chunk) * kChunk;
    return left < kChunk ? static_cast<int>(left) : kChunk;
  }
};

// Calls f with the wire type behind a FloatType.
template <class F>
__device__ inline void with_wire_type(int32_t type, const F& f) {
  if (type == kFloat) return f(WireFloat{});
  if (type == kBFloat16) return f(WireBFloat16{});
  return f(WireHalf{});
}

// Sum over the lanes below this one; *total is the sum over all.
__device__ inline int64_t warp_scan(int64_t x, int64_t* total) {
  int64_t sum = x;
  for (int step = 1; step < kWarp; step *= 2) {
    const int64_t below = __shfl_up_sync(kAll, sum, step);
    if (lane() >= step) sum += below;
  }
  *total = __shfl_sync(kAll, sum, kWarp - 1);
  return sum - x;
}

// Sum over the threads below this one; *total is the sum over the block. All threads call it.
__device__ inline int64_t block_scan(int64_t x, int64_t* total) {
  __shared__ int64_t sums[kWarps];
  int64_t of_warp;
  const int64_t below = warp_scan(x, &of_warp);
  __syncthreads();  // the call before this one may still be reading
  if (lane() == 0) sums[warp()] = of_warp;
  __syncthreads();
  int64_t before = 0, all = 0;
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp()) before += sums[i];
    all += sums[i];
  }
  *total = all;
  return before + below;
}

// Counts one bin for every lane that has one. Equal neighbours are added once. All lanes call it.
__device__ inline void count(uint32_t* histogram, bool has, uint32_t bin) {
  const unsigned peers = __match_any_sync(kAll, has ? bin : kAll);
  if (has && (peers & lanes_below()) == 0) atomicAdd(histogram + bin, static_cast<uint32_t>(__popc(peers)));
}

// A block's contribution to a histogram. Where nearly every element is counted, as in warm-up, it is gathered in shared
// memory first, since all blocks would wait for the same few bins.
class Tally {
 public:
  __device__ Tally(uint32_t* histogram, uint32_t* shared, bool many)
      : histogram_(histogram), shared_(shared), many_(many) {
    if (!many_) return;
    for (int bin = static_cast<int>(threadIdx.x); bin < kBins; bin += kThreads) shared_[bin] = 0;
    __syncthreads();
  }

  __device__ void add(bool has, uint32_t bin) const { count(many_ ? shared_ : histogram_, has, bin); }

  // All threads call it, once.
  __device__ void finish() const {
    if (!many_) return;
    __syncthreads();
    for (int bin = static_cast<int>(threadIdx.x); bin < kBins; bin += kThreads)
      if (shared_[bin] != 0) atomicAdd(histogram_ + bin, shared_[bin]);
  }

 private:
  uint32_t* histogram_;
  uint32_t* shared_;
  bool many_;
};

// Returns whether this block is the last of `blocks` to come here, and so sees what all of them wrote before. All
// threads call it. The counter is zero again afterwards.
__device__ inline bool last_block(uint32_t* counter, int64_t blocks) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    // Behind the barrier, one thread's fence stands for the writes of the whole block.
    __threadfence();
    last = atomicAdd(counter, 1u) == static_cast<uint32_t>(blocks - 1);
    if (last) {
      *counter = 0;
      __threadfence();  // before this block reads what the others wrote
    }
  }
  __syncthreads();
  return last;
}

// Sets a flag that others may set at the same time.
template <class Flag>
__device__ inline void raise(Flag* flag) {
  static_assert(sizeof(Flag) == 4, "flags are 32 bits");
#if defined(__CUDA_ARCH__)
  asm volatile("st.relaxed.gpu.u32 [%0], %1;" ::"l"(flag), "r"(1u) : "memory");
#else
  __atomic_store_n(flag, Flag{1}, __ATOMIC_RELAXED);
#endif
}

struct Digit {
  int64_t bin;   // -1: there are fewer than `rank`
  int64_t rank;  // within the bin
};

// Returns the bin that holds the rank-th largest (from 1), and leaves zeros in the histogram. A whole block calls it,
// after last_block; the counts are read past the L1 cache, since other blocks have added to them.
__device__ inline Digit take_digit(uint32_t* histogram, int64_t rank) {
  constexpr int kEach = kBins / kThreads;
  __shared__ Digit found;
  if (threadIdx.x == 0) found = Digit{-1, 0};
  uint32_t counts[kEach];
  int64_t sum = 0;
  const int top = kBins - 1 - static_cast<int>(threadIdx.x) * kEach;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    counts[i] = __ldcg(histogram + top - i);
    histogram[top - i] = 0;
    sum += counts[i];
  }
  int64_t total;
  int64_t above = block_scan(sum, &total);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (above < rank && rank <= above + counts[i]) found = Digit{top - i, rank - above};
    above += counts[i];
  }
  __syncthreads();
  return found;
}

}  // namespace dgc
