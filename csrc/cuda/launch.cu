// The launchers: each queues the kernels of its op, as kernels.cuh lists them. dgc/ops/launch.py has the same for the
// kernels that NVRTC compiles.
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

// Queues one kernel of the lists in kernels.cuh, unless one before it failed.
#define DGC_LAUNCH(kernel, x, y) \
  if (code == cudaSuccess) code = launch(kernel, x, y, *args, stream);

int dgc_cuda_compress(const CompressArgs* args, int device, void* stream) {
  const OnDevice on(device);
  cudaError_t code = on.code();
  const int64_t tiles = args->bucket.tiles;
  DGC_COMPRESS_KERNELS(DGC_LAUNCH)
  return code;
}

int dgc_cuda_unpack(const UnpackArgs* args, int device, void* stream) {
  const OnDevice on(device);
  cudaError_t code = on.code();
  const int64_t tiles = args->bucket.tiles, ranks = args->ranks;
  if (code == cudaSuccess)
    code = cudaMemsetAsync(args->status, 0, (ranks + 1) * sizeof(int32_t), static_cast<cudaStream_t>(stream));
  DGC_UNPACK_KERNELS(DGC_LAUNCH)
  return code;
}

int dgc_cuda_restore(const RestoreArgs* args, int device, void* stream) {
  const OnDevice on(device);
  cudaError_t code = on.code();
  const int64_t tiles = args->bucket.tiles;
  DGC_RESTORE_KERNELS(DGC_LAUNCH)
  return code;
}

int dgc_cuda_subtract(const SubtractArgs* args, int64_t blocks, int device, void* stream) {
  const OnDevice on(device);
  cudaError_t code = on.code();
  DGC_SUBTRACT_KERNELS(DGC_LAUNCH)
  return code;
}

int dgc_cuda_encode(const CodecArgs* args, int device, void* stream) {
  const OnDevice on(device);
  cudaError_t code = on.code();
  const int64_t tiles = args->bucket.tiles;
  if (code == cudaSuccess)
    code = cudaMemsetAsync(args->payloads, 0, args->layout().bytes, static_cast<cudaStream_t>(stream));
  DGC_ENCODE_KERNELS(DGC_LAUNCH)
  return code;
}

int dgc_cuda_decode(const CodecArgs* args, int device, void* stream) {
  const OnDevice on(device);
  cudaError_t code = on.code();
  const int64_t tiles = args->bucket.tiles, ranks = args->ranks;
  DGC_DECODE_KERNELS(DGC_LAUNCH)
  return code;
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
