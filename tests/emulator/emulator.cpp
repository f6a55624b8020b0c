// The CUDA kernels and their launchers, compiled for the CPU. tests/support/roads.py loads it.
#include "../../csrc/cuda/launch.cu"
#include "../../csrc/cuda/stream.h"

void* dgc::current_stream(int) { return nullptr; }

namespace {

template <class Args>
bool run(void (*kernel)(Args), dim3 grid, const void* args) {
  emulator::run_grid(grid, dgc::kThreads, [&] { kernel(*static_cast<const Args*>(args)); });
  return true;
}

}  // namespace

// Launches one kernel by its name, as CuPy does. Returns whether there is one.
extern "C" bool emulate(const char* name, unsigned x, unsigned y, const void* args) {
#define DGC_RUN(kernel, blocks, rows) \
  if (std::strcmp(name, #kernel) == 0) return run(dgc::kernel, dim3(x, y), args);
  DGC_KERNELS(DGC_RUN)
#undef DGC_RUN
  return false;
}
