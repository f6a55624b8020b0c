// bound, collect, digit and last, the kernels of compress_ that find the threshold: the k-th largest |v| of every
// segment, digit by digit, among the candidates that reach the bound.
#pragma once

#include "common.cuh"

namespace dgc {

extern "C" __global__ void __launch_bounds__(kThreads) dgc_bound(const __grid_constant__ CompressArgs a) {
  const Workspace w = a.bucket.work();
  const TileView tile(w, blockIdx.x);
  SegmentState& state = w.segment_states[tile.segment];
  uint32_t* histogram = w.histograms + tile.segment * kBins;
  const uint32_t* group_max = w.group_max + tile.index * kGroupsPerTile;
  const int groups = static_cast<int>(div_up(tile.numel, kGroup));
  if (state.rank != 0) {
    const uint32_t prefix = state.prefix;
    // All loads first: the compiler moves none of them past an atomic.
    constexpr int kEach = kGroupsPerTile / kThreads;
    uint32_t largest[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int group = i * kThreads + static_cast<int>(threadIdx.x);
      largest[i] = group < groups ? group_max[group] : kInfinity;
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      // Maxima are finite, so what is not there has no prefix of theirs.
      count(histogram, largest[i] >> 20 == prefix, largest[i] >> 9 & (kBins - 1));
    }
  }
  if (!last_block(&state.arrived, w.segments[tile.segment].tiles)) return;
  const int64_t rank = state.rank;
  const Digit digit = take_digit(histogram, rank);
  if (threadIdx.x == 0) state.bound = rank == 0 ? 0 : state.prefix << 20 | static_cast<uint32_t>(digit.bin) << 9;
}

// The bound that holds for a tile. Zeros are sent only where fewer than k entries are not zero; then k zeros lie among
// the first 2k elements.
__device__ inline uint32_t bound_of(const TileView& tile, const DeviceSegment& s, const SegmentState& state) {
  return state.bound == 0 && tile.begin >= 2 * s.entries ? 1 : state.bound;
}

// Finds a chunk's candidates, four groups at a time: eight lanes look at a group, four elements each. Calls
// f(element, bits, mask) with the lane's first element, counted in the chunk, its four values, and which of them are
// candidates. Order: by group, by lane, by element. A whole warp calls it.
template <class F>
__device__ inline void over_groups(const float* v, const uint16_t* groups, int n_groups, int numel, uint32_t bound,
                                   const F& f) {
  for (int i = 0; i < n_groups; i += 4) {
    const int mine = i + lane() / 8;
    const int element = mine < n_groups ? groups[mine] * static_cast<int>(kGroup) + lane() % 8 * 4 : numel;
    const Quad<float> x =
        element + 4 <= numel ? load<float, kAligned>(v + element, 4) : load<float, kTail>(v + element, numel - element);
    uint32_t bits[4];
    unsigned mask = 0;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      bits[c] = float_bits(x.x[c]);
      if (element + c < numel && magnitude(x.x[c]) >= bound) mask |= 1u << c;
    }
    f(element, bits, mask);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads) dgc_collect(const __grid_constant__ CompressArgs a) {
  __shared__ uint16_t groups[kWarps][kGroupsPerChunk];
  __shared__ int64_t first_of_tile;
  __shared__ uint32_t bins[kBins];
  const Workspace w = a.bucket.work();
  const TileView tile(w, blockIdx.x);
  const DeviceSegment& s = w.segments[tile.segment];
  SegmentState& state = w.segment_states[tile.segment];
  uint32_t* histogram = w.histograms + tile.segment * kBins;
  const int64_t chunk = tile.index * kChunksPerTile + warp();
  const int numel = tile.chunk_numel(warp());
  const float* v = a.residual + s.state + tile.begin + warp() * kChunk;
  const uint32_t bound = bound_of(tile, s, state);

  // Groups that reach the bound, in order.
  uint16_t* mine = groups[warp()];
  int n_groups = 0;
  uint32_t largest[kGroupsPerChunk / kWarp];
#pragma unroll
  for (int i = 0; i < kGroupsPerChunk / kWarp; ++i) {
    const int group = i * kWarp + lane();
    largest[i] = group * kGroup < numel ? w.group_max[chunk * kGroupsPerChunk + group] : 0;
  }
#pragma unroll
  for (int i = 0; i < kGroupsPerChunk / kWarp; ++i) {
    const int group = i * kWarp + lane();
    const bool reaches = group * kGroup < numel && largest[i] >= bound;
    const unsigned vote = __ballot_sync(kAll, reaches);
    if (reaches) mine[n_groups + __popc(vote & lanes_below())] = static_cast<uint16_t>(group);
    n_groups += __popc(vote);
  }
  __syncwarp();

  const Tally tally(histogram, bins, state.bound == 0);
  int candidates = 0;
  over_groups(v, mine, n_groups, numel, bound, [&](int, const uint32_t* bits, unsigned mask) {
    candidates += __popc(mask);
#pragma unroll
    for (int c = 0; c < 4; ++c) tally.add((mask >> c & 1) != 0, (bits[c] & kMagnitude) >> 20);
  });
  tally.finish();
  int64_t in_warp, in_tile;
  warp_scan(candidates, &in_warp);
  const int64_t before = block_scan(lane() == 0 ? in_warp : 0, &in_tile);

  // One claim a tile. A tile whose candidates do not fit, because the data are equal or k is large, reads v again.
  if (threadIdx.x == 0 && in_tile > 0) {
    const unsigned long long first = atomicAdd(&w.bucket->candidates, static_cast<unsigned long long>(in_tile));
    first_of_tile = static_cast<int64_t>(first) + in_tile <= w.capacity ? static_cast<int64_t>(first) : kReread;
  }
  __syncthreads();
  const bool fits = in_tile > 0 && first_of_tile != kReread;
  int64_t at = 0;
  if (fits) at = first_of_tile + __shfl_sync(kAll, before, 0);
  if (lane() == 0) {
    ChunkState& c = w.chunks[chunk];
    c.count = static_cast<uint32_t>(in_warp);
    c.first = in_warp > 0 && !fits ? kReread : at;
  }
  if (fits) {
    over_groups(v, mine, n_groups, numel, bound, [&](int element, const uint32_t* bits, unsigned mask) {
      int64_t written;
      int64_t to = at + warp_scan(__popc(mask), &written);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if ((mask >> c & 1) == 0) continue;
        w.candidate_bits[to] = bits[c];
        w.candidate_indices[to] = static_cast<uint16_t>(element + c);
        ++to;
      }
      at += written;
    });
  }

  if (!last_block(&state.arrived, s.tiles)) return;
  const Digit digit = take_digit(histogram, s.entries);
  if (threadIdx.x == 0) {
    state.prefix = static_cast<uint32_t>(digit.bin);
    state.rank = digit.rank;
  }
}

// Calls f(valid, bits, index) for a chunk's candidates, in order, 32 at a time; index counts in the chunk. A whole warp
// calls it.
template <class F>
__device__ inline void over_candidates(const CompressArgs& a, const Workspace& w, const TileView& tile, int chunk,
                                       const F& f) {
  const DeviceSegment& s = w.segments[tile.segment];
  const ChunkState& c = w.chunks[tile.index * kChunksPerTile + chunk];
  const int64_t first = c.first;
  if (first != kReread) {
    const int n = static_cast<int>(c.count);
    for (int i = lane(); i - lane() < n; i += kWarp) {
      const bool valid = i < n;
      f(valid, valid ? w.candidate_bits[first + i] : 0, valid ? w.candidate_indices[first + i] : 0);
    }
  } else {
    const uint32_t bound = bound_of(tile, s, w.segment_states[tile.segment]);
    const float* v = a.residual + s.state + tile.begin + chunk * kChunk;
    const int n = tile.chunk_numel(chunk);
    for (int i = lane(); i - lane() < n; i += kWarp) {
      const float x = i < n ? v[i] : 0.0f;
      f(i < n && magnitude(x) >= bound, float_bits(x), i);
    }
  }
}

// The next digit of the threshold: its bits from `shift` on, among candidates that share the digits above.
__device__ inline void next_digit(const CompressArgs& a, int shift, int bits, bool last) {
  const Workspace w = a.bucket.work();
  const TileView tile(w, blockIdx.x);
  SegmentState& state = w.segment_states[tile.segment];
  uint32_t* histogram = w.histograms + tile.segment * kBins;
  __shared__ uint32_t bins[kBins];
  const uint32_t prefix = state.prefix, mask = (1u << bits) - 1;
  const Tally tally(histogram, bins, state.bound == 0);
  over_candidates(a, w, tile, warp(), [&](bool valid, uint32_t x, int) {
    const uint32_t size = x & kMagnitude;
    tally.add(valid && size >> (shift + bits) == prefix, size >> shift & mask);
  });
  tally.finish();
  if (!last_block(&state.arrived, w.segments[tile.segment].tiles)) return;
  const Digit digit = take_digit(histogram, state.rank);
  if (threadIdx.x == 0) {
    const uint32_t found = prefix << bits | static_cast<uint32_t>(digit.bin);
    state.prefix = found;
    state.rank = digit.rank;
    if (last) {
      state.threshold = found;
      state.ties = digit.rank;
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads) dgc_digit(const __grid_constant__ CompressArgs a) {
  next_digit(a, 9, 11, false);
}

extern "C" __global__ void __launch_bounds__(kThreads) dgc_last(const __grid_constant__ CompressArgs a) {
  next_digit(a, 0, 9, true);
}

}  // namespace dgc
