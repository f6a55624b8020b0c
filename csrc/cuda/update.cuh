// update, the first kernel of compress_: u and v, the largest |v| of every 32 elements, and the first digit of the
// bound.
#pragma once

#include "common.cuh"

namespace dgc {

struct WarpReport {
  uint32_t group_max;  // of the group that this lane has been given
  bool used;
  bool nonfinite;
};

constexpr int kWarpElements = kWarp * kGroup;
constexpr int kRounds = 8;  // of four elements a lane

// One warp's 1024 elements: eight lanes hold a group of 32, four elements each. Lane 8q + j returns the maximum of
// group 4j + q. u and v are aligned, since every segment's state starts at a multiple of 128 bytes.
template <class Wire, Reach kReach, bool kMomentum>
__device__ inline WarpReport update_warp(const typename Wire::Raw* __restrict__ g, float* __restrict__ u,
                                         float* __restrict__ v, int numel, float mu, float scale, bool nesterov) {
  using Raw = typename Wire::Raw;
  constexpr Reach kState = kReach == kTail ? kTail : kAligned;
  constexpr int kAtOnce = 2;  // rounds whose loads are under way together
  WarpReport report{0, false, false};
  uint32_t gradient_bits = 0;
#pragma unroll 1
  for (int first = 0; first < kRounds; first += kAtOnce) {
    Quad<Raw> raw[kAtOnce];
    Quad<float> new_u[kAtOnce] = {}, new_v[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int at = (first + j) * 4 * kWarp + 4 * lane();
      raw[j] = load<Raw, kReach>(g + at, numel - at);
      if constexpr (kMomentum) new_u[j] = load<float, kState>(u + at, numel - at);
      new_v[j] = load<float, kState>(v + at, numel - at);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int at = (first + j) * 4 * kWarp + 4 * lane();
      uint32_t largest = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float h = multiply(Wire::load(raw[j].x[i]), scale);
        gradient_bits |= float_bits(h);
        report.nonfinite |= !accumulate(h, mu, kMomentum, nesterov, &new_u[j].x[i], &new_v[j].x[i]);
        const uint32_t size = magnitude(new_v[j].x[i]);
        largest = size > largest ? size : largest;
      }
      if constexpr (kMomentum) store<float, kState>(u + at, numel - at, new_u[j]);
      store<float, kState>(v + at, numel - at, new_v[j]);
#pragma unroll
      for (int step = 1; step < 8; step *= 2) {
        const uint32_t other = __shfl_xor_sync(kAll, largest, step);
        largest = other > largest ? other : largest;
      }
      if (lane() % 8 == first + j) report.group_max = largest;
    }
  }
  report.used = (gradient_bits & kMagnitude) != 0;
  return report;
}

template <class Wire, bool kMomentum>
__device__ inline WarpReport update_warp(const void* gradient, int64_t offset, float* u, float* v, int numel, float mu,
                                         float scale, bool nesterov) {
  const auto* g = static_cast<const typename Wire::Raw*>(gradient) + offset;
  if (numel < kWarpElements) return update_warp<Wire, kTail, kMomentum>(g, u, v, numel, mu, scale, nesterov);
  const bool aligned = reinterpret_cast<uint64_t>(g) % sizeof(Quad<typename Wire::Raw>) == 0;
  return aligned ? update_warp<Wire, kAligned, kMomentum>(g, u, v, numel, mu, scale, nesterov)
                 : update_warp<Wire, kUnaligned, kMomentum>(g, u, v, numel, mu, scale, nesterov);
}

// The group whose maximum update_warp gave to this lane.
__device__ inline int group_of_lane() { return lane() % 8 * 4 + lane() / 8; }

// Four blocks on a multiprocessor: 32 warps with 3 KiB of loads under way each.
extern "C" __global__ void __launch_bounds__(kThreads, 4) dgc_update(const __grid_constant__ CompressArgs a) {
  const Workspace w = a.bucket.work();
  const TileView tile(w, blockIdx.x / kChunksPerTile);
  const int chunk = static_cast<int>(blockIdx.x % kChunksPerTile);
  const DeviceSegment& s = w.segments[tile.segment];
  SegmentState& state = w.segment_states[tile.segment];
  const int numel = tile.chunk_numel(chunk) - warp() * kWarpElements;  // from this warp's first element on
  if (numel > 0) {
    const int64_t begin = tile.begin + chunk * kChunk + warp() * kWarpElements;
    float* u = a.momentum == nullptr ? nullptr : a.momentum + s.state + begin;
    float* v = a.residual + s.state + begin;
    const float mu = a.mu[tile.segment], scale = *a.scale;
    const void* gradient = a.gradients.data[s.source];
    const int64_t offset = s.offset + begin;
    const bool nesterov = a.nesterov != 0;
    WarpReport report{};
    with_wire_type(a.gradients.type[s.source], [&](auto type) {
      using Wire = decltype(type);
      report = u != nullptr ? update_warp<Wire, true>(gradient, offset, u, v, numel, mu, scale, nesterov)
                            : update_warp<Wire, false>(gradient, offset, u, v, numel, mu, scale, nesterov);
    });
    const bool exists = group_of_lane() * kGroup < numel;
    const int64_t group = tile.index * kGroupsPerTile + chunk * kGroupsPerChunk + warp() * kWarp + group_of_lane();
    if (exists) w.group_max[group] = report.group_max;
    count(w.histograms + tile.segment * kBins, exists, report.group_max >> 20);
    if (__any_sync(kAll, report.used) && lane() == 0) raise(&state.used);
    if (__any_sync(kAll, report.nonfinite) && lane() == 0) {
      raise(&state.nonfinite);
      raise(&w.bucket->nonfinite);
    }
  }
  if (!last_block(&state.arrived, s.tiles * kChunksPerTile)) return;
  // No digit, and rank 0, where k exceeds the number of groups.
  const Digit digit = take_digit(w.histograms + tile.segment * kBins, s.entries);
  if (threadIdx.x == 0) {
    state.prefix = static_cast<uint32_t>(digit.bin);
    state.rank = digit.rank;
  }
}

}  // namespace dgc
