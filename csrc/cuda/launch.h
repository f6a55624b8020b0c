// The launchers: plain C, neither torch nor CUDA in their types. They queue work on a stream, wait for nothing, and
// return a cudaError_t.
#pragma once

#include "args.h"

extern "C" {
int dgc_cuda_compress(const dgc::CompressArgs* args, int device, void* stream);
int dgc_cuda_unpack(const dgc::UnpackArgs* args, int device, void* stream);
int dgc_cuda_restore(const dgc::RestoreArgs* args, int device, void* stream);
int dgc_cuda_subtract(const dgc::SubtractArgs* args, int64_t blocks, int device, void* stream);
int dgc_cuda_encode(const dgc::CodecArgs* args, int device, void* stream);
int dgc_cuda_decode(const dgc::CodecArgs* args, int device, void* stream);
// Returns what cudaGetErrorString says.
const char* dgc_cuda_error(int code);
// Versions of the runtime and of the driver, each 1000 * major + 10 * minor, and a device's compute capability, 10 *
// major + minor; 0 where it cannot be told.
void dgc_cuda_versions(int device, int* runtime, int* driver, int* capability);
}
