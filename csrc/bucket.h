// A bucket as the ops see it on the host, whatever the device: its segment table and the checks of arguments.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <vector>

#include "wire.h"

namespace dgc {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The segment table, checked. Throws on a table that no layout of ours produces.
struct Bucket {
  explicit Bucket(const Tensor& table);

  WireLayout wire(ScalarType dtype) const;

  std::vector<Segment> segments;
  std::vector<int64_t> first_tile;   // of each segment, and one past the last
  std::vector<int64_t> first_entry;  // likewise, in the payload
  int64_t tiles = 0;
  int64_t entries = 0;
  int64_t state = 0;  // elements that momentum and residual have at least

 private:
  template <class F>
  void check_apart(const F& place) const;
};

// Throws unless the tensor is contiguous, on this device, of this type, and has that many elements.
void check_tensor(const Tensor& tensor, const char* name, DeviceType device, ScalarType dtype, int64_t min_numel);
// Throws unless the tensor's memory starts at a multiple of kAlign, as the sections of a payload do.
void check_aligned(const Tensor& tensor, const char* name);
// Throws unless the segments lie inside the tensors that their `source` names: contiguous, float32, bfloat16 or
// float16.
void check_sources(const std::vector<Tensor>& sources, const char* name, DeviceType device, const Bucket& bucket);

}  // namespace dgc
