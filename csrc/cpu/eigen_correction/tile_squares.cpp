#include "tile_squares.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/blas/gemm.h"
#include "cpu/scratch.h"

namespace hesskern::cpu {

namespace {

constexpr int64_t W = amx::kPanel;
// Positions beyond which a block of panels would not fit a core's cache.
constexpr int64_t kMostPositions = 512;
constexpr int64_t kLeastPositions = 16, kLeastOrder = 64;

// Panels of a block's sides, fewer where they have more rows.
int64_t block_panels(int64_t positions) {
  return std::clamp<int64_t>(kTileBlock * kTileSlab / positions, 1, kTileBlock);
}

}  // namespace

bool TileSquares::pay() const {
  return t >= kLeastPositions && t <= kMostPositions && std::min(m, d) >= kLeastOrder &&
         amx::available();
}

void TileSquares::add_plainly(float* unit, const float* g, const float* x, int64_t rows,
                              int64_t columns) const {
  for (int64_t i = 0; i < rows; ++i) {
    float product[W] = {};
    for (int64_t k = 0; k < t; ++k) {
      for (int64_t j = 0; j < columns; ++j) product[j] += g[k * m + i] * x[k * d + j];
    }
    for (int64_t j = 0; j < columns; ++j) unit[i * W + j] += product[j] * product[j];
  }
}

amx::Split TileSquares::lay_out_left(const TileOperands& operands, const Block& block,
                                     const float* g) const {
  amx::Split found = amx::Split::first;
  for (int64_t step = 0; step < amx::steps(t); ++step) {
    const int64_t row = step * amx::kStep, count = std::min(amx::kStep, t - row);
    for (int64_t i = block.i0; i < block.i1; ++i) {
      const float* from = g + row * m + i * W;
      found = amx::together(found, amx::split_columns(operands.left(i - block.i0, step), nullptr,
                                                      from, m, count, std::min(W, m - i * W)));
    }
  }
  return found;
}

amx::Split TileSquares::lay_out_right(const TileOperands& operands, const Block& block,
                                      const float* x) const {
  amx::Split found = amx::Split::first;
  for (int64_t step = 0; step < amx::steps(t); ++step) {
    const int64_t row = step * amx::kStep, count = std::min(amx::kStep, t - row);
    for (int64_t j = block.j0; j < block.j1; ++j) {
      const float* from = x + row * d + j * W;
      found = amx::together(found, amx::split_columns(nullptr, operands.right(j - block.j0, step),
                                                      from, d, count, std::min(W, d - j * W)));
    }
  }
  return found;
}

void TileSquares::add_block(const TileOperands& operands, const Block& block, float* sums,
                            float* sum, int64_t stride) const {
  const int64_t columns = block.j1 - block.j0;
  std::fill_n(sums, (block.i1 - block.i0) * columns * W * W, 0.0f);
  const auto unit = [&](int64_t i, int64_t j) {
    return sums + ((i - block.i0) * columns + j - block.j0) * W * W;
  };
  for (int64_t sample = 0; sample < n; ++sample) {
    const float* x = right + sample * t * d;
    const amx::Split of_right = lay_out_right(operands, block, x);
    for (int64_t c = 0; c < r; ++c) {
      const float* g = left + (sample * r + c) * t * m;
      const amx::Split split = amx::together(of_right, lay_out_left(operands, block, g));
      for (int64_t i = block.i0; i < block.i1; ++i) {
        for (int64_t j = block.j0; j < block.j1; ++j) {
          if (split != amx::Split::refused) {
            operands.add_squares(i - block.i0, j - block.j0, amx::steps(t), split, unit(i, j));
          } else {
            add_plainly(unit(i, j), g + i * W, x + j * W, std::min(W, m - i * W),
                        std::min(W, d - j * W));
          }
        }
      }
    }
  }
  for (int64_t i = block.i0; i < block.i1; ++i) {
    for (int64_t j = block.j0; j < block.j1; ++j) {
      add_tile_unit(sum + i * W * stride + j * W, stride, std::min(W, m - i * W),
                    std::min(W, d - j * W), unit(i, j));
    }
  }
}

void TileSquares::run(float* sum, int64_t stride) const {
  const int64_t left_panels = (m + W - 1) / W, right_panels = (d + W - 1) / W;
  const int64_t size = block_panels(t);
  const int64_t threads = product_threads(n * r * t * m * d);
  // Bands of rows are shared out; of few, each is divided by its columns as well.
  std::vector<Block> blocks;
  const int64_t bands = (left_panels + size - 1) / size;
  const int64_t least = (right_panels + size - 1) / size;
  const int64_t parts = std::min(right_panels, std::max(least, (threads + bands - 1) / bands));
  for (int64_t band = 0; band < bands; ++band) {
    for (int64_t part = 0; part < parts; ++part) {
      blocks.push_back({left_panels * band / bands, left_panels * (band + 1) / bands,
                        right_panels * part / parts, right_panels * (part + 1) / parts});
    }
  }
  const int64_t count = static_cast<int64_t>(blocks.size()), used = std::min(threads, count);
  at::parallel_for(0, used, 1, [&](int64_t begin, int64_t end) {
    const TileOperands operands(size, size, t);
    const Scratch<float> sums(size * size * W * W);
    for (int64_t b = count * begin / used; b < count * end / used; ++b) {
      add_block(operands, blocks[b], sums.data(), sum, stride);
    }
  });
}

}  // namespace hesskern::cpu
