// The launch sequences: which kernel with how many blocks. dgc/ops/launch.py has the same for the kernels that NVRTC
// compiles.
#include <cuda_runtime.h>

#include "kernels.cuh"
#include "launch.h"

namespace dgc {
namespace {

// The caller's device is the current one again afterwards. Set only where it differs: setting a device makes a context
// on it, which costs memory.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    code_ = cudaGetDevice(&before_);
    changed_ = code_ == cudaSuccess && before_ != device;
    if (changed_) code_ = cudaSetDevice(device);
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  cudaError_t code() const { return code_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t code_;
};

template <class Args>
cudaError_t launch(void (*kernel)(Args), int64_t blocks, int64_t rows, const Args& args, void* stream) {
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(rows));
  void* pointers[] = {const_cast<Args*>(&args)};
  return cudaLaunchKernel(kernel, grid, dim3(kThreads), pointers, 0, static_cast<cudaStream_t>(stream));
}

}  // namespace
}  // namespace dgc

using namespace dgc;

int dgc_cuda_compress(const CompressArgs* args, int device, void* stream) {
  const OnDevice on(device);
  if (on.code() != cudaSuccess) return on.code();
  const int64_t tiles = args->bucket.tiles;
  cudaError_t code = launch(dgc_update, tiles * kChunksPerTile, 1, *args, stream);
  for (const auto kernel : {dgc_bound, dgc_collect, dgc_digit, dgc_last, dgc_place, dgc_emit})
    if (code == cudaSuccess) code = launch(kernel, tiles, 1, *args, stream);
  return code;
}

int dgc_cuda_unpack(const UnpackArgs* args, int device, void* stream) {
  const OnDevice on(device);
  if (on.code() != cudaSuccess) return on.code();
  const int64_t tiles = args->bucket.tiles;
  cudaError_t code =
      cudaMemsetAsync(args->status, 0, (args->ranks + 1) * sizeof(int32_t), static_cast<cudaStream_t>(stream));
  if (code == cudaSuccess) code = launch(dgc_check, div_up(tiles, kWarps), args->ranks, *args, stream);
  if (code == cudaSuccess) code = launch(dgc_average, tiles * kChunksPerTile, 1, *args, stream);
  return code;
}

int dgc_cuda_restore(const RestoreArgs* args, int device, void* stream) {
  const OnDevice on(device);
  if (on.code() != cudaSuccess) return on.code();
  return launch(dgc_restore, args->bucket.tiles, 1, *args, stream);
}

int dgc_cuda_subtract(const SubtractArgs* args, int64_t blocks, int device, void* stream) {
  const OnDevice on(device);
  if (on.code() != cudaSuccess) return on.code();
  return launch(dgc_subtract, blocks, 1, *args, stream);
}

const char* dgc_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

void dgc_cuda_versions(int device, int* runtime, int* driver, int* capability) {
  *runtime = CUDART_VERSION;
  *driver = *capability = 0;
  int major = 0, minor = 0;
  cudaDriverGetVersion(driver);
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess)
    *capability = 10 * major + minor;
}
