// The one function of libtorch_cuda that is needed is looked up at run time: a library linked against it would not load
// into a torch without CUDA.
#include "stream.h"

#include <dlfcn.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace dgc {

void* current_stream(int device) {
  using Get = int32_t (*)(int32_t device, void** stream);
  static const auto get = [] {
    // torch has loaded it, or there would be no CUDA tensor.
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr ? nullptr : reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(
      get != nullptr,
      "dgc: expected libtorch_cuda.so to be loaded and to export "
      "aoti_torch_get_current_cuda_stream, as every CUDA build of torch from 2.10 does; rebuild without the "
      "CUDA kernels: DGC_CUDA=0 pip install .");
  void* stream = nullptr;
  STD_TORCH_CHECK(get(device, &stream) == 0, "dgc: torch did not tell its current stream of device ", device);
  return stream;
}

}  // namespace dgc
