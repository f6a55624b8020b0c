// dgc::compress_ on a GPU: seven kernels, launched in the order in which they stand here. docs/kernels.md has the idea,
// which is the CPU's: the update leaves the largest |v| of every 32 elements, the k-th largest of these bounds the
// threshold from below, and only groups that reach the bound are read again.
//
//   update   u, v; group maxima; first digit of the bound                        20.1 B/element
//   bound    second digit of the bound                                           reads the maxima
//   collect  candidates: elements that reach the bound; first digit of theirs    reads the maxima and 1 group in 30
//   digit    second digit of the threshold                                       reads candidates
//   last     last digit of the threshold                                         reads candidates
//   place    counts what is sent, tile by tile, and sums up                      reads candidates
//   emit     writes the payload, takes it off v, masks u                         reads candidates
//
// A kernel has one block for each tile (update: for each chunk). What a whole segment has to know, the last of its
// blocks to finish works out, so that nothing waits and nothing is launched for it. All sizes depend on the layout
// alone, all numbers that change are in device memory: the sequence can be captured in a CUDA graph.
#pragma once

#include "common.cuh"

namespace dgc {

// How a warp may read its elements.
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

extern "C" __global__ void __launch_bounds__(kThreads) dgc_place(const __grid_constant__ CompressArgs a) {
  const Workspace w = a.bucket.work();
  const TileView tile(w, blockIdx.x);
  const DeviceSegment& s = w.segments[tile.segment];
  SegmentState& state = w.segment_states[tile.segment];
  const uint32_t threshold = state.threshold;
  uint32_t above = 0, ties = 0;
  over_candidates(a, w, tile, warp(), [&](bool valid, uint32_t bits, int) {
    const uint32_t size = bits & kMagnitude;
    above += __popc(__ballot_sync(kAll, valid && size > threshold));
    ties += __popc(__ballot_sync(kAll, valid && size == threshold));
  });
  if (lane() == 0) {
    ChunkState& c = w.chunks[tile.index * kChunksPerTile + warp()];
    c.above = above;
    c.ties = ties;
  }
  TileState sum;
  block_scan(lane() == 0 ? above : 0, &sum.above);
  block_scan(lane() == 0 ? ties : 0, &sum.ties);
  if (threadIdx.x == 0) w.tiles[tile.index] = sum;
  if (!last_block(&state.arrived, s.tiles)) return;

  // From counts of each tile to counts of all tiles before it.
  TileState before{0, 0};
  for (int64_t first = 0; first < s.tiles; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    TileState mine{0, 0}, total;
    if (i < s.tiles) {
      mine.above = __ldcg(&w.tiles[s.first_tile + i].above);
      mine.ties = __ldcg(&w.tiles[s.first_tile + i].ties);
    }
    mine.above = block_scan(mine.above, &total.above);
    mine.ties = block_scan(mine.ties, &total.ties);
    if (i < s.tiles) w.tiles[s.first_tile + i] = TileState{before.above + mine.above, before.ties + mine.ties};
    before.above += total.above;
    before.ties += total.ties;
  }
}

template <class Wire>
__device__ inline void emit_tile(const CompressArgs& a, const Workspace& w, const TileView& tile) {
  const WireLayout wire = a.bucket.wire();
  const DeviceSegment& s = w.segments[tile.segment];
  const SegmentState& state = w.segment_states[tile.segment];
  const uint32_t threshold = state.threshold;
  auto* indices = reinterpret_cast<uint16_t*>(a.payload + wire.indices);
  auto* values = reinterpret_cast<typename Wire::Raw*>(a.payload + wire.values);
  // Counts of the segment up to here: first to this warp's chunk, then to each window.
  int64_t above = w.tiles[tile.index].above, ties = w.tiles[tile.index].ties;
  for (int i = 0; i < warp(); ++i) {
    above += w.chunks[tile.index * kChunksPerTile + i].above;
    ties += w.chunks[tile.index * kChunksPerTile + i].ties;
  }
  over_candidates(a, w, tile, warp(), [&](bool valid, uint32_t bits, int index) {
    const uint32_t size = bits & kMagnitude;
    const bool is_above = valid && size > threshold, is_tie = valid && size == threshold;
    const unsigned above_vote = __ballot_sync(kAll, is_above), tie_vote = __ballot_sync(kAll, is_tie);
    const int64_t ties_before = ties + __popc(tie_vote & lanes_below());
    if (is_above || (is_tie && ties_before < state.ties)) {
      const int64_t entry =
          s.first_entry + above + __popc(above_vote & lanes_below()) + smaller(state.ties, ties_before);
      const int64_t at = s.state + tile.begin + warp() * kChunk + index;
      const float value = bits_float(bits);
      const typename Wire::Raw raw = Wire::store(value);
      const float sent = Wire::load(raw);
      indices[entry] = static_cast<uint16_t>(warp() * kChunk + index);
      values[entry] = raw;
      a.residual[at] = subtract(value, sent);  // exact: what the wire type cannot say stays here
      if (a.sent_momentum != nullptr) {
        // Momentum factor masking (paper, section 3.2), where something was sent.
        a.sent_momentum[entry] = a.momentum[at];
        if (!is_zero(sent)) a.momentum[at] = 0.0f;
      }
    }
    above += __popc(above_vote);
    ties += __popc(tie_vote);
  });
  // The last warp's counts are those of the whole segment up to the end of this tile.
  if (warp() == kWarps - 1 && lane() == 0) {
    reinterpret_cast<uint32_t*>(a.payload + wire.ends)[tile.index] =
        static_cast<uint32_t>(s.first_entry + above + smaller(state.ties, ties));
  }
}

extern "C" __global__ void __launch_bounds__(kThreads) dgc_emit(const __grid_constant__ CompressArgs a) {
  const Workspace w = a.bucket.work();
  const TileView tile(w, blockIdx.x);
  with_wire_type(a.bucket.wire_type, [&](auto wire) { emit_tile<decltype(wire)>(a, w, tile); });
  // No other block looks at these any more.
  if (threadIdx.x == 0 && tile.begin == 0) {
    SegmentState& state = w.segment_states[tile.segment];
    a.payload[a.bucket.wire().used + tile.segment] =
        (state.used != 0 ? kUsed : 0) | (state.nonfinite != 0 ? kLeftOut : 0);
    state.used = state.nonfinite = 0;
  }
  if (threadIdx.x == 0 && tile.index == 0) {
    reinterpret_cast<Header*>(a.payload)->flags = w.bucket->nonfinite != 0 ? kNonFinite : 0;
    w.bucket->nonfinite = 0;
    w.bucket->candidates = 0;
  }
}

}  // namespace dgc
