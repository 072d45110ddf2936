// The product with a layer's Hessian by two matrix products: a tile of samples
// is laid out once for the microkernels and serves both from cache, Y = X V^T,
// then y_n := S_n^T S_n y_n in one read of S, then out += Y^T X. While the
// products of one tile run, S and X of the next are fetched.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "cpu/blas/microkernel.h"
#include "cpu/blas/panels.h"
#include "cpu/scratch.h"
#include "layer_hessian.h"

namespace hesskern::cpu {

// Regions of memory to fetch while kernels run, spread evenly over their steps.
class Ahead {
 public:
  void add(const void* begin, int64_t bytes) {
    regions_[count_++] = {static_cast<const char*>(begin), bytes};
    total_ += bytes;
  }
  // steps: inner indices that all kernels together run through.
  void spread(int64_t steps) { step_ = std::min<int64_t>(64, round_up(total_ / steps + 1, 8)); }
  template <typename T>
  void feed(BlockProduct<T>& p) {
    while (current_ < count_ && regions_[current_].bytes <= 0) ++current_;
    if (current_ == count_) {
      p.ahead = reinterpret_cast<const char*>(p.b);
      p.ahead_step = 0;
      return;
    }
    Region& region = regions_[current_];
    p.ahead = region.begin;
    p.ahead_step = step_;
    region.begin += p.inner * step_;
    region.bytes -= p.inner * step_;
  }

 private:
  struct Region {
    const char* begin;
    int64_t bytes;
  };
  Region regions_[2];
  int count_ = 0, current_ = 0;
  int64_t total_ = 0, step_ = 0;
};

template <typename T>
class PanelProduct {
 public:
  static constexpr int64_t kLevel = 4096;

  // V: vectors [vectors m, d] of one block
  PanelProduct(const LayerHessian<T>& h, int64_t vectors)
      : h_(h), kernels_(microkernels<T>()), columns_(vectors * h.m) {
    width_ = kernels_.width;
    panels_ = (h_.d + width_ - 1) / width_;
    y_stride_ = spread_stride<T>(columns_);
    const int64_t per_row = 2 * panels_ * width_ + y_stride_ + h_.c * h_.m;
    const int64_t rows = kTileBytes / (static_cast<int64_t>(sizeof(T)) * per_row);
    const int64_t block = kernels_.rows;
    samples_ = std::clamp<int64_t>(rows, 2 * block, 12 * block) / h_.t;
    if (h_.t == 1) samples_ -= samples_ % block;
    samples_ = std::clamp<int64_t>(samples_, 1, h_.n);
  }

  int64_t rows() const { return columns_; }
  int64_t sum_stride() const { return spread_stride<T>(round_up(h_.d, kernels_.lanes)); }
  int64_t packed_size() const { return round_up(columns_, width_) * h_.d; }

  // packed: panels of V^T [columns / width, d, width]; a part of them per call
  int64_t pack_items() const { return (columns_ + width_ - 1) / width_; }
  void pack(T* packed, const T* v, int64_t item) const {
    pack_panels(packed + item * h_.d * width_, h_.d, 0, v + item * width_ * h_.d, h_.d,
                std::min(width_, columns_ - item * width_), 1, h_.d);
  }

  void finish_packing(T*) const {}

  // sum [rows, sum_stride] += the product's part of samples [begin, end)
  void accumulate(T* sum, const T* packed, int64_t begin, int64_t end) const {
    const int64_t capacity = samples_ * h_.t;
    Tile tile{Scratch<T>(panels_ * capacity * width_), Scratch<T>(capacity * y_stride_),
              Scratch<T>(2 * h_.m * h_.t), Ahead{}};
    for (int64_t first = begin; first < end; first += samples_) {
      const int64_t count = std::min(samples_, end - first), rows = count * h_.t;
      load(tile, first, count);
      tile.ahead = fetch(first + count, std::min(samples_, end - first - count), rows);
      project(tile, packed, rows);
      apply_roots(h_, tile.y.data(), y_stride_, first, count, columns_ / h_.m, tile.scratch.data());
      update(sum, tile, rows);
    }
  }

  // out [columns, d]'s row := scale sum's
  void join(T* out, int64_t row, const T* sum, T scale) const {
    for (int64_t j = 0; j < h_.d; ++j) out[row * h_.d + j] = scale * sum[j];
  }

 private:
  // Bytes of a tile's panels, results and roots together: half of a second-level
  // cache of 1 MB, the other half holds the next tile's.
  static constexpr int64_t kTileBytes = 1 << 19;
  // Inner indices of one pass of the first product, a multiple of every width: a
  // panel of V then stays in the second-level cache.
  static constexpr int64_t kDepth = 2048;
  // Panels of X that the second product keeps in the second-level cache.
  static constexpr int64_t kPanelBytes = 1 << 19;

  struct Tile {
    Scratch<T> x;        // panels [panels, rows, width]
    Scratch<T> y;        // [rows, columns]
    Scratch<T> scratch;  // one sample's y and result in the order of s
    Ahead ahead;
  };

  void load(Tile& tile, int64_t first, int64_t count) const {
    const int64_t capacity = samples_ * h_.t;
    const T* x = h_.x + first * h_.x_n;
    if (h_.t == 1) {
      pack_panels(tile.x.data(), capacity, 0, x, count, h_.d, h_.x_n, h_.x_d);
      return;
    }
    for (int64_t n = 0; n < count; ++n) {
      pack_panels(tile.x.data(), capacity, n * h_.t, x + n * h_.x_n, h_.t, h_.d, h_.x_t, h_.x_d);
    }
  }

  Ahead fetch(int64_t first, int64_t count, int64_t rows) const {
    Ahead ahead;
    if (count <= 0) return ahead;
    const int64_t size = count * static_cast<int64_t>(sizeof(T)), block = kernels_.rows;
    ahead.add(h_.s + first * h_.s_n, std::abs(h_.s_n) * size);
    ahead.add(h_.x + first * h_.x_n, std::abs(h_.x_n) * size);
    ahead.spread((rows + block - 1) / block * pack_items() * h_.d +
                 (columns_ + block - 1) / block * panels_ * rows);
    return ahead;
  }

  // Y [rows, columns] := X V^T
  void project(Tile& tile, const T* packed, int64_t rows) const {
    const int64_t block = kernels_.rows, panel = samples_ * h_.t * width_;
    BlockProduct<T> p{};
    p.a_stride = width_;
    p.a_jump = panel;
    p.segment = width_;
    p.c_stride = y_stride_;
    for (int64_t k = 0; k < h_.d; k += kDepth) {
      p.inner = std::min(kDepth, h_.d - k);
      p.accumulate = k > 0;
      for (int64_t column = 0; column < columns_; column += width_) {
        const int64_t used = columns_ - column > kernels_.lanes ? 2 : 1;
        p.b = packed + column * h_.d + k * width_;
        for (int64_t row = 0; row < rows; row += block) {
          p.a = tile.x.data() + k / width_ * panel + row * width_;
          p.c = tile.y.data() + row * y_stride_ + column;
          tile.ahead.feed(p);
          kernels_.by_rows[std::min(block, rows - row)][used](p);
        }
      }
    }
  }

  // sum [columns, d] += Y^T X
  void update(T* sum, Tile& tile, int64_t rows) const {
    const int64_t capacity = samples_ * h_.t, stride = sum_stride();
    const int64_t bands = (columns_ + kernels_.rows - 1) / kernels_.rows;
    const int64_t group =
        std::max<int64_t>(1, kPanelBytes / (static_cast<int64_t>(sizeof(T)) * rows * width_));
    BlockProduct<T> p{};
    p.a_stride = y_stride_;
    p.segment = rows;
    p.inner = rows;
    p.c_stride = stride;
    p.accumulate = true;
    for (int64_t first = 0; first < panels_; first += group) {
      const int64_t last = std::min(panels_, first + group);
      for (int64_t band = 0; band < bands; ++band) {
        const int64_t row = columns_ * band / bands, end = columns_ * (band + 1) / bands;
        p.a = tile.y.data() + row;
        for (int64_t panel = first; panel < last; ++panel) {
          const int64_t used = h_.d - panel * width_ > kernels_.lanes ? 2 : 1;
          p.b = tile.x.data() + panel * capacity * width_;
          p.c = sum + row * stride + panel * width_;
          tile.ahead.feed(p);
          kernels_.by_columns[end - row][used](p);
        }
      }
    }
  }

  const LayerHessian<T>& h_;
  const Microkernels<T>& kernels_;
  int64_t columns_, width_, panels_, y_stride_, samples_;
};

}  // namespace hesskern::cpu
