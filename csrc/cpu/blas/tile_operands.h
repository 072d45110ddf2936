// Panels laid out for the tile unit by the thread that multiplies them: in its own cache, from
// which alone the unit is fed fast enough.
#pragma once

#include <cstdint>

#include "cpu/amx/amx.h"
#include "cpu/scratch.h"

namespace hesskern::cpu {

// Rows that products sum over at a time, and panels of a block's sides: the operands and the
// block's products are 1.8 MB.
constexpr int64_t kTileSlab = 128, kTileBlock = 16;

// On one thread.
class TileOperands {
 public:
  // Room for so many panels of both sides, of up to so many rows.
  TileOperands(int64_t lefts, int64_t rights, int64_t rows = kTileSlab)
      : panel_(amx::steps(rows) * amx::kStepSize), left_(lefts * panel_), right_(rights * panel_) {}

  // Where a panel's step is to be laid out.
  uint16_t* left(int64_t i, int64_t step) const {
    return left_.data() + i * panel_ + step * amx::kStepSize;
  }
  uint16_t* right(int64_t j, int64_t step) const {
    return right_.data() + j * panel_ + step * amx::kStepSize;
  }

  // unit [W, W] += the product, or its elements' squares
  void add_product(int64_t i, int64_t j, int64_t steps, amx::Split split, float* unit) const {
    amx::add_product(unit, left(i, 0), right(j, 0), steps, split);
  }
  void add_squares(int64_t i, int64_t j, int64_t steps, amx::Split split, float* unit) const {
    amx::add_squares(unit, left(i, 0), right(j, 0), steps, split);
  }

 private:
  int64_t panel_;
  Scratch<uint16_t> left_, right_;
  amx::Session session_;
};

// to [rows, columns], rows ld apart, += the first of unit [W, W]
inline void add_tile_unit(float* to, int64_t ld, int64_t rows, int64_t columns, const float* unit) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) to[i * ld + j] += unit[i * amx::kPanel + j];
  }
}

}  // namespace hesskern::cpu
