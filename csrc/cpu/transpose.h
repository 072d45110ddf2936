// Transposed copies of blocks of a matrix.
#pragma once

#include <cstdint>
#include <utility>

#include "cpu/vector.h"

namespace hesskern::cpu {

// __builtin_shufflevector came to GCC with 12.
#if defined(__clang__) || __GNUC__ >= 12
#define HESSKERN_SHUFFLE 1
// Exchanges the off-diagonal blocks of order S in the L x L matrix of rows a, b
// that are S apart.
template <int S, class V, int... J>
HESSKERN_FORCE_INLINE void exchange(V& a, V& b, std::integer_sequence<int, J...>) {
  constexpr int L = sizeof...(J);
  const V first = __builtin_shufflevector(a, b, ((J & S) == 0 ? J : L + J - S)...);
  b = __builtin_shufflevector(a, b, ((J & S) == 0 ? J + S : L + J)...);
  a = first;
}

template <int S, class V, int L>
HESSKERN_FORCE_INLINE void exchange_all(V (&r)[L]) {
  HESSKERN_UNROLL
  for (int i = 0; i < L; ++i) {
    if ((i & S) == 0) exchange<S>(r[i], r[i + S], std::make_integer_sequence<int, L>{});
  }
}
#else
#define HESSKERN_SHUFFLE 0
#endif

// dst [L, L] (rows ldd apart) := src^T, src [L, L] (rows lds apart), L lanes.
template <class T, class Isa>
HESSKERN_FORCE_INLINE void transpose_block(T* dst, int64_t ldd, const T* src, int64_t lds) {
  constexpr int L = kLanes<T, Isa>;
#if HESSKERN_SHUFFLE
  Vector<T, Isa> r[L];
  HESSKERN_UNROLL
  for (int i = 0; i < L; ++i) load<T, Isa>(r[i], src + i * lds);
  exchange_all<1>(r);
  if constexpr (L > 2) exchange_all<2>(r);
  if constexpr (L > 4) exchange_all<4>(r);
  if constexpr (L > 8) exchange_all<8>(r);
  HESSKERN_UNROLL
  for (int i = 0; i < L; ++i) store<T, Isa>(dst + i * ldd, r[i]);
#else
  for (int i = 0; i < L; ++i) {
    for (int j = 0; j < L; ++j) dst[i * ldd + j] = src[j * lds + i];
  }
#endif
}

// dst [cols, rows] (rows ldd apart) := src^T, src [rows, cols] (rows lds apart)
template <class T, class Isa>
HESSKERN_FORCE_INLINE void transpose(T* dst, int64_t ldd, const T* src, int64_t lds, int64_t rows,
                                     int64_t cols) {
  constexpr int L = kLanes<T, Isa>;
  const int64_t full_rows = rows / L * L, full_cols = cols / L * L;
  for (int64_t j = 0; j < full_cols; j += L) {
    for (int64_t i = 0; i < full_rows; i += L) {
      transpose_block<T, Isa>(dst + j * ldd + i, ldd, src + i * lds + j, lds);
    }
    for (int64_t i = full_rows; i < rows; ++i) {
      for (int64_t t = j; t < j + L; ++t) dst[t * ldd + i] = src[i * lds + t];
    }
  }
  for (int64_t j = full_cols; j < cols; ++j) {
    for (int64_t i = 0; i < rows; ++i) dst[j * ldd + i] = src[i * lds + j];
  }
}

}  // namespace hesskern::cpu
