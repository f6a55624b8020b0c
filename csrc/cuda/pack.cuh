// place and emit, the last kernels of compress_: every entry finds its place in the payload, and what is written there
// is taken off v and masked in the momentum.
#pragma once

#include "select.cuh"

namespace dgc {

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
      if (a.sent != nullptr) {
        // Momentum factor masking (paper, section 3.2), where something was sent.
        a.sent[entry] = a.kept[0][at];
        if (!is_zero(sent)) a.kept[0][at] = 0.0f;
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
