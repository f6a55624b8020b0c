// Runs every kernel on the emulator under ThreadSanitizer, which reports two threads of a block that touch the same
// memory, one of them writing, without a barrier in between. tests/project/test_races.py builds and runs it.
//
//   races            all kernels
//   races barrier    a kernel without its barrier, to see that it is reported
//   races vote       likewise one that takes a vote for a barrier
#include <cstdio>
#include <random>
#include <string>

#include "../../csrc/cuda/launch.cu"

extern "C" void emulate_order(unsigned seed);

namespace {

using dgc::kThreads;

// A bucket on the host, as dgc/ops/cuda.py lays it out.
struct Bucket {
  Bucket(const std::vector<int64_t>& sizes, double density, unsigned seed) : random(seed) {
    std::vector<dgc::DeviceSegment> table;
    std::vector<int32_t> segment_of_tile;
    int64_t offset = 3, state = 0;  // gradients are not aligned
    for (const int64_t n : sizes) {
      const auto k = std::max<int64_t>(1, static_cast<int64_t>(density * n));
      const int64_t tiles = dgc::div_up(n, dgc::kTile);
      table.push_back(
          {0, offset, state, n, k, static_cast<int64_t>(segment_of_tile.size()), tiles, entries, uppers, lowers});
      uppers += dgc::upper_words(n, k);
      lowers += dgc::lower_words(n, k);
      segment_of_tile.insert(segment_of_tile.end(), tiles, static_cast<int32_t>(table.size()) - 1);
      offset += n;
      state += dgc::div_up(n, dgc::kGroup) * dgc::kGroup;
      entries += k;
    }
    gradient = normal(offset);
    m = normal(state);
    s.assign(state, 1.0f);
    v = normal(state);
    numbers.assign(8 * sizes.size(), 0.9f);  // rows enough for every rule
    sent.resize(entries);
    args.segments = static_cast<int64_t>(table.size());
    args.tiles = static_cast<int64_t>(segment_of_tile.size());
    args.entries = entries;
    args.wire_type = dgc::kFloat;
    workspace.resize(args.work().bytes);
    args.workspace = workspace.data();
    const dgc::Workspace w = args.work();
    std::memcpy(const_cast<dgc::DeviceSegment*>(w.segments), table.data(), table.size() * sizeof table[0]);
    std::memcpy(const_cast<int32_t*>(w.segment_of_tile), segment_of_tile.data(), segment_of_tile.size() * 4);
    payload.resize(args.wire().bytes);
    *reinterpret_cast<dgc::Header*>(payload.data()) = {dgc::kMagic, 1, 2, 0};
  }

  std::vector<float> normal(int64_t n) {
    std::vector<float> x(n);
    std::normal_distribution<float> draw;
    for (float& value : x) value = draw(random);
    return x;
  }

  void compress(dgc::FloatType type, dgc::Accumulation rule) {
    dgc::CompressArgs a{};
    a.bucket = args;
    dgc::with_rule(rule, [&](auto of_rule) {
      float* kept[] = {m.data(), s.data()};
      for (int i = 0; i < decltype(of_rule)::kKept; ++i) a.kept[i] = kept[i];
    });
    a.residual = v.data();
    a.numbers = numbers.data();
    a.scale = &scale;
    a.payload = payload.data();
    a.sent = a.kept[0] != nullptr ? sent.data() : nullptr;
    a.rule = static_cast<int64_t>(rule);
    a.gradients.data[0] = gradient.data();
    a.gradients.type[0] = type;
    dgc_cuda_compress(&a, 0, nullptr);
  }

  void unpack(int ranks) {
    std::vector<uint8_t> payloads;
    for (int i = 0; i < ranks; ++i) payloads.insert(payloads.end(), payload.begin(), payload.end());
    std::vector<int32_t> status(ranks + 1);
    dgc::UnpackArgs a{};
    a.bucket = args;
    a.payloads = payloads.data();
    a.ranks = ranks;
    a.scale = &scale;
    a.status = status.data();
    a.out.data[0] = gradient.data();
    dgc_cuda_unpack(&a, 0, nullptr);
    for (const int32_t code : status)
      if (code != 0) std::printf("unpack: status %d\n", code);
  }

  // Through the wire and back, as three ranks: the selections have to be what was encoded.
  void encode_and_decode(int64_t value_bits) {
    dgc::CodecArgs a{};
    a.bucket = args;
    a.selections = payload.data();
    a.residual = v.data();
    a.ranks = 1;
    a.uppers = uppers;
    a.lowers = lowers;
    a.value_bits = value_bits;
    std::vector<uint8_t> coded(3 * a.layout().bytes), back(3 * payload.size());
    a.payloads = coded.data();
    dgc_cuda_encode(&a, 0, nullptr);
    for (int i = 1; i < 3; ++i) std::copy_n(coded.begin(), a.layout().bytes, coded.begin() + i * a.layout().bytes);
    a.selections = back.data();
    a.ranks = 3;
    dgc_cuda_decode(&a, 0, nullptr);
    const dgc::WireLayout at = args.wire();
    for (int i = 0; i < 3; ++i)
      if (!std::equal(payload.begin() + at.values, payload.begin() + at.values + 4 * entries,
                      back.begin() + i * payload.size() + at.values))
        std::puts("decode: other values");
  }

  void restore() {
    const std::vector<uint8_t> which(args.segments, 1);
    const dgc::RestoreArgs a{args, payload.data(), which.data(), sent.data(), m.data(), v.data()};
    dgc_cuda_restore(&a, 0, nullptr);
  }

  std::mt19937 random;
  int64_t entries = 0, uppers = 0, lowers = 0;
  float scale = 1.0f;
  std::vector<float> gradient, m, s, v, numbers, sent;
  std::vector<uint8_t> workspace, payload;
  dgc::BucketArgs args{};
};

void subtract() {
  std::vector<float> p(20'000, 1.0f), g(20'000, 0.5f);
  dgc::SubtractArgs a{};
  a.minus_lr = -1.0f;
  a.shrink = 1.0f;
  a.count = 2;
  a.pairs[0] = {p.data(), g.data(), 100, 0, 0};
  a.pairs[1] = {p.data() + 101, g.data() + 101, 19'000, 1, 0};
  dgc_cuda_subtract(&a, 1 + dgc::div_up(19'000, dgc::kChunk), 0, nullptr);
}

// Each thread writes a number, and after a barrier, a vote or nothing reads its neighbour's.
template <int kHow>
void neighbour(int* out) {
  __shared__ int shared[kThreads];
  const int me = static_cast<int>(threadIdx.x);
  shared[me] = me;
  if (kHow == 0) __syncthreads();
  if (kHow == 1) __ballot_sync(0xffffffffu, true);
  out[me] = shared[me ^ 1];
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  std::vector<int> out(kThreads);
  if (what == "barrier") {
    emulator::run_grid(dim3(1), kThreads, [&] { neighbour<2>(out.data()); });
  } else if (what == "vote") {
    emulator::run_grid(dim3(1), kThreads, [&] { neighbour<1>(out.data()); });
  } else {
    emulator::run_grid(dim3(1), kThreads, [&] { neighbour<0>(out.data()); });
    for (const unsigned order : {0u, 1u}) {
      emulate_order(order);
      for (const double density : {0.001, 0.02, 0.3}) {  // from groups, candidates that do not fit, shared histograms
        Bucket bucket({70'000, 33, 20'000}, density, order);
        bucket.compress(dgc::kFloat, dgc::Accumulation::kMomentum);
        bucket.unpack(3);
        for (const int64_t bits : {32, 8, 4}) bucket.encode_and_decode(bits);
        bucket.restore();
        bucket.compress(dgc::kBFloat16, dgc::Accumulation::kSum);
        std::fill(bucket.v.begin(), bucket.v.end(), 0.0f);  // all equal: ties
        std::fill(bucket.gradient.begin(), bucket.gradient.end(), 1.0f);
        bucket.compress(dgc::kFloat, dgc::Accumulation::kSum);
      }
      Bucket small({9'000}, 0.01, order);
      small.compress(dgc::kFloat, dgc::Accumulation::kMomentum);
      small.compress(dgc::kFloat, dgc::Accumulation::kAdam);
      small.unpack(300);
      subtract();
    }
  }
  std::puts("done");
}
