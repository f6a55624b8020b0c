// Values of 8 and of 4 bits: a sign, and a magnitude on a logarithmic scale that each parameter has of its own. In
// whole numbers throughout, so that the CPU, CUDA and plain PyTorch give the same bits.
#pragma once

#include "arithmetic.h"
#include "wire.h"

namespace dgc {

// The bits of a float32's magnitude, as an integer, grow nearly as its logarithm: equal steps between them are nearly
// equal ratios. Code 0 says zero; code c > 0 says the magnitude with the bits base + (c - 1) * step.
struct Scale {
  uint32_t base;  // bits of the least magnitude that is not zero
  uint32_t step;
};
static_assert(sizeof(Scale) == 8, "a payload has 8 bytes for it");

// A step of two binades: half of it, a factor of two, is as far as v - w stays exact (Sterbenz).
constexpr uint32_t kMostStep = 1u << 24;

DGC_BOTH constexpr uint32_t most_code(int bits) { return (1u << (bits - 1)) - 1; }

// Returns the scale from the least magnitude that is not zero to the largest.
DGC_BOTH inline Scale scale_of(uint32_t least, uint32_t largest, int bits) {
  const uint32_t intervals = most_code(bits) - 1;
  const uint32_t step = (largest - least + intervals - 1) / intervals;
  return {least, step < 1 ? 1u : step > kMostStep ? kMostStep : step};
}

// Returns whether a scale from elsewhere is one that scale_of could have made.
DGC_BOTH inline bool is_scale(const Scale& s) { return s.base < kInfinity && s.step >= 1 && s.step <= kMostStep; }

// Returns the code nearest to a value whose magnitude, if not zero, is at least the scale's base.
DGC_BOTH inline uint32_t code_of(float x, const Scale& s, int bits) {
  const uint32_t size = magnitude(x), sign = float_bits(x) >> 31 << (bits - 1), most = most_code(bits);
  if (size == 0) return sign;
  const uint32_t level = (size - s.base + s.step / 2) / s.step;
  return sign | (level < most ? level + 1 : most);
}

DGC_BOTH inline float value_of(uint32_t code, const Scale& s, int bits) {
  const uint32_t sign = code >> (bits - 1) << 31, level = code & most_code(bits);
  if (level == 0) return bits_float(sign);
  const uint32_t size = s.base + (level - 1) * s.step;  // below 2^32, as the scale is sound
  return bits_float(sign | (size < kInfinity ? size : kInfinity - 1));
}

}  // namespace dgc
