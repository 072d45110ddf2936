// z := S^T (S y): the middle step of a product with a layer's Hessian.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/blas/fitting.h"
#include "cpu/vector.h"

namespace hesskern::cpu {

namespace detail {

// kClasses rows of S: z := or += sum_i <s_i, y> s_i. A row is covered by whole
// vectors, the last one moved back to end with the row; y_last holds y's elements
// there that no other vector covers, zero elsewhere.
template <typename T, class Isa, int kClasses>
HESSKERN_FORCE_INLINE void gram_rows(T* z, const T* y, const Vector<T, Isa>& y_last, const T* s,
                                     int64_t stride, int64_t q, bool accumulate) {
  constexpr int L = kLanes<T, Isa>;
  const int64_t last = q - L;
  Vector<T, Isa> sum[kClasses], si, yj;
  HESSKERN_UNROLL
  for (int i = 0; i < kClasses; ++i) {
    load<T, Isa>(si, s + i * stride + last);
    sum[i] = si * y_last;
  }
  for (int64_t j = 0; j < last; j += L) {
    load<T, Isa>(yj, y + j);
    HESSKERN_UNROLL
    for (int i = 0; i < kClasses; ++i) {
      load<T, Isa>(si, s + i * stride + j);
      sum[i] += si * yj;
    }
  }
  T a[kClasses];
  element_sums<T, Isa>(a, sum);
  Vector<T, Isa> end{}, zj;
  if (accumulate) load<T, Isa>(end, z + last);
  HESSKERN_UNROLL
  for (int i = 0; i < kClasses; ++i) {
    load<T, Isa>(si, s + i * stride + last);
    end += a[i] * si;
  }
  for (int64_t j = 0; j < last; j += L) {
    load<T, Isa>(si, s + j);
    zj = a[0] * si;
    HESSKERN_UNROLL
    for (int i = 1; i < kClasses; ++i) {
      load<T, Isa>(si, s + i * stride + j);
      zj += a[i] * si;
    }
    if (accumulate) {
      load<T, Isa>(si, z + j);
      zj += si;
    }
    store<T, Isa>(z + j, zj);
  }
  store<T, Isa>(z + last, end);
}

template <typename T, class Isa>
HESSKERN_FORCE_INLINE void gram_long(T* z, const T* y, const T* s, int64_t stride, int64_t c,
                                     int64_t q) {
  constexpr int L = kLanes<T, Isa>;
  const int64_t last = q - L, covered = (L - last % L) % L;
  T uncovered[L];
  for (int64_t i = 0; i < L; ++i) uncovered[i] = i < covered ? T(0) : y[last + i];
  Vector<T, Isa> y_last;
  load<T, Isa>(y_last, uncovered);
  int64_t i = 0;
  for (; i + 8 <= c; i += 8) gram_rows<T, Isa, 8>(z, y, y_last, s + i * stride, stride, q, i > 0);
  if (c - i >= 4) {
    gram_rows<T, Isa, 4>(z, y, y_last, s + i * stride, stride, q, i > 0);
    i += 4;
  }
  if (c - i >= 2) {
    gram_rows<T, Isa, 2>(z, y, y_last, s + i * stride, stride, q, i > 0);
    i += 2;
  }
  if (c - i == 1) gram_rows<T, Isa, 1>(z, y, y_last, s + i * stride, stride, q, i > 0);
}

}  // namespace detail

// z [q] := S^T (S y) for S [c, q] with rows stride apart, y [q]; z and y apart.
template <typename T, class Isa>
HESSKERN_FORCE_INLINE void gram_times(T* z, const T* y, const T* s, int64_t stride, int64_t c,
                                      int64_t q) {
  with_fitting<T, Isa>(q, [&](auto isa) HESSKERN_INLINE {
    detail::gram_long<T, decltype(isa)>(z, y, s, stride, c, q);
  });
}

}  // namespace hesskern::cpu
