// dgc::unpack on a GPU: check, then average. Nothing in a payload is believed before it is checked, no address is made
// of what has not been, and nothing is written unless every payload passes.
#pragma once

#include "common.cuh"

namespace dgc {

// A status while blocks still look for a smaller code: zero is the initial value, and atomicMax finds the least code.
__device__ inline int32_t worse(int32_t code) { return 16 - code; }

template <class Wire>
struct PayloadView {
  const Header* header;
  const uint8_t* used;
  const uint32_t* ends;
  const uint16_t* indices;
  const typename Wire::Raw* values;

  __device__ PayloadView(const uint8_t* bytes, const WireLayout& at)
      : header(reinterpret_cast<const Header*>(bytes)),
        used(bytes + at.used),
        ends(reinterpret_cast<const uint32_t*>(bytes + at.ends)),
        indices(reinterpret_cast<const uint16_t*>(bytes + at.indices)),
        values(reinterpret_cast<const typename Wire::Raw*>(bytes + at.values)) {}

  __device__ int64_t begin(int64_t tile) const { return tile == 0 ? 0 : ends[tile - 1]; }
};

__device__ inline int32_t check_header(const Header& header, const Header& own) {
  if (header.magic != kMagic) return kBadMagic;
  if (header.step != own.step) return kBadStep;
  if (header.fingerprint != own.fingerprint) return kBadLayout;
  return kOk;
}

// One tile of one payload; a whole warp calls it.
template <class Wire>
__device__ inline int32_t check_tile(const PayloadView<Wire>& p, const TileView& tile, const DeviceSegment& s,
                                     int64_t entries) {
  const int64_t begin = p.begin(tile.index), end = p.ends[tile.index];
  if (begin > end || end > entries) return kBadTiles;
  // The number of entries that a parameter sends is fixed.
  if (tile.begin + kTile >= s.numel && end != s.first_entry + s.entries) return kBadTiles;
  bool rising = true, finite = true;
  for (int64_t e = begin + lane(); e < end; e += kWarp) {
    rising &= p.indices[e] < tile.numel && (e == begin || p.indices[e - 1] < p.indices[e]);
    finite &= magnitude(Wire::load(p.values[e])) < kInfinity;
  }
  if (!__all_sync(kAll, rising)) return kBadIndex;
  return __all_sync(kAll, finite) ? kOk : kBadValue;
}

// A block for each eight tiles of each rank, and a warp for each tile.
extern "C" __global__ void __launch_bounds__(kThreads) dgc_check(const __grid_constant__ UnpackArgs a) {
  const Workspace w = a.bucket.work();
  const WireLayout wire = a.bucket.wire();
  const int64_t rank = blockIdx.y, tile = static_cast<int64_t>(blockIdx.x) * kWarps + warp();
  if (tile < a.bucket.tiles) {
    int32_t code = kOk;
    const TileView view(w, tile);
    with_wire_type(a.bucket.wire_type, [&](auto type) {
      using View = PayloadView<decltype(type)>;
      const View payload(a.payloads + rank * wire.bytes, wire);
      if (tile == 0) {
        const View own(a.payloads + a.rank * wire.bytes, wire);
        code = check_header(*payload.header, *own.header);
      }
      if (code == kOk) code = check_tile(payload, view, w.segments[view.segment], a.bucket.entries);
    });
    if (code != kOk && lane() == 0) atomicMax(a.status + rank, worse(code));
  }
  if (!last_block(&w.bucket->arrived, static_cast<int64_t>(gridDim.x) * gridDim.y)) return;
  for (int64_t r = threadIdx.x; r < a.ranks; r += kThreads) {
    const int32_t found = __ldcg(a.status + r);
    const auto* header = reinterpret_cast<const Header*>(a.payloads + r * wire.bytes);
    a.status[r] = found != 0 ? worse(found) : (header->flags & kNonFinite) != 0 ? kNonFiniteStatus : kOk;
  }
}

// Finds where a chunk's entries begin and end among a tile's, whose indices rise. Both ends are searched at once.
__device__ inline void find_chunk(const uint16_t* indices, int chunk, int64_t* begin, int64_t* end) {
  int64_t low[2] = {*begin, *begin}, high[2] = {*end, *end};
  while (low[0] < high[0] || low[1] < high[1]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (low[i] >= high[i]) continue;
      const int64_t middle = (low[i] + high[i]) / 2;
      if (indices[middle] < (chunk + i) * kChunk) {
        low[i] = middle + 1;
      } else {
        high[i] = middle;
      }
    }
  }
  *begin = low[0];
  *end = low[1];
}

// A block's shared memory: the sums of a chunk, and where each rank's entries are.
struct alignas(16) ChunkSums {
  float sum[kChunk];
  uint32_t first[kThreads];   // a rank's first entry in the chunk
  uint32_t before[kThreads];  // entries of lower ranks
};

// Adds all ranks' entries of one chunk up, in rank order.
template <class Wire>
__device__ inline void sum_chunk(const UnpackArgs& a, const WireLayout& wire, int64_t tile, int chunk,
                                 ChunkSums& shared) {
  uint32_t *first = shared.first, *before = shared.before;
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t batch = 0; batch < a.ranks; batch += kThreads) {
    const int ranks = static_cast<int>(a.ranks - batch < kThreads ? a.ranks - batch : kThreads);
    int64_t begin = 0, end = 0, total;
    if (thread < ranks) {
      const PayloadView<Wire> p(a.payloads + (batch + thread) * wire.bytes, wire);
      begin = p.begin(tile);
      end = p.ends[tile];
      find_chunk(p.indices, chunk, &begin, &end);
    }
    const int64_t lower = block_scan(end - begin, &total);
    first[thread] = static_cast<uint32_t>(begin);
    before[thread] = static_cast<uint32_t>(lower);
    __syncthreads();
    // A window of entries at a time, a thread for each; they are ordered by rank. No index repeats within a rank, so
    // between two barriers no two threads add to the same sum.
    for (int64_t window = 0; window < total; window += kThreads) {
      const int64_t entry = window + thread;
      const auto rank_of = [&](int64_t e) {
        int low = 0, high = ranks;  // the last rank with before <= e
        while (high - low > 1) {
          const int middle = (low + high) / 2;
          (before[middle] <= e ? low : high) = middle;
        }
        return low;
      };
      const int last = rank_of(smaller(window + kThreads, total) - 1);
      int mine = -1, index = 0;
      float value = 0.0f;
      if (entry < total) {
        mine = rank_of(entry);
        const PayloadView<Wire> p(a.payloads + (batch + mine) * wire.bytes, wire);
        const int64_t e = first[mine] + entry - before[mine];
        index = p.indices[e] - chunk * kChunk;
        value = Wire::load(p.values[e]);
      }
      for (int rank = rank_of(window); rank <= last; ++rank) {
        if (mine == rank) shared.sum[index] = add(shared.sum[index], value);
        __syncthreads();
      }
    }
  }
}

// Writes n averages; `out` may start anywhere. Returns whether this thread's are finite. Thread 0 writes the first.
template <class Store>
__device__ inline bool store_chunk(typename Store::Raw* out, int n, const float* sum, float inverse, float scale) {
  using Raw = typename Store::Raw;
  bool finite = true;
  const auto round = [&](float x) {
    const Raw average = Store::round(multiply(multiply(x, inverse), scale));
    finite &= Store::is_finite(average);
    return average;
  };
  const int past = static_cast<int>(reinterpret_cast<uint64_t>(out) / sizeof(Raw) % 4);
  const int head = past == 0 ? 0 : (4 - past < n ? 4 - past : n);
  const int quads = (n - head) / 4, tail = head + 4 * quads;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < head) out[thread] = round(sum[thread]);
  for (int q = thread; q < quads; q += kThreads) {
    const float* from = sum + head + 4 * q;
    // In one access where it is aligned; four of stride four would wait for the same banks.
    const Quad<float> x =
        head == 0 ? *reinterpret_cast<const Quad<float>*>(from) : Quad<float>{{from[0], from[1], from[2], from[3]}};
    *reinterpret_cast<Quad<Raw>*>(out + head + 4 * q) = {{round(x.x[0]), round(x.x[1]), round(x.x[2]), round(x.x[3])}};
  }
  if (tail + thread < n) out[tail + thread] = round(sum[tail + thread]);
  return finite;
}

// Writes one chunk of averages; the first of a parameter becomes NaN where entries were left out anywhere.
template <class Store>
__device__ inline void finish_chunk(const UnpackArgs& a, void* out, int64_t at, int numel, const float* sum,
                                    bool mark) {
  auto* to = static_cast<typename Store::Raw*>(out) + at;
  const float inverse = 1.0f / static_cast<float>(a.ranks);
  if (!store_chunk<Store>(to, numel, sum, inverse, *a.scale)) raise(a.status + a.ranks);
  if (threadIdx.x != 0 || !mark) return;
  bool left_out = false;
  for (int64_t r = 0; r < a.ranks; ++r) left_out |= a.status[r] == kNonFiniteStatus;
  if (left_out) *to = Store::nan();
}

// A block for each chunk.
extern "C" __global__ void __launch_bounds__(kThreads) dgc_average(const __grid_constant__ UnpackArgs a) {
  __shared__ ChunkSums shared;
  const Workspace w = a.bucket.work();
  const WireLayout wire = a.bucket.wire();
  const TileView tile(w, blockIdx.x / kChunksPerTile);
  const int chunk = static_cast<int>(blockIdx.x % kChunksPerTile), numel = tile.chunk_numel(chunk);
  if (numel <= 0) return;
  const DeviceSegment& s = w.segments[tile.segment];
  const int thread = static_cast<int>(threadIdx.x);
  bool bad = false, used = false;
  for (int64_t r = thread; r < a.ranks; r += kThreads) {
    bad |= (a.status[r] & (kNonFiniteStatus - 1)) != kOk;
    used |= (a.payloads[r * wire.bytes + wire.used + tile.segment] & kUsed) != 0;
  }
  if (__syncthreads_or(bad)) return;
  for (int q = thread; q < kChunk / 4; q += kThreads) reinterpret_cast<Quad<float>*>(shared.sum)[q] = Quad<float>{};
  used = __syncthreads_or(used);
  if (used) {
    with_wire_type(a.bucket.wire_type,
                   [&](auto type) { sum_chunk<decltype(type)>(a, wire, tile.index, chunk, shared); });
  }
  const bool mark = used && tile.begin == 0 && chunk == 0;
  const int64_t at = s.offset + tile.begin + chunk * kChunk;
  void* out = a.out.data[s.source];
  const uint8_t type = a.out.type[s.source];
  if (type == kFloat) {
    finish_chunk<StoreFloat>(a, out, at, numel, shared.sum, mark);
  } else if (type == kBFloat16) {
    finish_chunk<StoreBFloat16>(a, out, at, numel, shared.sum, mark);
  } else {
    finish_chunk<StoreHalf>(a, out, at, numel, shared.sum, mark);
  }
}

}  // namespace dgc
