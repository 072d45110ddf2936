// Dot products of a few arrays with a few others, their sums in registers.
#pragma once

#include <cstdint>

#include "cpu/vector.h"

namespace hesskern::cpu {

// out [R, N] := dot products of R rows and N columns of K elements, K whole vectors.
template <class T, class Isa, int R, int N>
HESSKERN_FORCE_INLINE void dot_tile(int64_t K, const T* const* rows, const T* const* cols, T* out) {
  using V = Vector<T, Isa>;
  constexpr int L = kLanes<T, Isa>;
  V sum[R][N];
  HESSKERN_UNROLL
  for (int i = 0; i < R; ++i) {
    HESSKERN_UNROLL
    for (int j = 0; j < N; ++j) sum[i][j] = V{};
  }
  for (int64_t k = 0; k < K; k += L) {
    V left[R];
    HESSKERN_UNROLL
    for (int i = 0; i < R; ++i) load<T, Isa>(left[i], rows[i] + k);
    HESSKERN_UNROLL
    for (int j = 0; j < N; ++j) {
      V right;
      load<T, Isa>(right, cols[j] + k);
      HESSKERN_UNROLL
      for (int i = 0; i < R; ++i) sum[i][j] += left[i] * right;
    }
  }
  HESSKERN_UNROLL
  for (int i = 0; i < R; ++i) {
    HESSKERN_UNROLL
    for (int j = 0; j < N; ++j) {
      T lanes[L], total = 0;
      store<T, Isa>(lanes, sum[i][j]);
      for (int l = 0; l < L; ++l) total += lanes[l];
      out[i * N + j] = total;
    }
  }
}

}  // namespace hesskern::cpu
