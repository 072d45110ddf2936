// Products of a warpgroup, 128 threads, from shared memory on tensor cores (wgmma), and its share
// of the registers: compute capability 9.0 alone. Compiled without nvcc, the same functions come
// from the emulation in tests/cuda_on_cpu.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "axis.h"

#ifndef __CUDACC__
#include "emulated_wgmma.h"
#endif

// Whether this pass compiles kernels with these instructions.
#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HESSKERN_WGMMA 1
#endif

namespace hesskern::cuda {

#ifdef __CUDACC__

// Registers of a thread from here on; all threads of the warpgroup.
template <int Count>
__device__ inline void give_up_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}
template <int Count>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}

// Before the first product after a wait.
__device__ inline void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// The products since the last call are one group.
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits for all groups but the latest; until then products read shared memory.
template <int Left>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Left) : "memory");
}

// Keeps the compiler from moving uses of the sums across a wait.
template <int Count>
__device__ inline void pin(float (&d)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// "%0, %1, ..., %63", and what they stand for.
#define HESSKERN_TEN(tens)                                                                \
  "%" #tens "0, %" #tens "1, %" #tens "2, %" #tens "3, %" #tens "4, %" #tens "5, %" #tens \
  "6, %" #tens "7, %" #tens "8, %" #tens "9, "
#define HESSKERN_64_NAMES \
  HESSKERN_TEN()          \
  HESSKERN_TEN(1)         \
  HESSKERN_TEN(2) HESSKERN_TEN(3) HESSKERN_TEN(4) HESSKERN_TEN(5) "%60, %61, %62, %63"
#define HESSKERN_4_SUMS(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define HESSKERN_16_SUMS(i) \
  HESSKERN_4_SUMS(i), HESSKERN_4_SUMS(i + 4), HESSKERN_4_SUMS(i + 8), HESSKERN_4_SUMS(i + 12)
#define HESSKERN_WGMMA_128(type)                                                              \
  asm volatile(                                                                               \
      "{.reg .pred p; setp.ne.b32 p, %66, 0;"                                                 \
      " wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" HESSKERN_64_NAMES    \
      "}, %64, %65, p, 1, 1, %67, %67;}"                                                      \
      : HESSKERN_16_SUMS(0), HESSKERN_16_SUMS(16), HESSKERN_16_SUMS(32), HESSKERN_16_SUMS(48) \
      : "l"(a), "l"(b), "r"(keep), "n"(Transposed ? 1 : 0))

// d [64, N] of the warpgroup := A [64, 16] B [16, N] (keep: plus d), both in shared memory where
// the descriptors say, of bfloat16 or float16. Transposed: they lie with neighbours along M and N,
// not along k. Of d a thread holds, as element 4 j + i, row 16 (warp % 4) + lane / 4 (+ 8 where
// i >= 2), column 8 j + 2 (lane % 4) + i % 2.
template <typename T, int N, bool Transposed>
__device__ inline void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, int keep) {
  static_assert(N == 128);
  if constexpr (std::is_same_v<T, Float16>) {
    HESSKERN_WGMMA_128("f16");
  } else {
    HESSKERN_WGMMA_128("bf16");
  }
}

#undef HESSKERN_WGMMA_128
#undef HESSKERN_16_SUMS
#undef HESSKERN_4_SUMS
#undef HESSKERN_64_NAMES
#undef HESSKERN_TEN

#endif

}  // namespace hesskern::cuda
