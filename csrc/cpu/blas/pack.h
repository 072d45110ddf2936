// Filling a panel [rows, W] of a packed operand from memory of another order.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/transpose.h"
#include "cpu/vector.h"

namespace hesskern::cpu {

// dst [rows, W] := the matrix src [rows, cols], cols <= W, with the given element
// strides; columns beyond cols become zero.
template <class T>
inline void pack_panel(T* dst, int64_t W, const T* src, int64_t stride_row, int64_t stride_col,
                       int64_t rows, int64_t cols) {
  with_simd([&](auto isa) HESSKERN_INLINE {
    using Isa = decltype(isa);
    if (stride_row == 1) {
      transpose<T, Isa>(dst, W, src, stride_col, cols, rows);
    } else if (stride_col == 1 && cols == W) {
      constexpr int L = kLanes<T, Isa>;
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < W; j += L) {
          Vector<T, Isa> v;
          load<T, Isa>(v, src + i * stride_row + j);
          store<T, Isa>(dst + i * W + j, v);
        }
      }
    } else {
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < cols; ++j) {
          dst[i * W + j] = src[i * stride_row + j * stride_col];
        }
      }
    }
    for (int64_t i = 0; cols < W && i < rows; ++i) {
      for (int64_t j = cols; j < W; ++j) dst[i * W + j] = T(0);
    }
  });
}

}  // namespace hesskern::cpu
