// The covariance of unfolded patches, written in products that do not depend on
// the patch offset.
//
// On one axis, entry i of the kernel reads x[stride p + dilation i - padding] at
// position p. With dilation i = stride a_i + phi_i that is y_phi[p + a_i], where
// y_phi is every stride-th pixel of the padded image from phase phi on. A pair of
// entries (i, i') is therefore a sum over the window v in [a_i, a_i + P),
//
//     A(i, i') = sum_v y_phi[v] y_phi'[v + a],     a = a_i' - a_i,
//
// and pairs of equal phases and equal lag a, a chain, differ only by the products
// that enter and leave as the window slides. The first of a chain is the full
// correlation at lag a less what lies outside its window; every other is its
// predecessor plus a few single products. Most of those meet the zero padding and
// vanish. In two dimensions everything is the product of the two axes:
//
//     lag x lag      correlations of whole images
//     single x lag   correlations of border rows (and columns)
//     single x single  products of corner pixels
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace hesskern {

struct ConvAxis {
  // sum_v y_phase_a[v] y_phase_b[v + lag] over the image, added to term.
  struct Lag {
    int64_t phase_a, phase_b, lag;
    int64_t term;
  };
  // y_phase_a[position_a] y_phase_b[position_b], added to up to two terms.
  struct Single {
    int64_t phase_a, phase_b, position_a, position_b;
    std::vector<std::pair<int64_t, int>> terms;  // term, sign
  };
  // Boundary positions that singles read, as signals of their own.
  struct Border {
    int64_t phase, position;
  };

  int64_t size, stride, padding;  // of the axis
  int64_t taps, positions;        // kernel entries, window length P
  int64_t phases;                 // phases that occur
  int64_t first, span;            // y_phi[v] is zero outside v in [first, first + span)
  int64_t max_lag;
  std::vector<int64_t> phase_offset;  // [phases] phi
  std::vector<int64_t> low, high;     // [phases] nonzero range of v
  std::vector<Lag> lags;
  std::vector<Single> singles;
  std::vector<Border> borders;
  std::vector<int64_t> border_a, border_b;  // [singles] indices into borders
  int64_t terms;
  // [taps taps] term that a pair's chain has reached, and for each term the one
  // before it in its chain (-1: the first); terms of a chain ascend.
  std::vector<int64_t> term_of_pair, previous;

  // Pixel of y_phase[v]; outside [0, size) it is padding.
  int64_t pixel(int64_t phase, int64_t v) const {
    return stride * v + phase_offset[phase] - padding;
  }
};

ConvAxis make_axis(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
                   int64_t positions);

// Lags and singles of an axis in one list.
struct AxisProduct {
  bool single;
  int64_t a, b;  // phases or borders
  int64_t lag;   // 0 for singles
  std::vector<std::pair<int64_t, int>> terms;
};

std::vector<AxisProduct> axis_products(const ConvAxis& axis);

// Index of the product with the sides of product i exchanged.
std::vector<int64_t> exchanged(const std::vector<AxisProduct>& list);

}  // namespace hesskern
