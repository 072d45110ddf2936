// How many blocks share the rows of one tile.
#pragma once

#include <algorithm>
#include <cstdint>

#include "launch.h"

namespace hesskern::cuda {

// count parts of share steps each, the last one of what is left.
struct Splits {
  int64_t count, share;
};

// steps of work for each of so many blocks, between least and most parts (split-K). slots: blocks
// that run at once; write: in steps, what it costs a block to write its sums and have them added;
// all: what each part more costs all blocks together, where memory is what takes the time.
inline Splits plan_splits(int64_t blocks, int64_t steps, int64_t slots, int64_t write,
                          int64_t least, int64_t most, int64_t all = 0) {
  steps = std::max<int64_t>(steps, 1);
  Splits best{0, 0};
  int64_t best_cost = 0;
  const int64_t end = std::max({most, least, int64_t{1}});
  for (int64_t count = std::max<int64_t>(least, 1); count <= end;) {
    const int64_t share = ceil_div(steps, count), used = ceil_div(steps, share);
    const int64_t cost = ceil_div(blocks * used, slots) * (share + (used > 1 ? write : 0)) +
                         (used > 1 ? used * all : 0);
    if (best.count == 0 || cost < best_cost) best = {used, share}, best_cost = cost;
    if (share == 1) break;
    // The next count whose share is smaller.
    count = ceil_div(steps, share - 1);
  }
  return best;
}

}  // namespace hesskern::cuda
