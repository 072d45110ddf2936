#include "tile_matmul.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "cpu/scratch.h"
#include "tile_operands.h"

namespace hesskern::cpu {

namespace {

// Multiply-adds, and sizes of every axis, from which laying out the operands pays.
constexpr int64_t kWork = 1 << 21, kAxis = 64;

// A matrix whose columns or rows are contiguous.
struct Operand {
  const float* data;
  int64_t ld;
  bool by_rows;  // rows are contiguous

  explicit Operand(const at::Tensor& t)
      : data(t.const_data_ptr<float>()),
        ld(t.stride(1) == 1 ? t.stride(0) : t.stride(1)),
        by_rows(t.stride(1) == 1) {}

  static bool fits(const at::Tensor& t) {
    return t.stride(1) == 1 ? t.stride(0) >= t.size(1)
                            : t.stride(0) == 1 && t.stride(1) >= t.size(0);
  }
  const float* at(int64_t row, int64_t column) const {
    return by_rows ? data + row * ld + column : data + column * ld + row;
  }
};

constexpr int64_t W = amx::kPanel;

inline int64_t panels(int64_t size) {
  return (size + W - 1) / W;
}

struct Product {
  Operand a, b;
  float* out;  // [rows, columns]
  int64_t rows, inner, columns;

  // Numbers [k, k + depth) of panels as operands.
  amx::Split lay_out_left(const TileOperands& operands, int64_t i0, int64_t i1, int64_t k,
                          int64_t depth) const {
    const auto split = [&](int64_t i, int64_t step) {
      const int64_t from = k + step * amx::kStep, used = std::min(amx::kStep, k + depth - from);
      const int64_t count = std::min(W, rows - i * W);
      uint16_t* to = operands.left(i - i0, step);
      const float* x = a.at(i * W, from);
      return a.by_rows ? amx::split_rows(to, nullptr, x, a.ld, count, used)
                       : amx::split_columns(to, nullptr, x, a.ld, used, count);
    };
    return for_all(i0, i1, amx::steps(depth), a.by_rows, split);
  }
  amx::Split lay_out_right(const TileOperands& operands, int64_t j0, int64_t j1, int64_t k,
                           int64_t depth) const {
    const auto split = [&](int64_t j, int64_t step) {
      const int64_t from = k + step * amx::kStep, used = std::min(amx::kStep, k + depth - from);
      const int64_t count = std::min(W, columns - j * W);
      uint16_t* to = operands.right(j - j0, step);
      const float* x = b.at(from, j * W);
      return b.by_rows ? amx::split_columns(nullptr, to, x, b.ld, used, count)
                       : amx::split_rows(nullptr, to, x, b.ld, count, used);
    };
    return for_all(j0, j1, amx::steps(depth), !b.by_rows, split);
  }

  // split(panel, step) in the order in which the numbers lie in memory: steps beside one another
  // or panels.
  template <class Each>
  static amx::Split for_all(int64_t first, int64_t last, int64_t steps, bool steps_beside,
                            const Each& each) {
    const int64_t count = last - first, inner = steps_beside ? steps : count;
    amx::Split found = amx::Split::first;
    for (int64_t n = 0; n < count * steps && found != amx::Split::refused; ++n) {
      const int64_t outside = n / inner, inside = n % inner;
      found = amx::together(
          found, steps_beside ? each(first + outside, inside) : each(first + inside, outside));
    }
    return found;
  }

  // Panels [i0, i1) of rows and [j0, j1) of columns, no more than a block. False where numbers are
  // not for the unit.
  bool block(const TileOperands& operands, float* sums, int64_t i0, int64_t i1, int64_t j0,
             int64_t j1) const {
    std::fill_n(sums, (i1 - i0) * (j1 - j0) * W * W, 0.0f);
    for (int64_t k = 0; k < inner; k += kTileSlab) {
      const int64_t depth = std::min(kTileSlab, inner - k);
      const amx::Split split = amx::together(lay_out_left(operands, i0, i1, k, depth),
                                             lay_out_right(operands, j0, j1, k, depth));
      if (split == amx::Split::refused) return false;
      float* unit = sums;
      for (int64_t i = i0; i < i1; ++i) {
        for (int64_t j = j0; j < j1; ++j, unit += W * W) {
          operands.add_product(i - i0, j - j0, amx::steps(depth), split, unit);
        }
      }
    }
    const float* unit = sums;
    for (int64_t i = i0; i < i1; ++i) {
      for (int64_t j = j0; j < j1; ++j, unit += W * W) {
        const int64_t count = std::min(W, columns - j * W);
        float* to = out + i * W * columns + j * W;
        for (int64_t r = 0; r < std::min(W, rows - i * W); ++r) {
          std::copy_n(unit + r * W, count, to + r * columns);
        }
      }
    }
    return true;
  }

  // A part of the longer side. False where numbers are not for the unit.
  bool part(int64_t index, int64_t parts) const {
    const bool by_rows = rows >= columns;
    const int64_t all = panels(by_rows ? rows : columns);
    const int64_t first = all * index / parts, last = all * (index + 1) / parts;
    const int64_t i0 = by_rows ? first : 0, i1 = by_rows ? last : panels(rows);
    const int64_t j0 = by_rows ? 0 : first, j1 = by_rows ? panels(columns) : last;
    const int64_t lefts = std::min(kTileBlock, i1 - i0), rights = std::min(kTileBlock, j1 - j0);
    const TileOperands operands(lefts, rights);
    const Scratch<float> sums(lefts * rights * W * W);
    for (int64_t i = i0; i < i1; i += kTileBlock) {
      for (int64_t j = j0; j < j1; j += kTileBlock) {
        if (!block(operands, sums.data(), i, std::min(i1, i + kTileBlock), j,
                   std::min(j1, j + kTileBlock))) {
          return false;
        }
      }
    }
    return true;
  }
};

}  // namespace

bool tiles_take(at::ScalarType type, int64_t rows, int64_t inner, int64_t columns) {
  return type == at::kFloat && std::min({rows, inner, columns}) >= kAxis &&
         rows * inner * columns >= kWork && amx::available();
}

at::Tensor tile_matmul(const at::Tensor& a, const at::Tensor& b) {
  const int64_t rows = a.size(0), inner = a.size(1), columns = b.size(1);
  const bool pays =
      b.scalar_type() == a.scalar_type() && tiles_take(a.scalar_type(), rows, inner, columns);
  if (!pays || !Operand::fits(a) || !Operand::fits(b)) return at::mm(a, b);
  const at::Tensor out = at::empty({rows, columns}, a.options());
  const Product product{Operand(a), Operand(b), out.mutable_data_ptr<float>(),
                        rows,       inner,      columns};
  const int64_t threads = std::min<int64_t>(panels(std::max(rows, columns)), at::get_num_threads());
  std::atomic<bool> fits{true};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (!product.part(i, threads)) fits.store(false, std::memory_order_relaxed);
    }
  });
  return fits.load(std::memory_order_relaxed) ? out : at::mm(a, b);
}

TORCH_LIBRARY_IMPL(hesskern_internal, CPU, m) {
  m.impl("matmul", &tile_matmul);
}

}  // namespace hesskern::cpu
