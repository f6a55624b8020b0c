// select: the k-th largest of many magnitudes, and a quick bound on it.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <functional>
#include <mutex>

#include "common.h"

namespace dgc {

// Magnitudes from low to high.
struct Range {
  uint32_t low = 0, high = kMagnitude;
};

// Returns the k-th largest (1 <= k <= n) of the magnitudes in bits, which all lie in the range; signs are ignored. Each
// pass divides the range by 2,048 and keeps the keys in the part that has the answer, in whatever order, until few
// enough are left for nth_element.
inline uint32_t kth_largest(const uint32_t* bits, int64_t n, int64_t k, Range range = {}) {
  constexpr int64_t kFew = 4096, kBins = 2048;
  std::vector<uint32_t> kept;
  while (n > kFew && range.low < range.high) {
    int shift = 0;
    while ((range.high - range.low) >> shift >= kBins) ++shift;
    const auto digit_of = [low = range.low, shift](uint32_t x) { return ((x & kMagnitude) - low) >> shift; };
    std::array<int64_t, kBins> count{};
    std::mutex mutex;
    torch::stable::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
      // Two tables, so that equal neighbours do not wait for each other's store.
      std::array<std::array<int64_t, kBins>, 2> local{};
      for (int64_t i = begin; i < end; ++i) ++local[i & 1][digit_of(bits[i])];
      const std::lock_guard<std::mutex> lock(mutex);
      for (int64_t b = 0; b < kBins; ++b) count[b] += local[0][b] + local[1][b];
    });
    uint32_t digit = kBins - 1;
    while (k > count[digit]) k -= count[digit--];
    std::vector<uint32_t> next;
    next.reserve(count[digit]);
    torch::stable::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
      std::vector<uint32_t> local;
      for (int64_t i = begin; i < end; ++i)
        if (digit_of(bits[i]) == digit) local.push_back(bits[i] & kMagnitude);
      const std::lock_guard<std::mutex> lock(mutex);
      next.insert(next.end(), local.begin(), local.end());
    });
    kept.swap(next);
    bits = kept.data();
    n = static_cast<int64_t>(kept.size());
    range.low += digit << shift;
    range.high = std::min(range.high, range.low + ((uint32_t{1} << shift) - 1));
  }
  if (range.low == range.high) return range.low;
  if (kept.empty()) {
    kept.assign(bits, bits + n);
    for (uint32_t& x : kept) x &= kMagnitude;
  }
  std::nth_element(kept.begin(), kept.begin() + (k - 1), kept.end(), std::greater<>());
  return kept[k - 1];
}

// Returns a number that at least k of the n magnitudes reach, close to the k-th largest: guessed from every
// (n / 8192)-th of them, a few standard deviations on the safe side, and then counted. A guess that too few reach, as
// happens where the data are periodic, is replaced by the k-th largest itself.
inline uint32_t bound_on_kth_largest(const uint32_t* bits, int64_t n, int64_t k) {
  constexpr int64_t kSample = 8192;
  const int64_t stride = n / kSample;
  if (stride < 2) return kth_largest(bits, n, k);
  std::vector<uint32_t> sample;
  sample.reserve(n / stride + 1);
  for (int64_t i = 0; i < n; i += stride) sample.push_back(bits[i] & kMagnitude);
  const double expected = static_cast<double>(k) * sample.size() / n;
  const auto rank = static_cast<size_t>(expected + 4.0 * std::sqrt(expected) + 4.0);
  if (rank >= sample.size()) return kth_largest(bits, n, k);
  std::nth_element(sample.begin(), sample.begin() + rank, sample.end(), std::greater<>());
  const uint32_t guess = sample[rank];
  std::atomic<int64_t> reached{0};
  torch::stable::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
    int32_t count = 0;  // 32 bits, so that eight are counted at a time
    int64_t total = 0;
    for (int64_t i = begin; i < end;) {
      const int64_t stop = std::min(end, i + (int64_t{1} << 30));
      for (count = 0; i < stop; ++i) count += (bits[i] & kMagnitude) >= guess;
      total += count;
    }
    reached += total;
  });
  return reached >= k ? guess : kth_largest(bits, n, k);
}

}  // namespace dgc
