// Loops over short runs: the widest vector that a run fills, and sums over the
// elements of several vectors at once.
#pragma once

#include <cstdint>
#include <utility>

#include "cpu/vector.h"
#include "pack.h"

namespace hesskern {

#if defined(__GNUC__)
template <>
struct VectorType<float, 4> {
  typedef float type __attribute__((vector_size(4)));
  typedef float unaligned __attribute__((vector_size(4)));
};
template <>
struct VectorType<double, 8> {
  typedef double type __attribute__((vector_size(8)));
  typedef double unaligned __attribute__((vector_size(8)));
};
#endif

}  // namespace hesskern

namespace hesskern::cpu {

// Vectors of one element.
template <class T>
struct Single {
  static constexpr int kBytes = sizeof(T);
};

template <class T>
inline int64_t fitting_lanes(int64_t n) {
  int64_t lanes = simd_lanes<T>();
  while (lanes > n) lanes = lanes > kLanes<T, Baseline> ? lanes / 2 : 1;
  return lanes;
}

// Calls body with the widest instruction set up to Isa whose vectors a run of
// n >= 1 elements fills: fitting_lanes(n) of them.
template <class T, class Isa, class Body>
HESSKERN_FORCE_INLINE void with_fitting(int64_t n, const Body& body) {
  if (n >= kLanes<T, Isa>) {
    body(Isa{});
  } else if constexpr (Isa::kBytes == Avx512::kBytes) {
    with_fitting<T, Avx2>(n, body);
  } else if constexpr (Isa::kBytes == Avx2::kBytes) {
    with_fitting<T, Baseline>(n, body);
  } else {
    body(Single<T>{});
  }
}

namespace detail {

#if HESSKERN_SHUFFLE
// Rounds of a transposition with the halves added: element j of r[0] then belongs
// to vector j mod kCount.
template <int kStep, class V, int kCount, int... kJ>
HESSKERN_FORCE_INLINE void fold_vectors(V (&r)[kCount], std::integer_sequence<int, kJ...> lanes) {
  if constexpr (kStep >= 1) {
    HESSKERN_UNROLL
    for (int i = 0; i < kStep; ++i) {
      exchange<kStep>(r[i], r[i + kStep], lanes);
      r[i] += r[i + kStep];
    }
    fold_vectors<kStep / 2>(r, lanes);
  }
}

// v[j] := the sum of v's elements j mod kCount.
template <int kStep, int kCount, class V, int... kJ>
HESSKERN_FORCE_INLINE void fold_elements(V& v, std::integer_sequence<int, kJ...> lanes) {
  if constexpr (kStep >= kCount) {
    V other = v;
    exchange<kStep>(v, other, lanes);
    v += other;
    fold_elements<kStep / 2, kCount>(v, lanes);
  }
}
#endif

}  // namespace detail

// sums[i] := the sum of v[i]'s elements, for a power of two of vectors, which
// share each step.
template <class T, class Isa, int kCount>
HESSKERN_FORCE_INLINE void element_sums(T* sums, const Vector<T, Isa> (&v)[kCount]) {
  static_assert((kCount & (kCount - 1)) == 0);
  constexpr int L = kLanes<T, Isa>;
#if HESSKERN_SHUFFLE
  constexpr int kTogether = kCount < L ? kCount : L;
  HESSKERN_UNROLL
  for (int first = 0; first < kCount; first += kTogether) {
    Vector<T, Isa> r[kTogether];
    HESSKERN_UNROLL
    for (int i = 0; i < kTogether; ++i) r[i] = v[first + i];
    if constexpr (L > 1) {
      const std::make_integer_sequence<int, L> lanes;
      detail::fold_vectors<kTogether / 2>(r, lanes);
      detail::fold_elements<L / 2, kTogether>(r[0], lanes);
    }
    HESSKERN_UNROLL
    for (int i = 0; i < kTogether; ++i) sums[first + i] = r[0][i];
  }
#else
  for (int i = 0; i < kCount; ++i) {
    sums[i] = 0;
    for (int j = 0; j < L; ++j) sums[i] += v[i][j];
  }
#endif
}

}  // namespace hesskern::cpu
