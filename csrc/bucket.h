// A bucket as the ops see it on the host, whatever the device: its segment table and the checks of arguments.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <memory>
#include <vector>

#include "wire.h"

namespace dgc {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A segment table, checked, and what follows from it. Throws on a table that no layout of ours produces.
struct Bucket {
  Bucket(const Segment* rows, size_t count);

  // Where everything stands in a selection with values of this type.
  WireLayout wire(ScalarType dtype) const;
  // Where everything stands in a payload of such a selection, with values of so many bits: the type's own, or, of
  // float32, 8 or 4.
  PayloadLayout payload(ScalarType dtype, int64_t value_bits) const;

  std::vector<Segment> segments;
  std::vector<int64_t> first_tile;   // of each segment, and one past the last
  std::vector<int64_t> first_entry;  // likewise, in the payload
  std::vector<int64_t> first_upper;  // likewise, of the words with the upper bits of its indices
  std::vector<int64_t> first_lower;  // likewise, with the low bits
  int64_t tiles = 0;
  int64_t entries = 0;
  int64_t state = 0;  // elements that the residual and what a rule keeps have at least

 private:
  template <class F>
  void check_apart(const F& place) const;
};

// Returns the bucket of a segment table. A table is checked when it first comes, and not again while one with the same
// contents is among the last that passed: what is compared are the rows, since memory is used again.
std::shared_ptr<const Bucket> bucket_of(const Tensor& table);

// Throws unless the tensor is contiguous, on this device, of this type, and has that many elements.
void check_tensor(const Tensor& tensor, const char* name, DeviceType device, ScalarType dtype, int64_t min_numel);
// Throws unless the tensor's memory starts at a multiple of kAlign, as the sections of a payload do.
void check_aligned(const Tensor& tensor, const char* name);
// Throws unless the tensor holds rows of so many bytes, contiguous and aligned, on this device.
void check_rows(const Tensor& tensor, const char* name, int64_t bytes, DeviceType device);
// Throws unless the segments lie inside the tensors that their `source` names: contiguous, float32, bfloat16 or
// float16.
void check_sources(const std::vector<Tensor>& sources, const char* name, DeviceType device, const Bucket& bucket);

// Throws unless there are as many kept tensors and numbers as a rule has, and a momentum where it is to be logged.
void check_rule(int64_t rule, const std::vector<Tensor>& kept, const Tensor& numbers, bool logs, const Bucket& bucket);

}  // namespace dgc
