// The arguments of the kernels: plain structs of pointers and counts, passed by value, and where everything stands in
// the workspace. dgc/ops/args.py builds the same structs with ctypes, and dgc/ops/cuda.py the workspace: a struct whose
// size is asserted here has that size there, and tests/ops/test_twins.py holds them together.
#pragma once

#include "../rule.h"
#include "../wire.h"

namespace dgc {

// 256 threads look at a tile's 2048 groups, 8192 elements at a time.
constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
// A chunk is what one block updates, and later one warp looks through: an eighth of a tile.
constexpr int kChunk = 8192;
constexpr int kChunksPerTile = kTile / kChunk;
constexpr int kGroupsPerChunk = kChunk / kGroup;
static_assert(kChunksPerTile == kWarps, "a block is one warp for each chunk of its tile");
// Digits of the radix selection: bits 30..20, 19..9 and 8..0 of a magnitude.
constexpr int kBins = 2048;

// Kernel arguments have 4 KiB on every device, and hold the gradients' addresses.
constexpr int kMaxSources = 256;
constexpr int kMaxPairs = 120;

enum FloatType : uint8_t { kFloat = 0, kBFloat16 = 1, kHalf = 2 };

// The tensors that hold a bucket's gradients. By value, since addresses may differ at every call, and so that a
// captured graph carries them.
struct Sources {
  void* data[kMaxSources];
  uint8_t type[kMaxSources];  // FloatType
};
static_assert(sizeof(Sources) == 2304);

// A segment as the device knows it: its row of the table, and where its tiles, its entries and the words of its indices
// start in the bucket.
struct DeviceSegment {
  int64_t source;
  int64_t offset;
  int64_t state;
  int64_t numel;
  int64_t entries;
  int64_t first_tile;
  int64_t tiles;
  int64_t first_entry;
  int64_t first_upper;
  int64_t first_lower;
};
static_assert(sizeof(DeviceSegment) == 80);

// The state of the selection in a segment. Blocks of one kernel write it for the next kernel.
struct SegmentState {
  uint32_t arrived;    // blocks of the running kernel that are done; 0 between kernels
  uint32_t used;       // whether any h was not zero; 0 between calls
  uint32_t prefix;     // upper digits found so far
  uint32_t bound;      // no element below it is among the k largest
  uint32_t threshold;  // the k-th largest magnitude
  uint32_t nonfinite;  // whether compress_ left entries out; 0 between calls
  int64_t rank;        // of the wanted magnitude among those that share the prefix; 0: there is none
  int64_t ties;        // entries at the threshold that are sent
  uint32_t far;        // encode_: kMagnitude less the least magnitude that is not zero; 0 between calls
  uint32_t largest;    // encode_: the largest magnitude; 0 between calls
};
static_assert(sizeof(SegmentState) == 48);

struct TileState {
  int64_t above;  // candidates above the threshold; after the scan, in the segment's tiles before this one
  int64_t ties;   // candidates at the threshold; likewise
};
static_assert(sizeof(TileState) == 16);

struct ChunkState {
  int64_t first;   // candidates of the chunk in the buffer, or kReread: they did not fit, look through v again
  uint32_t count;  // how many
  uint32_t above;  // of them above the threshold
  uint32_t ties;   // at the threshold
  uint32_t unused;
};
static_assert(sizeof(ChunkState) == 24);
constexpr int64_t kReread = -1;

struct BucketState {
  unsigned long long candidates;  // claimed so far; 0 between calls
  uint32_t nonfinite;             // whether compress_ left entries out; 0 between calls
  uint32_t arrived;               // blocks of check that are done; 0 between calls
};
static_assert(sizeof(BucketState) == 16);

// The workspace: tables that dgc.ops.workspace() wrote, then scratch, zero between calls where it says so.
struct Workspace {
  const DeviceSegment* segments;
  const int32_t* segment_of_tile;
  BucketState* bucket;
  SegmentState* segment_states;
  TileState* tiles;
  ChunkState* chunks;
  uint32_t* histograms;  // kBins a segment; zero between kernels
  uint32_t* group_max;   // kGroupsPerTile a tile
  uint32_t* candidate_bits;
  uint16_t* candidate_indices;  // inside the chunk
  int64_t capacity;             // candidates that fit
  int64_t bytes;

  DGC_BOTH Workspace(uint8_t* base, int64_t n_segments, int64_t n_tiles, int64_t n_entries) {
    int64_t at = 0;
    const auto place = [&](int64_t size) {
      uint8_t* start = base + at;
      at += align_up(size);
      return start;
    };
    capacity = 2 * n_entries;
    segments = reinterpret_cast<const DeviceSegment*>(place(n_segments * sizeof(DeviceSegment)));
    segment_of_tile = reinterpret_cast<const int32_t*>(place(n_tiles * sizeof(int32_t)));
    bucket = reinterpret_cast<BucketState*>(place(sizeof(BucketState)));
    segment_states = reinterpret_cast<SegmentState*>(place(n_segments * sizeof(SegmentState)));
    tiles = reinterpret_cast<TileState*>(place(n_tiles * sizeof(TileState)));
    chunks = reinterpret_cast<ChunkState*>(place(n_tiles * kChunksPerTile * sizeof(ChunkState)));
    histograms = reinterpret_cast<uint32_t*>(place(n_segments * kBins * sizeof(uint32_t)));
    group_max = reinterpret_cast<uint32_t*>(place(n_tiles * kGroupsPerTile * sizeof(uint32_t)));
    candidate_bits = reinterpret_cast<uint32_t*>(place(capacity * sizeof(uint32_t)));
    candidate_indices = reinterpret_cast<uint16_t*>(place(capacity * sizeof(uint16_t)));
    bytes = at;
  }
};

// The part of the arguments that all kernels of a bucket need.
struct BucketArgs {
  int64_t segments;
  int64_t tiles;
  int64_t entries;
  uint8_t* workspace;
  int32_t wire_type;  // FloatType of the values in the payload
  int32_t unused;

  DGC_BOTH Workspace work() const { return Workspace(workspace, segments, tiles, entries); }
  DGC_BOTH WireLayout wire() const { return WireLayout(segments, tiles, entries, wire_type == kFloat ? 4 : 2); }
};
static_assert(sizeof(BucketArgs) == 40);

struct CompressArgs {
  BucketArgs bucket;
  float* kept[kMaxKept];  // by the rule, the momentum first; null beyond
  float* residual;
  const float* numbers;  // of the rule: a row for each, a column for each segment
  const float* scale;
  uint8_t* payload;
  float* sent;   // null: no masking
  int64_t rule;  // Accumulation
  Sources gradients;
};
static_assert(sizeof(CompressArgs) == 2408);

struct UnpackArgs {
  BucketArgs bucket;
  const uint8_t* payloads;
  int64_t ranks;
  int64_t rank;
  const float* scale;
  int32_t* status;
  Sources out;
};
static_assert(sizeof(UnpackArgs) == 2384);

struct RestoreArgs {
  BucketArgs bucket;
  const uint8_t* payload;
  const uint8_t* which;
  const float* sent;  // null: nothing was masked
  float* momentum;
  float* residual;
};
static_assert(sizeof(RestoreArgs) == 80);

// Of encode_, for one rank, and of decode, for all: where a rank's selection and its payload stand.
struct CodecArgs {
  BucketArgs bucket;
  uint8_t* selections;
  uint8_t* payloads;
  float* residual;  // encode_ only
  int64_t ranks;
  int64_t uppers;  // words of upper bits in a payload
  int64_t lowers;  // words of low bits
  int64_t value_bits;

  DGC_BOTH PayloadLayout layout() const {
    return PayloadLayout(bucket.segments, bucket.entries, uppers, lowers, value_bits);
  }
};
static_assert(sizeof(CodecArgs) == 96);

struct Pair {
  float* parameter;
  const float* update;
  int64_t numel;
  uint32_t first_block;
  uint32_t unused;
};
static_assert(sizeof(Pair) == 32);

struct SubtractArgs {
  const uint8_t* skip;  // null, or not zero there: change nothing
  float minus_lr;
  float shrink;
  int32_t count;
  int32_t unused;
  Pair pairs[kMaxPairs];
};
static_assert(sizeof(SubtractArgs) == 3864);

}  // namespace dgc
