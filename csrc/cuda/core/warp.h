// What a warp does together: tensor-core products, reads of their operands, sums over lanes; a
// block's dynamic shared memory, and copies into it that run beside the arithmetic. Compiled
// without nvcc, the same functions come from the emulation in tests/cuda_on_cpu.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "axis.h"

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

// value, which the compiler takes for another one: what follows from it is not computed before.
__device__ inline int anew(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

__device__ inline uint32_t bits_of(float value) {
  return __float_as_uint(value);
}
__device__ inline float float_of(uint32_t bits) {
  return __uint_as_float(bits);
}

__device__ inline float to_float(float value) {
  return value;
}
__device__ inline float to_float(BFloat16 value) {
  return float_of(static_cast<uint32_t>(value.bits) << 16);
}
__device__ inline float to_float(Float16 value) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
}

// c += a b on tf32 numbers (8 bits of exponent, 10 of fraction): of a and b the low 13 bits do not
// enter. With g = lane / 4 and t = lane % 4 a lane holds of
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

// c += a b on bfloat16 or float16. With g = lane / 4 and t = lane % 4 a lane holds of
//   a [16, 16]: (g, 2 t), (g, 2 t + 1) in one word, then rows g + 8, then columns + 8, then both
//   b [16, 8]: (2 t, g), (2 t + 1, g) in one word, then rows + 8
//   c [16, 8]: as in multiply_tf32
__device__ inline void multiply_half(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b,
                                     BFloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void multiply_half(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b,
                                     Float16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d = a b + c, which leaves c as it is.
__device__ inline void multiply_half(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                     const float (&c)[4], BFloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
}
__device__ inline void multiply_half(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                     const float (&c)[4], Float16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
}

// The same with the first eight columns of a and rows of b alone: a has the rows g and g + 8.
__device__ inline void multiply_half(float (&d)[4], const uint32_t (&a)[2], uint32_t b,
                                     const float (&c)[4], Float16) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%7, %8, %9, %10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// Four matrices [8, 8] of 16-bit elements in shared memory. row: where row lane % 8 of matrix
// lane / 8 begins, at a multiple of 16 bytes. With g and t as above a lane gets of matrix i the
// word words[i]: elements (g, 2 t) and (g, 2 t + 1); transposed: (2 t, g) and (2 t + 1, g).
__device__ inline void load_matrices(uint32_t (&words)[4], const void* row, bool transposed) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if (transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  }
}

// Starts to copy the first bytes (0 to 16) of 16 at global to shared memory; the others become
// zero. Both addresses are multiples of 16.
__device__ inline void copy_piece(void* shared, const void* global, int bytes) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
               "r"(bytes)
               : "memory");
}

// Starts to copy 8 bytes from global to shared memory, or zeros where not inside. Both addresses
// are multiples of 8.
__device__ inline void copy_two_words(void* shared, const void* global, bool inside) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(address), "l"(global),
               "r"(inside ? 8 : 0)
               : "memory");
}

// Starts to copy 4 bytes from global to shared memory, or zeros where not inside.
__device__ inline void copy_word(float* shared, const float* global, bool inside) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(global),
               "r"(inside ? 4 : 0)
               : "memory");
}

// Square root to within one unit in the last place or two.
__device__ inline float square_root(float value) {
  float root;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(value));
  return root;
}

// The thread's copies since the last call are one group.
__device__ inline void close_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for the thread's own copies, all but those of the latest groups.
template <int Groups>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
}

// What no thread writes while the kernel runs: may be read before earlier writes.
__device__ inline int read_only(const int* pointer) {
  return __ldg(pointer);
}
__device__ inline float read_only(const float* pointer) {
  return __ldg(pointer);
}

// *flag = 1, by any number of threads.
__device__ inline void raise_flag(int* flag) {
  *flag = 1;
}

// *place = max(*place, value), by any number of threads.
__device__ inline void raise_to(uint32_t* place, uint32_t value) {
  atomicMax(place, value);
}

// Count neighbouring floats (1 or 4) that are read once: caches need not keep them. Aligned to all
// of them.
template <int Count>
__device__ inline void read_once(float (&values)[Count], const float* from) {
  static_assert(Count == 1 || Count == 4);
  if constexpr (Count == 4) {
    const float4 four = __ldcs(reinterpret_cast<const float4*>(from));
    values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
  } else {
    values[0] = __ldcs(from);
  }
}

template <typename T>
__device__ inline T from_lane_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// The largest of the lanes' values (redux), in every lane.
__device__ inline uint32_t warp_max(uint32_t value) {
  return __reduce_max_sync(0xffffffffu, value);
}

// The lanes' values or'ed together, in every lane.
__device__ inline uint32_t warp_or(uint32_t value) {
  return __reduce_or_sync(0xffffffffu, value);
}

// The lanes' writes to shared memory before are seen by all lanes after.
__device__ inline void warp_barrier() {
  __syncwarp();
}

// Two float16, rounded to nearest: low in the lower half of the word.
__device__ inline uint32_t float16_pair(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ inline void floats_of_pair(uint32_t word, float& low, float& high) {
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(low), "=f"(high)
      : "r"(word));
}

#endif

// value rounded to the nearest tf32 number, ties away from zero; NaN may become anything, so that
// what is left over is NaN then.
__device__ inline float high_part(float value) {
  return float_of((bits_of(value) + 0x1000u) & 0xffffe000u);
}

// The same for multiply_tf32 alone, which ignores the low bits; NaN stays.
__device__ inline float rounded_operand(float value) {
  return value == value ? float_of(bits_of(value) + 0x1000u) : value;
}

// Sum of value over the warp's 32 lanes, in every lane; the order of the additions is fixed.
template <typename T>
__device__ inline T warp_sum(T value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += from_lane_xor(value, mask);
  return value;
}

// Starts to copy the first count (none if less than 1) of four numbers to shared memory, zeros
// behind them. pieces: at once, from a multiple of 16 bytes.
__device__ inline void copy_four(float* shared, const float* global, int count, bool pieces) {
  if (pieces) {
    copy_piece(shared, global, count < 1 ? 0 : count < 4 ? 4 * count : 16);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) copy_word(shared + e, e < count ? global + e : global, e < count);
  }
}

// The same for 16-bit numbers, of which all four are there or none, at a multiple of 8 bytes.
template <typename T>
__device__ inline void copy_four(T* shared, const T* global, int count, bool) {
  static_assert(sizeof(T) == 2);
  copy_two_words(shared, global, count > 0);
}

}  // namespace hesskern::cuda
