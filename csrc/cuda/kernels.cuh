// All kernels: what nvcc compiles into the library, and NVRTC where there is no nvcc. The lists below name each, op by
// op, in the order of the launches, with its blocks in x and y: launch.cu and tests/emulator are made from them, and
// dgc/ops/launch.py says the same.
#pragma once

#include "codec.cuh"
#include "compress.cuh"
#include "restore.cuh"
#include "subtract.cuh"
#include "unpack.cuh"

#define DGC_COMPRESS_KERNELS(X)              \
  X(dgc_update, (tiles * kChunksPerTile), 1) \
  X(dgc_bound, tiles, 1)                     \
  X(dgc_collect, tiles, 1)                   \
  X(dgc_digit, tiles, 1)                     \
  X(dgc_last, tiles, 1)                      \
  X(dgc_place, tiles, 1)                     \
  X(dgc_emit, tiles, 1)
#define DGC_UNPACK_KERNELS(X)                \
  X(dgc_check, div_up(tiles, kWarps), ranks) \
  X(dgc_average, (tiles * kChunksPerTile), 1)
#define DGC_RESTORE_KERNELS(X) X(dgc_restore, tiles, 1)
#define DGC_SUBTRACT_KERNELS(X) X(dgc_subtract, blocks, 1)
#define DGC_ENCODE_KERNELS(X) \
  X(dgc_scale, tiles, 1)      \
  X(dgc_encode, tiles, 1)
#define DGC_DECODE_KERNELS(X) X(dgc_decode, tiles, ranks)
#define DGC_KERNELS(X)    \
  DGC_COMPRESS_KERNELS(X) \
  DGC_UNPACK_KERNELS(X)   \
  DGC_RESTORE_KERNELS(X)  \
  DGC_SUBTRACT_KERNELS(X) \
  DGC_ENCODE_KERNELS(X)   \
  DGC_DECODE_KERNELS(X)
