// Four float32 side by side, which one instruction loads or stores; at multiples of 16 bytes.
#pragma once

#include <cuda_runtime.h>

namespace hesskern::cuda {

struct alignas(16) Four {
  float value[4];
};

// What is read once gives way first in the caches (ld.global.cs).
__device__ inline Four load_once(const float* from) {
#ifdef __CUDACC__
  const float4 v = __ldcs(reinterpret_cast<const float4*>(from));
  return {{v.x, v.y, v.z, v.w}};
#else
  return *reinterpret_cast<const Four*>(from);
#endif
}

__device__ inline Four load_four(const float* from) {
  return *reinterpret_cast<const Four*>(from);
}

__device__ inline void store_four(float* to, const Four& four) {
  *reinterpret_cast<Four*>(to) = four;
}

}  // namespace hesskern::cuda
