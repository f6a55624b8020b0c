// The GPU benchmark's competitors for which PyTorch has no call: the bare update, and CUB's top-k behind it.
// -DTOPK adds the second; it needs CCCL 3.2 or later.
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kThreads = 256;

unsigned blocks(int64_t threads) { return static_cast<unsigned>((threads + kThreads - 1) / kThreads); }

__device__ void update_one(float g, float& u, float& v, float mu) {
  u = mu * u + g;
  v += u;
}

// Momentum-corrected accumulation, four elements a thread: 20 bytes of memory an element. Keys, |v|, are 4 more.
template <bool kKeys>
__global__ void __launch_bounds__(kThreads)
    update_kernel(const float* __restrict__ g, float* __restrict__ u, float* __restrict__ v, float* __restrict__ keys,
                  int64_t n, float mu) {
  const int64_t i = 4 * (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x);
  if (i + 4 <= n) {
    const float4 h = *reinterpret_cast<const float4*>(g + i);
    float4 a = *reinterpret_cast<float4*>(u + i), b = *reinterpret_cast<float4*>(v + i);
    update_one(h.x, a.x, b.x, mu);
    update_one(h.y, a.y, b.y, mu);
    update_one(h.z, a.z, b.z, mu);
    update_one(h.w, a.w, b.w, mu);
    *reinterpret_cast<float4*>(u + i) = a;
    *reinterpret_cast<float4*>(v + i) = b;
    if (kKeys) *reinterpret_cast<float4*>(keys + i) = make_float4(fabsf(b.x), fabsf(b.y), fabsf(b.z), fabsf(b.w));
  } else {
    for (int64_t j = i; j < n; ++j) {
      update_one(g[j], u[j], v[j], mu);
      if (kKeys) keys[j] = fabsf(v[j]);
    }
  }
}

template <bool kKeys>
cudaError_t update_all(const float* g, float* u, float* v, float* keys, int64_t n, float mu, cudaStream_t stream) {
  update_kernel<kKeys><<<blocks((n + 3) / 4), kThreads, 0, stream>>>(g, u, v, keys, n, mu);
  return cudaGetLastError();
}

// Adam's rule with c2 = 0, four elements a thread: 28 bytes of memory an element.
struct Adam {
  float weight, b2, c1, step, root, eps;

  __device__ void update_one(float g, float& m, float& s, float& v) const {
    m = fmaf(weight, g - m, m);
    s = fmaf(c1 * g, g, b2 * s);
    v += step * m / (sqrtf(s) / root + eps);
  }
};

__global__ void __launch_bounds__(kThreads)
    update_adam_kernel(const float* __restrict__ g, float* __restrict__ m, float* __restrict__ s, float* __restrict__ v,
                       int64_t n, Adam adam) {
  const int64_t i = 4 * (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x);
  if (i + 4 <= n) {
    const float4 h = *reinterpret_cast<const float4*>(g + i);
    float4 a = *reinterpret_cast<float4*>(m + i), b = *reinterpret_cast<float4*>(s + i);
    float4 c = *reinterpret_cast<float4*>(v + i);
    adam.update_one(h.x, a.x, b.x, c.x);
    adam.update_one(h.y, a.y, b.y, c.y);
    adam.update_one(h.z, a.z, b.z, c.z);
    adam.update_one(h.w, a.w, b.w, c.w);
    *reinterpret_cast<float4*>(m + i) = a;
    *reinterpret_cast<float4*>(s + i) = b;
    *reinterpret_cast<float4*>(v + i) = c;
  } else {
    for (int64_t j = i; j < n; ++j) adam.update_one(g[j], m[j], s[j], v[j]);
  }
}

}  // namespace

// Returns a cudaError_t, as all functions here. Tensors start at multiples of 16 bytes.
extern "C" int update(const float* g, float* u, float* v, int64_t n, float mu, cudaStream_t stream) {
  return update_all<false>(g, u, v, nullptr, n, mu, stream);
}

extern "C" int update_adam(const float* g, float* m, float* s, float* v, int64_t n, float weight, float b2, float c1,
                           float step, float root, float eps, cudaStream_t stream) {
  const Adam adam{weight, b2, c1, step, root, eps};
  update_adam_kernel<<<blocks((n + 3) / 4), kThreads, 0, stream>>>(g, m, s, v, n, adam);
  return cudaGetLastError();
}

#ifdef TOPK
#include <cub/device/device_topk.cuh>
#include <cuda/iterator>

namespace {

struct Magnitude {
  __host__ __device__ float operator()(float x) const { return fabsf(x); }
};

// The only requirements that DeviceTopK knows, and its fastest: which of equal entries, and in which order, is open.
template <class Keys>
cudaError_t top_pairs(void* temp, size_t* bytes, Keys keys, float* top_keys, uint32_t* indices, int64_t n, int64_t k,
                      cudaStream_t stream) {
  const auto requirements = cuda::execution::require(cuda::execution::determinism::not_guaranteed,
                                                     cuda::execution::output_ordering::unsorted);
  const auto env = cuda::std::execution::env{cuda::stream_ref{stream}, requirements};
  return cub::DeviceTopK::MaxPairs(temp, *bytes, keys, top_keys, cuda::counting_iterator<uint32_t>{0}, indices,
                                   static_cast<uint32_t>(n), static_cast<uint32_t>(k), env);
}

// Gathers what is sent and its momentum, and zeroes both.
__global__ void __launch_bounds__(kThreads)
    take_kernel(const uint32_t* __restrict__ indices, int64_t k, float* __restrict__ u, float* __restrict__ v,
                float* __restrict__ values, float* __restrict__ momenta) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= k) return;
  const uint32_t at = indices[i];
  values[i] = v[at];
  momenta[i] = u[at];
  v[at] = 0.0f;
  u[at] = 0.0f;
}

}  // namespace

// The step with DeviceTopK, n < 2^32. `keys` has room for n magnitudes; null: DeviceTopK takes those of v as it reads
// it. `out` has room for 4 * k words: keys, indices, values, momenta. temp null: only says how many bytes it needs.
extern "C" int topk(const float* g, float* u, float* v, float* keys, int64_t n, float mu, int64_t k, float* out,
                    void* temp, size_t* bytes, cudaStream_t stream) {
  auto* indices = reinterpret_cast<uint32_t*>(out + k);
  cudaError_t code = cudaSuccess;
  if (temp != nullptr) {
    code = keys == nullptr ? update_all<false>(g, u, v, nullptr, n, mu, stream)
                           : update_all<true>(g, u, v, keys, n, mu, stream);
  }
  if (code != cudaSuccess) return code;
  code = keys == nullptr ? top_pairs(temp, bytes, cuda::transform_iterator(v, Magnitude{}), out, indices, n, k, stream)
                         : top_pairs(temp, bytes, keys, out, indices, n, k, stream);
  if (code != cudaSuccess || temp == nullptr) return code;
  take_kernel<<<blocks(k), kThreads, 0, stream>>>(indices, k, u, v, out + 2 * k, out + 3 * k);
  return cudaGetLastError();
}
#endif
