// The CUDA kernels and their launchers, compiled for the CPU. tests/support/roads.py loads it.
#include "../../csrc/cuda/launch.cu"
#include "../../csrc/cuda/stream.h"

void* dgc::current_stream(int) { return nullptr; }

// Launches one kernel by its name, as CuPy does. Returns whether there is one.
extern "C" bool emulate(const char* name, unsigned x, unsigned y, const void* args) {
  using namespace dgc;
  const auto run = [&](const char* other, auto kernel, auto* typed) {
    if (std::strcmp(name, other) != 0) return false;
    emulator::run_grid(dim3(x, y), kThreads, [&] { kernel(*typed); });
    return true;
  };
  const auto* compress = static_cast<const CompressArgs*>(args);
  const auto* unpack = static_cast<const UnpackArgs*>(args);
  return run("dgc_update", dgc_update, compress) || run("dgc_bound", dgc_bound, compress) ||
         run("dgc_collect", dgc_collect, compress) || run("dgc_digit", dgc_digit, compress) ||
         run("dgc_last", dgc_last, compress) || run("dgc_place", dgc_place, compress) ||
         run("dgc_emit", dgc_emit, compress) || run("dgc_check", dgc_check, unpack) ||
         run("dgc_average", dgc_average, unpack) ||
         run("dgc_restore", dgc_restore, static_cast<const RestoreArgs*>(args)) ||
         run("dgc_subtract", dgc_subtract, static_cast<const SubtractArgs*>(args));
}
