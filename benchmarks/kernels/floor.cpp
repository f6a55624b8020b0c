// The floor of the CPU benchmark: accumulation and nothing else, as a compiler vectorises it, on torch's own threads.
#include <torch/csrc/stable/ops.h>

#include <cmath>

// Momentum correction. 20 bytes of memory an element: read g, u, v, write u, v.
extern "C" void update(const float* __restrict g, float* __restrict u, float* __restrict v, int64_t n, float mu) {
  torch::stable::parallel_for(0, n, 65536, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      u[i] = mu * u[i] + g[i];
      v[i] += u[i];
    }
  });
}

// Adam, with the numbers of its rule but c2, which is 0. 28 bytes: read g, m, s, v, write m, s, v.
struct Adam {
  float weight, b2, c1, step, root, eps;

  void update(const float* __restrict g, float* __restrict m, float* __restrict s, float* __restrict v,
              int64_t n) const {
    const Adam a = *this;  // or the compiler would have to think that the stores change it
    for (int64_t i = 0; i < n; ++i) {
      const float new_m = std::fma(a.weight, g[i] - m[i], m[i]), new_s = std::fma(a.c1 * g[i], g[i], a.b2 * s[i]);
      m[i] = new_m;
      s[i] = new_s;
      v[i] += a.step * new_m / (std::sqrt(new_s) / a.root + a.eps);
    }
  }
};

extern "C" void update_adam(const float* g, float* m, float* s, float* v, int64_t n, float weight, float b2, float c1,
                            float step, float root, float eps) {
  const Adam adam{weight, b2, c1, step, root, eps};
  torch::stable::parallel_for(0, n, 65536, [&](int64_t begin, int64_t end) {
    adam.update(g + begin, m + begin, s + begin, v + begin, end - begin);
  });
}
