// dgc::subtract_ on a GPU: parameter -= lr * update, for updates that are nearly all zero. Where four of them are, the
// parameter is neither read nor written. One launch for up to 128 parameters.
#pragma once

#include "common.cuh"

namespace dgc {

extern "C" __global__ void __launch_bounds__(kThreads) dgc_subtract(const __grid_constant__ SubtractArgs a) {
  if (a.skip != nullptr && *a.skip != 0) return;
  const Pair& pair = a.pairs[blockIdx.y];
  const auto aligned = (reinterpret_cast<uint64_t>(pair.parameter) | reinterpret_cast<uint64_t>(pair.update)) % 16 == 0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t quads = aligned ? pair.numel / 4 : 0;
  // Rounded once, as torch's add_(alpha=).
  for (int64_t q = thread; q < quads; q += stride) {
    const float4 g = reinterpret_cast<const float4*>(pair.update)[q];
    if (g.x == 0.0f && g.y == 0.0f && g.z == 0.0f && g.w == 0.0f) continue;
    float4 p = reinterpret_cast<const float4*>(pair.parameter)[q];
    p.x = multiply_add(a.minus_lr, g.x, p.x);
    p.y = multiply_add(a.minus_lr, g.y, p.y);
    p.z = multiply_add(a.minus_lr, g.z, p.z);
    p.w = multiply_add(a.minus_lr, g.w, p.w);
    reinterpret_cast<float4*>(pair.parameter)[q] = p;
  }
  for (int64_t i = 4 * quads + thread; i < pair.numel; i += stride) {
    const float g = pair.update[i];
    if (g != 0.0f) pair.parameter[i] = multiply_add(a.minus_lr, g, pair.parameter[i]);
  }
}

}  // namespace dgc
