// The wire format, free of torch and of the standard library: the CPU and the CUDA code include it, so that both write
// the same bytes. dgc/ops/wire.py is its twin in Python, docs/wire.md the description.
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
constexpr int64_t kMagic = 0x3145524957434744;  // "DGCWIRE1" in memory

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
  int64_t unit;     // how many consecutive elements are chosen as one: 1, or kGroup
};
constexpr int64_t kSegmentColumns = 6;
static_assert(sizeof(Segment) == kSegmentColumns * sizeof(int64_t), "a row is nothing but its columns");

struct Header {
  int64_t magic;
  int64_t step;         // of the sender: equal sizes do not mean equal steps
  int64_t fingerprint;  // of layout and configuration
  int64_t flags;        // written by compress_
};

DGC_BOTH constexpr int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
DGC_BOTH constexpr int64_t align_up(int64_t bytes) { return div_up(bytes, kAlign) * kAlign; }

// Byte offsets of the payload's sections: header | used bytes | tile ends (u32) | indices (u16) | values.
struct WireLayout {
  int64_t used, ends, indices, values, bytes;

  DGC_BOTH WireLayout(int64_t segments, int64_t tiles, int64_t entries, int64_t value_bytes)
      : used(sizeof(Header)),
        ends(align_up(used + segments)),
        indices(align_up(ends + 4 * tiles)),
        values(align_up(indices + 2 * entries)),
        bytes(align_up(values + value_bytes * entries)) {}
};

}  // namespace dgc
