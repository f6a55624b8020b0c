// dgc::restore_: what compress_ took out of momentum and residual goes back, for the chosen parameters of a bucket.
#include <optional>

#include "common.h"

namespace dgc {
namespace {

void restore_cpu(Tensor payload, Tensor which, Tensor segments, Tensor, std::optional<Tensor> sent,
                 std::optional<Tensor> momentum, Tensor residual, ScalarType wire_dtype) {
  const auto known = bucket_of(segments);
  const Bucket& bucket = *known;
  const WireLayout at = bucket.wire(wire_dtype);
  check_cpu(payload, "payload", ScalarType::Byte, at.bytes);
  check_aligned(payload, "payload");
  check_cpu(which, "which", ScalarType::Byte, bucket.segments.size());
  check_cpu(residual, "residual", ScalarType::Float, bucket.state);
  float* u = nullptr;
  const float* sent_u = nullptr;
  if (sent) {
    STD_TORCH_CHECK(momentum.has_value(), "sent: expected None where momentum is None");
    check_cpu(*sent, "sent", ScalarType::Float, bucket.entries);
    check_cpu(*momentum, "momentum", ScalarType::Float, bucket.state);
    u = static_cast<float*>(momentum->mutable_data_ptr());
    sent_u = static_cast<const float*>(sent->const_data_ptr());
  }
  const std::vector<Tile> tiles = tiles_of(bucket);  // only now: of a wrong table it could be any number
  auto* v = static_cast<float*>(residual.mutable_data_ptr());
  const auto* chosen = static_cast<const uint8_t*>(which.const_data_ptr());
  with_wire_type(wire_dtype, [&](auto wire) {
    using Wire = decltype(wire);
    const auto* bytes = static_cast<const uint8_t*>(payload.const_data_ptr());
    const auto* ends = reinterpret_cast<const uint32_t*>(bytes + at.ends);
    const auto* indices = reinterpret_cast<const uint16_t*>(bytes + at.indices);
    const auto* values = reinterpret_cast<const typename Wire::Raw*>(bytes + at.values);
    int64_t entry = 0;
    for (size_t t = 0; t < tiles.size(); ++t) {
      const Tile& tile = tiles[t];
      const int64_t to = bucket.segments[tile.segment].state + tile.begin;
      STD_TORCH_CHECK(ends[t] <= bucket.entries, "payload: expected one that compress_ wrote for these segments");
      for (; entry < ends[t]; ++entry) {
        STD_TORCH_CHECK(indices[entry] < tile.numel, "payload: expected one that compress_ wrote for these segments");
        if (!chosen[tile.segment]) continue;
        const int64_t i = to + indices[entry];
        v[i] += Wire::load(values[entry]);  // exact: compress_ left v - w here
        if (u != nullptr) u[i] = sent_u[entry];
      }
    }
  });
}

}  // namespace
}  // namespace dgc

STABLE_TORCH_LIBRARY_IMPL(dgc, CPU, m) { m.impl("restore_", TORCH_BOX(&dgc::restore_cpu)); }
