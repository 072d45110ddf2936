// z := S^T (S y): the middle step of a product with a layer's Hessian.
#pragma once

#include <algorithm>
#include <cstdint>

#include "panels.h"
#include "vectors.h"

namespace hesskern::cpu {

namespace detail {

// kClasses rows of S: z := or += sum_i <s_i, y> s_i. A row is covered by whole
// vectors, the last one moved back to end with the row; y_last holds y's elements
// there that no other vector covers, zero elsewhere.
template <int kBytes, int kClasses, typename T>
HESSKERN_INLINE inline void gram_rows(T* z, const T* y, const Vector<T, kBytes>& y_last, const T* s,
                                      int64_t stride, int64_t q, bool accumulate) {
  constexpr int kLanes = SimdVector<T, kBytes>::lanes;
  const int64_t last = q - kLanes;
  Vector<T, kBytes> sum[kClasses], si, yj;
  HESSKERN_UNROLL
  for (int i = 0; i < kClasses; ++i) {
    load<kBytes>(si, s + i * stride + last);
    sum[i] = si * y_last;
  }
  for (int64_t j = 0; j < last; j += kLanes) {
    load<kBytes>(yj, y + j);
    HESSKERN_UNROLL
    for (int i = 0; i < kClasses; ++i) {
      load<kBytes>(si, s + i * stride + j);
      sum[i] += si * yj;
    }
  }
  T a[kClasses];
  element_sums<kBytes>(a, sum);
  Vector<T, kBytes> end{}, zj;
  if (accumulate) load<kBytes>(end, z + last);
  HESSKERN_UNROLL
  for (int i = 0; i < kClasses; ++i) {
    load<kBytes>(si, s + i * stride + last);
    end += a[i] * si;
  }
  for (int64_t j = 0; j < last; j += kLanes) {
    load<kBytes>(si, s + j);
    zj = a[0] * si;
    HESSKERN_UNROLL
    for (int i = 1; i < kClasses; ++i) {
      load<kBytes>(si, s + i * stride + j);
      zj += a[i] * si;
    }
    if (accumulate) {
      load<kBytes>(si, z + j);
      zj += si;
    }
    store<kBytes>(z + j, zj);
  }
  store<kBytes>(z + last, end);
}

template <int kBytes, typename T>
HESSKERN_INLINE inline void gram_long(T* z, const T* y, const T* s, int64_t stride, int64_t c,
                                      int64_t q) {
  constexpr int kLanes = SimdVector<T, kBytes>::lanes;
  const int64_t last = q - kLanes, covered = round_up(last, kLanes) - last;
  T uncovered[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) uncovered[i] = i < covered ? T(0) : y[last + i];
  Vector<T, kBytes> y_last;
  load<kBytes>(y_last, uncovered);
  int64_t i = 0;
  for (; i + 8 <= c; i += 8) gram_rows<kBytes, 8>(z, y, y_last, s + i * stride, stride, q, i > 0);
  if (c - i >= 4) {
    gram_rows<kBytes, 4>(z, y, y_last, s + i * stride, stride, q, i > 0);
    i += 4;
  }
  if (c - i >= 2) {
    gram_rows<kBytes, 2>(z, y, y_last, s + i * stride, stride, q, i > 0);
    i += 2;
  }
  if (c - i == 1) gram_rows<kBytes, 1>(z, y, y_last, s + i * stride, stride, q, i > 0);
}

}  // namespace detail

// z [q] := S^T (S y) for S [c, q] with rows stride apart, y [q]; z and y apart.
template <int kBytes, typename T>
HESSKERN_INLINE inline void gram_times(T* z, const T* y, const T* s, int64_t stride, int64_t c,
                                       int64_t q) {
  with_fitting_vector<kBytes, T>(q, [&](auto bytes) HESSKERN_INLINE {
    detail::gram_long<decltype(bytes)::value>(z, y, s, stride, c, q);
  });
}

}  // namespace hesskern::cpu
