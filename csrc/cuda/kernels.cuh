// All kernels: what nvcc compiles into the library, and NVRTC where there is no nvcc.
#pragma once

#include "compress.cuh"
#include "restore.cuh"
#include "subtract.cuh"
#include "unpack.cuh"
