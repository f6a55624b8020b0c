// dgc::unpack: the payloads of all ranks to one gradient, scale/N * sum over ranks 0..N-1 in that order, among the
// zeros that compress_ left there. Nothing in a payload is believed before it is checked, and nothing is written unless
// every payload passes.
#include <atomic>

#include "common.h"

namespace dgc {
namespace {

template <class Wire>
struct Payload {
  using Raw = typename Wire::Raw;

  Payload(const uint8_t* bytes, const WireLayout& at)
      : header(reinterpret_cast<const Header*>(bytes)),
        used(bytes + at.used),
        ends(reinterpret_cast<const uint32_t*>(bytes + at.ends)),
        indices(reinterpret_cast<const uint16_t*>(bytes + at.indices)),
        values(reinterpret_cast<const Raw*>(bytes + at.values)) {}

  int64_t begin(int64_t tile) const { return tile == 0 ? 0 : ends[tile - 1]; }

  const Header* header;
  const uint8_t* used;
  const uint32_t* ends;
  const uint16_t* indices;
  const Raw* values;
};

template <class Wire>
int32_t check_frame(const Payload<Wire>& p, const Header& own, const Bucket& bucket) {
  if (p.header->magic != kMagic) return kBadMagic;
  if (p.header->step != own.step) return kBadStep;
  if (p.header->fingerprint != own.fingerprint) return kBadLayout;
  uint32_t last = 0;
  for (size_t t = 0; t < static_cast<size_t>(bucket.tiles); ++t) {
    if (p.ends[t] < last || p.ends[t] > bucket.entries) return kBadTiles;
    last = p.ends[t];
  }
  for (size_t s = 0; s < bucket.segments.size(); ++s) {
    if (p.ends[bucket.first_tile[s + 1] - 1] != bucket.first_entry[s + 1]) return kBadTiles;
  }
  return kOk;
}

template <class Wire>
int32_t check_tile(const Payload<Wire>& p, int64_t tile, int64_t numel) {
  bool rising = true, finite = true;
  int64_t last = -1;
  for (int64_t e = p.begin(tile); e < p.ends[tile]; ++e) {
    rising &= p.indices[e] > last;
    last = p.indices[e];
    finite &= magnitude(Wire::load(p.values[e])) < kInfinity;
  }
  return !rising || last >= numel ? kBadIndex : finite ? kOk : kBadValue;
}

// Returns whether every average is finite.
template <class Store, class Wire>
bool add_tile(const std::vector<Payload<Wire>>& payloads, int64_t tile, float scale, typename Store::Raw* out,
              float* sum) {
  for (const auto& p : payloads) {
    for (int64_t e = p.begin(tile); e < p.ends[tile]; ++e) {
      __builtin_prefetch(out + p.indices[e], 1);
      sum[p.indices[e]] += Wire::load(p.values[e]);
    }
  }
  // Moves each sum out and leaves zero behind, so that `sum` is ready for the next tile. A sum met a second time, from
  // another rank, is zero by then, as is one that cancelled: out already holds zero there.
  const float inverse = 1.0f / static_cast<float>(payloads.size());
  bool finite = true;
  for (const auto& p : payloads) {
    for (int64_t e = p.begin(tile); e < p.ends[tile]; ++e) {
      float& x = sum[p.indices[e]];
      if (x == 0.0f) continue;
      const auto average = Store::round(x * inverse * scale);
      finite &= Store::is_finite(average);
      out[p.indices[e]] = average;
      x = 0.0f;
    }
  }
  return finite;
}

template <class F>
void with_store_type(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Float) return f(StoreFloat{});
  if (dtype == ScalarType::BFloat16) return f(StoreBFloat16{});
  if (dtype == ScalarType::Half) return f(StoreHalf{});
  STD_TORCH_CHECK(false, "out: expected float32, bfloat16 or float16, got scalar type ", static_cast<int>(dtype));
}

template <class Wire>
void unpack_to(const std::vector<Payload<Wire>>& payloads, int64_t rank, const Bucket& bucket, float scale,
               const std::vector<Tensor>& out, int32_t* status) {
  const std::vector<Tile> tiles = tiles_of(bucket);
  const int64_t ranks = payloads.size(), n_tiles = tiles.size();
  std::vector<std::atomic<int32_t>> found(ranks);  // of each rank, its smallest code
  for (int64_t r = 0; r < ranks; ++r) found[r] = status[r] = check_frame(payloads[r], *payloads[rank].header, bucket);
  torch::stable::parallel_for(0, n_tiles, 4, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t r = 0; r < ranks; ++r) {
        if (status[r] != kOk) continue;  // its tile ends are no addresses
        const int32_t code = check_tile(payloads[r], t, tiles[t].numel);
        int32_t seen = found[r];
        while (code != kOk && (seen == kOk || code < seen) && !found[r].compare_exchange_weak(seen, code)) {
        }
      }
    }
  });
  bool good = true, complete = true;
  for (int64_t r = 0; r < ranks; ++r) {
    status[r] = found[r];
    good &= status[r] == kOk;
  }
  for (int64_t r = 0; r < ranks; ++r) {
    if (status[r] != kOk || (payloads[r].header->flags & kNonFinite) == 0) continue;
    status[r] |= kNonFiniteStatus;
    complete = false;
  }
  status[ranks] = 0;
  if (!good) return;

  std::vector<uint8_t> used(bucket.segments.size());
  for (const auto& p : payloads)
    for (size_t s = 0; s < used.size(); ++s) used[s] |= p.used[s] & kUsed;
  std::atomic<bool> finite{true};
  torch::stable::parallel_for(0, n_tiles, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> sum(kTile);
    for (int64_t t = begin; t < end; ++t) {
      const Tile& tile = tiles[t];
      const Segment& s = bucket.segments[tile.segment];
      if (!used[tile.segment]) continue;
      const Tensor& target = out[s.source];
      with_store_type(target.scalar_type(), [&](auto store) {
        using Store = decltype(store);
        auto* to = static_cast<typename Store::Raw*>(target.mutable_data_ptr()) + s.offset + tile.begin;
        if (!add_tile<Store>(payloads, t, scale, to, sum.data())) finite = false;
        if (!complete && tile.begin == 0) *to = Store::nan();
      });
    }
  });
  status[ranks] = !finite;
}

void unpack_cpu(Tensor payloads, int64_t rank, Tensor segments, Tensor, Tensor scale, ScalarType wire_dtype,
                std::vector<Tensor> out, Tensor status) {
  const auto known = bucket_of(segments);
  const Bucket& bucket = *known;
  const WireLayout at = bucket.wire(wire_dtype);
  check_sources(out, "out", DeviceType::CPU, bucket);
  check_cpu(payloads, "payloads", ScalarType::Byte, 0);
  STD_TORCH_CHECK(payloads.dim() == 2 && payloads.size(1) == at.bytes && rank >= 0 && rank < payloads.size(0),
                  "payloads: expected a row of ", at.bytes, " bytes for each rank, this rank's (", rank,
                  ") among them");
  check_aligned(payloads, "payloads");
  check_cpu(scale, "scale", ScalarType::Float, 1);
  check_cpu(status, "status", ScalarType::Int, payloads.size(0) + 1);
  with_wire_type(wire_dtype, [&](auto wire) {
    using Wire = decltype(wire);
    const auto* bytes = static_cast<const uint8_t*>(payloads.const_data_ptr());
    std::vector<Payload<Wire>> views;
    for (int64_t r = 0; r < payloads.size(0); ++r) views.emplace_back(bytes + r * at.bytes, at);
    unpack_to(views, rank, bucket, *static_cast<const float*>(scale.const_data_ptr()), out,
              static_cast<int32_t*>(status.mutable_data_ptr()));
  });
}

}  // namespace
}  // namespace dgc

STABLE_TORCH_LIBRARY_IMPL(dgc, CPU, m) { m.impl("unpack", TORCH_BOX(&dgc::unpack_cpu)); }
