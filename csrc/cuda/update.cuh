// update, the first kernel of compress_: what the rule keeps and v, the largest |v| of every 32 elements, and the first
// digit of the bound.
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

// One warp's 1024 elements, from where the tensors of the rule and v begin.
struct WarpState {
  float* kept[kMaxKept];
  float* residual;
};

// Eight lanes hold a group of 32, four elements each. Lane 8q + j returns the maximum of group 4j + q. The state is
// aligned, since every segment's starts at a multiple of 128 bytes.
template <class Wire, Reach kReach, class Rule>
__device__ inline WarpReport update_warp(const typename Wire::Raw* __restrict__ g, const WarpState& state, int numel,
                                         const Rule& rule, float scale) {
  using Raw = typename Wire::Raw;
  constexpr Reach kState = kReach == kTail ? kTail : kAligned;
  constexpr int kTensors = Rule::kKept + 1;
  constexpr int kAtOnce = kTensors > 2 ? 1 : 2;  // rounds whose loads are under way together, in 64 registers
  float* __restrict__ tensors[kTensors];         // those of the rule, then v
  for (int t = 0; t < Rule::kKept; ++t) tensors[t] = state.kept[t];
  tensors[Rule::kKept] = state.residual;
  WarpReport report{0, false, false};
  uint32_t gradient_bits = 0;
#pragma unroll 1
  for (int first = 0; first < kRounds; first += kAtOnce) {
    Quad<Raw> raw[kAtOnce];
    Quad<float> x[kAtOnce][kTensors];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int at = (first + j) * 4 * kWarp + 4 * lane();
      raw[j] = load<Raw, kReach>(g + at, numel - at);
#pragma unroll
      for (int t = 0; t < kTensors; ++t) x[j][t] = load<float, kState>(tensors[t] + at, numel - at);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int at = (first + j) * 4 * kWarp + 4 * lane();
      uint32_t largest = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float h = multiply(Wire::load(raw[j].x[i]), scale);
        gradient_bits |= float_bits(h);
        float* kept[kMaxKept];
#pragma unroll
        for (int t = 0; t < Rule::kKept; ++t) kept[t] = &x[j][t].x[i];
        float* v = &x[j][Rule::kKept].x[i];
        report.nonfinite |= !accumulate(rule, h, kept, v);
        const uint32_t size = magnitude(*v);
        largest = size > largest ? size : largest;
      }
#pragma unroll
      for (int t = 0; t < kTensors; ++t) store<float, kState>(tensors[t] + at, numel - at, x[j][t]);
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

template <class Wire, class Rule>
__device__ inline WarpReport update_warp(const void* gradient, int64_t offset, const WarpState& state, int numel,
                                         const Rule& rule, float scale) {
  const auto* g = static_cast<const typename Wire::Raw*>(gradient) + offset;
  if (numel < kWarpElements) return update_warp<Wire, kTail>(g, state, numel, rule, scale);
  const bool aligned = reinterpret_cast<uint64_t>(g) % sizeof(Quad<typename Wire::Raw>) == 0;
  return aligned ? update_warp<Wire, kAligned>(g, state, numel, rule, scale)
                 : update_warp<Wire, kUnaligned>(g, state, numel, rule, scale);
}

// The group whose maximum update_warp gave to this lane.
__device__ inline int group_of_lane() { return lane() % 8 * 4 + lane() / 8; }

// Four blocks on a multiprocessor: 32 warps with 3 KiB of loads under way each, 2 KiB with Adam.
extern "C" __global__ void __launch_bounds__(kThreads, 4) dgc_update(const __grid_constant__ CompressArgs a) {
  const Workspace w = a.bucket.work();
  const TileView tile(w, blockIdx.x / kChunksPerTile);
  const int chunk = static_cast<int>(blockIdx.x % kChunksPerTile);
  const DeviceSegment& s = w.segments[tile.segment];
  SegmentState& state = w.segment_states[tile.segment];
  const int numel = tile.chunk_numel(chunk) - warp() * kWarpElements;  // from this warp's first element on
  if (numel > 0) {
    const int64_t begin = tile.begin + chunk * kChunk + warp() * kWarpElements;
    WarpState at{{}, a.residual + s.state + begin};
    WarpReport report{};
    with_rule(static_cast<Accumulation>(a.rule), [&](auto of_rule) {
      using Rule = decltype(of_rule);
      for (int t = 0; t < Rule::kKept; ++t) at.kept[t] = a.kept[t] + s.state + begin;
      const Rule rule = rule_of<Rule>(a.numbers, a.bucket.segments, tile.segment);
      with_wire_type(a.gradients.type[s.source], [&](auto type) {
        report = update_warp<decltype(type)>(a.gradients.data[s.source], s.offset + begin, at, numel, rule, *a.scale);
      });
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
