// Definitions that let one source compile as C++, as CUDA, and under NVRTC, which has no standard library.
#pragma once

#if defined(__CUDACC_RTC__)
using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
#else
#include <cstdint>
#include <cstring>
#endif

// For the host and for the device.
#if defined(__CUDACC__)
#define DGC_BOTH __host__ __device__
#else
#define DGC_BOTH
#endif
