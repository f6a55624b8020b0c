// The floor of the CPU benchmark: momentum-corrected accumulation and nothing else, as a compiler vectorises it, on
// torch's own threads. 20 bytes of memory an element: read g, u, v, write u, v.
#include <torch/csrc/stable/ops.h>

extern "C" void update(const float* __restrict g, float* __restrict u, float* __restrict v, int64_t n, float mu) {
  torch::stable::parallel_for(0, n, 65536, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      u[i] = mu * u[i] + g[i];
      v[i] += u[i];
    }
  });
}
