// Matrix products over packed panels, for operands of any strides. They serve
// where a BLAS call costs more than the product, and where a result goes straight
// into the layout in which the next product reads it.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#include "microkernel.h"
#include "panels.h"

namespace hesskern::cpu {

// A matrix with element strides.
template <typename T>
struct Matrix {
  const T* data;
  int64_t row, column;

  const T* at(int64_t i, int64_t j) const { return data + i * row + j * column; }
};

// The right operands B [inner, columns] of a batch of products, in panels.
template <typename T>
struct RightOperand {
  const T* data;
  int64_t inner, columns;
  int64_t panel, batch;  // elements between panels, and between the batch's operands
  int64_t count;         // operands in the batch

  int64_t panels() const {
    const int64_t width = microkernels<T>().width;
    return (columns + width - 1) / width;
  }
};

// Where the results C [rows, columns] go: block (i, p) of the batch's operand b at
// data + b batch + i row + p panel.
template <typename T>
struct Target {
  T* data;
  int64_t row, panel, batch;

  // Row-major matrices; and panels, as the right operand of another product.
  static Target rows(T* data, int64_t stride, int64_t batch) {
    return {data, stride, microkernels<T>().width, batch};
  }
  static Target panels(T* data, int64_t rows, int64_t batch) {
    const int64_t width = microkernels<T>().width;
    return {data, width, rows * width, batch};
  }
  bool padded() const { return row == microkernels<T>().width && panel != row; }
};

// Factors for the elements of a result, repeated every `rows` rows.
template <typename T>
struct Scale {
  Matrix<T> factors;
  int64_t rows;
};

// Elements of the panels of B [inner, columns].
template <typename T>
inline int64_t panels_size(int64_t inner, int64_t columns) {
  return inner * round_up(columns, microkernels<T>().width);
}

// Panels [first, last) of B [inner, columns].
template <typename T>
inline void pack_right(T* panels, const Matrix<T>& b, int64_t inner, int64_t columns, int64_t first,
                       int64_t last) {
  const int64_t width = microkernels<T>().width;
  const int64_t begin = first * width, end = std::min(columns, last * width);
  pack_panels(panels + begin * inner, inner, 0, b.at(0, begin), inner, end - begin, b.row,
              b.column);
}

// Inner indices of one pass: a block of A's rows then fits the first-level cache.
constexpr int64_t kInnerBlock = 512;

// Rows [row0, row1) of A B, of all panels of the batch those in [first, last);
// scale may be null.
template <typename T>
void multiply(const Target<T>& c, const Matrix<T>& a, const RightOperand<T>& b, int64_t row0,
              int64_t row1, int64_t first, int64_t last, const Scale<T>* scale) {
  const auto& kernels = microkernels<T>();
  const int64_t width = kernels.width, lanes = kernels.lanes, block = kernels.rows;
  const int64_t panels = b.panels();
  // Columns that do not fill a vector are computed here and copied.
  alignas(64) T edge[Microkernels<T>::kMaxRows * (128 / sizeof(T))];
  // A block of A in the order that it has, without the conflicts of its stride.
  constexpr int64_t kLeftStride = kInnerBlock + 64 / sizeof(T);
  alignas(64) T left[Microkernels<T>::kMaxRows * kLeftStride];
  const bool by_rows = a.column == 1 || a.row != 1;
  const bool copy = (a.column != 1 && a.row != 1) || last - first >= 4;
  for (int64_t k = 0; k < b.inner; k += kInnerBlock) {
    const int64_t depth = std::min(kInnerBlock, b.inner - k);
    const bool finish = k + depth == b.inner;
    BlockProduct<T> p{};
    p.segment = p.inner = depth;
    for (int64_t row = row0; row < row1; row += block) {
      const int64_t used = std::min(block, row1 - row);
      p.a = a.at(row, k);
      p.a_stride = by_rows ? a.row : a.column;
      if (copy && by_rows) {
        for (int64_t i = 0; i < used; ++i) {
          const T* source = a.at(row + i, k);
          for (int64_t j = 0; j < depth; ++j) left[i * kLeftStride + j] = source[j * a.column];
        }
        p.a = left;
        p.a_stride = kLeftStride;
      } else if (copy) {
        for (int64_t j = 0; j < depth; ++j) std::copy_n(a.at(row, k + j), used, left + j * block);
        p.a = left;
        p.a_stride = block;
      }
      const auto& kernel = (by_rows ? kernels.by_rows : kernels.by_columns)[used];
      for (int64_t index = first; index < last; ++index) {
        const int64_t panel = index % panels, column = panel * width;
        const int64_t count = std::min(width, b.columns - column);
        const int64_t vectors = count > lanes ? 2 : 1;
        p.b = b.data + index / panels * b.batch + panel * b.panel + k * width;
        p.ahead = reinterpret_cast<const char*>(p.b);
        T* target = c.data + index / panels * c.batch + row * c.row + panel * c.panel;
        if (c.padded() || count == vectors * lanes) {
          p.c = target;
          p.c_stride = c.row;
          p.accumulate = k > 0;
          kernel[vectors](p);
        } else {
          p.c = edge;
          p.c_stride = width;
          p.accumulate = false;
          kernel[vectors](p);
          for (int64_t i = 0; i < used; ++i) {
            for (int64_t j = 0; j < count; ++j) {
              T& result = target[i * c.row + j];
              result = (k > 0 ? result : T(0)) + edge[i * width + j];
            }
          }
        }
        if (finish && scale != nullptr) {
          for (int64_t i = 0; i < used; ++i) {
            const T* factors = scale->factors.at((row + i) % scale->rows, column);
            T* result = target + i * c.row;
            const int64_t step = scale->factors.column;
            if (step == 1) {
              for (int64_t j = 0; j < count; ++j) result[j] *= factors[j];
            } else {
              for (int64_t j = 0; j < count; ++j) result[j] *= factors[j * step];
            }
          }
        }
      }
    }
  }
}

// Threads worth starting for a product.
inline int64_t product_threads(int64_t multiply_adds) {
  constexpr int64_t kThreadWork = 1 << 19;
  if (at::in_parallel_region()) return 1;
  return std::clamp<int64_t>(multiply_adds / kThreadWork, 1, at::get_num_threads());
}

// c := A B for each operand of the batch, A [rows, inner]. fill(first, last) puts
// the batch's panels [first, last) in place first; it may do nothing.
template <typename T, class Fill>
void product(const Target<T>& c, const Matrix<T>& a, const RightOperand<T>& b, int64_t rows,
             const Scale<T>* scale, const Fill& fill) {
  const int64_t panels = b.count * b.panels(), block = microkernels<T>().rows;
  const int64_t threads = product_threads(rows * b.inner * b.columns * b.count);
  if (threads == 1) {
    fill(0, panels);
    multiply(c, a, b, 0, rows, 0, panels, scale);
    return;
  }
  // Panels are shared out where there are enough of them: each thread then fills
  // its own. Rows otherwise.
  const bool by_panels =
      panels % threads == 0 || panels >= 16 * threads || rows < 2 * block * threads;
  if (by_panels) {
    at::parallel_for(0, std::min(threads, panels), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t parts = std::min(threads, panels);
        const int64_t first = panels * i / parts, last = panels * (i + 1) / parts;
        fill(first, last);
        multiply(c, a, b, 0, rows, first, last, scale);
      }
    });
    return;
  }
  at::parallel_for(0, panels, (panels + threads - 1) / threads, fill);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      multiply(c, a, b, rows * i / threads, rows * (i + 1) / threads, 0, panels, scale);
    }
  });
}

}  // namespace hesskern::cpu
