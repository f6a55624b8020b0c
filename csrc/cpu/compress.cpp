// dgc::compress_: accumulate, select and pack one bucket in one pass over memory. docs/kernels.md has the idea: the
// update also leaves the largest |v| of every 32 elements; the k-th largest of these bounds the threshold from below,
// because k groups that reach it hold k elements that do. Only the groups that reach it are ever read again: right
// behind the update, by a guess of the bound, while they are in cache, and once more where the guess was too high.
#include <optional>

#include "select.h"
#include "update.h"

namespace dgc {
namespace {

struct Candidate {
  uint32_t index;  // inside the tile
  float value;
};

// Larger than every magnitude.
constexpr uint32_t kNothing = kMagnitude + 1;

// The state of a tile, filled in phase by phase.
struct TileWork {
  TileReport report;
  uint32_t bound = kNothing;          // every element that reaches it is a candidate
  bool late = false;                  // the candidates were found by a second search
  std::vector<Candidate> candidates;  // in index order
  int64_t entry = 0;                  // where its entries start in the payload
  int64_t above = 0;                  // candidates above the threshold: all are sent
  int64_t ties = 0;                   // candidates at the threshold ...
  int64_t ties_sent = 0;              // ... and how many of them, from the smallest index on, are sent
};

// Beyond one entry in so many elements nearly every group qualifies, and the threshold comes from the elements.
constexpr int64_t kMinElementsPerEntry = 40;

class Compressor {
 public:
  // kept: the tensors of the rule, its momentum first.
  Compressor(const Bucket& bucket, const std::array<float*, kMaxKept>& kept, float* residual, uint32_t* group_max)
      : bucket_(bucket),
        tiles_(tiles_of(bucket)),
        kept_(kept),
        residual_(residual),
        group_max_(group_max),
        work_(tiles_.size()),
        bound_(bucket.segments.size()),
        threshold_(bucket.segments.size()) {}

  void accumulate(const std::vector<Tensor>& gradients, Accumulation rule, const float* numbers, float scale) {
    with_rule(rule, [&](auto type) {
      using Rule = decltype(type);
      over_runs([&](const Tile& tile, TileWork& work, uint32_t& guess) {
        const Segment& s = bucket_.segments[tile.segment];
        const Tensor& gradient = gradients[s.source];
        const int64_t at = s.state + tile.begin;
        UpdateArgs args{{}, residual_ + at, group_max_ + tile.group, tile.numel, scale};
        for (int t = 0; t < Rule::kKept; ++t) args.kept[t] = kept_[t] + at;
        work.report = update(avx2_, gradient.scalar_type(), gradient.mutable_data_ptr(), s.offset + tile.begin, args,
                             rule_of<Rule>(numbers, bucket_.segments.size(), tile.segment));
        if (!threshold_from_groups(s)) return;
        constexpr int64_t kEvery = 16;  // a guess costs as much as collecting from a few tiles
        if (guess == kNothing || tile.begin / kTile % kEvery == 0) guess = guess_from(tile);
        if (guess != kNothing) collect(tile, work, guess, 4 * expected(tile) + 64);
      });
    });
  }

  void select() {
    over_segments([&](int64_t i) { bound_[i] = bound_of(i); });
    over_tiles([&](const Tile& tile, TileWork& work) {
      work.late = work.bound > bound_[tile.segment];
      if (work.late) collect(tile, work, bound_[tile.segment], kGroupsPerTile);
    });
    over_segments([&](int64_t i) {
      threshold_[i] = bound_[i];
      bool late = false;
      for_tiles_of(i, [&](TileWork& work) { late |= work.late; });
      if (late && threshold_from_groups(bucket_.segments[i])) threshold_[i] = kth_largest_candidate(i);
    });
    over_tiles([&](const Tile& tile, TileWork& work) {
      const uint32_t threshold = threshold_[tile.segment];
      auto& candidates = work.candidates;
      const auto below = [&](const Candidate& c) { return magnitude(c.value) < threshold; };
      const auto equal = [&](const Candidate& c) { return magnitude(c.value) == threshold; };
      candidates.erase(std::remove_if(candidates.begin(), candidates.end(), below), candidates.end());
      work.ties = std::count_if(candidates.begin(), candidates.end(), equal);
      work.above = static_cast<int64_t>(candidates.size()) - work.ties;
    });
    int64_t entry = 0;
    for (size_t i = 0; i < bucket_.segments.size(); ++i) {
      int64_t ties_left = bucket_.segments[i].entries;
      for_tiles_of(i, [&](TileWork& work) { ties_left -= work.above; });
      for_tiles_of(i, [&](TileWork& work) {
        work.entry = entry;
        work.ties_sent = std::min(ties_left, work.ties);
        ties_left -= work.ties_sent;
        entry += work.above + work.ties_sent;
      });
    }
  }

  template <class Wire>
  void pack(uint8_t* payload, float* sent_momentum) {
    using Raw = typename Wire::Raw;
    const WireLayout at(bucket_.segments.size(), bucket_.tiles, bucket_.entries, sizeof(Raw));
    auto* ends = reinterpret_cast<uint32_t*>(payload + at.ends);
    auto* indices = reinterpret_cast<uint16_t*>(payload + at.indices);
    auto* values = reinterpret_cast<Raw*>(payload + at.values);
    over_tiles([&](const Tile& tile, TileWork& work) {
      const uint32_t threshold = threshold_[tile.segment];
      const int64_t state = bucket_.segments[tile.segment].state + tile.begin;
      int64_t entry = work.entry, ties_left = work.ties_sent;
      const size_t n = work.candidates.size();
      for (size_t j = 0; j < n; ++j) {
        constexpr size_t kAhead = 32;
        if (j + kAhead < n) prefetch(state + work.candidates[j + kAhead].index);
        const Candidate c = work.candidates[j];
        if (magnitude(c.value) == threshold && ties_left-- <= 0) continue;
        const Raw raw = Wire::store(c.value);
        const float sent = Wire::load(raw);
        indices[entry] = static_cast<uint16_t>(c.index);
        values[entry] = raw;
        residual_[state + c.index] = c.value - sent;  // exact: what the wire type cannot say stays here
        if (sent_momentum != nullptr) {
          // Momentum factor masking (paper, section 3.2), where something was sent.
          float& u = kept_[0][state + c.index];
          sent_momentum[entry] = u;
          if (sent != 0.0f) u = 0.0f;
        }
        ++entry;
      }
      ends[&tile - tiles_.data()] = static_cast<uint32_t>(entry);
    });
    write_reports(payload, at);
  }

 private:
  template <class F>
  void over_tiles(const F& f) {
    torch::stable::parallel_for(0, tiles_.size(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(tiles_[i], work_[i]);
    });
  }

  // Calls f as over_tiles does, with a guess besides that it may change, which is that of the tile before.
  template <class F>
  void over_runs(const F& f) {
    torch::stable::parallel_for(0, tiles_.size(), 1, [&](int64_t begin, int64_t end) {
      uint32_t guess = kNothing;
      for (int64_t i = begin; i < end; ++i) f(tiles_[i], work_[i], guess);
    });
  }

  template <class F>
  void for_tiles_of(size_t segment, const F& f) {
    for (int64_t i = bucket_.first_tile[segment]; i < bucket_.first_tile[segment + 1]; ++i) f(work_[i]);
  }

  // Small segments side by side, then the large ones, each with all threads.
  template <class F>
  void over_segments(const F& f) {
    constexpr int64_t kLarge = 1 << 20;
    const auto& segments = bucket_.segments;
    torch::stable::parallel_for(0, segments.size(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        if (segments[i].numel < kLarge) f(i);
    });
    for (size_t i = 0; i < segments.size(); ++i)
      if (segments[i].numel >= kLarge) f(i);
  }

  static bool threshold_from_groups(const Segment& s) { return s.numel >= s.entries * kMinElementsPerEntry; }

  // The entries of a tile if all tiles of its segment had as many, rounded up.
  int64_t expected(const Tile& tile) const {
    const Segment& s = bucket_.segments[tile.segment];
    return static_cast<int64_t>(std::ceil(static_cast<double>(s.entries) * tile.numel / s.numel));
  }

  // Returns what as many groups of a tile reach as of every tile like it would have to, or kNothing where that is 0. A
  // few standard deviations are on the safe side, unless the tile is all there is.
  uint32_t guess_from(const Tile& tile) const {
    const int64_t n = div_up(tile.numel, kGroup), mean = expected(tile);
    const bool alone = tile.numel == bucket_.segments[tile.segment].numel;
    const int64_t rank = mean + (alone ? 0 : static_cast<int64_t>(4 * std::sqrt(static_cast<double>(mean))) + 4);
    const uint32_t guess = rank <= n ? kth_largest(group_max_ + tile.group, n, rank) : 0;
    return guess != 0 ? guess : kNothing;
  }

  // Returns a number that at least k of a segment's keys reach; where all tiles have been searched for what reaches it,
  // that is the k-th largest itself.
  uint32_t bound_of(int64_t segment) {
    const Segment& s = bucket_.segments[segment];
    const uint32_t* groups = group_max_ + tiles_[bucket_.first_tile[segment]].group;
    const int64_t n = div_up(s.numel, kGroup);
    if (!threshold_from_groups(s)) return kth_largest(bits(s.state), s.numel, s.entries);
    int64_t found = 0;
    uint32_t searched = 0;
    for_tiles_of(segment, [&](TileWork& work) {
      found += work.candidates.size();
      searched = std::max(searched, work.bound);
    });
    const uint32_t bound = found >= s.entries ? kth_largest_candidate(segment) : 0;
    return searched <= bound ? bound : std::max(bound, bound_on_kth_largest(groups, n, s.entries));
  }

  const uint32_t* bits(int64_t at) const { return reinterpret_cast<const uint32_t*>(residual_ + at); }

  void prefetch(int64_t at) const {
    __builtin_prefetch(residual_ + at, 1);
    if (kept_[0] != nullptr) __builtin_prefetch(kept_[0] + at, 1);
  }

  // Makes candidates of all elements of a tile that reach the bound, unless they lie in more groups than that.
  void collect(const Tile& tile, TileWork& work, uint32_t bound, int64_t most) {
    const Segment& s = bucket_.segments[tile.segment];
    const int64_t state = s.state + tile.begin;
    uint32_t least = bound;
    // Zeros are sent only where fewer than k entries are not zero; then k zeros lie among the first 2k elements. The
    // same holds for groups.
    if (bound == 0 && tile.begin >= 2 * s.entries) least = 1;
    uint16_t hits[kGroupsPerTile];
    int64_t n = 0;
    scan(avx2_, group_max_ + tile.group, div_up(tile.numel, kGroup), least,
         [&](int64_t group) { hits[n++] = static_cast<uint16_t>(group); });
    if (n > most) return;
    work.bound = bound;
    work.candidates.clear();
    work.candidates.reserve(n + n / 4);
    for (int64_t j = 0; j < n; ++j) {
      constexpr int64_t kAhead = 32;
      if (j + kAhead < n) {  // a group is two cache lines
        const float* next = residual_ + state + hits[j + kAhead] * kGroup;
        __builtin_prefetch(next);
        __builtin_prefetch(next + kGroup / 2);
      }
      const int64_t begin = hits[j] * kGroup;
      scan(avx2_, bits(state + begin), std::min(kGroup, tile.numel - begin), least, [&](int64_t i) {
        work.candidates.push_back({static_cast<uint32_t>(begin + i), residual_[state + begin + i]});
      });
    }
  }

  uint32_t kth_largest_candidate(int64_t segment) {
    size_t n = 0;
    for_tiles_of(segment, [&](TileWork& work) { n += work.candidates.size(); });
    std::vector<uint32_t> keys;
    keys.reserve(n);
    Range range{kMagnitude, 0};
    for_tiles_of(segment, [&](TileWork& work) {
      for (const Candidate& c : work.candidates) {
        const uint32_t size = magnitude(c.value);
        range.low = std::min(range.low, size);
        range.high = std::max(range.high, size);
        keys.push_back(size);
      }
    });
    return kth_largest(keys.data(), keys.size(), bucket_.segments[segment].entries, range);
  }

  void write_reports(uint8_t* payload, const WireLayout& at) {
    int64_t flags = 0;
    for (size_t i = 0; i < bucket_.segments.size(); ++i) {
      uint8_t used = 0;
      for_tiles_of(
          i, [&](TileWork& work) { used |= (work.report.used ? kUsed : 0) | (work.report.nonfinite ? kLeftOut : 0); });
      if ((used & kLeftOut) != 0) flags = kNonFinite;
      payload[at.used + i] = used;
    }
    reinterpret_cast<Header*>(payload)->flags = flags;
  }

  const Bucket& bucket_;
  const std::vector<Tile> tiles_;
  std::array<float*, kMaxKept> kept_;
  float* residual_;
  uint32_t* group_max_;
  std::vector<TileWork> work_;
  std::vector<uint32_t> bound_;      // of each segment: no entry below it can be sent
  std::vector<uint32_t> threshold_;  // of each segment: the k-th largest |v|, or of groups the (k / 32)-th largest
  const bool avx2_ = use_avx2();
};

void compress_cpu(std::vector<Tensor> gradients, int64_t rule, std::vector<Tensor> kept, Tensor residual,
                  Tensor segments, Tensor numbers, Tensor scale, Tensor payload, Tensor workspace,
                  std::optional<Tensor> sent, ScalarType wire_dtype) {
  const auto known = bucket_of(segments);
  const Bucket& bucket = *known;
  check_sources(gradients, "gradients", DeviceType::CPU, bucket);
  check_cpu(residual, "residual", ScalarType::Float, bucket.state);
  check_rule(rule, kept, numbers, sent.has_value(), bucket);
  for (const Tensor& tensor : kept) check_cpu(tensor, "kept", ScalarType::Float, bucket.state);
  check_cpu(numbers, "numbers", ScalarType::Float, 0);
  check_cpu(scale, "scale", ScalarType::Float, 1);
  int64_t groups = 0;
  for (const Segment& s : bucket.segments) groups += s.numel / kTile * kGroupsPerTile + div_up(s.numel % kTile, kGroup);
  check_cpu(workspace, "workspace", ScalarType::Byte, 4 * groups);
  check_aligned(workspace, "workspace");
  check_cpu(payload, "payload", ScalarType::Byte, bucket.wire(wire_dtype).bytes);
  check_aligned(payload, "payload");
  if (sent) check_cpu(*sent, "sent", ScalarType::Float, bucket.entries);

  std::array<float*, kMaxKept> of_rule{};
  for (size_t t = 0; t < kept.size(); ++t) of_rule[t] = static_cast<float*>(kept[t].mutable_data_ptr());
  Compressor compressor(bucket, of_rule, static_cast<float*>(residual.mutable_data_ptr()),
                        static_cast<uint32_t*>(workspace.mutable_data_ptr()));
  with_wire_type(wire_dtype, [&](auto wire) {
    using Wire = decltype(wire);
    compressor.accumulate(gradients, static_cast<Accumulation>(rule),
                          static_cast<const float*>(numbers.const_data_ptr()),
                          *static_cast<const float*>(scale.const_data_ptr()));
    compressor.select();
    compressor.pack<Wire>(static_cast<uint8_t*>(payload.mutable_data_ptr()),
                          sent ? static_cast<float*>(sent->mutable_data_ptr()) : nullptr);
  });
}

}  // namespace
}  // namespace dgc

STABLE_TORCH_LIBRARY_IMPL(dgc, CPU, m) { m.impl("compress_", TORCH_BOX(&dgc::compress_cpu)); }
