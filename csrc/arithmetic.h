// The arithmetic of one gradient entry, free of torch: the CPU and the CUDA code include it, so that both give the same
// bits, and what the CPU's tests say of it holds for both.
#pragma once

#include "portable.h"

namespace dgc {

DGC_BOTH inline uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

DGC_BOTH inline float bits_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

constexpr uint32_t kMagnitude = 0x7fffffffu;  // all but the sign
constexpr uint32_t kInfinity = 0x7f800000u;   // magnitudes from here on are Inf and NaN

// |x| as an integer orders as |x| does, with Inf above every number and NaN above Inf.
DGC_BOTH inline uint32_t magnitude(float x) { return float_bits(x) & kMagnitude; }

// Returns whether x is 0 or -0; denormal numbers are not.
DGC_BOTH inline bool is_zero(float x) { return magnitude(x) == 0; }

// Each operation rounded on its own, whatever the compiler may fuse elsewhere. In PTX, since CuPy compiles everything
// with -ftz=true, which would flush denormal numbers: what stays behind would no longer be exact.
DGC_BOTH inline float multiply(float a, float b) {
#if defined(__CUDA_ARCH__)
  float x;
  asm("mul.rn.f32 %0, %1, %2;" : "=f"(x) : "f"(a), "f"(b));
  return x;
#else
  return a * b;  // -ffp-contract=off
#endif
}

DGC_BOTH inline float add(float a, float b) {
#if defined(__CUDA_ARCH__)
  float x;
  asm("add.rn.f32 %0, %1, %2;" : "=f"(x) : "f"(a), "f"(b));
  return x;
#else
  return a + b;
#endif
}

DGC_BOTH inline float subtract(float a, float b) {
#if defined(__CUDA_ARCH__)
  float x;
  asm("sub.rn.f32 %0, %1, %2;" : "=f"(x) : "f"(a), "f"(b));
  return x;
#else
  return a - b;
#endif
}

DGC_BOTH inline float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  float x;
  asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(x) : "f"(a), "f"(b), "f"(c));
  return x;
#else
  return __builtin_fmaf(a, b, c);
#endif
}

DGC_BOTH inline float divide(float a, float b) {
#if defined(__CUDA_ARCH__)
  float x;
  asm("div.rn.f32 %0, %1, %2;" : "=f"(x) : "f"(a), "f"(b));
  return x;
#else
  return a / b;
#endif
}

DGC_BOTH inline float square_root(float a) {
#if defined(__CUDA_ARCH__)
  float x;
  asm("sqrt.rn.f32 %0, %1;" : "=f"(x) : "f"(a));
  return x;
#else
  return __builtin_sqrtf(a);
#endif
}

// The types in which values travel. store() rounds to nearest even and saturates, so that what stays behind, v - w, is
// finite and exact (WireHalf: up to |v| = 2^29, where v - 65504 no longer fits into 24 bits); load() is exact.
struct WireFloat {
  using Raw = uint32_t;
  DGC_BOTH static Raw store(float x) { return float_bits(x); }
  DGC_BOTH static float load(Raw raw) { return bits_float(raw); }
};

struct WireBFloat16 {
  using Raw = uint16_t;
  DGC_BOTH static Raw store(float x) {
    const uint32_t bits = float_bits(x), sign = bits & ~kMagnitude, size = bits & kMagnitude;
    const uint32_t rounded = (size + 0x7fffu + ((size >> 16) & 1u)) >> 16;
    return static_cast<Raw>((sign >> 16) | (rounded < 0x7f80u ? rounded : 0x7f7fu));
  }
  DGC_BOTH static float load(Raw raw) { return bits_float(static_cast<uint32_t>(raw) << 16); }
};

struct WireHalf {
  using Raw = uint16_t;
  DGC_BOTH static Raw store(float x) {
    const uint32_t bits = float_bits(x), size = bits & kMagnitude;
    const uint32_t sign = (bits & ~kMagnitude) >> 16;
    uint32_t half;
    if (size >= 0x477fe000u) {  // 65504, the largest half, and above
      half = 0x7bffu;
    } else if (size < 0x38800000u) {  // below 2^-14: subnormal, a multiple of 2^-24
      // Adding 0.5 lines the last bit of the sum up with 2^-24; the addition rounds to nearest even.
      half = float_bits(add(bits_float(size), 0.5f)) - 0x3f000000u;
    } else {
      half = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
    }
    return static_cast<Raw>(sign | half);
  }
  DGC_BOTH static float load(Raw raw) {
#if defined(__CUDA_ARCH__)
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(raw));  // exact, as what follows
    return x;
#else
    const uint32_t sign = static_cast<uint32_t>(raw & 0x8000u) << 16, exponent = (raw >> 10) & 31u,
                   mantissa = raw & 0x3ffu;
    if (exponent == 31u) return bits_float(sign | kInfinity | (mantissa << 13));
    if (exponent != 0) return bits_float(sign | ((exponent + 112u) << 23) | (mantissa << 13));
    const float size = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
    return bits_float(sign | float_bits(size));
#endif
  }
};

// The types in which the sum is handed back, those of gradients: rounded to nearest, overflow to Inf as torch does.
struct StoreFloat {
  using Raw = float;
  DGC_BOTH static Raw round(float x) { return x; }
  DGC_BOTH static bool is_finite(Raw x) { return magnitude(x) < kInfinity; }
  DGC_BOTH static Raw nan() { return bits_float(0x7fc00000u); }
};

struct StoreBFloat16 {
  using Raw = uint16_t;
  DGC_BOTH static Raw round(float x) {
    const uint32_t bits = float_bits(x);
    return static_cast<Raw>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
  DGC_BOTH static bool is_finite(Raw x) { return (x & 0x7fffu) < 0x7f80u; }
  DGC_BOTH static Raw nan() { return 0x7fc0u; }
};

struct StoreHalf {
  using Raw = uint16_t;
  DGC_BOTH static Raw round(float x) {
    // 65520 is the first number that is nearer to the next power of two than to 65504.
    if (magnitude(x) >= float_bits(65520.0f)) return static_cast<Raw>(((float_bits(x) >> 16) & 0x8000u) | 0x7c00u);
    return WireHalf::store(x);
  }
  DGC_BOTH static bool is_finite(Raw x) { return (x & 0x7fffu) < 0x7c00u; }
  DGC_BOTH static Raw nan() { return 0x7e00u; }
};

}  // namespace dgc
