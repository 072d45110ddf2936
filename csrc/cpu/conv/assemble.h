// From the terms of a channel tile to the covariance itself.
#pragma once

#include <algorithm>
#include <cstdint>

#include "conv_plan.h"
#include "cpu/blas/pack.h"

namespace hesskern::cpu {

// Channels [row0, row0 + rows) against [col0, col0 + cols) of one group.
struct ChannelTile {
  int64_t row0, rows, col0, cols;
};

// Elements of work that assemble_tile needs: two lines of all taps.
inline int64_t assembly_size(const ConvAxis& h, const ConvAxis& w, int64_t lanes) {
  return 2 * h.taps * w.taps * lanes;
}

// acc [C k k, C k k] (rows ld apart, upper triangle) += alpha times the blocks of
// the tile; terms [axis_h.terms, axis_w.terms, R, L] is summed along its chains in
// place. Needs work of assembly_size() elements.
template <class T, class Isa>
HESSKERN_FORCE_INLINE void assemble_tile(T* acc, int64_t ld, const ConvAxis& axis_h,
                                         const ConvAxis& axis_w, const ChannelTile& tile, T* terms,
                                         int64_t R, T alpha, T* work) {
  using V = Vector<T, Isa>;
  constexpr int L = kLanes<T, Isa>;
  const int64_t block = R * L, row_terms = axis_w.terms * block;
  auto add = [&](T* to, const T* from, int64_t count) HESSKERN_INLINE {
    for (int64_t i = 0; i < count; i += L) {
      V a, b;
      load<T, Isa>(a, to + i);
      load<T, Isa>(b, from + i);
      store<T, Isa>(to + i, V(a + b));
    }
  };
  for (int64_t t = 0; t < axis_h.terms; ++t) {
    const int64_t before = axis_h.previous[t];
    if (before >= 0) add(terms + t * row_terms, terms + before * row_terms, row_terms);
  }
  for (int64_t t = 0; t < axis_h.terms; ++t) {
    for (int64_t u = 0; u < axis_w.terms; ++u) {
      const int64_t before = axis_w.previous[u];
      if (before < 0) continue;
      add(terms + t * row_terms + u * block, terms + t * row_terms + before * block, block);
    }
  }
  const int64_t kh = axis_h.taps, kw = axis_w.taps, taps = kh * kw;
  T* gathered = work;
  T* turned = work + taps * L;
  for (int64_t c = 0; c < tile.rows; ++c) {
    for (int64_t o = 0; o < taps; ++o) {
      const int64_t* pair_h = axis_h.term_of_pair.data() + o / kw * kh;
      const int64_t* pair_w = axis_w.term_of_pair.data() + o % kw * kw;
      for (int64_t i = 0; i < kh; ++i) {
        const T* line = terms + pair_h[i] * row_terms + c * L;
        for (int64_t j = 0; j < kw; ++j) {
          V v;
          load<T, Isa>(v, line + pair_w[j] * block);
          store<T, Isa>(gathered + (i * kw + j) * L, v);
        }
      }
      transpose<T, Isa>(turned, taps, gathered, L, taps, L);
      const int64_t row = (tile.row0 + c) * taps + o, col = tile.col0 * taps;
      T* to = acc + row * ld + col;
      for (int64_t n = std::max<int64_t>(0, row - col); n < tile.cols * taps; ++n) {
        to[n] += alpha * turned[n];
      }
    }
  }
}

}  // namespace hesskern::cpu
