// dgc::encode_ and dgc::decode: a selection as the bytes that travel, and back. decode follows no address that it has
// not checked, and leaves all else to unpack: of bytes that are no index it makes tile ends that unpack refuses.
#include "../codec.h"

#include <algorithm>

#include "common.h"

namespace dgc {
namespace {

// The sections of a selection and of a payload, of one rank.
struct Rank {
  Rank(uint8_t* selection, uint8_t* payload, const WireLayout& from, const PayloadLayout& to)
      : ends(reinterpret_cast<uint32_t*>(selection + from.ends)),
        indices(reinterpret_cast<uint16_t*>(selection + from.indices)),
        chosen(selection + from.values),
        scales(reinterpret_cast<Scale*>(payload + to.scales)),
        upper(reinterpret_cast<uint32_t*>(payload + to.upper)),
        lower(reinterpret_cast<uint32_t*>(payload + to.lower)),
        values(payload + to.values) {}

  uint32_t* ends;
  uint16_t* indices;
  uint8_t* chosen;
  Scale* scales;
  uint32_t* upper;
  uint32_t* lower;
  uint8_t* values;
};

int64_t begin_of(const Rank& r, int64_t tile) { return tile == 0 ? 0 : r.ends[tile - 1]; }

// Throws unless tile ends and indices are such as compress_ writes for these segments, which they are addresses by.
void check_selection(const Rank& r, const Bucket& bucket, const std::vector<Tile>& tiles) {
  int64_t t = 0;
  bool good = true;
  for (const Tile& tile : tiles) {
    const int64_t first = bucket.first_entry[tile.segment], next = bucket.first_entry[tile.segment + 1];
    const int64_t begin = tile.begin == 0 ? first : begin_of(r, t), end = r.ends[t++];
    good &= begin_of(r, t - 1) == begin && begin <= end && end <= next &&
            (tile.begin + kTile < bucket.segments[tile.segment].numel || end == next);
    for (int64_t e = begin; good && e < end; ++e) good &= r.indices[e] < tile.numel;
  }
  STD_TORCH_CHECK(good, "selection: expected one that compress_ wrote for these segments");
}

void encode_indices(const Rank& r, const Bucket& bucket, int64_t segment) {
  const Segment& s = bucket.segments[segment];
  const int low = low_bits(s.numel, s.entries);
  const uint32_t mask = (1u << low) - 1;
  uint32_t* upper = r.upper + bucket.first_upper[segment];
  uint32_t* lower = r.lower + bucket.first_lower[segment];
  std::fill(upper, r.upper + bucket.first_upper[segment + 1], 0u);
  uint64_t pending = 0;
  int filled = 0;
  int64_t i = 0;
  for (int64_t t = bucket.first_tile[segment]; t < bucket.first_tile[segment + 1]; ++t) {
    const int64_t tile = (t - bucket.first_tile[segment]) * kTile;
    for (int64_t e = begin_of(r, t); e < r.ends[t]; ++e, ++i) {
      const int64_t at = ((tile + r.indices[e]) >> low) + i;
      upper[at / 32] |= 1u << (at % 32);
      pending |= static_cast<uint64_t>(r.indices[e] & mask) << filled;
      filled += low;
      if (filled >= 32) {
        *lower++ = static_cast<uint32_t>(pending);
        pending >>= 32;
        filled -= 32;
      }
    }
  }
  if (filled > 0) *lower = static_cast<uint32_t>(pending);
}

uint8_t* first_value(const Rank& r, const Bucket& bucket, int64_t segment, int bits) {
  const int64_t entry = bucket.first_entry[segment];
  return r.values + (bits == 4 ? first_nibble_byte(segment, entry) : entry * bits / 8);
}

Scale scale_of_values(const Rank& r, const Bucket& bucket, int64_t segment, int bits) {
  const auto* chosen = reinterpret_cast<const float*>(r.chosen);
  uint32_t least = kMagnitude, largest = 0;
  for (int64_t e = bucket.first_entry[segment]; e < bucket.first_entry[segment + 1]; ++e) {
    const uint32_t size = magnitude(chosen[e]);
    if (size == 0) continue;
    least = std::min(least, size);
    largest = std::max(largest, size);
  }
  return scale_of(largest == 0 ? 0 : least, largest, bits);
}

// Rounds a tile's values to codes, which are 0 before. What receivers will read replaces them, and the rest goes to the
// residual.
void encode_values(const Rank& r, const Bucket& bucket, const Tile& tile, int64_t t, int bits, float* residual) {
  const int64_t first = bucket.first_entry[tile.segment], at = bucket.segments[tile.segment].state + tile.begin;
  const Scale scale = r.scales[tile.segment];
  auto* chosen = reinterpret_cast<float*>(r.chosen);
  uint8_t* values = first_value(r, bucket, tile.segment, bits);
  const int64_t end = r.ends[t];
  for (int64_t e = begin_of(r, t); e < end; ++e) {
    constexpr int64_t kAhead = 24;
    if (e + kAhead < end) __builtin_prefetch(residual + at + r.indices[e + kAhead], 1);
    const uint32_t code = code_of(chosen[e], scale, bits);
    const int64_t i = e - first;
    if (bits == 8) {
      values[i] = static_cast<uint8_t>(code);
    } else {  // two tiles may share a byte
      __atomic_fetch_or(values + i / 2, static_cast<uint8_t>(code << (4 * (i % 2))), __ATOMIC_RELAXED);
    }
    const float sent = value_of(code, scale, bits);
    residual[at + r.indices[e]] += chosen[e] - sent;
    chosen[e] = sent;
  }
}

void decode_indices(const Rank& r, const Bucket& bucket, int64_t segment) {
  const Segment& s = bucket.segments[segment];
  const uint64_t low = low_bits(s.numel, s.entries), entries = s.entries;
  const uint32_t mask = (1u << low) - 1;
  const uint32_t* upper = r.upper + bucket.first_upper[segment];
  const auto* lower = reinterpret_cast<const uint8_t*>(r.lower + bucket.first_lower[segment]);
  const uint64_t words = bucket.first_upper[segment + 1] - bucket.first_upper[segment];
  const uint64_t first = bucket.first_entry[segment];
  uint32_t *end = r.ends + bucket.first_tile[segment], *const last = r.ends + bucket.first_tile[segment + 1] - 1;
  uint16_t* indices = r.indices + first;
  // The first high part of the next tile. Most entries are in the tile of the one before.
  const uint64_t highs = kTile >> low;
  uint64_t i = 0, next = highs;
  for (uint64_t w = 0; w < words; ++w) {
    uint32_t word = upper[w];
    if (i + 32 > entries && i + __builtin_popcount(word) > entries) {
      i = entries + 1;
      break;
    }
    for (; word != 0; word &= word - 1, ++i) {
      const uint64_t high = 32 * w + __builtin_ctz(word) - i;
      for (; high >= next && end < last; next += highs) *end++ = static_cast<uint32_t>(first + i);
      uint32_t rest;  // behind the last word with low bits come values, 16 bytes or more
      std::memcpy(&rest, lower + i * low / 8, sizeof rest);
      indices[i] = static_cast<uint16_t>((high << low) | (rest >> (i * low % 8) & mask));
    }
  }
  // So many ones, and none behind the last bit, leave so many zeros: no high part was too large.
  const uint64_t rest = upper_bits(s.numel, s.entries) % 32;
  if (i != entries || (rest != 0 && upper[words - 1] >> rest != 0)) {
    *last = ~0u;
    return;
  }
  for (; end <= last; ++end) *end = static_cast<uint32_t>(first + entries);
}

void decode_values(const Rank& r, const Bucket& bucket, int64_t segment, int bits) {
  const int64_t entries = bucket.segments[segment].entries, first = bucket.first_entry[segment];
  const uint8_t* values = first_value(r, bucket, segment, bits);
  if (bits >= 16) {
    std::copy(values, values + entries * bits / 8, r.chosen + first * bits / 8);
    return;
  }
  const Scale scale = r.scales[segment];
  auto* to = reinterpret_cast<float*>(r.chosen) + first;
  if (!is_scale(scale)) {
    std::fill(to, to + entries, StoreFloat::nan());
    return;
  }
  if (bits == 4) {
    float of_code[16];
    for (uint32_t code = 0; code < 16; ++code) of_code[code] = value_of(code, scale, bits);
    for (int64_t i = 0; i < entries; ++i) to[i] = of_code[(values[i / 2] >> (4 * (i % 2))) & 15u];
  } else {
    for (int64_t i = 0; i < entries; ++i) to[i] = value_of(values[i], scale, bits);
  }
}

void encode_cpu(Tensor selection, Tensor segments, Tensor, Tensor residual, ScalarType wire_dtype, int64_t value_bits,
                Tensor payload) {
  const auto known = bucket_of(segments);
  const Bucket& bucket = *known;
  const WireLayout from = bucket.wire(wire_dtype);
  const PayloadLayout to = bucket.payload(wire_dtype, value_bits);
  check_cpu(selection, "selection", ScalarType::Byte, from.bytes);
  check_aligned(selection, "selection");
  check_cpu(residual, "residual", ScalarType::Float, bucket.state);
  check_cpu(payload, "payload", ScalarType::Byte, to.bytes);
  check_aligned(payload, "payload");
  auto* source = static_cast<uint8_t*>(selection.mutable_data_ptr());
  auto* target = static_cast<uint8_t*>(payload.mutable_data_ptr());
  const Rank rank(source, target, from, to);
  const std::vector<Tile> tiles = tiles_of(bucket);
  check_selection(rank, bucket, tiles);
  std::copy(source, source + from.ends, target);
  const int bits = static_cast<int>(value_bits);
  torch::stable::parallel_for(0, bucket.segments.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      encode_indices(rank, bucket, s);
      if (bits < 16) {
        rank.scales[s] = scale_of_values(rank, bucket, s, bits);
      } else {
        const int64_t first = bucket.first_entry[s] * bits / 8, last = bucket.first_entry[s + 1] * bits / 8;
        std::copy(rank.chosen + first, rank.chosen + last, rank.values + first);
      }
    }
  });
  if (bits >= 16) return;
  if (bits == 4) std::fill(rank.values, target + to.bytes, 0);
  auto* left = static_cast<float*>(residual.mutable_data_ptr());
  // Over tiles, as compress_ packs them: each thread finds the residual in its own cache.
  torch::stable::parallel_for(0, tiles.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) encode_values(rank, bucket, tiles[t], t, bits, left);
  });
}

void decode_cpu(Tensor payloads, Tensor segments, Tensor, ScalarType wire_dtype, int64_t value_bits,
                Tensor selections) {
  const auto known = bucket_of(segments);
  const Bucket& bucket = *known;
  const WireLayout to = bucket.wire(wire_dtype);
  const PayloadLayout from = bucket.payload(wire_dtype, value_bits);
  check_rows(payloads, "payloads", from.bytes, DeviceType::CPU);
  check_rows(selections, "selections", to.bytes, DeviceType::CPU);
  STD_TORCH_CHECK(payloads.size(0) == selections.size(0), "selections: expected a row for each of ", payloads.size(0),
                  " payloads, got ", selections.size(0));
  // Only read, but a Rank serves both ways.
  auto* source = static_cast<uint8_t*>(payloads.mutable_data_ptr());
  auto* target = static_cast<uint8_t*>(selections.mutable_data_ptr());
  const int64_t count = bucket.segments.size();
  torch::stable::parallel_for(0, payloads.size(0) * count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      uint8_t *payload = source + i / count * from.bytes, *selection = target + i / count * to.bytes;
      const Rank rank(selection, payload, to, from);
      if (i % count == 0) std::copy(payload, payload + to.ends, selection);
      decode_indices(rank, bucket, i % count);
      decode_values(rank, bucket, i % count, static_cast<int>(value_bits));
    }
  });
}

}  // namespace
}  // namespace dgc

STABLE_TORCH_LIBRARY_IMPL(dgc, CPU, m) {
  m.impl("encode_", TORCH_BOX(&dgc::encode_cpu));
  m.impl("decode", TORCH_BOX(&dgc::decode_cpu));
}
