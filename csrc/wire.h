// The wire format and the arithmetic of one gradient entry, free of torch: the CPU code includes it and the CUDA
// code will, so that both write the same bytes and the same bits. dgc/wire.py is its twin in Python; DESIGN:
// docs/wire.md.
#pragma once

#include <cstdint>
#include <cstring>

namespace dgc {

// A tile is the stretch of one parameter that a 16-bit index can address.
constexpr int64_t kTile = 65536;
// A group is the run of elements that shares one maximum; groups and tiles start anew with each segment.
constexpr int64_t kGroup = 32;
constexpr int64_t kGroupsPerTile = kTile / kGroup;
// Sections of the payload start on multiples of this, so that every value is aligned on every device.
constexpr int64_t kAlign = 16;
constexpr int64_t kMagic = 0x3145524957434744;  // "DGCWIRE1" in memory

// Flags of the header.
constexpr int64_t kNonFinite = 1;

// What unpack says about the payload of one rank: the low byte is one of these, kNonFiniteStatus may be added.
enum Status : int32_t {
  kOk = 0,
  kBadMagic = 1,
  kBadStep = 2,
  kBadLayout = 3,
  kBadTiles = 4,
  kBadIndex = 5,
  kBadValue = 6,
  kNonFiniteStatus = 256,
};

// One compressed parameter of a bucket: a row of the int64 segment table.
struct Segment {
  int64_t source;   // which of the gradient tensors holds it
  int64_t offset;   // its first element there
  int64_t state;    // its first element in momentum and residual
  int64_t numel;    // elements
  int64_t entries;  // k: entries sent at each step
};
constexpr int64_t kSegmentColumns = sizeof(Segment) / sizeof(int64_t);

struct Header {
  int64_t magic;
  int64_t step;         // of the sender: equal sizes do not mean equal steps
  int64_t fingerprint;  // of layout and configuration
  int64_t flags;        // written by compress_
};

constexpr int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t align_up(int64_t bytes) { return div_up(bytes, kAlign) * kAlign; }

// Byte offsets of the payload's sections: header | used bytes | tile ends (u32) | indices (u16) | values.
struct WireLayout {
  int64_t used, ends, indices, values, bytes;

  WireLayout(int64_t segments, int64_t tiles, int64_t entries, int64_t value_bytes)
      : used(sizeof(Header)),
        ends(align_up(used + segments)),
        indices(align_up(ends + 4 * tiles)),
        values(align_up(indices + 2 * entries)),
        bytes(align_up(values + value_bytes * entries)) {}
};

inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

constexpr uint32_t kMagnitude = 0x7fffffffu;  // all but the sign
constexpr uint32_t kInfinity = 0x7f800000u;   // magnitudes from here on are Inf and NaN

// |x| as an integer orders as |x| does, with Inf above every number and NaN above Inf.
inline uint32_t magnitude(float x) { return float_bits(x) & kMagnitude; }

// How values travel. store() rounds to nearest even and saturates, so that what stays behind, v - w, is finite
// and exact; load() is exact.
struct WireFloat {
  using Raw = uint32_t;
  static Raw store(float x) { return float_bits(x); }
  static float load(Raw raw) { return bits_float(raw); }
};

struct WireBFloat16 {
  using Raw = uint16_t;
  static Raw store(float x) {
    const uint32_t bits = float_bits(x), sign = bits & ~kMagnitude, size = bits & kMagnitude;
    const uint32_t rounded = (size + 0x7fffu + ((size >> 16) & 1u)) >> 16;
    return static_cast<Raw>((sign >> 16) | (rounded < 0x7f80u ? rounded : 0x7f7fu));
  }
  static float load(Raw raw) { return bits_float(static_cast<uint32_t>(raw) << 16); }
};

struct WireHalf {
  using Raw = uint16_t;
  static Raw store(float x) {
    const uint32_t bits = float_bits(x), size = bits & kMagnitude;
    const uint32_t sign = (bits & ~kMagnitude) >> 16;
    uint32_t half;
    if (size >= 0x477fe000u) {  // 65504, the largest half, and above
      half = 0x7bffu;
    } else if (size < 0x38800000u) {  // below 2^-14: subnormal, a multiple of 2^-24
      // Adding 0.5 lines the last bit of the sum up with 2^-24; the addition rounds to nearest even.
      half = float_bits(bits_float(size) + 0.5f) - 0x3f000000u;
    } else {
      half = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
    }
    return static_cast<Raw>(sign | half);
  }
  static float load(Raw raw) {
    const uint32_t sign = static_cast<uint32_t>(raw & 0x8000u) << 16, exponent = (raw >> 10) & 31u,
                   mantissa = raw & 0x3ffu;
    if (exponent == 31u) return bits_float(sign | kInfinity | (mantissa << 13));
    if (exponent != 0) return bits_float(sign | ((exponent + 112u) << 23) | (mantissa << 13));
    const float size = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
    return bits_float(sign | float_bits(size));
  }
};

}  // namespace dgc
