// Fixed-size vectors for register-blocked kernels, and the choice of their size
// at run time: a kernel is one always-inline lambda over an instruction set
// descriptor, compiled once per set.
//
//   with_simd([&](auto isa) HESSKERN_INLINE { kernel<decltype(isa)>(...); });
#pragma once

#include <cstdint>
#include <type_traits>

#include "simd.h"

#if defined(__clang__)
#define HESSKERN_UNROLL _Pragma("clang loop unroll(full)")
#else
#define HESSKERN_UNROLL _Pragma("GCC unroll 32")
#endif

#define HESSKERN_FORCE_INLINE inline __attribute__((always_inline))
#define HESSKERN_PREFETCH(address) __builtin_prefetch(address)
// Towards the second-level cache only, for memory that is read much later.
#define HESSKERN_PREFETCH_FAR(address) __builtin_prefetch(address, 0, 2)

namespace hesskern {

// Vector width, and the register tile of a real product that keeps the
// multiply-add units busy without spilling: kRows broadcasts against kVectors
// vectors (kRows kVectors accumulators), kComplexRows for complex products,
// kDotRows kDotColumns for dot products of arrays.
struct Avx512 {
  static constexpr int kBytes = 64, kRows = 8, kVectors = 2, kComplexRows = 8, kDotRows = 4,
                       kDotColumns = 6;
};
struct Avx2 {
  static constexpr int kBytes = 32, kRows = 4, kVectors = 2, kComplexRows = 4, kDotRows = 2,
                       kDotColumns = 5;
};
struct Baseline {
  static constexpr int kBytes = 16, kRows = 4, kVectors = 2, kComplexRows = 2, kDotRows = 2,
                       kDotColumns = 5;
};

template <class T, int Bytes>
struct VectorType;
#define HESSKERN_VECTOR(T, Bytes)                                                \
  template <>                                                                    \
  struct VectorType<T, Bytes> {                                                  \
    typedef T type __attribute__((vector_size(Bytes)));                          \
    typedef T unaligned __attribute__((vector_size(Bytes), aligned(sizeof(T)))); \
  };
HESSKERN_VECTOR(float, 16)
HESSKERN_VECTOR(float, 32)
HESSKERN_VECTOR(float, 64)
HESSKERN_VECTOR(double, 16)
HESSKERN_VECTOR(double, 32)
HESSKERN_VECTOR(double, 64)
#undef HESSKERN_VECTOR

template <class T, class Isa>
using Vector = typename VectorType<T, Isa::kBytes>::type;

// Unaligned access; may_alias is not needed, the element type is T itself.
template <class T, class Isa>
HESSKERN_FORCE_INLINE void load(Vector<T, Isa>& v, const T* p) {
  v = *reinterpret_cast<const typename VectorType<T, Isa::kBytes>::unaligned*>(p);
}
template <class T, class Isa>
HESSKERN_FORCE_INLINE void store(T* p, const Vector<T, Isa>& v) {
  *reinterpret_cast<typename VectorType<T, Isa::kBytes>::unaligned*>(p) = v;
}

template <class T, class Isa>
constexpr int kLanes = Isa::kBytes / static_cast<int>(sizeof(T));

// Lanes of the vectors that with_simd chooses on this machine.
template <class T>
inline int64_t simd_lanes() {
  switch (simd_level()) {
    case Simd::avx512:
      return kLanes<T, Avx512>;
    case Simd::avx2:
      return kLanes<T, Avx2>;
    default:
      return kLanes<T, Baseline>;
  }
}

template <class Kernel>
inline void with_simd(Kernel kernel) {
#if HESSKERN_X86
  if (simd_level() == Simd::avx512) {
    auto run = [&]() HESSKERN_INLINE { kernel(Avx512{}); };
    return run_avx512(run);
  }
  if (simd_level() == Simd::avx2) {
    auto run = [&]() HESSKERN_INLINE { kernel(Avx2{}); };
    return run_avx2(run);
  }
#endif
  kernel(Baseline{});
}

}  // namespace hesskern
