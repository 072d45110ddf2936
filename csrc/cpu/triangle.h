// Gram products P^T P on one triangle: register-tiled kernels over packed panels
// and the drivers that share them among threads.
//
// A packed operand holds the columns of P [K, d] in panels of W columns, each
// [K, W] contiguous, so that a tile reads both of its sides in order. What fills
// the panels is the caller's: rows of a matrix, patches of an image.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>

#include "scratch.h"
#include "vector.h"

namespace hesskern::cpu {

// Columns of a panel.
template <class T, class Isa>
constexpr int kPanel = kLanes<T, Isa> * Isa::kVectors;

template <class T>
inline int64_t panel_width() {
  return simd_lanes<T>() * 2;
}
static_assert(Avx512::kVectors == 2 && Avx2::kVectors == 2 && Baseline::kVectors == 2);

// Rows of P that a panel holds at once: 16 KB of float32, half the first-level cache.
constexpr int64_t kPanelRows = 128;

// Where the columns of P are: column i at base + (i / W) panel_stride + i % W,
// consecutive rows ld apart. Plain row-major storage has panel_stride = W.
template <class T>
struct Columns {
  const T* base;
  int64_t panel_stride, ld;
};

// c [R, N lanes] (rows ldc apart) += alpha sum_k a[k lda + (0..R)] b[k ldb + lanes]
template <class T, class Isa, int R, int N>
HESSKERN_FORCE_INLINE void gram_tile(int64_t K, const T* a, int64_t lda, const T* b, int64_t ldb,
                                     T* c, int64_t ldc, T alpha) {
  using V = Vector<T, Isa>;
  constexpr int L = kLanes<T, Isa>;
  V sum[R][N];
  HESSKERN_UNROLL
  for (int i = 0; i < R; ++i) {
    HESSKERN_PREFETCH(c + i * ldc);
    if constexpr (N * sizeof(V) > 64) HESSKERN_PREFETCH(c + i * ldc + L);
    HESSKERN_UNROLL
    for (int j = 0; j < N; ++j) sum[i][j] = V{};
  }
  for (int64_t k = 0; k < K; ++k) {
    V right[N];
    HESSKERN_UNROLL
    for (int j = 0; j < N; ++j) load<T, Isa>(right[j], b + k * ldb + j * L);
    HESSKERN_UNROLL
    for (int i = 0; i < R; ++i) {
      const T left = a[k * lda + i];
      HESSKERN_UNROLL
      for (int j = 0; j < N; ++j) sum[i][j] += left * right[j];
    }
  }
  HESSKERN_UNROLL
  for (int i = 0; i < R; ++i) {
    HESSKERN_UNROLL
    for (int j = 0; j < N; ++j) {
      V old;
      load<T, Isa>(old, c + i * ldc + j * L);
      old += alpha * sum[i][j];
      store<T, Isa>(c + i * ldc + j * L, old);
    }
  }
}

// As gram_tile for cols < N lanes columns of c: the rest is not touched.
template <class T, class Isa, int R, int N>
HESSKERN_FORCE_INLINE void gram_tile_edge(int64_t K, const T* a, int64_t lda, const T* b,
                                          int64_t ldb, T* c, int64_t ldc, T alpha, int64_t cols) {
  constexpr int width = N * kLanes<T, Isa>;
  if (cols >= width) return gram_tile<T, Isa, R, N>(K, a, lda, b, ldb, c, ldc, alpha);
  alignas(64) T edge[R * width] = {};
  gram_tile<T, Isa, R, N>(K, a, lda, b, ldb, edge, width, alpha);
  for (int i = 0; i < R; ++i) {
    for (int64_t j = 0; j < cols; ++j) c[i * ldc + j] += edge[i * width + j];
  }
}

template <class T, class Isa, int R>
HESSKERN_FORCE_INLINE void gram_rows(int64_t K, const Columns<T>& p, int64_t row, int64_t col,
                                     int64_t cols, T* c, int64_t ldc, T alpha) {
  constexpr int W = kPanel<T, Isa>, L = kLanes<T, Isa>;
  const T* a = p.base + row / W * p.panel_stride + row % W;
  const T* b = p.base + col / W * p.panel_stride;
  T* target = c + row * ldc + col;
  // Vectors left of the diagonal hold nothing of the upper triangle.
  if (row >= col + L) {
    gram_tile_edge<T, Isa, R, 1>(K, a, p.ld, b + L, p.ld, target + L, ldc, alpha, cols - L);
  } else if (cols <= L) {
    gram_tile_edge<T, Isa, R, 1>(K, a, p.ld, b, p.ld, target, ldc, alpha, cols);
  } else {
    gram_tile_edge<T, Isa, R, 2>(K, a, p.ld, b, p.ld, target, ldc, alpha, cols);
  }
}

// c [d, d] (rows ldc apart) += alpha P^T P for the rows [row0, row1) and the
// columns [col, col + cols) of one panel, on and above the diagonal.
template <class T, class Isa>
HESSKERN_FORCE_INLINE void gram_panel(int64_t K, const Columns<T>& p, int64_t row0, int64_t row1,
                                      int64_t col, int64_t cols, T* c, int64_t ldc, T alpha) {
  constexpr int R = Isa::kRows;
  int64_t row = row0;
  for (; row + R <= row1; row += R) gram_rows<T, Isa, R>(K, p, row, col, cols, c, ldc, alpha);
  for (; row + 2 <= row1; row += 2) gram_rows<T, Isa, 2>(K, p, row, col, cols, c, ldc, alpha);
  if (row < row1) gram_rows<T, Isa, 1>(K, p, row, col, cols, c, ldc, alpha);
}

// c [d, d] += alpha P^T P over all panels; K rows at once.
template <class T>
inline void gram_triangle(int64_t K, const Columns<T>& p, int64_t d, T* c, int64_t ldc, T alpha) {
  with_simd([&](auto isa) HESSKERN_INLINE {
    using Isa = decltype(isa);
    constexpr int W = kPanel<T, Isa>;
    for (int64_t col = 0; col < d; col += W) {
      const int64_t cols = std::min<int64_t>(W, d - col);
      gram_panel<T, Isa>(K, p, 0, col + cols, col, cols, c, ldc, alpha);
    }
  });
}

// acc [d, d] (rows ld apart, upper triangle) += alpha P^T P, P [K, d] split by
// rows among threads: for small d, where a private sum per thread is cheap.
// rows_of(buffer, row0, rows) returns where rows [row0, row0 + rows) are, having
// packed them into buffer (one slab of panels) where they do not lie well.
template <class T, class RowsOf>
void gram_split_rows(T* acc, int64_t ld, int64_t d, int64_t K, T alpha, int64_t threads,
                     const RowsOf& rows_of) {
  const int64_t W = panel_width<T>(), panels = (d + W - 1) / W, width = panels * W;
  // Float32 sums of many equal terms drift: what a thread adds goes through a
  // second level every kLevel panels of rows.
  constexpr int64_t kLevel = 64;
  const int64_t per_thread = 2 * d * width + panels * kPanelRows * W;
  Scratch<T> scratch(threads * per_thread);
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) {
      T* total = scratch.data() + thread * per_thread;
      T* recent = total + d * width;
      T* panel = recent + d * width;
      std::fill(total, panel, T(0));
      const int64_t begin = K * thread / threads, end = K * (thread + 1) / threads;
      int64_t count = 0;
      auto flush = [&] {
        for (int64_t i = 0; i < d * width; ++i) total[i] += recent[i];
        std::fill(recent, recent + d * width, T(0));
        count = 0;
      };
      for (int64_t row = begin; row < end; row += kPanelRows) {
        const int64_t rows = std::min(kPanelRows, end - row);
        gram_triangle<T>(rows, rows_of(panel, row, rows), d, recent, width, T(1));
        if (++count == kLevel) flush();
      }
      flush();
    }
  });
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / (threads * d));
  at::parallel_for(0, d, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* first = scratch.data() + i * width;
      for (int64_t thread = 1; thread < threads; ++thread) {
        const T* other = first + thread * per_thread;
        for (int64_t j = i; j < d; ++j) first[j] += other[j];
      }
      for (int64_t j = i; j < d; ++j) acc[i * ld + j] += alpha * first[j];
    }
  });
}

// acc [d, d] (rows ld apart, upper triangle) += alpha P^T P, P [K, d], the tiles
// of the triangle split among threads: for large d. A chunk of rows is packed
// once for all threads: pack(dst [rows, W], panel, row0, rows) fills one panel, with
// zeros beyond d.
template <class T, class Pack>
void gram_split_tiles(T* acc, int64_t ld, int64_t d, int64_t K, T alpha, int64_t threads,
                      const Pack& pack) {
  constexpr int64_t kChunk = 1 << 20;  // packed elements: 4 MB of float32
  const int64_t W = panel_width<T>(), panels = (d + W - 1) / W;
  const int64_t slab = panels * kPanelRows * W;
  const int64_t slabs = std::clamp<int64_t>(kChunk / slab, 1, (K + kPanelRows - 1) / kPanelRows);
  Scratch<T> packed(slabs * slab);
  // Work in units of W rows of one panel column; column j has j + 1 of them.
  const int64_t units = panels * (panels + 1) / 2;
  for (int64_t chunk = 0; chunk < K; chunk += slabs * kPanelRows) {
    const int64_t rows = std::min(K - chunk, slabs * kPanelRows);
    const int64_t used = (rows + kPanelRows - 1) / kPanelRows;
    auto slab_rows = [&](int64_t s) { return std::min(kPanelRows, rows - s * kPanelRows); };
    at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
      const int64_t begin = used * panels * first / threads;
      const int64_t end = used * panels * last / threads;
      for (int64_t item = begin; item < end; ++item) {
        const int64_t s = item / panels, panel = item % panels;
        pack(packed.data() + s * slab + panel * kPanelRows * W, panel, chunk + s * kPanelRows,
             slab_rows(s));
      }
    });
    at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
      const int64_t begin = units * first / threads, end = units * last / threads;
      with_simd([&](auto isa) HESSKERN_INLINE {
        using Isa = decltype(isa);
        for (int64_t s = 0; s < used; ++s) {
          const Columns<T> columns{packed.data() + s * slab, kPanelRows * W, W};
          for (int64_t j = 0; j < panels; ++j) {
            const int64_t unit = j * (j + 1) / 2;
            const int64_t from = std::max<int64_t>(begin - unit, 0);
            const int64_t to = std::min<int64_t>(end - unit, j + 1);
            if (from >= to) continue;
            gram_panel<T, Isa>(slab_rows(s), columns, from * W, std::min(to * W, d), j * W,
                               std::min(W, d - j * W), acc, ld, alpha);
          }
        }
      });
    });
  }
}

// Up to this order every thread keeps a sum of its own (256 KB of float32).
constexpr int64_t kPrivateOrder = 256;

// Threads worth starting for K rows of order d: one for about a million
// multiply-adds.
inline int64_t gram_threads(int64_t K, int64_t d) {
  return std::clamp<int64_t>(K * d * (d + 32) / (1 << 20), 1, at::get_num_threads());
}

// acc [d, d] += alpha P^T P by the driver that suits the shape; pack and rows_of
// as above.
template <class T, class Pack, class RowsOf>
void gram(T* acc, int64_t ld, int64_t d, int64_t K, T alpha, int64_t threads, const Pack& pack,
          const RowsOf& rows_of) {
  // A private sum is set to zero, added up and read back: worth it for many rows.
  if (d <= kPrivateOrder && K >= 8 * threads && K >= d / 2) {
    gram_split_rows<T>(acc, ld, d, K, alpha, threads, rows_of);
  } else {
    gram_split_tiles<T>(acc, ld, d, K, alpha, threads, pack);
  }
}

}  // namespace hesskern::cpu
