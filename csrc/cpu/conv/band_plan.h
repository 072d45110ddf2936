// Which rows of an image the rows of a convolution's kernel see together.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "checks.h"

namespace hesskern::cpu {

// Image rows r that the same kernel rows i see, at position (r + padding - dilation i) / stride,
// and from which equally many rows r + dilation e lie inside the image.
struct BandClass {
  std::vector<int64_t> taps;  // ascending
  int64_t lags;               // e = 0 .. lags - 1
  int64_t rows = 0;           // image rows of the class
  int64_t first_table = 0;    // of its lags' tables among those of all classes

  bool sees(int64_t tap) const { return std::binary_search(taps.begin(), taps.end(), tap); }
};

struct BandPlan {
  std::vector<BandClass> classes;
  std::vector<int32_t> class_of_row;  // [height]; -1: no kernel row sees it
  int64_t tables = 0;                 // one per class and lag

  BandPlan(const ConvGeometry& g, int64_t height) {
    std::vector<int64_t> taps;
    for (int64_t row = 0; row < height; ++row) {
      taps.clear();
      for (int64_t tap = 0; tap < g.kernel_h; ++tap) {
        const int64_t offset = row + g.padding_h - g.dilation_h * tap;
        if (offset >= 0 && offset % g.stride_h == 0 && offset / g.stride_h < g.out_h) {
          taps.push_back(tap);
        }
      }
      if (taps.empty()) {
        class_of_row.push_back(-1);
        continue;
      }
      const int64_t lags =
          std::min(g.kernel_h - 1 - taps.front(), (height - 1 - row) / g.dilation_h) + 1;
      const auto same = [&](const BandClass& c) { return c.lags == lags && c.taps == taps; };
      auto found = std::find_if(classes.begin(), classes.end(), same);
      if (found == classes.end()) {
        found = classes.insert(classes.end(), BandClass{taps, lags, 0, tables});
        tables += lags;
      }
      ++found->rows;
      class_of_row.push_back(static_cast<int32_t>(found - classes.begin()));
    }
  }
};

}  // namespace hesskern::cpu
