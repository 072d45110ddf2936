#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "checks.h"

namespace hesskern::cpu {

namespace {

// acc [g, d, d] with the given element strides; copies upper to lower in tiles
// so that both sides of the diagonal stay in cache.
template <typename T>
void mirror_tiles(T* acc, int64_t groups, int64_t d, int64_t stride_g, int64_t stride_row,
                  int64_t stride_col) {
  constexpr int64_t kTile = 32;
  const int64_t tiles = (d + kTile - 1) / kTile;
  at::parallel_for(0, groups * tiles, 8, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      T* a = acc + (item / tiles) * stride_g;
      const int64_t row0 = (item % tiles) * kTile, row1 = std::min(d, row0 + kTile);
      for (int64_t col0 = 0; col0 <= row0; col0 += kTile) {
        for (int64_t i = row0; i < row1; ++i) {
          const int64_t col1 = std::min(i, col0 + kTile);
          for (int64_t j = col0; j < col1; ++j) {
            a[i * stride_row + j * stride_col] = a[j * stride_row + i * stride_col];
          }
        }
      }
    }
  });
}

// acc [d, d] or [g, d, d]
void mirror_(at::Tensor& acc) {
  check_mirror(acc);
  if (acc.numel() == 0) return;
  const bool grouped = acc.dim() == 3;
  AT_DISPATCH_FLOATING_TYPES(acc.scalar_type(), "mirror_", [&] {
    mirror_tiles<scalar_t>(acc.mutable_data_ptr<scalar_t>(), grouped ? acc.size(0) : 1,
                           acc.size(-1), grouped ? acc.stride(0) : 0, acc.stride(-2),
                           acc.stride(-1));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(hesskern, CPU, m) {
  m.impl("mirror_", &mirror_);
}

}  // namespace hesskern::cpu
