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

// The thread's writes to shared memory so far, for products that others start once they know of it.
__device__ inline void show_to_wgmma() {
#ifdef HESSKERN_WGMMA
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// "%0, %1, ..., %15" and so on, and what they stand for.
#define HESSKERN_TEN(tens)                                                                \
  "%" #tens "0, %" #tens "1, %" #tens "2, %" #tens "3, %" #tens "4, %" #tens "5, %" #tens \
  "6, %" #tens "7, %" #tens "8, %" #tens "9, "
#define HESSKERN_16_NAMES HESSKERN_TEN() "%10, %11, %12, %13, %14, %15"
#define HESSKERN_32_NAMES HESSKERN_TEN() HESSKERN_TEN(1) HESSKERN_TEN(2) "%30, %31"
#define HESSKERN_48_NAMES \
  HESSKERN_TEN()          \
  HESSKERN_TEN(1)         \
  HESSKERN_TEN(2)         \
  HESSKERN_TEN(3) "%40, %41, %42, %43, %44, %45, %46, %47"
#define HESSKERN_64_NAMES \
  HESSKERN_TEN()          \
  HESSKERN_TEN(1)         \
  HESSKERN_TEN(2) HESSKERN_TEN(3) HESSKERN_TEN(4) HESSKERN_TEN(5) "%60, %61, %62, %63"
#define HESSKERN_4_SUMS(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define HESSKERN_16_SUMS(i) \
  HESSKERN_4_SUMS(i), HESSKERN_4_SUMS(i + 4), HESSKERN_4_SUMS(i + 8), HESSKERN_4_SUMS(i + 12)
// a, b, keep and transposed: the operands' numbers.
#define HESSKERN_PRODUCT(columns, type, names, a_, b_, keep_, transposed_, ...)                    \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %" #keep_                                            \
               ", 0; wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type          \
               " {" names "}, %" #a_ ", %" #b_ ", p, 1, 1, %" #transposed_ ", %" #transposed_ ";}" \
               : __VA_ARGS__                                                                       \
               : "l"(a), "l"(b), "r"(keep), "n"(Transposed ? 1 : 0))
#define HESSKERN_WGMMA_32(type) \
  HESSKERN_PRODUCT(32, type, HESSKERN_16_NAMES, 16, 17, 18, 19, HESSKERN_16_SUMS(0))
#define HESSKERN_WGMMA_64(type)                                                      \
  HESSKERN_PRODUCT(64, type, HESSKERN_32_NAMES, 32, 33, 34, 35, HESSKERN_16_SUMS(0), \
                   HESSKERN_16_SUMS(16))
#define HESSKERN_WGMMA_96(type)                                                      \
  HESSKERN_PRODUCT(96, type, HESSKERN_48_NAMES, 48, 49, 50, 51, HESSKERN_16_SUMS(0), \
                   HESSKERN_16_SUMS(16), HESSKERN_16_SUMS(32))
#define HESSKERN_WGMMA_128(type)                                                      \
  HESSKERN_PRODUCT(128, type, HESSKERN_64_NAMES, 64, 65, 66, 67, HESSKERN_16_SUMS(0), \
                   HESSKERN_16_SUMS(16), HESSKERN_16_SUMS(32), HESSKERN_16_SUMS(48))

// d [64, N] of the warpgroup := A [64, 16] B [16, N] (keep: plus d), both in shared memory where
// the descriptors say, of bfloat16 or float16. Transposed: they lie with neighbours along M and N,
// not along k. Of d a thread holds, as element 4 j + i, row 16 (warp % 4) + lane / 4 (+ 8 where
// i >= 2), column 8 j + 2 (lane % 4) + i % 2; what d has beyond that stays.
template <typename T, int N, bool Transposed, int Size>
__device__ inline void wgmma(float (&d)[Size], uint64_t a, uint64_t b, int keep) {
  static_assert(2 * Size >= N && (N == 32 || N == 64 || N == 96 || N == 128));
  static_assert(N == 128 || std::is_same_v<T, Float16>);
  if constexpr (N == 32) {
    HESSKERN_WGMMA_32("f16");
  } else if constexpr (N == 64) {
    HESSKERN_WGMMA_64("f16");
  } else if constexpr (N == 96) {
    HESSKERN_WGMMA_96("f16");
  } else if constexpr (std::is_same_v<T, Float16>) {
    HESSKERN_WGMMA_128("f16");
  } else {
    HESSKERN_WGMMA_128("bf16");
  }
}

#undef HESSKERN_WGMMA_128
#undef HESSKERN_WGMMA_96
#undef HESSKERN_WGMMA_64
#undef HESSKERN_WGMMA_32
#undef HESSKERN_PRODUCT
#undef HESSKERN_16_SUMS
#undef HESSKERN_4_SUMS
#undef HESSKERN_64_NAMES
#undef HESSKERN_48_NAMES
#undef HESSKERN_32_NAMES
#undef HESSKERN_16_NAMES
#undef HESSKERN_TEN

#endif

}  // namespace hesskern::cuda
