// dgc::subtract_ on a GPU: parameter <- shrink * parameter - lr * update, for updates that are nearly all zero. Where
// four of them are and shrink is 1, the parameter is neither read nor written. One launch for up to 120 parameters,
// with a block for each 8,192 elements.
#pragma once

#include "common.cuh"

namespace dgc {

extern "C" __global__ void __launch_bounds__(kThreads) dgc_subtract(const __grid_constant__ SubtractArgs a) {
  if (a.skip != nullptr && *a.skip != 0) return;
  int low = 0, high = a.count;  // the last parameter that starts at this block or before
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (a.pairs[middle].first_block <= blockIdx.x ? low : high) = middle;
  }
  const Pair& pair = a.pairs[low];
  const int64_t begin = static_cast<int64_t>(blockIdx.x - pair.first_block) * kChunk;
  const int n = static_cast<int>(smaller(pair.numel - begin, kChunk));
  float* p = pair.parameter + begin;
  const float* g = pair.update + begin;
  const auto aligned = (reinterpret_cast<uint64_t>(p) | reinterpret_cast<uint64_t>(g)) % sizeof(Quad<float>) == 0;
  const int thread = static_cast<int>(threadIdx.x), quads = aligned ? n / 4 : 0;
  const bool keeps = float_bits(a.shrink) == float_bits(1.0f);  // then what is not updated stays as it is
  // The product is rounded, and the rest once, as torch's mul_() and add_(alpha=).
  const auto updated = [&](float parameter, float update) {
    return multiply_add(a.minus_lr, update, multiply(a.shrink, parameter));
  };
  for (int q = thread; q < quads; q += kThreads) {
    const Quad<float> update = reinterpret_cast<const Quad<float>*>(g)[q];
    bool zero = keeps;
#pragma unroll
    for (int i = 0; i < 4; ++i) zero &= is_zero(update.x[i]);
    if (zero) continue;
    Quad<float> parameter = reinterpret_cast<const Quad<float>*>(p)[q];
#pragma unroll
    for (int i = 0; i < 4; ++i) parameter.x[i] = updated(parameter.x[i], update.x[i]);
    reinterpret_cast<Quad<float>*>(p)[q] = parameter;
  }
  for (int i = 4 * quads + thread; i < n; i += kThreads)
    if (!keeps || !is_zero(g[i])) p[i] = updated(p[i], g[i]);
}

}  // namespace dgc
