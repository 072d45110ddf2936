// What a warp does together: tensor-core products, sums over lanes, and a block's dynamic shared
// memory. Compiled without nvcc, the same functions come from the emulation in tests/cuda_on_cpu.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#ifndef __CUDACC__
#include "emulated_warp.h"
#endif

namespace hesskern::cuda {

#ifdef __CUDACC__

// The block's dynamic shared memory, aligned to 16 bytes.
__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

// value rounded to the nearest tf32 number (8 bits of exponent, 10 of fraction), as a float.
__device__ inline float round_to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
}

// c += a b on tf32 numbers. With g = lane / 4 and t = lane % 4 a lane holds of
//   a [16, 8]: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)
//   b [8, 8]: (t, g), (t + 4, g)
//   c [16, 8]: (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1)
__device__ inline void multiply_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
        "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}

template <typename T>
__device__ inline T from_lane_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

#endif

// Sum of value over the warp's 32 lanes, in every lane; the order of the additions is fixed.
template <typename T>
__device__ inline T warp_sum(T value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += from_lane_xor(value, mask);
  return value;
}

}  // namespace hesskern::cuda
