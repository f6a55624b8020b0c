// Parts that the CPU ops share: the tiles of a bucket, the choice of instructions, and the scan for large magnitudes.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "../arithmetic.h"
#include "../bucket.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define DGC_AVX2 __attribute__((target("avx2,fma,f16c")))
#endif

namespace dgc {

// True where AVX2, FMA and F16C are there and DGC_CPU=portable does not ask for the path without them.
bool use_avx2();

// 64 KiB of float: enough work for a thread to be worth waking.
constexpr int64_t kGrain = 16384;

// One tile of one segment, with the positions of everything that belongs to it.
struct Tile {
  int64_t segment;
  int64_t begin;  // first element, counted from the start of the segment
  int64_t numel;
  int64_t group;  // its first group, counted over the whole bucket
};

// The tiles of all segments, in order.
std::vector<Tile> tiles_of(const Bucket& bucket);

void check_cpu(const Tensor& tensor, const char* name, ScalarType dtype, int64_t min_numel);

// Calls f with the C++ type behind a 16- or 32-bit floating dtype of the wire.
template <class F>
void with_wire_type(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Float) return f(WireFloat{});
  if (dtype == ScalarType::BFloat16) return f(WireBFloat16{});
  if (dtype == ScalarType::Half) return f(WireHalf{});
  STD_TORCH_CHECK(false, "dtype: expected float32, bfloat16 or float16, got scalar type ", static_cast<int>(dtype));
}

// Calls f(i), in rising order, for every i < n with (bits[i] & kMagnitude) >= threshold.
template <class F>
inline void scan_portable(const uint32_t* bits, int64_t n, uint32_t threshold, const F& f) {
  for (int64_t i = 0; i < n; ++i)
    if ((bits[i] & kMagnitude) >= threshold) f(i);
}

#if defined(__x86_64__)
template <class F>
DGC_AVX2 inline void scan_avx2(const uint32_t* bits, int64_t n, uint32_t threshold, const F& f) {
  const __m256i size = _mm256_set1_epi32(static_cast<int32_t>(kMagnitude));
  const __m256i below = _mm256_set1_epi32(static_cast<int32_t>(threshold) - 1);
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    uint32_t mask = 0;
    for (int j = 0; j < 4; ++j) {
      const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bits + i + 8 * j));
      const __m256i hit = _mm256_cmpgt_epi32(_mm256_and_si256(x, size), below);
      mask |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(hit))) << (8 * j);
    }
    for (; mask != 0; mask &= mask - 1) f(i + __builtin_ctz(mask));
  }
  for (; i < n; ++i)
    if ((bits[i] & kMagnitude) >= threshold) f(i);
}
#endif

template <class F>
inline void scan(bool avx2, const uint32_t* bits, int64_t n, uint32_t threshold, const F& f) {
#if defined(__x86_64__)
  if (avx2) return scan_avx2(bits, n, threshold, f);
#endif
  scan_portable(bits, n, threshold, f);
}

}  // namespace dgc
