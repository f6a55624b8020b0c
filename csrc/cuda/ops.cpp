// The ops for CUDA tensors: checks arguments, fills the kernels' structs, and queues them on torch's current stream.
// Reads nothing from the device and allocates nothing.
#include <algorithm>
#include <optional>

#include "../bucket.h"
#include "launch.h"
#include "stream.h"

namespace dgc {
namespace {

#if defined(DGC_EMULATED)  // tests/emulator runs the kernels on CPU tensors
constexpr DeviceType kDevice = DeviceType::CPU;
#else
constexpr DeviceType kDevice = DeviceType::CUDA;
#endif

// Throws unless the tensor is on the device of another, and as check_tensor says.
void check(const Tensor& tensor, const char* name, ScalarType dtype, int64_t min_numel, const Tensor& as) {
  check_tensor(tensor, name, kDevice, dtype, min_numel);
  STD_TORCH_CHECK(tensor.get_device_index() == as.get_device_index(), name,
                  ": expected it on the same device as the others, cuda:", static_cast<int>(as.get_device_index()),
                  ", got cuda:", static_cast<int>(tensor.get_device_index()));
}

template <class T>
T* data(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<T*>(tensor->mutable_data_ptr()) : nullptr;
}

FloatType float_type(ScalarType dtype) {
  return dtype == ScalarType::Float ? kFloat : dtype == ScalarType::BFloat16 ? kBFloat16 : kHalf;
}

BucketArgs bucket_args(const Bucket& bucket, const Tensor& workspace, ScalarType wire_dtype) {
  for (const Segment& s : bucket.segments) {
    STD_TORCH_CHECK(s.state % kGroup == 0, "segments: expected state to be a multiple of ", kGroup, " on CUDA, got ",
                    s.state);
  }
  BucketArgs args{};
  args.segments = bucket.segments.size();
  args.tiles = bucket.tiles;
  args.entries = bucket.entries;
  args.wire_type = float_type(wire_dtype);
  const int64_t bytes = args.work().bytes;
  check(workspace, "workspace", ScalarType::Byte, bytes, workspace);
  STD_TORCH_CHECK(workspace.numel() == bytes, "workspace: expected the ", bytes,
                  " bytes that dgc.ops.workspace() makes for these segments, got ", workspace.numel());
  args.workspace = static_cast<uint8_t*>(workspace.mutable_data_ptr());
  return args;
}

void set_sources(Sources* sources, const std::vector<Tensor>& tensors, const char* name, const Bucket& bucket,
                 const Tensor& as) {
  check_sources(tensors, name, kDevice, bucket);
  STD_TORCH_CHECK(tensors.size() <= kMaxSources, name, ": expected at most ", kMaxSources, " tensors a bucket, got ",
                  tensors.size(), ": use smaller buckets");
  for (size_t i = 0; i < tensors.size(); ++i) {
    check(tensors[i], name, tensors[i].scalar_type(), 0, as);
    sources->data[i] = tensors[i].mutable_data_ptr();
    sources->type[i] = float_type(tensors[i].scalar_type());
  }
}

// Throws if a launch failed, with what is known of the reason.
void check_launch(int code, int device) {
  if (code == 0) return;
  int runtime, driver, capability;
  dgc_cuda_versions(device, &runtime, &driver, &capability);
  STD_TORCH_CHECK(false, "dgc: CUDA error ", code, ", ", dgc_cuda_error(code), ". The kernels were built by CUDA ",
                  runtime / 1000, ".", runtime % 1000 / 10,
                  " for compute capability 8.0 and 9.0, later ones through PTX; "
                  "the driver supports CUDA ",
                  driver / 1000, ".", driver % 1000 / 10, ", device ", device, " has compute capability ",
                  capability / 10, ".", capability % 10,
                  ". If they do not fit, rebuild with an nvcc that the driver supports, or without: "
                  "DGC_CUDA=0 pip install .");
}

void compress_cuda(std::vector<Tensor> gradients, int64_t rule, std::vector<Tensor> kept, Tensor residual,
                   Tensor segments, Tensor numbers, Tensor scale, Tensor payload, Tensor workspace,
                   std::optional<Tensor> sent, ScalarType wire_dtype) {
  const auto known = bucket_of(segments);
  const Bucket& bucket = *known;
  CompressArgs args{};
  check(payload, "payload", ScalarType::Byte, bucket.wire(wire_dtype).bytes, workspace);
  check_aligned(payload, "payload");  // it and the state are read up to 16 bytes at a time
  args.bucket = bucket_args(bucket, workspace, wire_dtype);
  set_sources(&args.gradients, gradients, "gradients", bucket, workspace);
  check(residual, "residual", ScalarType::Float, bucket.state, workspace);
  check_aligned(residual, "residual");
  check_rule(rule, kept, numbers, sent.has_value(), bucket);
  for (size_t t = 0; t < kept.size(); ++t) {
    check(kept[t], "kept", ScalarType::Float, bucket.state, workspace);
    check_aligned(kept[t], "kept");
    args.kept[t] = data<float>(kept[t]);
  }
  check(numbers, "numbers", ScalarType::Float, 0, workspace);
  check(scale, "scale", ScalarType::Float, 1, workspace);
  if (sent) check(*sent, "sent", ScalarType::Float, bucket.entries, workspace);
  args.residual = data<float>(residual);
  args.numbers = static_cast<const float*>(numbers.const_data_ptr());
  args.scale = static_cast<const float*>(scale.const_data_ptr());
  args.payload = data<uint8_t>(payload);
  args.sent = data<float>(sent);
  args.rule = rule;
  const int device = workspace.get_device_index();
  if (bucket.tiles != 0) check_launch(dgc_cuda_compress(&args, device, current_stream(device)), device);
}

void unpack_cuda(Tensor payloads, int64_t rank, Tensor segments, Tensor workspace, Tensor scale, ScalarType wire_dtype,
                 std::vector<Tensor> out, Tensor status) {
  const auto known = bucket_of(segments);
  const Bucket& bucket = *known;
  const int64_t bytes = bucket.wire(wire_dtype).bytes;
  UnpackArgs args{};
  args.bucket = bucket_args(bucket, workspace, wire_dtype);
  set_sources(&args.out, out, "out", bucket, workspace);
  check(payloads, "payloads", ScalarType::Byte, 0, workspace);
  STD_TORCH_CHECK(payloads.dim() == 2 && payloads.size(1) == bytes && rank >= 0 && rank < payloads.size(0),
                  "payloads: expected a row of ", bytes, " bytes for each rank, this rank's (", rank, ") among them");
  STD_TORCH_CHECK(payloads.size(0) < 65536, "payloads: expected fewer than 65536 ranks, got ", payloads.size(0));
  check_aligned(payloads, "payloads");
  check(scale, "scale", ScalarType::Float, 1, workspace);
  check(status, "status", ScalarType::Int, payloads.size(0) + 1, workspace);
  args.payloads = static_cast<const uint8_t*>(payloads.const_data_ptr());
  args.ranks = payloads.size(0);
  args.rank = rank;
  args.scale = static_cast<const float*>(scale.const_data_ptr());
  args.status = data<int32_t>(status);
  const int device = workspace.get_device_index();
  if (bucket.tiles != 0) check_launch(dgc_cuda_unpack(&args, device, current_stream(device)), device);
}

void restore_cuda(Tensor payload, Tensor which, Tensor segments, Tensor workspace, std::optional<Tensor> sent,
                  std::optional<Tensor> momentum, Tensor residual, ScalarType wire_dtype) {
  const auto known = bucket_of(segments);
  const Bucket& bucket = *known;
  RestoreArgs args{};
  args.bucket = bucket_args(bucket, workspace, wire_dtype);
  check(payload, "payload", ScalarType::Byte, bucket.wire(wire_dtype).bytes, workspace);
  check(which, "which", ScalarType::Byte, args.bucket.segments, workspace);
  check(residual, "residual", ScalarType::Float, bucket.state, workspace);
  if (sent) {
    STD_TORCH_CHECK(momentum.has_value(), "sent: expected None where momentum is None");
    check(*sent, "sent", ScalarType::Float, bucket.entries, workspace);
    check(*momentum, "momentum", ScalarType::Float, bucket.state, workspace);
    args.sent = data<float>(sent);
    args.momentum = data<float>(momentum);
  }
  args.payload = static_cast<const uint8_t*>(payload.const_data_ptr());
  args.which = static_cast<const uint8_t*>(which.const_data_ptr());
  args.residual = data<float>(residual);
  const int device = workspace.get_device_index();
  if (bucket.tiles != 0) check_launch(dgc_cuda_restore(&args, device, current_stream(device)), device);
}

CodecArgs codec_args(const Bucket& bucket, const Tensor& workspace, ScalarType wire_dtype, int64_t value_bits) {
  bucket.payload(wire_dtype, value_bits);  // throws where there is no such format
  CodecArgs args{};
  args.bucket = bucket_args(bucket, workspace, wire_dtype);
  args.uppers = bucket.first_upper.back();
  args.lowers = bucket.first_lower.back();
  args.value_bits = value_bits;
  args.ranks = 1;
  return args;
}

void encode_cuda(Tensor selection, Tensor segments, Tensor workspace, Tensor residual, ScalarType wire_dtype,
                 int64_t value_bits, Tensor payload) {
  const auto known = bucket_of(segments);
  const Bucket& bucket = *known;
  CodecArgs args = codec_args(bucket, workspace, wire_dtype, value_bits);
  check(selection, "selection", ScalarType::Byte, bucket.wire(wire_dtype).bytes, workspace);
  check_aligned(selection, "selection");
  check(residual, "residual", ScalarType::Float, bucket.state, workspace);
  check(payload, "payload", ScalarType::Byte, args.layout().bytes, workspace);
  check_aligned(payload, "payload");
  args.selections = data<uint8_t>(selection);
  args.payloads = data<uint8_t>(payload);
  args.residual = data<float>(residual);
  const int device = workspace.get_device_index();
  if (bucket.tiles != 0) check_launch(dgc_cuda_encode(&args, device, current_stream(device)), device);
}

void decode_cuda(Tensor payloads, Tensor segments, Tensor workspace, ScalarType wire_dtype, int64_t value_bits,
                 Tensor selections) {
  const auto known = bucket_of(segments);
  const Bucket& bucket = *known;
  CodecArgs args = codec_args(bucket, workspace, wire_dtype, value_bits);
  check(payloads, "payloads", ScalarType::Byte, 0, workspace);
  check(selections, "selections", ScalarType::Byte, 0, workspace);
  check_rows(payloads, "payloads", args.layout().bytes, kDevice);
  check_rows(selections, "selections", bucket.wire(wire_dtype).bytes, kDevice);
  STD_TORCH_CHECK(payloads.size(0) == selections.size(0) && payloads.size(0) < 65536,
                  "selections: expected a row for each payload, fewer than 65536, got ", selections.size(0), " and ",
                  payloads.size(0));
  args.selections = data<uint8_t>(selections);
  args.payloads = data<uint8_t>(payloads);
  args.ranks = payloads.size(0);
  const int device = workspace.get_device_index();
  if (bucket.tiles != 0) check_launch(dgc_cuda_decode(&args, device, current_stream(device)), device);
}

void subtract_cuda(std::vector<Tensor> parameters, std::vector<Tensor> updates, double lr, double shrink,
                   std::optional<Tensor> skip) {
  STD_TORCH_CHECK(parameters.size() == updates.size(), "updates: expected one for each of ", parameters.size(),
                  " parameters, got ", updates.size());
  if (skip && !parameters.empty()) check(*skip, "skip", ScalarType::Byte, 1, parameters[0]);
  for (size_t first = 0; first < parameters.size(); first += kMaxPairs) {
    SubtractArgs args{};
    args.skip = data<const uint8_t>(skip);
    args.minus_lr = static_cast<float>(-lr);
    args.shrink = static_cast<float>(shrink);
    args.count = static_cast<int32_t>(std::min<size_t>(kMaxPairs, parameters.size() - first));
    int64_t blocks = 0;
    for (int32_t i = 0; i < args.count; ++i) {
      const Tensor &p = parameters[first + i], &g = updates[first + i];
      check(p, "parameters", ScalarType::Float, 0, parameters[0]);
      check(g, "updates", ScalarType::Float, p.numel(), parameters[0]);
      args.pairs[i] = {data<float>(p), static_cast<const float*>(g.const_data_ptr()), p.numel(),
                       static_cast<uint32_t>(blocks), 0};
      blocks += div_up(p.numel(), kChunk);
    }
    const int device = parameters[0].get_device_index();
    if (blocks != 0) check_launch(dgc_cuda_subtract(&args, blocks, device, current_stream(device)), device);
  }
}

}  // namespace
}  // namespace dgc

#if defined(DGC_EMULATED)
STABLE_TORCH_LIBRARY_IMPL(dgc, PrivateUse1, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(dgc, CUDA, m) {
#endif
  m.impl("compress_", TORCH_BOX(&dgc::compress_cuda));
  m.impl("unpack", TORCH_BOX(&dgc::unpack_cuda));
  m.impl("restore_", TORCH_BOX(&dgc::restore_cuda));
  m.impl("subtract_", TORCH_BOX(&dgc::subtract_cuda));
  m.impl("encode_", TORCH_BOX(&dgc::encode_cuda));
  m.impl("decode", TORCH_BOX(&dgc::decode_cuda));
}
