#include "common.h"

#include <cstdlib>
#include <cstring>

namespace dgc {

bool use_avx2() {
#if defined(__x86_64__)
  static const bool yes = [] {
    const char* asked = std::getenv("DGC_CPU");
    if (asked != nullptr && std::strcmp(asked, "portable") == 0) return false;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }();
  return yes;
#else
  return false;
#endif
}

std::vector<Tile> tiles_of(const Bucket& bucket) {
  std::vector<Tile> tiles;
  tiles.reserve(bucket.tiles);
  int64_t group = 0;
  for (size_t i = 0; i < bucket.segments.size(); ++i) {
    const int64_t end = bucket.segments[i].numel;
    for (int64_t begin = 0; begin < end; begin += kTile) {
      const int64_t numel = end - begin < kTile ? end - begin : kTile;
      tiles.push_back({static_cast<int64_t>(i), begin, numel, group});
      group += div_up(numel, kGroup);
    }
  }
  return tiles;
}

void check_cpu(const Tensor& tensor, const char* name, ScalarType dtype, int64_t min_numel) {
  check_tensor(tensor, name, DeviceType::CPU, dtype, min_numel);
}

}  // namespace dgc
