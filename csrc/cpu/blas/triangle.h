// Gram products P^T P on one triangle: register-tiled kernels over panels of
// columns, and the drivers that share them among threads.
//
// The columns of P [K, d] are taken in panels of W; the triangle consists of units
// [W, W], one per pair of panels. What fills the panels is the caller's: rows of a
// matrix, patches of an image.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

#include "cpu/scratch.h"
#include "cpu/vector.h"
#include "panel_rows.h"
#include "tile_units.h"

namespace hesskern::cpu {

// The panels of rows [row, row + rows) of d columns in buffer [panels, kPanelRows, W], each filled
// by pack(dst [rows, W], panel, row, rows).
template <class T, class Pack>
inline Panels<T> packed_panels(T* buffer, int64_t d, int64_t row, int64_t rows, const Pack& pack) {
  const int64_t W = panel_width<T>(), panels = (d + W - 1) / W;
  for (int64_t panel = 0; panel < panels; ++panel) {
    pack(buffer + panel * kPanelRows * W, panel, row, rows);
  }
  return {buffer, kPanelRows * W, W, panels * W};
}

// c [R, N lanes] (rows ldc apart) += sum_k a[k lda + (0..R)] b[k ldb + lanes]. Small
// tiles keep U sums apart: one multiply-add would wait for the one before.
template <class T, class Isa, int R, int N>
HESSKERN_FORCE_INLINE void gram_tile(int64_t K, const T* a, int64_t lda, const T* b, int64_t ldb,
                                     T* c, int64_t ldc) {
  using V = Vector<T, Isa>;
  constexpr int L = kLanes<T, Isa>, U = R * N >= 8 ? 1 : 8 / (R * N);
  V sum[U][R][N];
  HESSKERN_UNROLL
  for (int u = 0; u < U; ++u) {
    HESSKERN_UNROLL
    for (int i = 0; i < R; ++i) {
      HESSKERN_UNROLL
      for (int j = 0; j < N; ++j) sum[u][i][j] = V{};
    }
  }
  auto step = [&](int64_t k, int u) HESSKERN_INLINE {
    V right[N];
    HESSKERN_UNROLL
    for (int j = 0; j < N; ++j) load<T, Isa>(right[j], b + k * ldb + j * L);

    HESSKERN_UNROLL
    for (int i = 0; i < R; ++i) {
      const T left = a[k * lda + i];
      HESSKERN_UNROLL
      for (int j = 0; j < N; ++j) sum[u][i][j] += left * right[j];
    }
  };
  int64_t k = 0;
  for (; k + U <= K; k += U) {
    HESSKERN_UNROLL
    for (int u = 0; u < U; ++u) step(k + u, u);
  }
  for (; k < K; ++k) step(k, 0);
  HESSKERN_UNROLL
  for (int i = 0; i < R; ++i) {
    HESSKERN_UNROLL
    for (int j = 0; j < N; ++j) {
      V old;
      load<T, Isa>(old, c + i * ldc + j * L);
      HESSKERN_UNROLL
      for (int u = 0; u < U; ++u) old += sum[u][i][j];
      store<T, Isa>(c + i * ldc + j * L, old);
    }
  }
}

// unit [W, W] += P_i^T P_j over K rows, for the first rows of panel i and the first
// cols of panel j (more are written). On the diagonal, vectors that lie left of it
// are left out.
template <class T, class Isa>
HESSKERN_FORCE_INLINE void gram_unit(int64_t K, const Panels<T>& p, int64_t i, int64_t j,
                                     int64_t rows, int64_t cols, T* unit) {
  constexpr int W = kPanel<T, Isa>, L = kLanes<T, Isa>;
  const T* a = p.base + i * p.stride;
  const T* b = p.base + j * p.stride;
  auto block = [&](auto count, int64_t row) HESSKERN_INLINE {
    constexpr int R = decltype(count)::value;
    if (cols <= L) {
      gram_tile<T, Isa, R, 1>(K, a + row, p.ld, b, p.ld, unit + row * W, W);
    } else if (i == j && row >= L) {
      gram_tile<T, Isa, R, 1>(K, a + row, p.ld, b + L, p.ld, unit + row * W + L, W);
    } else {
      gram_tile<T, Isa, R, 2>(K, a + row, p.ld, b, p.ld, unit + row * W, W);
    }
  };
  constexpr int R = Isa::kRows;
  int64_t row = 0;
  for (; row + R <= rows; row += R) block(std::integral_constant<int, R>{}, row);
  if constexpr (R > 4) {
    if (row + 4 <= rows) {
      block(std::integral_constant<int, 4>{}, row);
      row += 4;
    }
  }
  if (row + 2 <= rows) {
    block(std::integral_constant<int, 2>{}, row);
    row += 2;
  }
  if (row < rows) block(std::integral_constant<int, 1>{}, row);
}

// What a sum is added to, and where the result goes: acc [d, d] := beta base [d, d] + the sum, on
// and above the diagonal. base may be acc, but must not overlap it otherwise; it is not read where
// beta is zero.
template <class T>
struct Triangle {
  T* acc;
  int64_t ld;  // elements from one row to the next
  const T* base;
  int64_t base_ld;
  T beta;

  static Triangle of(T* acc, int64_t ld) { return {acc, ld, acc, ld, T(1)}; }
  // For what is added to the result.
  Triangle in_place() const { return of(acc, ld); }
};

// Number of the unit of panels i <= j, and its panels.
inline int64_t unit_index(int64_t i, int64_t j) {
  return j * (j + 1) / 2 + i;
}

// to.acc := to.beta to.base + alpha times unit (i, j), on and above the diagonal.
template <class T>
HESSKERN_FORCE_INLINE void add_unit(const Triangle<T>& to, int64_t d, int64_t W, int64_t i,
                                    int64_t j, T alpha, const T* unit) {
  const int64_t rows = std::min(W, d - i * W), cols = std::min(W, d - j * W);
  for (int64_t r = 0; r < rows; ++r) {
    T* acc = to.acc + (i * W + r) * to.ld + j * W;
    const T* base = to.base + (i * W + r) * to.base_ld + j * W;
    const T* from = unit + r * W;
    const int64_t first = i == j ? r : 0;
    if (to.beta == T(1)) {
      for (int64_t c = first; c < cols; ++c) acc[c] = base[c] + alpha * from[c];
    } else if (to.beta == T(0)) {
      for (int64_t c = first; c < cols; ++c) acc[c] = alpha * from[c];
    } else {
      for (int64_t c = first; c < cols; ++c) acc[c] = to.beta * base[c] + alpha * from[c];
    }
  }
}

// Float32 sums of many equal terms drift apart from the true sum, all in one
// direction. Sums therefore have levels: kPanelRows terms in a register, this many
// of those in a unit, and units in what is added to acc.
constexpr int64_t kLevel = 64;

// One thread's sum of P^T P, all units of the triangle, of at most so many additions.
template <class T>
class PrivateSum {
 public:
  static int64_t units_size(int64_t d) {
    const int64_t W = panel_width<T>(), panels = (d + W - 1) / W;
    return unit_index(0, panels) * W * W;
  }
  static int64_t size(int64_t d, int64_t additions) {
    return (additions > kLevel ? 2 : 1) * units_size(d);
  }

  PrivateSum(T* memory, int64_t d, int64_t additions)
      : total_(memory), recent_(additions > kLevel ? memory + units_size(d) : memory), d_(d) {
    std::fill(memory, memory + size(d, additions), T(0));
    if (tiles_pay<T>(d, kTileRows)) tiles_.emplace((d + panel_width<T>() - 1) / panel_width<T>());
  }
  // At most kPanelRows rows. False where panels would have to be read that are not there.
  bool add(int64_t rows, const Panels<T>& p) {
    const int64_t W = panel_width<T>(), panels = (d_ + W - 1) / W;
    if (!add_on_tiles(rows, p)) {
      if (p.columns < panels * W) return false;
      with_simd([&](auto isa) HESSKERN_INLINE {
        using Isa = decltype(isa);
        for (int64_t j = 0; j < panels; ++j) {
          for (int64_t i = 0; i <= j; ++i) {
            gram_unit<T, Isa>(rows, p, i, j, std::min(W, d_ - i * W), std::min(W, d_ - j * W),
                              recent_ + unit_index(i, j) * W * W);
          }
        }
      });
    }
    if (++count_ == kLevel) flush();
    return true;
  }
  void flush() {
    if (recent_ == total_) return;
    const int64_t size = units_size(d_);
    for (int64_t i = 0; i < size; ++i) total_[i] += recent_[i];
    std::fill(recent_, recent_ + size, T(0));
    count_ = 0;
  }

 private:
  bool add_on_tiles(int64_t rows, const Panels<T>& p) {
    if constexpr (std::is_same_v<T, float>) {
      const int64_t W = amx::kPanel, panels = (d_ + W - 1) / W;
      if (!tiles_ || !tiles_->lay_out(rows, p, 0, panels, 0, panels)) return false;
      for (int64_t j = 0; j < panels; ++j) {
        for (int64_t i = 0; i <= j; ++i) tiles_->add(i, j, recent_ + unit_index(i, j) * W * W);
      }
      return true;
    }
    return false;
  }

  T *total_, *recent_;
  int64_t d_, count_ = 0;
  std::optional<TileUnits> tiles_;
};

// Units of private sums that a thread is worth starting for.
constexpr int64_t kUnitsAtOnce = 16;

// to += alpha times what each thread adds to its own sum, in at most so many additions:
// body(thread, sum). For small d.
template <class T, class Body>
void gram_private_sums(const Triangle<T>& to, int64_t d, T alpha, int64_t threads,
                       int64_t additions, const Body& body) {
  const int64_t W = panel_width<T>(), panels = (d + W - 1) / W;
  const int64_t per_thread = PrivateSum<T>::size(d, additions);
  Scratch<T> scratch(threads * per_thread);
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) {
      PrivateSum<T> sum(scratch.data() + thread * per_thread, d, additions);
      body(thread, sum);
      sum.flush();
    }
  });
  at::parallel_for(0, unit_index(0, panels), kUnitsAtOnce, [&](int64_t first, int64_t last) {
    for (int64_t j = 0; j < panels; ++j) {
      for (int64_t i = 0; i <= j; ++i) {
        if (unit_index(i, j) < first || unit_index(i, j) >= last) continue;
        T* sum = scratch.data() + unit_index(i, j) * W * W;
        for (int64_t thread = 1; thread < threads; ++thread) {
          const T* other = sum + thread * per_thread;
          for (int64_t n = 0; n < W * W; ++n) sum[n] += other[n];
        }
        add_unit<T>(to, d, W, i, j, alpha, sum);
      }
    }
  });
}

// What says where the panels of rows [row, row + rows) lie in memory that needs no packing; here,
// nowhere.
template <class T>
struct NowhereDirect {
  Panels<T> operator()(int64_t, int64_t) const { return {}; }
};

// Rows of at most this length are multiplied where they lie: longer ones map to few cache sets when
// the row length is a power of two. The tile unit's operands are laid out anew in any case.
constexpr int64_t kDirectOrder = 64;

// to += alpha P^T P, P [K, d], split by rows among threads: for small d, where a private sum per
// thread is cheap. pack and direct as in gram().
template <class T, class Pack, class Direct>
void gram_split_rows(const Triangle<T>& to, int64_t d, int64_t K, T alpha, int64_t threads,
                     const Pack& pack, const Direct& direct) {
  const int64_t W = panel_width<T>(), panels = (d + W - 1) / W;
  const bool look = d <= kDirectOrder || tiles_pay<T>(d, kTileRows);
  const int64_t additions = (K / threads + kPanelRows) / kPanelRows;
  gram_private_sums<T>(to, d, alpha, threads, additions, [&](int64_t thread, PrivateSum<T>& sum) {
    const Scratch<T> buffer(panels * kPanelRows * W);
    const int64_t begin = K * thread / threads, end = K * (thread + 1) / threads;
    for (int64_t row = begin; row < end; row += kPanelRows) {
      const int64_t rows = std::min(kPanelRows, end - row);
      const Panels<T> found = look ? direct(row, rows) : Panels<T>{};
      if (found.base != nullptr && sum.add(rows, found)) continue;
      sum.add(rows, packed_panels<T>(buffer.data(), d, row, rows, pack));
    }
  });
}

// Slabs of kPanelRows rows that are multiplied at a time, and panels of a block: the slabs of two
// blocks and the block's units, 768 KB of float32, stay in a core's own cache.
constexpr int64_t kSlabs = 2, kBlock = 8;
// Elements that are packed at a time for all threads: 4 MB of float32, but no less than kSlabs.
constexpr int64_t kChunk = 1 << 20;

// Panels i <= j of all units, block of panels by block.
struct BlockedUnit {
  int64_t i, j, block;
};
inline std::vector<BlockedUnit> blocked_units(int64_t panels, int64_t size) {
  std::vector<BlockedUnit> order;
  order.reserve(unit_index(0, panels));
  int64_t block = 0;
  for (int64_t j0 = 0; j0 < panels; j0 += size) {
    for (int64_t i0 = 0; i0 <= j0; i0 += size, ++block) {
      for (int64_t j = j0; j < std::min(panels, j0 + size); ++j) {
        for (int64_t i = i0; i <= std::min(j, i0 + size - 1); ++i) order.push_back({i, j, block});
      }
    }
  }
  return order;
}

// Some units of one block, and what their panels are multiplied with.
template <class T>
struct BlockSums {
  const BlockedUnit *first, *last;
  int64_t d;
  T* sums;  // [units, W, W]

  // += P_i^T P_j over rows of slabs, slab(s) being their panels and slab_rows(s) how many rows
  template <class Slab, class SlabRows>
  void add(int64_t slabs, const Slab& slab, const SlabRows& slab_rows) const {
    with_simd([&](auto isa) HESSKERN_INLINE {
      using Isa = decltype(isa);
      constexpr int64_t W = kPanel<T, Isa>;
      for (int64_t s0 = 0; s0 < slabs; s0 += kSlabs) {
        T* sum = sums;
        for (const BlockedUnit* unit = first; unit < last; ++unit, sum += W * W) {
          const auto [i, j, block] = *unit;
          for (int64_t s = s0; s < std::min(slabs, s0 + kSlabs); ++s) {
            gram_unit<T, Isa>(slab_rows(s), slab(s), i, j, std::min(W, d - i * W),
                              std::min(W, d - j * W), sum);
          }
        }
      }
    });
  }

  // The same on the tile unit. filled(s): the panels again, all of whose columns can be read.
  template <class Slab, class SlabRows, class Filled>
  void add_on(TileUnits& tiles, int64_t slabs, const Slab& slab, const SlabRows& slab_rows,
              const Filled& filled) const {
    constexpr int64_t W = amx::kPanel;
    int64_t i0 = first->i, i1 = i0;
    for (const BlockedUnit* unit = first; unit < last; ++unit) {
      i0 = std::min(i0, unit->i);
      i1 = std::max(i1, unit->i + 1);
    }
    for (int64_t s = 0; s < slabs; ++s) {
      if (!tiles.lay_out(slab_rows(s), slab(s), i0, i1, first->j, last[-1].j + 1)) {
        const auto panels = filled(s);
        add(1, [&](int64_t) { return panels; }, [&](int64_t) { return slab_rows(s); });
        continue;
      }
      T* sum = sums;
      for (const BlockedUnit* unit = first; unit < last; ++unit, sum += W * W) {
        tiles.add(unit->i, unit->j, sum);
      }
    }
  }
};

// to += alpha P^T P, P [K, d], the units of the triangle split among threads: for large d. A chunk
// of rows is packed once for all threads, unless it lies well; pack and direct as in gram().
template <class T, class Pack, class Direct = NowhereDirect<T>>
void gram_split_units(Triangle<T> to, int64_t d, int64_t K, T alpha, int64_t threads,
                      const Pack& pack, const Direct& direct = {}) {
  const int64_t W = panel_width<T>(), panels = (d + W - 1) / W;
  const int64_t slab = panels * kPanelRows * W;
  const bool tiles = tiles_pay<T>(d, K);
  const int64_t size = tiles ? kTileBlock : kBlock;
  const int64_t all = (K + kPanelRows - 1) / kPanelRows, units = unit_index(0, panels);
  const int64_t slabs = std::min(std::clamp(kChunk / slab, kSlabs, kLevel), all);
  std::optional<Scratch<T>> packed;
  const auto order = blocked_units(panels, size);
  int64_t step = 0;
  for (int64_t chunk = 0; chunk < K; chunk += step) {
    step = std::min(K - chunk, kLevel * kPanelRows);
    Panels<T> found{};
    if (tiles) found = direct(chunk, step);
    if (found.base == nullptr) step = std::min(K - chunk, slabs * kPanelRows);
    const int64_t rows = step, used = (rows + kPanelRows - 1) / kPanelRows;
    auto slab_rows = [&](int64_t s) { return std::min(kPanelRows, rows - s * kPanelRows); };
    auto slab_panels = [&](int64_t s) -> Panels<T> {
      if (found.base == nullptr) return {packed->data() + s * slab, kPanelRows * W, W, panels * W};
      return {found.base + s * kPanelRows * found.ld, found.stride, found.ld, found.columns};
    };
    if (found.base == nullptr) {
      if (!packed) packed.emplace(slabs * slab);
      at::parallel_for(0, used * panels, 1, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
          const int64_t s = item / panels, panel = item % panels;
          pack(packed->data() + s * slab + panel * kPanelRows * W, panel, chunk + s * kPanelRows,
               slab_rows(s));
        }
      });
    }
    at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
      const int64_t begin = units * first / threads, end = units * last / threads;
      const Scratch<T> sums(size * size * W * W);
      std::optional<Scratch<T>> own;
      auto filled_panels = [&](int64_t s) -> Panels<T> {
        const Panels<T> given = slab_panels(s);
        if (given.columns >= panels * W) return given;
        if (!own) own.emplace(slab);
        return packed_panels<T>(own->data(), d, chunk + s * kPanelRows, slab_rows(s), pack);
      };
      std::optional<TileUnits> unit;
      if (tiles) unit.emplace(std::min(size, panels));
      for (int64_t n0 = begin, n1 = n0; n0 < end; n0 = n1) {
        while (n1 < end && order[n1].block == order[n0].block) ++n1;
        std::fill(sums.data(), sums.data() + (n1 - n0) * W * W, T(0));
        const BlockSums<T> block{order.data() + n0, order.data() + n1, d, sums.data()};
        if constexpr (std::is_same_v<T, float>) {
          if (unit) block.add_on(*unit, used, slab_panels, slab_rows, filled_panels);
        }
        if (!unit) block.add(used, slab_panels, slab_rows);
        for (int64_t n = n0; n < n1; ++n) {
          const T* from = sums.data() + (n - n0) * W * W;
          add_unit<T>(to, d, W, order[n].i, order[n].j, alpha, from);
        }
      }
    });
    to = to.in_place();
  }
}

// Up to this order every thread keeps a sum of its own (147 KB of float32).
constexpr int64_t kPrivateOrder = 256;

// Threads worth starting for K rows of order d: one for about a million
// multiply-adds.
inline int64_t gram_threads(int64_t K, int64_t d) {
  return std::clamp<int64_t>(K * d * (d + 32) / (1 << 20), 1, at::get_num_threads());
}

// to += alpha P^T P by the driver that suits the shape, P [K > 0, d]. pack(dst [rows, W], panel,
// row, rows) fills one panel, with zeros beyond d; direct(row, rows) says where the panels of those
// rows lie, if they lie where they can be read.
template <class T, class Pack, class Direct = NowhereDirect<T>>
void gram(const Triangle<T>& to, int64_t d, int64_t K, T alpha, int64_t threads, const Pack& pack,
          const Direct& direct = {}) {
  // A private sum is set to zero, added up and read back: worth it for many rows.
  if (d <= kPrivateOrder && K >= 8 * threads && K >= d / 2) {
    gram_split_rows<T>(to, d, K, alpha, threads, pack, direct);
  } else {
    gram_split_units<T>(to, d, K, alpha, threads, pack, direct);
  }
}

}  // namespace hesskern::cpu
