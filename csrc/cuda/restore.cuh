// dgc::restore_ on a GPU: what compress_ took out of momentum and residual goes back, for the chosen parameters. A
// block for each tile; where nothing is chosen it costs a launch.
#pragma once

#include "common.cuh"

namespace dgc {

extern "C" __global__ void __launch_bounds__(kThreads) dgc_restore(const __grid_constant__ RestoreArgs a) {
  const Workspace w = a.bucket.work();
  const TileView tile(w, blockIdx.x);
  if (a.which[tile.segment] == 0) return;
  const WireLayout wire = a.bucket.wire();
  const int64_t to = w.segments[tile.segment].state + tile.begin;
  with_wire_type(a.bucket.wire_type, [&](auto type) {
    using Wire = decltype(type);
    const auto* ends = reinterpret_cast<const uint32_t*>(a.payload + wire.ends);
    const auto* indices = reinterpret_cast<const uint16_t*>(a.payload + wire.indices);
    const auto* values = reinterpret_cast<const typename Wire::Raw*>(a.payload + wire.values);
    const int64_t begin = tile.index == 0 ? 0 : ends[tile.index - 1];
    const int64_t end = smaller(ends[tile.index], a.bucket.entries);
    for (int64_t e = begin + threadIdx.x; e < end; e += kThreads) {
      if (indices[e] >= tile.numel) continue;  // not what compress_ wrote
      const int64_t i = to + indices[e];
      a.residual[i] = add(a.residual[i], Wire::load(values[e]));  // exact: compress_ left v - w here
      if (a.sent != nullptr) a.momentum[i] = a.sent[e];
    }
  });
}

}  // namespace dgc
