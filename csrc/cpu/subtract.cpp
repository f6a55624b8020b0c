// dgc::subtract_: parameter <- shrink * parameter - lr * update, for updates that are nearly all zero. Where 32 of them
// are and shrink is 1, the parameter is neither read nor written: little more than 4 bytes of memory an element instead
// of 12, and the same bits. Any other shrink changes all of it.

#include <optional>

#include "common.h"

namespace dgc {
namespace {

void subtract_portable(float* p, const float* g, int64_t n, float minus_lr) {
  for (int64_t i = 0; i < n; ++i)
    if (g[i] != 0.0f) p[i] = __builtin_fmaf(minus_lr, g[i], p[i]);  // rounded once, as torch's add_(alpha=)
}

// The product is rounded on its own, as torch's mul_() before the add_().
void shrink_portable(float* p, const float* g, int64_t n, float shrink, float minus_lr) {
  for (int64_t i = 0; i < n; ++i) p[i] = __builtin_fmaf(minus_lr, g[i], shrink * p[i]);
}

#if defined(__x86_64__)
DGC_AVX2 void subtract_avx2(float* p, const float* g, int64_t n, float minus_lr) {
  const __m256 factor = _mm256_set1_ps(minus_lr);
  int64_t i = 0;
  for (; i + kGroup <= n; i += kGroup) {
    __m256 x[4];
    for (int j = 0; j < 4; ++j) x[j] = _mm256_loadu_ps(g + i + 8 * j);
    const __m256i bits = _mm256_castps_si256(_mm256_or_ps(_mm256_or_ps(x[0], x[1]), _mm256_or_ps(x[2], x[3])));
    if (_mm256_testz_si256(bits, bits)) continue;
    for (int j = 0; j < 4; ++j) {
      float* to = p + i + 8 * j;
      _mm256_storeu_ps(to, _mm256_fmadd_ps(factor, x[j], _mm256_loadu_ps(to)));
    }
  }
  subtract_portable(p + i, g + i, n - i, minus_lr);
}

DGC_AVX2 void shrink_avx2(float* p, const float* g, int64_t n, float shrink, float minus_lr) {
  const __m256 factor = _mm256_set1_ps(minus_lr), scale = _mm256_set1_ps(shrink);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 shrunk = _mm256_mul_ps(scale, _mm256_loadu_ps(p + i));
    _mm256_storeu_ps(p + i, _mm256_fmadd_ps(factor, _mm256_loadu_ps(g + i), shrunk));
  }
  shrink_portable(p + i, g + i, n - i, shrink, minus_lr);
}
#endif

void subtract_cpu(std::vector<Tensor> parameters, std::vector<Tensor> updates, double lr, double shrink,
                  std::optional<Tensor> skip) {
  STD_TORCH_CHECK(parameters.size() == updates.size(), "updates: expected one for each of ", parameters.size(),
                  " parameters, got ", updates.size());
  if (skip) {
    check_cpu(*skip, "skip", ScalarType::Byte, 1);
    if (*static_cast<const uint8_t*>(skip->const_data_ptr()) != 0) return;
  }
  const auto minus_lr = static_cast<float>(-lr), factor = static_cast<float>(shrink);
  auto* subtract_span = subtract_portable;
  auto* shrink_span = shrink_portable;
#if defined(__x86_64__)
  if (use_avx2()) {
    subtract_span = subtract_avx2;
    shrink_span = shrink_avx2;
  }
#endif
  for (size_t t = 0; t < parameters.size(); ++t) {
    const int64_t n = parameters[t].numel();
    check_cpu(parameters[t], "parameters", ScalarType::Float, n);
    check_cpu(updates[t], "updates", ScalarType::Float, n);
    auto* p = static_cast<float*>(parameters[t].mutable_data_ptr());
    const auto* g = static_cast<const float*>(updates[t].const_data_ptr());
    torch::stable::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
      if (factor == 1.0f) {
        subtract_span(p + begin, g + begin, end - begin, minus_lr);
      } else {
        shrink_span(p + begin, g + begin, end - begin, factor, minus_lr);
      }
    });
  }
}

}  // namespace
}  // namespace dgc

STABLE_TORCH_LIBRARY_IMPL(dgc, CPU, m) { m.impl("subtract_", TORCH_BOX(&dgc::subtract_cpu)); }
