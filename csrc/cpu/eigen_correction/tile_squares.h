// Sums of squares of products on the tile unit.
#pragma once

#include <cstdint>

#include "cpu/blas/tile_operands.h"

namespace hesskern::cpu {

// sum [m, d], rows stride apart, += squares of left_nr^T right_n; left [n, r, t, m], right [n, t,
// d]
struct TileSquares {
  const float *left, *right;
  int64_t n, r, t, m, d;

  // Whether the machine has the unit and laying out the operands pays.
  bool pay() const;
  void run(float* sum, int64_t stride) const;

 private:
  // Panels [i0, i1) of the left and [j0, j1) of the right operands.
  struct Block {
    int64_t i0, i1, j0, j1;
  };

  amx::Split lay_out_left(const TileOperands& operands, const Block& block, const float* g) const;
  amx::Split lay_out_right(const TileOperands& operands, const Block& block, const float* x) const;
  // All samples; sums: memory for the block's units
  void add_block(const TileOperands& operands, const Block& block, float* sums, float* sum,
                 int64_t stride) const;
  // unit [W, W] += squares of one sample's [rows, columns] without the unit
  void add_plainly(float* unit, const float* g, const float* x, int64_t rows,
                   int64_t columns) const;
};

}  // namespace hesskern::cpu
