// encode_ and decode on a GPU: a selection as the bytes that travel, and back. A block for each tile, of each rank; no
// address is made of bytes that have not been checked, and all else is left to unpack.
#pragma once

#include "../codec.h"
#include "common.cuh"

namespace dgc {

// The sections of one rank's selection and payload.
struct CodecView {
  uint32_t* ends;
  uint16_t* indices;
  uint8_t* chosen;
  Scale* scales;
  uint32_t* upper;
  uint32_t* lower;
  uint8_t* values;

  __device__ CodecView(const CodecArgs& a, int64_t rank) {
    const WireLayout from = a.bucket.wire();
    const PayloadLayout to = a.layout();
    uint8_t *selection = a.selections + rank * from.bytes, *payload = a.payloads + rank * to.bytes;
    ends = reinterpret_cast<uint32_t*>(selection + from.ends);
    indices = reinterpret_cast<uint16_t*>(selection + from.indices);
    chosen = selection + from.values;
    scales = reinterpret_cast<Scale*>(payload + to.scales);
    upper = reinterpret_cast<uint32_t*>(payload + to.upper);
    lower = reinterpret_cast<uint32_t*>(payload + to.lower);
    values = payload + to.values;
  }

  // Calls f(entry, index in the tile) for the entries of a tile, by all threads of a block. What compress_ did not
  // write is left out.
  template <class F>
  __device__ void over_entries(const TileView& tile, const DeviceSegment& s, const F& f) const {
    const int64_t begin = tile.begin == 0 ? s.first_entry : ends[tile.index - 1];
    const int64_t end = smaller(ends[tile.index], s.first_entry + s.entries);
    for (int64_t e = (begin < s.first_entry ? s.first_entry : begin) + threadIdx.x; e < end; e += kThreads)
      if (indices[e] < tile.numel) f(e, static_cast<int64_t>(indices[e]));
  }
};

// Copies header and marks, which are the same on both sides. One block calls it.
__device__ inline void copy_head(uint8_t* to, const uint8_t* from, int64_t bytes) {
  for (int64_t i = threadIdx.x; i < bytes; i += kThreads) to[i] = from[i];
}

// The scale of each parameter, for values of 8 and 4 bits. The payload has been zeroed.
extern "C" __global__ void __launch_bounds__(kThreads) dgc_scale(const __grid_constant__ CodecArgs a) {
  const Workspace w = a.bucket.work();
  const TileView tile(w, blockIdx.x);
  if (tile.index == 0) copy_head(a.payloads, a.selections, a.bucket.wire().ends);
  if (a.value_bits >= 16) return;
  const CodecView view(a, 0);
  const DeviceSegment& s = w.segments[tile.segment];
  SegmentState& state = w.segment_states[tile.segment];
  const auto* chosen = reinterpret_cast<const float*>(view.chosen);
  uint32_t far = 0, largest = 0;
  view.over_entries(tile, s, [&](int64_t e, int64_t) {
    const uint32_t size = magnitude(chosen[e]);
    if (size == 0) return;
    far = kMagnitude - size > far ? kMagnitude - size : far;
    largest = size > largest ? size : largest;
  });
  if (largest != 0) {
    atomicMax(&state.far, far);
    atomicMax(&state.largest, largest);
  }
  if (!last_block(&state.arrived, s.tiles)) return;
  if (threadIdx.x == 0) {
    const uint32_t most = __ldcg(&state.largest);
    view.scales[tile.segment] =
        scale_of(most == 0 ? 0 : kMagnitude - __ldcg(&state.far), most, static_cast<int>(a.value_bits));
    state.far = state.largest = 0;
  }
}

extern "C" __global__ void __launch_bounds__(kThreads) dgc_encode(const __grid_constant__ CodecArgs a) {
  const Workspace w = a.bucket.work();
  const TileView tile(w, blockIdx.x);
  const DeviceSegment& s = w.segments[tile.segment];
  const CodecView view(a, 0);
  const int low = low_bits(s.numel, s.entries), bits = static_cast<int>(a.value_bits);
  uint32_t *upper = view.upper + s.first_upper, *lower = view.lower + s.first_lower;
  view.over_entries(tile, s, [&](int64_t e, int64_t inside) {
    const int64_t index = tile.begin + inside, i = e - s.first_entry;
    const int64_t at = (index >> low) + i, from = i * low;
    atomicOr(upper + at / 32, 1u << (at % 32));
    if (low != 0) {
      const uint64_t rest = static_cast<uint64_t>(index & ((1 << low) - 1)) << (from % 32);
      atomicOr(lower + from / 32, static_cast<uint32_t>(rest));
      if (from % 32 + low > 32) atomicOr(lower + from / 32 + 1, static_cast<uint32_t>(rest >> 32));
    }
    if (bits == 32) {
      reinterpret_cast<uint32_t*>(view.values)[e] = reinterpret_cast<const uint32_t*>(view.chosen)[e];
    } else if (bits == 16) {
      reinterpret_cast<uint16_t*>(view.values)[e] = reinterpret_cast<const uint16_t*>(view.chosen)[e];
    } else {
      const Scale scale = view.scales[tile.segment];
      float& value = reinterpret_cast<float*>(view.chosen)[e];
      const uint32_t code = code_of(value, scale, bits);
      if (bits == 8) {
        view.values[e] = static_cast<uint8_t>(code);
      } else {
        const int64_t nibble = 2 * first_nibble_byte(tile.segment, s.first_entry) + i;
        atomicOr(reinterpret_cast<uint32_t*>(view.values) + nibble / 8, code << (4 * (nibble % 8)));
      }
      const float sent = value_of(code, scale, bits);
      float& v = a.residual[s.state + index];
      v = add(v, subtract(value, sent));
      value = sent;
    }
  });
}

// Ones among some words; all threads of a block call it, and all get the sum.
__device__ inline int64_t count_ones(const uint32_t* words, int64_t count) {
  int64_t mine = 0, total;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) mine += __popc(words[i]);
  block_scan(mine, &total);
  return total;
}

// Each block has an equal part of the words with its parameter's upper bits, and counts the ones before it: what that
// reads again lies in the L2 cache, and at 0.1 % is 2,300 words of a parameter of 25 million.
extern "C" __global__ void __launch_bounds__(kThreads) dgc_decode(const __grid_constant__ CodecArgs a) {
  const Workspace w = a.bucket.work();
  const TileView tile(w, blockIdx.x);
  const int64_t rank = blockIdx.y;
  if (tile.index == 0)
    copy_head(a.selections + rank * a.bucket.wire().bytes, a.payloads + rank * a.layout().bytes, a.bucket.wire().ends);
  const DeviceSegment& s = w.segments[tile.segment];
  const CodecView view(a, rank);
  const int low = low_bits(s.numel, s.entries), bits = static_cast<int>(a.value_bits);
  const uint32_t *upper = view.upper + s.first_upper, *lower = view.lower + s.first_lower;
  const int64_t words = upper_words(s.numel, s.entries), end_bit = upper_bits(s.numel, s.entries);
  const int64_t part = tile.index - s.first_tile;
  const int64_t first_word = words * part / s.tiles, last_word = words * (part + 1) / s.tiles;
  // A tile ends with the zero that ends the last of its high parts.
  const int64_t zeros_a_tile = kTile >> low;

  int64_t before = count_ones(upper, first_word);
  for (int64_t begin = first_word; begin < last_word; begin += kThreads) {
    const int64_t at = begin + threadIdx.x;
    const uint32_t word = at < last_word ? upper[at] : 0;
    int64_t total;
    int64_t i = before + block_scan(__popc(word), &total);
    before += total;
    if (at >= last_word) continue;
    for (int b = 0; b < 32; ++b) {
      const int64_t bit = 32 * at + b, high = bit - i;
      if ((word >> b & 1u) == 0) {
        const int64_t next = (high + 1) / zeros_a_tile;
        if ((high + 1) % zeros_a_tile == 0 && next < s.tiles && bit < end_bit)
          view.ends[s.first_tile + next - 1] = static_cast<uint32_t>(s.first_entry + smaller(i, s.entries));
        continue;
      }
      if (i < s.entries) {
        const int64_t from = i * low;
        uint64_t rest = 0;
        if (low != 0) {
          rest = lower[from / 32] >> (from % 32);
          if (from % 32 + low > 32) rest |= static_cast<uint64_t>(lower[from / 32 + 1]) << (32 - from % 32);
        }
        const int64_t index = (high << low) | static_cast<int64_t>(rest & ((1u << low) - 1));
        view.indices[s.first_entry + i] = static_cast<uint16_t>(index % kTile);
      }
      ++i;
    }
  }
  if (part == s.tiles - 1 && threadIdx.x == 0) {
    // So many ones, and none behind the last bit, leave so many zeros: no high part is too large.
    const bool clean = end_bit % 32 == 0 || upper[words - 1] >> (end_bit % 32) == 0;
    view.ends[tile.index] = before == s.entries && clean ? static_cast<uint32_t>(s.first_entry + s.entries) : ~0u;
  }

  const int64_t first = s.first_entry + s.entries * part / s.tiles;
  const int64_t last = s.first_entry + s.entries * (part + 1) / s.tiles;
  const Scale scale = bits < 16 ? view.scales[tile.segment] : Scale{0, 1};
  const bool sound = is_scale(scale);
  for (int64_t e = first + threadIdx.x; e < last; e += kThreads) {
    if (bits == 32) {
      reinterpret_cast<uint32_t*>(view.chosen)[e] = reinterpret_cast<const uint32_t*>(view.values)[e];
    } else if (bits == 16) {
      reinterpret_cast<uint16_t*>(view.chosen)[e] = reinterpret_cast<const uint16_t*>(view.values)[e];
    } else {
      const int64_t nibble = 2 * first_nibble_byte(tile.segment, s.first_entry) + e - s.first_entry;
      const uint32_t code = bits == 8 ? view.values[e] : view.values[nibble / 2] >> (4 * (nibble % 2)) & 15u;
      reinterpret_cast<float*>(view.chosen)[e] = sound ? value_of(code, scale, bits) : StoreFloat::nan();
    }
  }
}

}  // namespace dgc
