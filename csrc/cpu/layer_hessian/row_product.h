// The product with a layer's Hessian row by row, for few vectors: a tile of rows
// is read from memory once, for its products with the vectors and, from cache,
// for the update.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/blas/microkernel.h"
#include "cpu/blas/panels.h"
#include "cpu/blas/row_products.h"
#include "cpu/scratch.h"
#include "cpu/vector.h"
#include "layer_hessian.h"

namespace hesskern::cpu {

// Rows are those of x [n, d] in place, d contiguous; t = 1.
template <typename T>
class RowProduct {
 public:
  static constexpr int64_t kLevel = 512;

  RowProduct(const LayerHessian<T>& h, int64_t vectors)
      : h_(h), columns_(vectors * h.m), pieces_{h.d, fitting_lanes<T>(h.d)} {
    const int64_t rows = kTileBytes / (static_cast<int64_t>(sizeof(T)) * h_.d);
    samples_ =
        std::clamp<int64_t>(rows / 4 * 4, std::max<int64_t>(1, std::min<int64_t>(rows, 4)), 64);
  }

  int64_t rows() const { return columns_; }
  int64_t sum_stride() const { return round_up(pieces_.size(), 64 / sizeof(T)); }
  int64_t packed_size() const { return columns_ * pieces_.size(); }

  int64_t pack_items() const { return columns_; }
  void pack(T* packed, const T* v, int64_t item) const {
    pieces_.split(packed + item * pieces_.size(), v + item * h_.d);
  }

  void finish_packing(T*) const {}

  void accumulate(T* sum, const T* packed, int64_t begin, int64_t end) const {
    const Scratch<T> y(samples_ * columns_), scratch(2 * h_.m);
    const int64_t stride = sum_stride(), v_stride = pieces_.size();
    for (int64_t first = begin; first < end; first += samples_) {
      const int64_t count = std::min(samples_, end - first);
      const T* x = h_.x + first * h_.x_n;
      with_simd([&](auto widest) HESSKERN_INLINE {
        with_fitting<T, decltype(widest)>(h_.d, [&](auto isa) HESSKERN_INLINE {
          row_dots<T, decltype(isa)>(y.data(), columns_, x, h_.x_n, count, packed, v_stride,
                                     columns_, h_.d);
        });
      });
      apply_roots(h_, y.data(), columns_, first, count, columns_ / h_.m, scratch.data());
      with_simd([&](auto widest) HESSKERN_INLINE {
        with_fitting<T, decltype(widest)>(h_.d, [&](auto isa) HESSKERN_INLINE {
          row_updates<T, decltype(isa)>(sum, stride, y.data(), columns_, x, h_.x_n, count, columns_,
                                        h_.d);
        });
      });
    }
  }

  void join(T* out, int64_t row, const T* sum, T scale) const {
    pieces_.join(out + row * h_.d, sum, scale);
  }

 private:
  static constexpr int64_t kTileBytes = 1 << 18;

  const LayerHessian<T>& h_;
  int64_t columns_;
  Pieces pieces_;
  int64_t samples_;
};

// Rows are R_nc = sum_t s_nct x_nt^T [m d], computed for one tile of samples at
// a time; d is padded to whole vectors.
template <typename T>
class OuterProduct {
 public:
  static constexpr int64_t kLevel = 4096;

  OuterProduct(const LayerHessian<T>& h, int64_t vectors)
      : h_(h), kernels_(microkernels<T>()), vectors_(vectors) {
    padded_ = round_up(h_.d, kernels_.lanes);
    row_ = h_.m * padded_;
    samples_ =
        std::clamp<int64_t>(kTileBytes / (static_cast<int64_t>(sizeof(T)) * h_.c * row_), 1, 16);
  }

  int64_t rows() const { return vectors_ * h_.m; }
  int64_t sum_stride() const { return padded_; }
  int64_t packed_size() const { return vectors_ * row_; }

  int64_t pack_items() const { return rows(); }
  void pack(T* packed, const T* v, int64_t item) const {
    T* target = std::copy_n(v + item * h_.d, h_.d, packed + item * padded_);
    std::fill_n(target, padded_ - h_.d, T(0));
  }

  void finish_packing(T*) const {}

  void accumulate(T* sum, const T* packed, int64_t begin, int64_t end) const {
    const int64_t width = kernels_.width, panels = (h_.d + width - 1) / width;
    const Scratch<T> x(panels * h_.t * width), r(samples_ * h_.c * row_);
    const Scratch<T> y(samples_ * h_.c * vectors_);
    for (int64_t first = begin; first < end; first += samples_) {
      const int64_t count = std::min(samples_, end - first), rows = count * h_.c;
      for (int64_t n = 0; n < count; ++n) {
        pack_panels(x.data(), h_.t, 0, h_.x + (first + n) * h_.x_n, h_.t, h_.d, h_.x_t, h_.x_d);
        outer(r.data() + n * h_.c * row_, x.data(), h_.s + (first + n) * h_.s_n);
      }
      with_simd([&](auto isa) HESSKERN_INLINE {
        using Isa = decltype(isa);
        row_dots<T, Isa>(y.data(), vectors_, r.data(), row_, rows, packed, row_, vectors_, row_);
        row_updates<T, Isa>(sum, row_, y.data(), vectors_, r.data(), row_, rows, vectors_, row_);
      });
    }
  }

  void join(T* out, int64_t row, const T* sum, T scale) const {
    for (int64_t j = 0; j < h_.d; ++j) out[row * h_.d + j] = scale * sum[j];
  }

 private:
  static constexpr int64_t kTileBytes = 1 << 18;

  // r [c, m, padded] := s_n [c, m, t] x_n^T, x in panels [panels, t, width]
  void outer(T* r, const T* x, const T* s) const {
    const int64_t width = kernels_.width;
    const int64_t bands = (h_.m + kernels_.rows - 1) / kernels_.rows;
    BlockProduct<T> p{};
    p.a_stride = h_.s_by_position ? h_.m : h_.t;
    p.segment = p.inner = h_.t;
    p.c_stride = padded_;
    p.accumulate = false;
    for (int64_t c = 0; c < h_.c; ++c) {
      for (int64_t band = 0; band < bands; ++band) {
        const int64_t row = h_.m * band / bands, end = h_.m * (band + 1) / bands;
        p.a = s + c * h_.s_c + row * (h_.s_by_position ? 1 : h_.t);
        const auto& kernels =
            (h_.s_by_position ? kernels_.by_columns : kernels_.by_rows)[end - row];
        for (int64_t column = 0; column < h_.d; column += width) {
          p.b = x + column * h_.t;
          p.c = r + (c * h_.m + row) * padded_ + column;
          p.ahead = reinterpret_cast<const char*>(p.b);
          kernels[h_.d - column > kernels_.lanes ? 2 : 1](p);
        }
      }
    }
  }

  const LayerHessian<T>& h_;
  const Microkernels<T>& kernels_;
  int64_t vectors_, padded_, row_, samples_;
};

}  // namespace hesskern::cpu
