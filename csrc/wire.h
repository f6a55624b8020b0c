// Where everything stands in a selection, which compress_ writes and unpack reads, and in a payload, which travels.
// Free of torch and of the standard library: the CPU and the CUDA code include it, so that both write the same bytes.
// dgc/ops/wire.py is its twin in Python, docs/wire.md the description.
#pragma once

#include "portable.h"

namespace dgc {

// A tile is the stretch of one parameter that a 16-bit index can address.
constexpr int64_t kTile = 65536;
// A group is the run of elements that shares one maximum; groups and tiles start anew with each segment.
constexpr int64_t kGroup = 32;
constexpr int64_t kGroupsPerTile = kTile / kGroup;
// Sections of the payload start on multiples of this, so that every value is aligned on every device.
constexpr int64_t kAlign = 16;
constexpr int64_t kMagic = 0x3245524957434744;  // "DGCWIRE2" in memory

// Flags of the header.
constexpr int64_t kNonFinite = 1;
// Bits of a parameter's byte: its gradient was not zero; entries of it were left out.
constexpr uint8_t kUsed = 1, kLeftOut = 2;

// The status that unpack gives the payload of one rank: the low byte is one of these, kNonFiniteStatus may be added.
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
constexpr int64_t kSegmentColumns = 5;
static_assert(sizeof(Segment) == kSegmentColumns * sizeof(int64_t), "a row is nothing but its columns");

struct Header {
  int64_t magic;
  int64_t step;         // of the sender: equal sizes do not mean equal steps
  int64_t fingerprint;  // of layout and configuration
  int64_t flags;        // written by compress_
};

DGC_BOTH constexpr int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
DGC_BOTH constexpr int64_t align_up(int64_t bytes) { return div_up(bytes, kAlign) * kAlign; }

// Byte offsets of a selection's sections: header | used bytes | tile ends (u32) | indices (u16) | values.
struct WireLayout {
  int64_t used, ends, indices, values, bytes;

  DGC_BOTH WireLayout(int64_t segments, int64_t tiles, int64_t entries, int64_t value_bytes)
      : used(sizeof(Header)),
        ends(align_up(used + segments)),
        indices(align_up(ends + 4 * tiles)),
        values(align_up(indices + 2 * entries)),
        bytes(align_up(values + value_bytes * entries)) {}
};

// Elias-Fano: of a parameter's k rising indices below numel, the low bits stand one after the other. The rest of each,
// the high part, is said in unary: in a string of bits, index i sets the bit at (its high part) + i. At most 16 bits
// are low, so that indices with equal high parts lie in one tile.
DGC_BOTH inline int low_bits(int64_t numel, int64_t entries) {
  int bits = 0;
  for (int64_t ratio = numel / entries; ratio > 1 && bits < 16; ratio >>= 1) ++bits;
  return bits;
}
DGC_BOTH inline int64_t upper_bits(int64_t numel, int64_t entries) {
  return entries + ((numel - 1) >> low_bits(numel, entries));
}
DGC_BOTH inline int64_t upper_words(int64_t numel, int64_t entries) { return div_up(upper_bits(numel, entries), 32); }
DGC_BOTH inline int64_t lower_words(int64_t numel, int64_t entries) {
  return div_up(entries * low_bits(numel, entries), 32);
}

// Byte offsets of a payload's sections: header | used bytes | scales (8 bytes a parameter, of values of 8 and 4 bits) |
// upper bits and low bits of the indices, each parameter's from a 32-bit word on | values.
struct PayloadLayout {
  int64_t scales, upper, lower, values, bytes;

  DGC_BOTH PayloadLayout(int64_t segments, int64_t entries, int64_t uppers, int64_t lowers, int64_t value_bits)
      : scales(align_up(sizeof(Header) + segments)),
        upper(align_up(scales + (value_bits < 16 ? 8 * segments : 0))),
        lower(align_up(upper + 4 * uppers)),
        values(align_up(lower + 4 * lowers)),
        bytes(align_up(values + (value_bits == 4 ? (entries + segments + 1) / 2 : entries * value_bits / 8))) {}
};

// The first byte of a parameter's values of 4 bits: none shares a byte with another parameter.
DGC_BOTH constexpr int64_t first_nibble_byte(int64_t segment, int64_t first_entry) {
  return (first_entry + segment) / 2;
}

}  // namespace dgc
