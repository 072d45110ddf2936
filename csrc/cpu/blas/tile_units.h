// Units of a Gram product on the tile unit.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "panel_rows.h"
#include "tile_operands.h"

namespace hesskern::cpu {

// Orders and rows from which laying out the operands pays.
constexpr int64_t kTileOrder = 96, kTileRows = 128;

template <class T>
inline bool tiles_pay(int64_t d, int64_t rows) {
  return std::is_same_v<T, float> && d >= kTileOrder && rows >= kTileRows && amx::available();
}

// On one thread.
class TileUnits {
 public:
  // Room for so many panels of either side.
  explicit TileUnits(int64_t panels) : operands_(panels, panels) {}

  // Panels [i0, i1) as left and [j0, j1) as right operands, of up to kPanelRows rows, with zeros
  // for columns that are not there. False where their numbers are not for the unit.
  bool lay_out(int64_t rows, const Panels<float>& p, int64_t i0, int64_t i1, int64_t j0,
               int64_t j1) {
    i0_ = i0;
    j0_ = j0;
    steps_ = amx::steps(rows);
    split_ = amx::Split::first;
    // A few rows at a time of all panels, as rows are read ahead better than columns.
    for (int64_t step = 0; step < steps_; ++step) {
      const int64_t row = step * amx::kStep, count = std::min(amx::kStep, rows - row);
      for (int64_t panel = std::min(i0, j0); panel < std::max(i1, j1); ++panel) {
        const bool is_left = panel >= i0 && panel < i1, is_right = panel >= j0 && panel < j1;
        if (!is_left && !is_right) continue;
        split_ = amx::together(
            split_, amx::split_columns(is_left ? operands_.left(panel - i0, step) : nullptr,
                                       is_right ? operands_.right(panel - j0, step) : nullptr,
                                       p.base + panel * p.stride + row * p.ld, p.ld, count,
                                       std::min(amx::kPanel, p.columns - panel * amx::kPanel)));
        if (split_ == amx::Split::refused) return false;
      }
    }
    return true;
  }

  // unit [W, W] += P_i^T P_j of what was laid out
  void add(int64_t i, int64_t j, float* unit) const {
    operands_.add_product(i - i0_, j - j0_, steps_, split_, unit);
  }

 private:
  static_assert(kPanelRows == kTileSlab);
  TileOperands operands_;
  int64_t i0_ = 0, j0_ = 0, steps_ = 0;
  amx::Split split_ = amx::Split::all;
};

}  // namespace hesskern::cpu
