// Run-time choice of the instruction set for hand-written loops, so that one
// portable binary uses AVX-512 or AVX2 where the machine has them.
// What is written once as an always-inline lambda, with_simd() of vector.h compiles
// into one function per instruction set.
#pragma once

#include <cstdlib>
#include <string_view>

#if !defined(__GNUC__)
#error "hesskern is built with GCC or Clang"
#endif

#if defined(__x86_64__)
#define HESSKERN_X86 1
#define HESSKERN_INLINE __attribute__((always_inline))
#define HESSKERN_AVX512 "avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"
// A function compiled for more than the baseline, with vectors of 512 bits.
#if defined(__clang__)
#define HESSKERN_WIDE_TARGET(features) __attribute__((target(features), min_vector_width(512)))
#else
#define HESSKERN_WIDE_TARGET(features) __attribute__((target(features ",prefer-vector-width=512")))
#endif
#define HESSKERN_TARGET_AVX512 HESSKERN_WIDE_TARGET(HESSKERN_AVX512)
#define HESSKERN_TARGET_AVX2 __attribute__((target("avx2,fma")))
#else
#define HESSKERN_X86 0
#define HESSKERN_INLINE
#endif

namespace hesskern {

enum class Simd { baseline, avx2, avx512 };

// The best set of this machine, or a lesser one that HESSKERN_SIMD names (baseline,
// avx2), so that all of them can be tested on one machine.
inline Simd simd_level() {
#if HESSKERN_X86
  static const Simd level = [] {
    const char* variable = std::getenv("HESSKERN_SIMD");
    const std::string_view limit = variable == nullptr ? "" : variable;
    __builtin_cpu_init();
    if (limit == "baseline" || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
      return Simd::baseline;
    }
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    return wide && limit != "avx2" ? Simd::avx512 : Simd::avx2;
  }();
  return level;
#else
  return Simd::baseline;
#endif
}

inline const char* simd_name() {
  switch (simd_level()) {
    case Simd::avx512:
      return "AVX-512";
    case Simd::avx2:
      return "AVX2";
    default:
      return "baseline";
  }
}

#if HESSKERN_X86
template <class Loop>
HESSKERN_TARGET_AVX512 __attribute__((noinline)) void run_avx512(Loop& loop) {
  loop();
}
template <class Loop>
HESSKERN_TARGET_AVX2 __attribute__((noinline)) void run_avx2(Loop& loop) {
  loop();
}
#endif

}  // namespace hesskern
