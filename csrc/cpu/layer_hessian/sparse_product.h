// The product with a layer's Hessian for inputs with one frequent value a: with
// x_n = e_n + a 1, only the elements of e_n that are not zero are multiplied, in
// Y = X V^T and, after y_n := S_n^T S_n y_n, in out^T += X^T Y. The first runs through
// the elements of a row and the second through those of a column, so that both sum
// in registers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/blas/panels.h"
#include "cpu/scratch.h"
#include "cpu/vector.h"
#include "layer_hessian.h"
#include "sparse_rows.h"

namespace hesskern::cpu {

// x [n, d] with d contiguous; t = 1.
template <typename T>
class SparseProduct {
 public:
  static constexpr int64_t kLevel = 1024;

  // V: vectors [vectors m, d] of one block
  SparseProduct(const LayerHessian<T>& h, T frequent, int64_t vectors)
      : h_(h), frequent_(frequent), columns_(vectors * h.m) {
    const int64_t lanes = simd_lanes<T>();
    padded_ = round_up(columns_, lanes);
    stride_ = spread_stride<T>(padded_);
    bands_ = (padded_ / lanes + kWidest - 1) / kWidest;
    words_ = (h.d + kWord - 1) / kWord;
    samples_ = std::clamp<int64_t>(kTileBytes / (kElement * (h.d + stride_)) / kWord, 1, 4) * kWord;
  }

  // Whether this is faster than PanelProduct, when the given share of the elements of x
  // is a: both in cycles a sample, fitted on a Zen 4 with AVX-512. S is read in either
  // case, but behind the multiplications there.
  bool pays(double share) const {
    const double lanes = static_cast<double>(simd_lanes<T>()), d = static_cast<double>(h_.d);
    const double vectors = static_cast<double>(padded_) / lanes;
    const double dense = 1.85 * d * static_cast<double>(columns_) / lanes;
    const double each = 2.6 * vectors + 5.0, located = 0.6 + 0.6 * static_cast<double>(bands_);
    const double roots = 8.0 * static_cast<double>(h_.c * h_.m) / lanes;
    return ((1.0 - share) * each + located) * d + roots < dense;
  }

  // The result transposed, [d, stride].
  int64_t rows() const { return h_.d; }
  int64_t sum_stride() const { return stride_; }
  // V^T [d, stride], and the sum of its rows, times a.
  int64_t packed_size() const { return (h_.d + 1) * stride_; }

  int64_t pack_items() const { return h_.d; }
  void pack(T* packed, const T* v, int64_t item) const {
    T* row = packed + item * stride_;
    for (int64_t i = 0; i < columns_; ++i) row[i] = v[i * h_.d + item];
    std::fill_n(row + columns_, stride_ - columns_, T(0));
  }
  void finish_packing(T* packed) const {
    T* base = packed + h_.d * stride_;
    std::fill_n(base, stride_, T(0));
    // Also with a = 0: what is not finite in V is to be seen in the result.
    for (int64_t j = 0; j < h_.d; ++j) {
      for (int64_t i = 0; i < padded_; ++i) base[i] += frequent_ * packed[j * stride_ + i];
    }
  }

  // sum [d, stride] += the product's part of samples [begin, end)
  void accumulate(T* sum, const T* packed, int64_t begin, int64_t end) const {
    const Scratch<T> y(samples_ * stride_), scratch(2 * h_.m), total(stride_);
    const Scratch<uint64_t> by_row(samples_ * words_), by_column(words_ * samples_);
    const Tile tile{nullptr, y.data(), by_row.data(), by_column.data()};
    std::fill_n(total.data(), stride_, T(0));
    for (int64_t first = begin; first < end; first += samples_) {
      const int64_t count = std::min(samples_, end - first);
      Tile current = tile;
      current.x = h_.x + first * h_.x_n;
      locate(current, count);
      for (int64_t n = 0; n < count; ++n) {
        T* row = current.y + n * stride_;
        // The roots of the sample after this one come while this one is multiplied.
        const bool another = first + n + 1 < end;
        const T* next = h_.s + (first + n + (another ? 1 : 0)) * h_.s_n;
        with_simd([&](auto isa)
                      HESSKERN_INLINE { project<decltype(isa)>(row, current, n, packed, next); });
        apply_roots(h_, row, stride_, first + n, 1, columns_ / h_.m, scratch.data());
      }
      for (int64_t n = 0; n < count; ++n) {
        for (int64_t i = 0; i < padded_; ++i) total.data()[i] += current.y[n * stride_ + i];
      }
      with_simd([&](auto isa) HESSKERN_INLINE { update<decltype(isa)>(sum, current, count); });
    }
    for (int64_t j = 0; j < h_.d; ++j) {
      for (int64_t i = 0; i < padded_; ++i) sum[j * stride_ + i] += frequent_ * total.data()[i];
    }
  }

  // out [columns, d]'s column j := scale sum's row j
  void join(T* out, int64_t j, const T* sum, T scale) const {
    for (int64_t i = 0; i < columns_; ++i) out[i * h_.d + j] = scale * sum[i];
  }

 private:
  static constexpr int64_t kElement = static_cast<int64_t>(sizeof(T));
  static constexpr int64_t kWord = 64;
  // Vectors that are summed in registers: 64 samples' part of Y stays in the first-level cache.
  static constexpr int kWidest = 7;
  // Bytes of a tile's x and y: V and the result are read once a tile.
  static constexpr int64_t kTileBytes = 400 << 10;

  struct Tile {
    const T* x;  // [samples, d], in place
    T* y;        // [samples, stride]
    // Which elements are not a: bits along the row [samples, words], and along the
    // column [samples / 64, words, 64].
    uint64_t *by_row, *by_column;
  };

  void locate(const Tile& tile, int64_t count) const {
    for (int64_t n = 0; n < count; ++n) {
      const T* x = tile.x + n * h_.x_n;
      for (int64_t w = 0; w < words_; ++w) {
        const int64_t j = w * kWord;
        tile.by_row[n * words_ + w] = differing(x + j, std::min(kWord, h_.d - j), frequent_);
      }
    }
    for (int64_t group = 0; group * kWord < count; ++group) {
      const int64_t first = group * kWord, last = std::min(count, first + kWord);
      for (int64_t w = 0; w < words_; ++w) {
        uint64_t* words = tile.by_column + (group * words_ + w) * kWord;
        for (int64_t n = first; n < last; ++n) words[n - first] = tile.by_row[n * words_ + w];
        std::fill(words + (last - first), words + kWord, uint64_t(0));
        transpose_bits(words);
      }
    }
  }

  // what(column, vectors) for every band of columns, the number of its vectors a constant.
  template <class Isa, class What>
  HESSKERN_FORCE_INLINE void each_band(const What& what) const {
    const int64_t vectors = padded_ / kLanes<T, Isa>;
    for (int64_t band = 0; band < bands_; ++band) {
      const int64_t first = vectors * band / bands_, last = vectors * (band + 1) / bands_;
      with_count<kWidest>(last - first,
                          [&](auto width) HESSKERN_INLINE { what(first * kLanes<T, Isa>, width); });
    }
  }

  template <int kMost, class What>
  HESSKERN_FORCE_INLINE static void with_count(int64_t count, const What& what) {
    if (count == kMost) {
      what(std::integral_constant<int, kMost>{});
    } else if constexpr (kMost > 1) {
      with_count<kMost - 1>(count, what);
    }
  }

  // y [columns] := V x_n
  template <class Isa>
  HESSKERN_FORCE_INLINE void project(T* y, const Tile& tile, int64_t n, const T* packed,
                                     const T* ahead) const {
    constexpr int64_t kLine = 64 / kElement;
    const int64_t lines = (h_.c * h_.m + kLine - 1) / kLine, steps = bands_ * words_;
    const int64_t each = (lines + steps - 1) / steps;
    int64_t line = 0;
    each_band<Isa>([&](int64_t column, auto width) HESSKERN_INLINE {
      constexpr int kWidth = decltype(width)::value, L = kLanes<T, Isa>;
      Vector<T, Isa> sum[kWidth], v;
      HESSKERN_UNROLL
      for (int i = 0; i < kWidth; ++i) {
        load<T, Isa>(sum[i], packed + h_.d * stride_ + column + i * L);
      }
      for (int64_t w = 0; w < words_; ++w) {
        for (const int64_t last = std::min(lines, line + each); line < last; ++line) {
          HESSKERN_PREFETCH(ahead + line * kLine);
        }
        const T* x = tile.x + n * h_.x_n + w * kWord;
        const T* rows = packed + w * kWord * stride_ + column;
        for (uint64_t bits = tile.by_row[n * words_ + w]; bits != 0; bits &= bits - 1) {
          const int j = __builtin_ctzll(bits);
          const T e = x[j] - frequent_;
          HESSKERN_UNROLL
          for (int i = 0; i < kWidth; ++i) {
            load<T, Isa>(v, rows + j * stride_ + i * L);
            sum[i] += e * v;
          }
        }
      }
      HESSKERN_UNROLL
      for (int i = 0; i < kWidth; ++i) store<T, Isa>(y + column + i * L, sum[i]);
    });
  }

  // total += (X - a)^T Y
  template <class Isa>
  HESSKERN_FORCE_INLINE void update(T* total, const Tile& tile, int64_t count) const {
    each_band<Isa>([&](int64_t column, auto width) HESSKERN_INLINE {
      constexpr int kWidth = decltype(width)::value, L = kLanes<T, Isa>;
      for (int64_t first = 0; first < count; first += kWord) {
        const uint64_t* words = tile.by_column + first * words_;
        const T *x = tile.x + first * h_.x_n, *y = tile.y + first * stride_ + column;
        for (int64_t j = 0; j < h_.d; ++j) {
          uint64_t bits = words[j];
          if (bits == 0) continue;
          Vector<T, Isa> sum[kWidth], z;
          T* row = total + j * stride_ + column;
          HESSKERN_UNROLL
          for (int i = 0; i < kWidth; ++i) load<T, Isa>(sum[i], row + i * L);
          for (; bits != 0; bits &= bits - 1) {
            const int n = __builtin_ctzll(bits);
            const T e = x[n * h_.x_n + j] - frequent_;
            HESSKERN_UNROLL
            for (int i = 0; i < kWidth; ++i) {
              load<T, Isa>(z, y + n * stride_ + i * L);
              sum[i] += e * z;
            }
          }
          HESSKERN_UNROLL
          for (int i = 0; i < kWidth; ++i) store<T, Isa>(row + i * L, sum[i]);
        }
      }
    });
  }

  const LayerHessian<T>& h_;
  T frequent_;
  int64_t columns_, padded_, stride_, bands_, words_, samples_;
};

}  // namespace hesskern::cpu
