#include "bucket.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <utility>

#include "rule.h"

namespace dgc {

template <class F>
void Bucket::check_apart(const F& place) const {
  std::vector<std::pair<std::pair<int64_t, int64_t>, int64_t>> spans;
  for (const Segment& s : segments) spans.emplace_back(place(s), s.numel);
  std::sort(spans.begin(), spans.end());
  for (size_t i = 1; i < spans.size(); ++i) {
    const auto& [before, numel] = spans[i - 1];
    const auto& [at, _] = spans[i];
    STD_TORCH_CHECK(before.first != at.first || before.second + numel <= at.second,
                    "segments: expected none to overlap, got one of ", numel, " elements at ", before.second,
                    " and one at ", at.second);
  }
}

Bucket::Bucket(const Segment* rows, size_t count) : segments(rows, rows + count) {
  int64_t uppers = 0, lowers = 0;
  constexpr int64_t limit = int64_t{1} << 47;  // the sum of two cannot overflow
  for (const Segment& s : segments) {
    STD_TORCH_CHECK(s.source >= 0 && s.offset >= 0 && s.offset < limit && s.state >= 0 && s.state < limit &&
                        s.numel > 0 && s.numel < limit && s.entries > 0 && s.entries <= s.numel,
                    "segments: expected source, offset, state >= 0 and 0 < entries <= numel, got ", s.source, ", ",
                    s.offset, ", ", s.state, ", entries ", s.entries, ", numel ", s.numel);
    first_tile.push_back(tiles);
    first_entry.push_back(entries);
    first_upper.push_back(uppers);
    first_lower.push_back(lowers);
    uppers += upper_words(s.numel, s.entries);
    lowers += lower_words(s.numel, s.entries);
    tiles += div_up(s.numel, kTile);
    entries += s.entries;
    STD_TORCH_CHECK(entries < (int64_t{1} << 32), "segments: expected fewer than 2^32 entries a bucket, got ", entries,
                    ": use smaller buckets (bucket_cap_mb)");
    state = std::max(state, s.state + s.numel);
  }
  first_tile.push_back(tiles);
  first_entry.push_back(entries);
  first_upper.push_back(uppers);
  first_lower.push_back(lowers);
  // Two segments on the same elements would race, and change them after their largest were found.
  check_apart([](const Segment& s) { return std::make_pair(int64_t{0}, s.state); });
  check_apart([](const Segment& s) { return std::make_pair(s.source, s.offset); });
}

namespace {

// The tables that passed last. More buckets than fit, or larger ones, are checked at each call.
class Passed {
 public:
  std::shared_ptr<const Bucket> find(const Segment* rows, size_t count) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& bucket : buckets_)
      if (bucket->segments.size() == count && std::memcmp(bucket->segments.data(), rows, count * sizeof *rows) == 0)
        return bucket;
    return nullptr;
  }

  void add(const std::shared_ptr<const Bucket>& bucket) {
    if (bucket->segments.empty() || bucket->segments.size() > kMostRows) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (buckets_.size() < kMost) {
      buckets_.push_back(bucket);
    } else {
      buckets_[oldest_] = bucket;
      oldest_ = (oldest_ + 1) % kMost;
    }
  }

 private:
  static constexpr size_t kMost = 64, kMostRows = 4096;
  std::mutex mutex_;
  std::vector<std::shared_ptr<const Bucket>> buckets_;
  size_t oldest_ = 0;
};

}  // namespace

std::shared_ptr<const Bucket> bucket_of(const Tensor& table) {
  STD_TORCH_CHECK(table.is_cpu() && table.scalar_type() == ScalarType::Long && table.is_contiguous() &&
                      table.dim() == 2 && table.size(1) == kSegmentColumns,
                  "segments: expected a contiguous int64 CPU tensor of shape [segments, ", kSegmentColumns, "]");
  static Passed passed;
  const auto* rows = static_cast<const Segment*>(table.const_data_ptr());
  const size_t count = table.size(0);
  if (auto bucket = passed.find(rows, count)) return bucket;
  const auto bucket = std::make_shared<const Bucket>(rows, count);  // throws where it does not pass
  passed.add(bucket);
  return bucket;
}

WireLayout Bucket::wire(ScalarType dtype) const {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "wire_dtype: expected float32, bfloat16 or float16, got scalar type ", static_cast<int>(dtype));
  return WireLayout(segments.size(), tiles, entries, dtype == ScalarType::Float ? 4 : 2);
}

PayloadLayout Bucket::payload(ScalarType dtype, int64_t value_bits) const {
  const int64_t own = dtype == ScalarType::Float ? 32 : 16;
  STD_TORCH_CHECK(value_bits == own || (own == 32 && (value_bits == 8 || value_bits == 4)), "value_bits: expected ",
                  own, own == 32 ? ", 8 or 4" : "", " for this wire_dtype, got ", value_bits);
  return PayloadLayout(segments.size(), entries, first_upper.back(), first_lower.back(), value_bits);
}

namespace {

const char* name_of(DeviceType device) { return device == DeviceType::CPU ? "CPU" : "CUDA"; }

}  // namespace

void check_tensor(const Tensor& tensor, const char* name, DeviceType device, ScalarType dtype, int64_t min_numel) {
  STD_TORCH_CHECK(tensor.device().type() == device && tensor.scalar_type() == dtype && tensor.is_contiguous() &&
                      tensor.numel() >= min_numel,
                  name, ": expected a contiguous ", name_of(device), " tensor of scalar type ", static_cast<int>(dtype),
                  " with at least ", min_numel, " elements, got device type ", static_cast<int>(tensor.device().type()),
                  ", scalar type ", static_cast<int>(tensor.scalar_type()), ", ", tensor.numel(), " elements",
                  tensor.is_contiguous() ? "" : ", not contiguous");
}

void check_aligned(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kAlign == 0, name,
                  ": expected memory aligned to ", kAlign,
                  " bytes; a view that starts in the middle of a tensor is not");
}

void check_rows(const Tensor& tensor, const char* name, int64_t bytes, DeviceType device) {
  check_tensor(tensor, name, device, ScalarType::Byte, 0);
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(1) == bytes, name, ": expected a row of ", bytes,
                  " bytes for each rank, got ", tensor.dim() == 2 ? tensor.size(1) : tensor.numel());
  check_aligned(tensor, name);
}

void check_sources(const std::vector<Tensor>& sources, const char* name, DeviceType device, const Bucket& bucket) {
  for (const Tensor& t : sources) {
    const ScalarType dtype = t.scalar_type();
    STD_TORCH_CHECK(t.device().type() == device && t.is_contiguous(), name, ": expected contiguous ", name_of(device),
                    " tensors, got device type ", static_cast<int>(t.device().type()),
                    t.is_contiguous() ? "" : ", not contiguous");
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, name,
                    ": expected float32, bfloat16 or float16, got scalar type ", static_cast<int>(dtype));
  }
  for (const Segment& s : bucket.segments) {
    STD_TORCH_CHECK(s.source < static_cast<int64_t>(sources.size()) && s.offset + s.numel <= sources[s.source].numel(),
                    name, ": a segment of ", s.numel, " elements at offset ", s.offset, " of tensor ", s.source,
                    " does not fit");
  }
}

void check_rule(int64_t rule, const std::vector<Tensor>& kept, const Tensor& numbers, bool logs, const Bucket& bucket) {
  STD_TORCH_CHECK(rule >= 0 && rule <= static_cast<int64_t>(Accumulation::kAdam), "rule: expected 0 to ",
                  static_cast<int64_t>(Accumulation::kAdam), ", got ", rule);
  with_rule(static_cast<Accumulation>(rule), [&](auto type) {
    using Rule = decltype(type);
    const auto segments = static_cast<int64_t>(bucket.segments.size());
    STD_TORCH_CHECK(kept.size() == Rule::kKept, "kept: expected ", Rule::kKept, " tensors for rule ", rule, ", got ",
                    kept.size());
    const bool fits = numbers.dim() == 2 && numbers.size(0) == kRows<Rule> && numbers.size(1) == segments;
    STD_TORCH_CHECK(fits, "numbers: expected [", kRows<Rule>, ", ", segments, "] for rule ", rule, ", got ",
                    numbers.dim() == 2 ? numbers.size(0) : numbers.numel(), " x ",
                    numbers.dim() == 2 ? numbers.size(1) : 1);
    STD_TORCH_CHECK(!logs || Rule::kKept > 0, "sent: expected None where the rule keeps nothing");
  });
}

}  // namespace dgc
