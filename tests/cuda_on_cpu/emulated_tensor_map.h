// csrc/cuda/core/tensor_map.h on the CPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "emulation.h"

namespace hesskern::cuda {

struct TensorMap {
  const unsigned char* data;
  // Elements of two bytes: of the matrices, then from one row and one part to the next.
  int64_t columns, rows, parts, row_step, part_step;
  int box_rows, box_parts;
};

inline bool tensor_maps_available() {
  return emulation::device().capability >= 90;
}

template <typename T>
bool encode(TensorMap& map, const BoxedParts& source, int box_rows, int box_parts) {
  // What the driver refuses.
  const bool steps = source.row_step % 8 == 0 && source.part_step % 8 == 0 && source.row_step > 0 &&
                     source.part_step > 0 && 2 * source.row_step < int64_t{1} << 40 &&
                     2 * source.part_step < int64_t{1} << 40;
  const bool sizes = source.columns > 0 && source.rows > 0 && source.parts > 0 &&
                     source.columns <= int64_t{1} << 32 && source.rows <= int64_t{1} << 32;
  const bool box = box_rows > 0 && box_rows <= 256 && box_parts > 0 && box_parts <= 256;
  if (!steps || !sizes || !box || reinterpret_cast<uintptr_t>(source.data) % 16 != 0) return false;
  map = {static_cast<const unsigned char*>(source.data),
         source.columns,
         source.rows,
         source.parts,
         source.row_step,
         source.part_step,
         box_rows,
         box_parts};
  return true;
}

// Pieces of 16 bytes, exchanged as their places' address bits say, zeros outside of the matrices.
inline void copy_box(void* shared, const TensorMap& map, uint64_t* barrier, int column, int row,
                     int part) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(shared);
  std::vector<emulation::Piece> pieces;
  uintptr_t to = first;
  for (int64_t p = part; p < part + map.box_parts; ++p) {
    for (int64_t r = row; r < row + map.box_rows; ++r) {
      const bool inside = p >= 0 && p < map.parts && r >= 0 && r < map.rows;
      for (int64_t c = column; c < column + kBoxColumns; c += 8, to += 16) {
        auto* place = reinterpret_cast<unsigned char*>(to ^ (to >> 7 & 7) << 4);
        const int64_t begin = c < 0 ? -c : 0, end = map.columns - c;
        const int lead = static_cast<int>(begin < 8 ? begin : 8);
        const int count = !inside || end <= lead ? 0 : static_cast<int>(end < 8 ? end : 8) - lead;
        if (lead > 0) pieces.push_back({place, nullptr, 0, 2 * lead});
        if (lead == 8) continue;
        const unsigned char* from =
            count == 0 ? nullptr : map.data + 2 * (p * map.part_step + r * map.row_step + c + lead);
        pieces.push_back({place + 2 * lead, from, 2 * count, 16 - 2 * lead});
      }
    }
  }
  emulation::start_bulk_copy(std::move(pieces), static_cast<int>(to - first), barrier);
}

}  // namespace hesskern::cuda
