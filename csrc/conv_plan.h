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

#include <array>
#include <cstddef>
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

// Signals of one kind: whole images (a signal per pair of phases), border rows (per border and
// horizontal phase), border columns (per vertical phase and border) or pixels (per pair of
// borders). A flat array puts zeros after every line, lines of zeros after every sample and a
// margin of zeros at both ends, so that a two-dimensional lag is one shift.
struct ConvFamily {
  bool border_h, border_w;
  int64_t signals, signals_w;  // in all, and of one border row or vertical phase
  int64_t lines, pitch;        // of a sample, zeros included
  int64_t margin;
};

// Whole images, border rows, border columns, pixels.
std::array<ConvFamily, 4> make_families(const ConvAxis& h, const ConvAxis& w);

// A product on both axes: of two signals of a family, b shifted against a in their flat arrays.
struct ConvProduct {
  int family;
  int64_t a, b, shift;
  size_t h, w;                        // places in the axes' lists
  size_t transposed_h, transposed_w;  // of the product with its two sides exchanged
  bool symmetric() const { return h == transposed_h && w == transposed_w; }
};

// All products of two axes' lists in the order of their families, signals and shifts; of two that
// are each other's transpose one.
std::vector<ConvProduct> conv_products(const std::array<ConvFamily, 4>& families,
                                       const std::vector<AxisProduct>& list_h,
                                       const std::vector<AxisProduct>& list_w);

}  // namespace hesskern
