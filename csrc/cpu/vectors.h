// Vectors in the compiler's own arithmetic types, for loops inside vectorize()
// or a target function that the compiler would not vectorize well by itself.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "simd.h"

// Before a loop with a constant count whose body must live in registers.
#if defined(__clang__)
#define HESSKERN_UNROLL _Pragma("unroll")
#define HESSKERN_UNROLL_TWICE _Pragma("unroll 2")
#else
#define HESSKERN_UNROLL _Pragma("GCC unroll 16")
#define HESSKERN_UNROLL_TWICE _Pragma("GCC unroll 2")
#endif

namespace hesskern::cpu {

template <typename T, int kBytes>
struct SimdVector {
  typedef T type __attribute__((vector_size(kBytes)));
  // For loads and stores at any element's address.
  typedef T unaligned __attribute__((vector_size(kBytes), aligned(alignof(T)), may_alias));
  static constexpr int lanes = kBytes / sizeof(T);
};

template <typename T, int kBytes>
using Vector = typename SimdVector<T, kBytes>::type;

// Vectors are passed by reference: passed by value they would fix a calling
// convention that depends on the instruction set.
template <int kBytes, typename T>
HESSKERN_INLINE inline void load(Vector<T, kBytes>& v, const T* from) {
  v = *reinterpret_cast<const typename SimdVector<T, kBytes>::unaligned*>(from);
}

template <int kBytes, typename T>
HESSKERN_INLINE inline void store(T* to, const Vector<T, kBytes>& v) {
  *reinterpret_cast<typename SimdVector<T, kBytes>::unaligned*>(to) = v;
}

namespace detail {

template <class V, int... kIndex>
HESSKERN_INLINE inline void shuffle(V& out, const V& a, const V& b,
                                    std::integer_sequence<int, kIndex...>) {
#if defined(__clang__)
  out = __builtin_shufflevector(a, b, kIndex...);
#else
  using Element = std::remove_cv_t<std::remove_reference_t<decltype(a[0])>>;
  using Index = std::conditional_t<sizeof(Element) == 4, int32_t, int64_t>;
  typedef Index Mask __attribute__((vector_size(sizeof(V))));
  out = __builtin_shuffle(a, b, Mask{kIndex...});
#endif
}

template <int kHalf, class V, int... kIndex>
HESSKERN_INLINE inline void interleave(V& out, const V& a, const V& b,
                                       std::integer_sequence<int, kIndex...>) {
  constexpr int kLanes = sizeof...(kIndex);
  shuffle(out, a, b,
          std::integer_sequence<int, (kIndex / 2 + kHalf * kLanes / 2 + kIndex % 2 * kLanes)...>{});
}

template <int kShift, class V, int... kIndex>
HESSKERN_INLINE inline void add_rotated(V& v, std::integer_sequence<int, kIndex...>) {
  constexpr int kLanes = sizeof...(kIndex);
  V rotated;
  shuffle(rotated, v, v, std::integer_sequence<int, ((kIndex + kShift) % kLanes)...>{});
  v += rotated;
}

template <int kShift, class V>
HESSKERN_INLINE inline void add_rotated(V& v) {
  using Element = std::remove_cv_t<std::remove_reference_t<decltype(v[0])>>;
  add_rotated<kShift>(v, std::make_integer_sequence<int, sizeof(V) / sizeof(Element)>{});
}

}  // namespace detail

// The lower (kHalf = 0) or upper (1) halves of a and b interleaved: a0 b0 a1 b1 ...
template <int kBytes, typename T, int kHalf>
HESSKERN_INLINE inline void interleave(Vector<T, kBytes>& out, const Vector<T, kBytes>& a,
                                       const Vector<T, kBytes>& b) {
  detail::interleave<kHalf>(out, a, b,
                            std::make_integer_sequence<int, SimdVector<T, kBytes>::lanes>{});
}

// dst[j * dst_stride + i] = src[i * src_stride + j] for one square block.
// Interleaving row i with row i + n/2 rotates the bits of (row, column) by one;
// log2(n) rounds exchange the two.
template <int kBytes, typename T>
HESSKERN_INLINE inline void transpose_block(T* dst, int64_t dst_stride, const T* src,
                                            int64_t src_stride) {
  constexpr int kLanes = SimdVector<T, kBytes>::lanes;
  Vector<T, kBytes> row[kLanes], next[kLanes];
  HESSKERN_UNROLL
  for (int i = 0; i < kLanes; ++i) load<kBytes>(row[i], src + i * src_stride);
  HESSKERN_UNROLL
  for (int round = 1; round < kLanes; round *= 2) {
    HESSKERN_UNROLL
    for (int i = 0; i < kLanes / 2; ++i) {
      interleave<kBytes, T, 0>(next[2 * i], row[i], row[i + kLanes / 2]);
      interleave<kBytes, T, 1>(next[2 * i + 1], row[i], row[i + kLanes / 2]);
    }
    HESSKERN_UNROLL
    for (int i = 0; i < kLanes; ++i) row[i] = next[i];
  }
  HESSKERN_UNROLL
  for (int i = 0; i < kLanes; ++i) store<kBytes>(dst + i * dst_stride, row[i]);
}

// sums[i] = the sum of v[i]'s elements, for a power of two of vectors: the rounds
// of a transposition with its halves added, so that all vectors share each step.
template <int kBytes, typename T, int kCount>
HESSKERN_INLINE inline void element_sums(T* sums, const Vector<T, kBytes> (&v)[kCount]) {
  static_assert((kCount & (kCount - 1)) == 0);
  constexpr int kLanes = SimdVector<T, kBytes>::lanes;
  constexpr int kTogether = kCount < kLanes ? kCount : kLanes;
  HESSKERN_UNROLL
  for (int first = 0; first < kCount; first += kTogether) {
    Vector<T, kBytes> row[kTogether], other;
    HESSKERN_UNROLL
    for (int i = 0; i < kTogether; ++i) row[i] = v[first + i];
    HESSKERN_UNROLL
    for (int half = kTogether / 2; half >= 1; half /= 2) {
      HESSKERN_UNROLL
      for (int i = 0; i < half; ++i) {
        interleave<kBytes, T, 0>(other, row[i], row[i + half]);
        interleave<kBytes, T, 1>(row[i], row[i], row[i + half]);
        row[i] += other;
      }
    }
    // Element j now belongs to vector j mod kTogether.
    if constexpr (kLanes >= 16 && kTogether < 16) detail::add_rotated<8>(row[0]);
    if constexpr (kLanes >= 8 && kTogether < 8) detail::add_rotated<4>(row[0]);
    if constexpr (kLanes >= 4 && kTogether < 4) detail::add_rotated<2>(row[0]);
    if constexpr (kLanes >= 2 && kTogether < 2) detail::add_rotated<1>(row[0]);
    HESSKERN_UNROLL
    for (int i = 0; i < kTogether; ++i) sums[first + i] = row[0][i];
  }
}

// Calls body with the widest vector of at most kBytes that a run of n >= 1
// elements fills, as std::integral_constant<int, bytes>.
template <int kBytes, typename T, class Body>
HESSKERN_INLINE inline void with_fitting_vector(int64_t n, const Body& body) {
  constexpr int kElement = sizeof(T);
  if (n >= SimdVector<T, kBytes>::lanes) {
    body(std::integral_constant<int, kBytes>{});
  } else if constexpr (kBytes > 16) {
    with_fitting_vector<kBytes / 2, T>(n, body);
  } else if constexpr (kBytes > kElement) {
    with_fitting_vector<kElement, T>(n, body);
  }
}

}  // namespace hesskern::cpu
