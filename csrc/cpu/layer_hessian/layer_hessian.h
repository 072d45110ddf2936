// The product with a layer's Hessian, in the parts that its algorithms share.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/vector.h"
#include "root_gram.h"

namespace hesskern::cpu {

// H V = sum_n sum_c <V, R_nc> R_nc with R_nc = sum_t s_nct x_nt^T; the operands
// with their element strides, positions t = 1 for linear layers.
template <typename T>
struct LayerHessian {
  const T* x;  // [n, d, t]
  int64_t x_n, x_d, x_t;
  const T* s;  // [n, c, m, t], one class of one sample in a contiguous run
  int64_t s_n, s_c;
  bool s_by_position;  // the run is [t, m] instead of [m, t]
  int64_t n, c, m, d, t;
};

// y_n := S_n^T S_n y_n for samples [first, first + count) and every vector;
// y [count t, vectors m] with rows y_stride apart, scratch [2 m t].
template <typename T>
void apply_roots(const LayerHessian<T>& h, T* y, int64_t y_stride, int64_t first, int64_t count,
                 int64_t vectors, T* scratch) {
  const int64_t m = h.m, t = h.t, q = m * t;
  const T* roots = h.s + first * h.s_n;
  if (h.c == 1 && q == 1) {
    for (int64_t n = 0; n < count; ++n) {
      const T weight = roots[n * h.s_n] * roots[n * h.s_n];
      for (int64_t b = 0; b < vectors; ++b) y[n * y_stride + b] *= weight;
    }
    return;
  }
  T *gathered = scratch, *result = scratch + q;
  with_simd([=, &h](auto isa) HESSKERN_INLINE {
    using Isa = decltype(isa);
    for (int64_t n = 0; n < count; ++n) {
      const T* s = roots + n * h.s_n;
      for (int64_t b = 0; b < vectors; ++b) {
        T* rows = y + n * t * y_stride + b * m;
        if (t == 1) {
          gram_times<T, Isa>(result, rows, s, h.s_c, h.c, q);
          std::copy_n(result, m, rows);
        } else if (h.s_by_position) {
          for (int64_t j = 0; j < t; ++j) std::copy_n(rows + j * y_stride, m, gathered + j * m);
          gram_times<T, Isa>(result, gathered, s, h.s_c, h.c, q);
          for (int64_t j = 0; j < t; ++j) std::copy_n(result + j * m, m, rows + j * y_stride);
        } else {
          transpose<T, Isa>(gathered, t, rows, y_stride, t, m);
          gram_times<T, Isa>(result, gathered, s, h.s_c, h.c, q);
          transpose<T, Isa>(rows, y_stride, result, t, m, t);
        }
      }
    }
  });
}

}  // namespace hesskern::cpu
