// Barriers in shared memory that count arrivals and bytes (mbarrier), and the copy engine's copies
// of whole rows that end on them (cp.async.bulk, compute capability 9.0 and later). Compiled
// without nvcc, the same functions come from the emulation in tests/cuda_on_cpu.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#ifndef __CUDACC__
#include "emulated_barrier.h"
#endif

namespace hesskern::cuda {

#ifdef __CUDACC__

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define HESSKERN_BULK_COPIES 1
#endif

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// One thread, before a block barrier that comes before any use.
__device__ inline void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// After the last barrier_init, by the thread that called it: the copy engine sees them.
__device__ inline void barriers_are_ready() {
#ifdef HESSKERN_BULK_COPIES
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ inline void barrier_arrive(uint64_t* barrier) {
  asm volatile("{.reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0];}" ::"r"(
                   shared_address(barrier))
               : "memory");
}

// Arrives and announces bytes that copies will bring.
__device__ inline void barrier_expect(uint64_t* barrier, int bytes) {
#ifdef HESSKERN_BULK_COPIES
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
#else
  __trap();
#endif
}

// Whether the phase of that parity is over; of a fresh barrier the one of parity 1 is.
__device__ inline bool barrier_passed(uint64_t* barrier, uint32_t parity) {
#ifdef HESSKERN_BULK_COPIES
  uint32_t passed;
  asm volatile(
      "{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
      : "=r"(passed)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return passed != 0;
#else
  __trap();
  return true;
#endif
}

__device__ inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  while (!barrier_passed(barrier, parity)) {
  }
}

// Starts to copy bytes to shared memory and counts them on the barrier; all of them and both
// addresses are multiples of 16.
__device__ inline void copy_row(void* shared, const void* global, int bytes, uint64_t* barrier) {
#ifdef HESSKERN_BULK_COPIES
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
#else
  __trap();
#endif
}

#endif

}  // namespace hesskern::cuda
