// accumulate: u <- mu*u + h, v <- v + u (or v + h + mu*u), one tile at a time. Where the gradient was, zeros are left:
// unpack writes averages among them, and to fill a gradient there would mean to fetch it from memory once more. On the
// way, a report of what selection and the payload need: the largest |v| of every group, whether any h was
// non-zero, whether any was lost.
#pragma once

#include <cstring>

#include "common.h"

namespace dgc {

struct TileReport {
  bool used = false;
  bool nonfinite = false;
};

struct UpdateArgs {
  float* momentum;  // null: mu is 0 and u is not kept
  float* residual;
  uint32_t* group_max;
  int64_t numel;
  float mu;
  float scale;
  bool nesterov;
};

// The types in which gradients are read: one element, and eight of them.
struct ReadFloat {
  using Raw = float;
  static float one(const Raw* p) { return *p; }
#if defined(__x86_64__)
  DGC_AVX2 static __m256 eight(const Raw* p) { return _mm256_loadu_ps(p); }
#endif
};

struct ReadBFloat16 {
  using Raw = uint16_t;
  static float one(const Raw* p) { return WireBFloat16::load(*p); }
#if defined(__x86_64__)
  DGC_AVX2 static __m256 eight(const Raw* p) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
  }
#endif
};

struct ReadHalf {
  using Raw = uint16_t;
  static float one(const Raw* p) { return WireHalf::load(*p); }
#if defined(__x86_64__)
  DGC_AVX2 static __m256 eight(const Raw* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
#endif
};

// One group, element by element.
template <class Read>
uint32_t update_group(typename Read::Raw* g, float* u, float* v, int64_t n, const UpdateArgs& a,
                      uint32_t* gradient_bits, bool* nonfinite) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float h = Read::one(g + i) * a.scale;
    *gradient_bits |= float_bits(h);
    if (!accumulate(h, a.mu, u != nullptr, a.nesterov, u != nullptr ? u + i : nullptr, v + i)) *nonfinite = true;
    const uint32_t size = magnitude(v[i]);
    largest = size > largest ? size : largest;
  }
  std::memset(g, 0, n * sizeof(*g));
  return largest;
}

template <class Read>
TileReport update_portable(typename Read::Raw* g, const UpdateArgs& a) {
  TileReport report;
  uint32_t gradient_bits = 0;
  for (int64_t i = 0, group = 0; i < a.numel; i += kGroup, ++group) {
    const int64_t n = a.numel - i < kGroup ? a.numel - i : kGroup;
    float* u = a.momentum != nullptr ? a.momentum + i : nullptr;
    a.group_max[group] = update_group<Read>(g + i, u, a.residual + i, n, a, &gradient_bits, &report.nonfinite);
  }
  report.used = (gradient_bits & kMagnitude) != 0;
  return report;
}

#if defined(__x86_64__)
template <class Read, bool kMomentum, bool kNesterov>
DGC_AVX2 TileReport update_avx2(typename Read::Raw* g, const UpdateArgs& a) {
  TileReport report;
  uint32_t rest_bits = 0;
  const __m256 mu = _mm256_set1_ps(a.mu), scale = _mm256_set1_ps(a.scale);
  const __m256i size = _mm256_set1_epi32(static_cast<int32_t>(kMagnitude));
  __m256 gradient_bits = _mm256_setzero_ps();
  float* u = a.momentum;
  float* v = a.residual;
  int64_t i = 0, group = 0;
  for (; i + kGroup <= a.numel; i += kGroup, ++group) {
    __m256 new_u[4], new_v[4];
    __m256i largest = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const int64_t at = i + 8 * j;
      const __m256 h = _mm256_mul_ps(Read::eight(g + at), scale);
      gradient_bits = _mm256_or_ps(gradient_bits, h);
      new_u[j] = h;
      if constexpr (kMomentum) new_u[j] = _mm256_add_ps(_mm256_mul_ps(mu, _mm256_loadu_ps(u + at)), h);
      const __m256 step = kNesterov ? _mm256_fmadd_ps(mu, new_u[j], h) : new_u[j];
      new_v[j] = _mm256_add_ps(_mm256_loadu_ps(v + at), step);
      largest = _mm256_max_epu32(largest, _mm256_and_si256(_mm256_castps_si256(new_v[j]), size));
    }
    __m128i m = _mm_max_epu32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4e));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xb1));
    const uint32_t group_max = static_cast<uint32_t>(_mm_cvtsi128_si32(m));
    if (__builtin_expect(group_max >= kInfinity, 0)) {
      a.group_max[group] =
          update_group<Read>(g + i, kMomentum ? u + i : nullptr, v + i, kGroup, a, &rest_bits, &report.nonfinite);
      continue;
    }
    a.group_max[group] = group_max;
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      if constexpr (kMomentum) _mm256_storeu_ps(u + i + 8 * j, new_u[j]);
      _mm256_storeu_ps(v + i + 8 * j, new_v[j]);
    }
    std::memset(g + i, 0, kGroup * sizeof(*g));
  }
  if (i < a.numel) {
    a.group_max[group] =
        update_group<Read>(g + i, kMomentum ? u + i : nullptr, v + i, a.numel - i, a, &rest_bits, &report.nonfinite);
  }
  const __m256i bits = _mm256_and_si256(_mm256_castps_si256(gradient_bits), size);
  report.used = !_mm256_testz_si256(bits, bits) || (rest_bits & kMagnitude) != 0;
  return report;
}
#endif

template <class Read>
TileReport update(bool avx2, void* gradient, int64_t offset, const UpdateArgs& a) {
  auto* g = static_cast<typename Read::Raw*>(gradient) + offset;
#if defined(__x86_64__)
  if (avx2) {
    if (a.momentum == nullptr) {
      return a.nesterov ? update_avx2<Read, false, true>(g, a) : update_avx2<Read, false, false>(g, a);
    }
    return a.nesterov ? update_avx2<Read, true, true>(g, a) : update_avx2<Read, true, false>(g, a);
  }
#endif
  return update_portable<Read>(g, a);
}

inline TileReport update(bool avx2, ScalarType dtype, void* gradient, int64_t offset, const UpdateArgs& a) {
  if (dtype == ScalarType::Float) return update<ReadFloat>(avx2, gradient, offset, a);
  if (dtype == ScalarType::BFloat16) return update<ReadBFloat16>(avx2, gradient, offset, a);
  return update<ReadHalf>(avx2, gradient, offset, a);
}

}  // namespace dgc
