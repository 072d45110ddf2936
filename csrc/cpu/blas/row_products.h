// Products of a few vectors with rows read in place: up to a handful of vectors
// they beat the microkernels, whose panels they would fill with zeros.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/vector.h"
#include "fitting.h"

namespace hesskern::cpu {

// A row [d] is covered by whole vectors, the last one moved back to end with the
// row. Operands and sums are kept as these pieces, one after the other: the last
// piece of an operand is zero where another one covers the element, and what a
// sum gathers there is dropped.
struct Pieces {
  int64_t d;      // row length
  int64_t lanes;  // of the vectors that cover it
  int64_t size() const { return (d + lanes - 1) / lanes * lanes; }

  // pieces [size] := v [d]
  template <typename T>
  void split(T* pieces, const T* v) const {
    const int64_t full = size() - lanes, covered = size() - d;
    std::copy_n(v, full, pieces);
    std::fill_n(pieces + full, covered, T(0));
    std::copy_n(v + full, lanes - covered, pieces + full + covered);
  }
  // v [d] := scale pieces
  template <typename T>
  void join(T* v, const T* pieces, T scale) const {
    const int64_t full = size() - lanes, covered = size() - d;
    for (int64_t j = 0; j < full; ++j) v[j] = scale * pieces[j];
    for (int64_t j = full; j < d; ++j) v[j] = scale * pieces[j + covered];
  }
};

namespace detail {

// y [kRows, kVectors] := x [kRows, d] v^T
template <typename T, class Isa, int kRows, int kVectors>
HESSKERN_FORCE_INLINE void dot_block(T* y, int64_t y_stride, const T* x, int64_t x_stride,
                                     const T* v, int64_t v_stride, int64_t d) {
  constexpr int L = kLanes<T, Isa>;
  Vector<T, Isa> sum[kRows * kVectors], xi[kRows], vj;
  HESSKERN_UNROLL
  for (int i = 0; i < kRows * kVectors; ++i) sum[i] = Vector<T, Isa>{};
  for (int64_t j = 0; j < d; j += L) {
    const int64_t at = std::min(j, d - L);
    HESSKERN_UNROLL
    for (int i = 0; i < kRows; ++i) load<T, Isa>(xi[i], x + i * x_stride + at);
    HESSKERN_UNROLL
    for (int b = 0; b < kVectors; ++b) {
      load<T, Isa>(vj, v + b * v_stride + j);
      HESSKERN_UNROLL
      for (int i = 0; i < kRows; ++i) sum[i * kVectors + b] += xi[i] * vj;
    }
  }
  T sums[kRows * kVectors];
  element_sums<T, Isa>(sums, sum);
  HESSKERN_UNROLL
  for (int i = 0; i < kRows; ++i) {
    HESSKERN_UNROLL
    for (int b = 0; b < kVectors; ++b) y[i * y_stride + b] = sums[i * kVectors + b];
  }
}

// out [kVectors, d] += y^T x
template <typename T, class Isa, int kRows, int kVectors>
HESSKERN_FORCE_INLINE void update_block(T* out, int64_t out_stride, const T* y, int64_t y_stride,
                                        const T* x, int64_t x_stride, int64_t d) {
  constexpr int L = kLanes<T, Isa>;
  Vector<T, Isa> xi[kRows], sum;
  T a[kVectors][kRows];
  HESSKERN_UNROLL
  for (int b = 0; b < kVectors; ++b) {
    HESSKERN_UNROLL
    for (int i = 0; i < kRows; ++i) a[b][i] = y[i * y_stride + b];
  }
  for (int64_t j = 0; j < d; j += L) {
    const int64_t at = std::min(j, d - L);
    HESSKERN_UNROLL
    for (int i = 0; i < kRows; ++i) load<T, Isa>(xi[i], x + i * x_stride + at);
    HESSKERN_UNROLL
    for (int b = 0; b < kVectors; ++b) {
      load<T, Isa>(sum, out + b * out_stride + j);
      HESSKERN_UNROLL
      for (int i = 0; i < kRows; ++i) sum += a[b][i] * xi[i];
      store<T, Isa>(out + b * out_stride + j, sum);
    }
  }
}

// block(first, count) for the indices below count in fours, then one by one; count a constant.
template <class Block>
HESSKERN_FORCE_INLINE void in_fours(int64_t count, const Block& block) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) block(i, std::integral_constant<int, 4>{});
  for (; i < count; ++i) block(i, std::integral_constant<int, 1>{});
}

}  // namespace detail

// y [rows, vectors] := x [rows, d] v^T, v [vectors, v_stride] in pieces
template <typename T, class Isa>
HESSKERN_FORCE_INLINE void row_dots(T* y, int64_t y_stride, const T* x, int64_t x_stride,
                                    int64_t rows, const T* v, int64_t v_stride, int64_t vectors,
                                    int64_t d) {
  detail::in_fours(vectors, [&](int64_t b, auto wide) HESSKERN_INLINE {
    detail::in_fours(rows, [&](int64_t r, auto tall) HESSKERN_INLINE {
      detail::dot_block<T, Isa, decltype(tall)::value, decltype(wide)::value>(
          y + r * y_stride + b, y_stride, x + r * x_stride, x_stride, v + b * v_stride, v_stride,
          d);
    });
  });
}

// out [vectors, out_stride] in pieces += y^T x, y [rows, vectors], x [rows, d]
template <typename T, class Isa>
HESSKERN_FORCE_INLINE void row_updates(T* out, int64_t out_stride, const T* y, int64_t y_stride,
                                       const T* x, int64_t x_stride, int64_t rows, int64_t vectors,
                                       int64_t d) {
  detail::in_fours(vectors, [&](int64_t b, auto wide) HESSKERN_INLINE {
    detail::in_fours(rows, [&](int64_t r, auto tall) HESSKERN_INLINE {
      detail::update_block<T, Isa, decltype(tall)::value, decltype(wide)::value>(
          out + b * out_stride, out_stride, y + r * y_stride + b, y_stride, x + r * x_stride,
          x_stride, d);
    });
  });
}

}  // namespace hesskern::cpu
