// accumulate: what is kept of each element and v, by the bucket's rule, one tile at a time. Where the gradient was,
// zeros are left: unpack writes averages among them, and to fill a gradient there would mean to fetch it from memory
// once more. On the way, a report of what selection and the payload need: the largest |v| of every group, whether any h
// was non-zero, whether any was lost.
#pragma once

#include <cstring>

#include "../rule.h"
#include "common.h"

namespace dgc {

struct TileReport {
  bool used = false;
  bool nonfinite = false;
};

struct UpdateArgs {
  float* kept[kMaxKept];  // null beyond those of the rule
  float* residual;
  uint32_t* group_max;
  int64_t numel;
  float scale;
};

// Zeros for a group of gradients: memset, in this place, would become a string instruction, which takes long to start.
#if defined(__x86_64__)
template <class Raw>
DGC_AVX2 inline void zero_group(Raw* g) {
  auto* to = reinterpret_cast<__m256i*>(g);
#pragma GCC unroll 4
  for (size_t j = 0; j < kGroup * sizeof(Raw) / sizeof(__m256i); ++j)
    _mm256_storeu_si256(to + j, _mm256_setzero_si256());
}
#endif

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

// One group, from element i of the tile on, element by element.
template <class Read, class Rule>
uint32_t update_group(typename Read::Raw* g, const UpdateArgs& a, const Rule& rule, int64_t i, int64_t n,
                      uint32_t* gradient_bits, bool* nonfinite) {
  uint32_t largest = 0;
  for (const int64_t end = i + n; i < end; ++i) {
    const float h = Read::one(g + i) * a.scale;
    *gradient_bits |= float_bits(h);
    float* kept[kMaxKept];
    for (int t = 0; t < Rule::kKept; ++t) kept[t] = a.kept[t] + i;
    if (!accumulate(rule, h, kept, a.residual + i)) *nonfinite = true;
    const uint32_t size = magnitude(a.residual[i]);
    largest = size > largest ? size : largest;
  }
  std::memset(g + i - n, 0, n * sizeof(*g));
  return largest;
}

template <class Read, class Rule>
TileReport update_portable(typename Read::Raw* g, const UpdateArgs& a, const Rule& rule) {
  TileReport report;
  uint32_t gradient_bits = 0;
  for (int64_t i = 0, group = 0; i < a.numel; i += kGroup, ++group) {
    const int64_t n = a.numel - i < kGroup ? a.numel - i : kGroup;
    a.group_max[group] = update_group<Read>(g, a, rule, i, n, &gradient_bits, &report.nonfinite);
  }
  report.used = (gradient_bits & kMagnitude) != 0;
  return report;
}

#if defined(__x86_64__)
// The rules of rule.h for eight entries at a time.
template <class Rule>
struct Eight;

template <>
struct Eight<Sum> {
  DGC_AVX2 explicit Eight(const Sum&) {}
  DGC_AVX2 __m256 update(__m256 h, __m256*) const { return h; }
};

template <>
struct Eight<Momentum> {
  __m256 mu;
  DGC_AVX2 explicit Eight(const Momentum& rule) : mu(_mm256_set1_ps(rule.mu)) {}
  DGC_AVX2 __m256 update(__m256 h, __m256* kept) const {
    return kept[0] = _mm256_add_ps(_mm256_mul_ps(mu, kept[0]), h);
  }
};

template <>
struct Eight<Nesterov> {
  __m256 mu;
  DGC_AVX2 explicit Eight(const Nesterov& rule) : mu(_mm256_set1_ps(rule.mu)) {}
  DGC_AVX2 __m256 update(__m256 h, __m256* kept) const {
    kept[0] = _mm256_add_ps(_mm256_mul_ps(mu, kept[0]), h);
    return _mm256_fmadd_ps(mu, kept[0], h);
  }
};

template <>
struct Eight<Adam> {
  __m256 from_m, coefficient, b2, c1, c2, step, root, eps;
  DGC_AVX2 explicit Eight(const Adam& rule)
      : from_m(_mm256_castsi256_ps(_mm256_set1_epi32(rule.starts_from_m() ? -1 : 0))),
        coefficient(_mm256_set1_ps(rule.coefficient())),
        b2(_mm256_set1_ps(rule.b2)),
        c1(_mm256_set1_ps(rule.c1)),
        c2(_mm256_set1_ps(rule.c2)),
        step(_mm256_set1_ps(rule.step)),
        root(_mm256_set1_ps(rule.root)),
        eps(_mm256_set1_ps(rule.eps)) {}
  DGC_AVX2 __m256 update(__m256 h, __m256* kept) const {
    const __m256 start = _mm256_blendv_ps(h, kept[0], from_m);
    const __m256 m = _mm256_fmadd_ps(coefficient, _mm256_sub_ps(h, kept[0]), start);
    const __m256 of_h = _mm256_fmadd_ps(_mm256_mul_ps(c1, h), h, _mm256_mul_ps(b2, kept[1]));
    const __m256 s = _mm256_fmadd_ps(_mm256_mul_ps(c2, m), m, of_h);
    kept[0] = m;
    kept[1] = s;
    const __m256 size = _mm256_add_ps(_mm256_div_ps(_mm256_sqrt_ps(s), root), eps);
    return _mm256_div_ps(_mm256_mul_ps(step, h), size);
  }
};

DGC_AVX2 inline uint32_t largest_of(__m256i x) {
  __m128i m = _mm_max_epu32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4e));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
}

template <class Read, class Rule>
DGC_AVX2 TileReport update_avx2(typename Read::Raw* g, const UpdateArgs& a, const Rule& rule) {
  TileReport report;
  uint32_t rest_bits = 0;
  const Eight<Rule> eight(rule);
  const __m256 scale = _mm256_set1_ps(a.scale), decay = _mm256_set1_ps(rule.decay);
  const __m256i size = _mm256_set1_epi32(static_cast<int32_t>(kMagnitude));
  const __m256i numbers = _mm256_set1_epi32(static_cast<int32_t>(kInfinity) - 1);
  __m256 gradient_bits = _mm256_setzero_ps();
  float* const v = a.residual;
  float* of_rule[kMaxKept];  // a copy, since the compiler has to think that stores may change `a`
  for (int t = 0; t < Rule::kKept; ++t) of_rule[t] = a.kept[t];
  const int64_t numel = a.numel;
  int64_t i = 0, group = 0;
  for (; i + kGroup <= numel; i += kGroup, ++group) {
    __m256 kept[4][kMaxKept], new_v[4];
    __m256i largest = _mm256_setzero_si256(), squares = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const int64_t at = i + 8 * j;
      const __m256 h = _mm256_mul_ps(Read::eight(g + at), scale);
      gradient_bits = _mm256_or_ps(gradient_bits, h);
      for (int t = 0; t < Rule::kKept; ++t) kept[j][t] = _mm256_loadu_ps(of_rule[t] + at);
      const __m256 update = eight.update(h, kept[j]);
      new_v[j] = _mm256_add_ps(_mm256_mul_ps(decay, _mm256_loadu_ps(v + at)), update);
      largest = _mm256_max_epu32(largest, _mm256_and_si256(_mm256_castps_si256(new_v[j]), size));
      if constexpr (Rule::kKept > 1)
        squares = _mm256_max_epu32(squares, _mm256_and_si256(_mm256_castps_si256(kept[j][1]), size));
    }
    const uint32_t group_max = largest_of(largest);
    bool finite = group_max < kInfinity;
    if constexpr (Rule::kKept > 1)
      finite &= _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(squares, numbers))) == 0;
    if (__builtin_expect(!finite, 0)) {
      a.group_max[group] = update_group<Read>(g, a, rule, i, kGroup, &rest_bits, &report.nonfinite);
      continue;
    }
    a.group_max[group] = group_max;
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      for (int t = 0; t < Rule::kKept; ++t) _mm256_storeu_ps(of_rule[t] + i + 8 * j, kept[j][t]);
      _mm256_storeu_ps(v + i + 8 * j, new_v[j]);
    }
    zero_group(g + i);
  }
  if (i < numel) {
    a.group_max[group] = update_group<Read>(g, a, rule, i, numel - i, &rest_bits, &report.nonfinite);
  }
  const __m256i bits = _mm256_and_si256(_mm256_castps_si256(gradient_bits), size);
  report.used = !_mm256_testz_si256(bits, bits) || (rest_bits & kMagnitude) != 0;
  return report;
}
#endif

template <class Read, class Rule>
TileReport update(bool avx2, void* gradient, int64_t offset, const UpdateArgs& a, const Rule& rule) {
  auto* g = static_cast<typename Read::Raw*>(gradient) + offset;
#if defined(__x86_64__)
  if (avx2) return update_avx2<Read>(g, a, rule);
#endif
  return update_portable<Read>(g, a, rule);
}

template <class Rule>
TileReport update(bool avx2, ScalarType dtype, void* gradient, int64_t offset, const UpdateArgs& a, const Rule& rule) {
  if (dtype == ScalarType::Float) return update<ReadFloat>(avx2, gradient, offset, a, rule);
  if (dtype == ScalarType::BFloat16) return update<ReadBFloat16>(avx2, gradient, offset, a, rule);
  return update<ReadHalf>(avx2, gradient, offset, a, rule);
}

}  // namespace dgc
