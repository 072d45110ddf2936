// What the lags of a convolution's input covariance are, from its geometry alone.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "conv_input_covariance.h"
#include "conv_plan.h"

namespace hesskern::cuda {

// Border lines of an axis at most.
constexpr size_t kMostBorders = 64;

struct LagFamily : ConvFamily {
  // Rows of a signal's flat array, between its margins and with them.
  int64_t inner(int64_t samples) const { return samples * lines * pitch; }
  int64_t rows(int64_t samples) const { return inner(samples) + 2 * margin; }
};

// A signal by another at several shifts, one after the other; first: place of its first block.
struct LagRun {
  int family;
  int64_t a, b, shift, count, first;
};

// All products of a layer, and the blocks of its covariance that are made of them.
struct LagPlan {
  ConvAxis h, w;
  bool fits = false;  // within the limits above; only then there is more than the axes
  LagFamily families[4];
  std::vector<LagRun> runs;
  int64_t blocks = 0;        // [C, C] each
  int64_t whole_blocks = 0;  // the first of them, of whole images
  // Of pair (o, p) of kernel entries, block * 4 + 2 (transposed) + 1 (subtracted), between
  // starts[o taps + p] and the next.
  std::vector<int32_t> starts, entries;
};

// Image, kernel, padding, dilation and output, of each the height and the width.
using LagGeometry = std::array<int64_t, 10>;

template <typename In>
LagGeometry geometry_of(const ConvInputCovariance<In, float>& call) {
  return {call.height,    call.width,      call.kernel_h,   call.kernel_w, call.padding_h,
          call.padding_w, call.dilation_h, call.dilation_w, call.out_h,    call.out_w};
}

// The plan of a geometry; those that came last are kept.
std::shared_ptr<const LagPlan> lag_plan(const LagGeometry& geometry);

}  // namespace hesskern::cuda
