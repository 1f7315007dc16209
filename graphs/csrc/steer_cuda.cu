#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "steer.h"

namespace austeer {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr std::size_t kMostBlocks = 1u << 20;

__device__ float widen(float value) { return value; }
__device__ float widen(__half value) { return __half2float(value); }
__device__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ T narrow(float value);
template <>
__device__ float narrow<float>(float value) {
  return value;
}
template <>
__device__ __half narrow<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// Products and sums are rounded one by one, as in the function bodies.
__device__ float gain(float scale, float gamma, float phi) {
  return __fadd_rn(1.0f, __fmul_rn(__fmul_rn(scale, gamma), phi));
}

__device__ float phi_of(float t) { return kPhiMax / (1.0f + expf(kPhiShift - t)); }

// Indices outside the width are left out: they cannot be refused from inside a kernel.
__device__ bool inside_row(std::int64_t place, std::size_t width) {
  return static_cast<unsigned long long>(place) < width;
}

template <typename T>
__global__ void constant(Site site, const T* x, T* y, std::size_t tokens, std::size_t width) {
  const float scale = *site.scale;
  for (std::size_t token = blockIdx.x; token < tokens; token += gridDim.x) {
    for (std::size_t i = threadIdx.x; i < site.k; i += kThreads) {
      const std::int64_t place = site.idx[i];
      if (!inside_row(place, width)) continue;
      const std::size_t at = token * width + place;
      y[at] = narrow<T>(__fmul_rn(widen(x[at]), gain(scale, site.gamma[i], 1.0f)));
    }
  }
}

// A block a token: every thread sums over its units, then the block over its threads.
template <typename T>
__global__ void adaptive(Site site, const T* x, T* y, std::size_t tokens, std::size_t width) {
  __shared__ float partial[kMaxRank][kWarps];
  const float scale = *site.scale;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (std::size_t token = blockIdx.x; token < tokens; token += gridDim.x) {
    const T* row = x + token * width;
    for (std::size_t j = 0; j < site.r; ++j) {
      float sum = 0.0f;
      for (std::size_t i = threadIdx.x; i < site.k; i += kThreads) {
        const std::int64_t place = site.idx[i];
        if (inside_row(place, width)) sum += widen(row[place]) * site.V[i * site.r + j];
      }
      for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(kAllLanes, sum, step);
      if (lane == 0) partial[j][warp] = sum;
    }
    // Nothing is written before every thread has read: y may be x.
    __syncthreads();
    for (std::size_t i = threadIdx.x; i < site.k; i += kThreads) {
      const std::int64_t place = site.idx[i];
      if (!inside_row(place, width)) continue;
      float t = 0.0f;
      for (std::size_t j = 0; j < site.r; ++j) {
        float feature = site.b[j];
        for (int part = 0; part < kWarps; ++part) feature += partial[j][part];
        t += feature * site.U[j * site.k + i];
      }
      const float steered = __fmul_rn(widen(row[place]), gain(scale, site.gamma[i], phi_of(t)));
      y[token * width + place] = narrow<T>(steered);
    }
    __syncthreads();
  }
}

template <typename T>
cudaError_t launch(const Site& site, const Rows& rows, cudaStream_t stream) {
  const T* x = static_cast<const T*>(rows.x);
  T* y = static_cast<T*>(rows.y);
  if (x != y) {
    const cudaError_t copied = cudaMemcpyAsync(y, x, rows.tokens * rows.width * sizeof(T),
                                               cudaMemcpyDeviceToDevice, stream);
    if (copied != cudaSuccess) {
      // Else the next launch that succeeds would report it.
      cudaGetLastError();
      return copied;
    }
  }
  if (site.k == 0) return cudaSuccess;
  const auto blocks =
      static_cast<unsigned>(rows.tokens < kMostBlocks ? rows.tokens : kMostBlocks);
  if (site.V == nullptr) {
    constant<T><<<blocks, kThreads, 0, stream>>>(site, x, y, rows.tokens, rows.width);
  } else {
    adaptive<T><<<blocks, kThreads, 0, stream>>>(site, x, y, rows.tokens, rows.width);
  }
  return cudaGetLastError();
}

}  // namespace

bool has_cuda() { return true; }

const char* steer_cuda(Type type, const Site& site, const Rows& rows, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  cudaError_t found = cudaErrorInvalidValue;
  switch (type) {
    case Type::kFloat: found = launch<float>(site, rows, queue); break;
    case Type::kFloat16: found = launch<__half>(site, rows, queue); break;
    case Type::kBFloat16: found = launch<__nv_bfloat16>(site, rows, queue); break;
  }
  return found == cudaSuccess ? nullptr : cudaGetErrorString(found);
}

}  // namespace austeer
