// Operands laid out for the microkernels, and the transposition that gets them
// there. A matrix [rows, columns] becomes panels [ceil(columns / width), rows,
// width], zero beyond its last column.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "simd.h"
#include "vectors.h"

namespace hesskern::cpu {

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Row stride of at least n elements that spreads the rows over all cache sets:
// an odd number of cache lines.
template <typename T>
inline int64_t spread_stride(int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(T);
  return ((n + kLine - 1) / kLine | 1) * kLine;
}

namespace detail {

// Blocks of one size, the rest of the matrix with blocks of half the size.
template <typename T, int kBytes>
HESSKERN_INLINE inline void transpose_blocks(T* dst, int64_t dst_stride, const T* src,
                                             int64_t src_stride, int64_t rows, int64_t columns) {
  constexpr int kLanes = kBytes / sizeof(T);
  if constexpr (kBytes < 16 || kLanes < 2) {
    for (int64_t j = 0; j < columns; ++j) {
      for (int64_t i = 0; i < rows; ++i) dst[j * dst_stride + i] = src[i * src_stride + j];
    }
  } else {
    const int64_t full_rows = rows / kLanes * kLanes, full_columns = columns / kLanes * kLanes;
    for (int64_t j = 0; j < full_columns; j += kLanes) {
      for (int64_t i = 0; i < full_rows; i += kLanes) {
        transpose_block<kBytes>(dst + j * dst_stride + i, dst_stride, src + i * src_stride + j,
                                src_stride);
      }
    }
    if (full_columns < columns) {
      transpose_blocks<T, kBytes / 2>(dst + full_columns * dst_stride, dst_stride,
                                      src + full_columns, src_stride, full_rows,
                                      columns - full_columns);
    }
    if (full_rows < rows) {
      transpose_blocks<T, kBytes / 2>(dst + full_rows, dst_stride, src + full_rows * src_stride,
                                      src_stride, rows - full_rows, columns);
    }
  }
}

}  // namespace detail

// dst [columns, rows] = src^T, src [rows, columns]; both with unit column stride.
template <typename T>
void transpose(T* dst, int64_t dst_stride, const T* src, int64_t src_stride, int64_t rows,
               int64_t columns) {
  vectorize_bytes([=](auto bytes) HESSKERN_INLINE {
    detail::transpose_blocks<T, decltype(bytes)::value>(dst, dst_stride, src, src_stride, rows,
                                                        columns);
  });
}

// Rows [row0, row0 + rows) of panels with panel_rows rows each, from
// x [rows, columns] with any strides; width: two vectors of the machine.
template <typename T>
void pack_panels(T* panels, int64_t panel_rows, int64_t row0, const T* x, int64_t rows,
                 int64_t columns, int64_t row_stride, int64_t column_stride) {
  vectorize_bytes([=](auto bytes) HESSKERN_INLINE {
    constexpr int kBytes = decltype(bytes)::value, kLanes = SimdVector<T, kBytes>::lanes;
    constexpr int kWidth = 2 * kLanes;
    const int64_t panel_stride = panel_rows * kWidth;
    const int64_t full = columns / kWidth * kWidth, rest = columns - full;
    T* first = panels + row0 * kWidth;
    if (column_stride == 1) {
      for (int64_t r = 0; r < rows; ++r) {
        const T* source = x + r * row_stride;
        T* target = first + r * kWidth;
        for (int64_t j = 0; j < full; j += kWidth, target += panel_stride) {
          Vector<T, kBytes> left, right;
          load<kBytes>(left, source + j);
          load<kBytes>(right, source + j + kLanes);
          store<kBytes>(target, left);
          store<kBytes>(target + kLanes, right);
        }
        for (int64_t j = 0; j < rest; ++j) target[j] = source[full + j];
        if (rest > 0) std::fill(target + rest, target + kWidth, T(0));
      }
      return;
    }
    T* target = first;
    for (int64_t j = 0; j < columns; j += kWidth, target += panel_stride) {
      const int64_t count = std::min<int64_t>(kWidth, columns - j);
      const T* source = x + j * column_stride;
      if (row_stride == 1) {
        detail::transpose_blocks<T, kBytes>(target, kWidth, source, column_stride, count, rows);
      } else {
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t i = 0; i < count; ++i) {
            target[r * kWidth + i] = source[r * row_stride + i * column_stride];
          }
        }
      }
      for (int64_t r = 0; r < rows && count < kWidth; ++r) {
        std::fill(target + r * kWidth + count, target + (r + 1) * kWidth, T(0));
      }
    }
  });
}

}  // namespace hesskern::cpu
