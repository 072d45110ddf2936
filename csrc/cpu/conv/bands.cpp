// Input covariance of a convolution with few channels per group, from patches that are
// unfolded along the width alone:
//
//     U_r [out_w, C_g kernel_w],  U_r[q, (c, j)] = x[c, r, stride_w q + dilation_w j - padding_w]
//
// for an image row r. The block of kernel rows i <= i' is the sum of U_r^T U_s over the pairs of
// rows r, s = r + dilation_h (i' - i) that both see. Each pair of rows is multiplied once for all
// kernel rows that see it, kernel_h / 2 times fewer products than of whole patches; rows of one
// class (band_plan.h) are summed in one table.
//
// A tile of U_r's columns and of vectors of U_s, of several s at once, stays in registers.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <vector>

#include "band_plan.h"
#include "cpu/scratch.h"
#include "cpu/vector.h"
#include "paths.h"

namespace hesskern::cpu {

namespace {

// Columns and vectors of a register tile.
template <class Isa>
constexpr int kColumns = Isa::kBytes == 64 ? 6 : 4;
template <class Isa>
constexpr int kWide = Isa::kBytes == 64 ? 4 : 2;

// to [lanes] += sum
template <class T, class Isa>
HESSKERN_FORCE_INLINE void add_to(double* to, const Vector<T, Isa>& sum) {
  constexpr int L = kLanes<T, Isa>, kDoubles = kLanes<double, Isa>;
  typedef T Part __attribute__((vector_size(kDoubles * sizeof(T))));
  T lanes[L];
  store<T, Isa>(lanes, sum);
  HESSKERN_UNROLL
  for (int l = 0; l < L; l += kDoubles) {
    Part part;
    std::memcpy(&part, lanes + l, sizeof(part));
    Vector<double, Isa> old;
    load<double, Isa>(old, to + l);
    store<double, Isa>(to + l, old + __builtin_convertvector(part, Vector<double, Isa>));
  }
}

// Where a tile's vectors lie and what they are summed in.
template <class T>
struct Right {
  const T* from;
  double* table;  // [C_g kernel_w, pitch], at the vector's columns
};

// Rows [begin, end) of U_r and of every U_s, and the first of the tile's columns.
template <class T>
struct Rows {
  const T* left;
  int64_t begin, end, pitch, column;
};

// The tables' rows [column, column + R) += left [K, R]^T rights [K, N vectors]
template <class T, class Isa, int R, int N>
HESSKERN_FORCE_INLINE void band_tile(const Rows<T>& rows, const Right<T>* rights) {
  using V = Vector<T, Isa>;
  V sum[R][N];
  const T* right[N];
  HESSKERN_UNROLL
  for (int j = 0; j < N; ++j) {
    right[j] = rights[j].from;
    HESSKERN_UNROLL
    for (int i = 0; i < R; ++i) sum[i][j] = V{};
  }
  const T* left = rows.left + rows.column;
  const int64_t pitch = rows.pitch, end = rows.end * pitch;
  for (int64_t k = rows.begin * pitch; k < end; k += pitch) {
    V vector[N];
    HESSKERN_UNROLL
    for (int j = 0; j < N; ++j) load<T, Isa>(vector[j], right[j] + k);
    HESSKERN_UNROLL
    for (int i = 0; i < R; ++i) {
      HESSKERN_UNROLL
      for (int j = 0; j < N; ++j) sum[i][j] += left[k + i] * vector[j];
    }
  }
  HESSKERN_UNROLL
  for (int i = 0; i < R; ++i) {
    HESSKERN_UNROLL
    for (int j = 0; j < N; ++j) {
      add_to<T, Isa>(rights[j].table + (rows.column + i) * pitch, sum[i][j]);
    }
  }
}

// band_tile for a number of columns R that is known when it runs.
template <class T, class Isa, int N, int R = 1>
HESSKERN_FORCE_INLINE void band_columns(int64_t columns, const Rows<T>& rows,
                                        const Right<T>* rights) {
  if constexpr (R < kColumns<Isa>) {
    if (columns > R) return band_columns<T, Isa, N, R + 1>(columns, rows, rights);
  }
  band_tile<T, Isa, R, N>(rows, rights);
}

// And for a number of vectors N.
template <class T, class Isa, int N = 1>
HESSKERN_FORCE_INLINE void band_product(int64_t vectors, int64_t columns, const Rows<T>& rows,
                                        const Right<T>* rights) {
  if constexpr (N < kWide<Isa>) {
    if (vectors > N) return band_product<T, Isa, N + 1>(vectors, columns, rows, rights);
  }
  band_columns<T, Isa, N>(columns, rows, rights);
}

template <class T>
struct Bands {
  const ConvCall& call;
  const ConvGeometry& g;
  const at::Tensor images;  // [n, C, H, W], contiguous
  const BandPlan& plan;
  int64_t channels, height, width;
  int64_t columns, pitch;  // of U_r: C_g kernel_w, and whole vectors
  int64_t samples, band;   // of a unit of work: samples, and image rows on the left
  int64_t kept_rows;       // of a unit of work: those on the right, too

  Bands(const ConvCall& call, const at::Tensor& images, const BandPlan& plan)
      : call(call),
        g(call.geometry),
        images(images),
        plan(plan),
        channels(call.group_channels()),
        height(images.size(2)),
        width(images.size(3)),
        columns(channels * g.kernel_w) {
    const int64_t lanes = simd_lanes<T>(), n = images.size(0);
    pitch = (columns + lanes - 1) / lanes * lanes;
    const int64_t row = g.out_w * pitch, halo = (g.kernel_h - 1) * g.dilation_h;
    const int64_t shares = (at::get_num_threads() + g.groups - 1) / g.groups;
    samples = std::clamp<int64_t>(kBandElements / (height * row), 1, (n + shares - 1) / shares);
    const int64_t fitting = std::max(kBandElements / row - halo, halo);
    const int64_t shared = n < shares ? (height + shares - 1) / shares : height;
    band = std::clamp<int64_t>(std::min(fitting, shared), 1, height);
    kept_rows = std::min(height, band + halo);
  }

  int64_t table_size() const { return plan.tables * columns * pitch; }
  int64_t units() const {
    return ((images.size(0) + samples - 1) / samples) * ((height + band - 1) / band);
  }
  // Rows of the same phase follow one another, so that rows of one class do.
  int64_t slot(int64_t row, int64_t first, int64_t last) const {
    const int64_t phase = (row - first) % g.stride_h, count = last - first;
    const int64_t before = phase * (count / g.stride_h) + std::min(phase, count % g.stride_h);
    return before + (row - first) / g.stride_h;
  }
  template <int kCopied>
  HESSKERN_FORCE_INLINE void unfold_row(T* to, T* line, int64_t group, int64_t sample,
                                        int64_t row) const;
  void unfold(T* to, T* line, int64_t group, int64_t n0, int64_t n1, int64_t row) const;
  void unit_sums(double* tables, T* kept, T* line, int64_t group, int64_t unit) const;
  void assemble(const double* tables, int64_t parts, int64_t group, int64_t pair) const;
  void run() const;
};

// to [out_w, pitch] := U_row of a sample; line is working memory. Copies of kCopied elements at a
// time write beyond the columns and the last row: what follows is written later.
template <class T>
template <int kCopied>
void Bands<T>::unfold_row(T* to, T* line, int64_t group, int64_t sample, int64_t row) const {
  const T* x = images.const_data_ptr<T>() +
               ((sample * images.size(1) + group * channels) * height + row) * width;
  const int64_t span = width + 2 * g.padding_w + kCopied, taps = g.kernel_w;
  for (int64_t c = 0; c < channels; ++c) {
    std::copy(x + c * height * width, x + c * height * width + width,
              line + c * span + g.padding_w);
  }
  for (int64_t q = 0; q < g.out_w; ++q, to += pitch) {
    const T* from = line + q * g.stride_w;
    T* at = to;
    for (int64_t c = 0; c < channels; ++c, from += span, at += taps) {
      if constexpr (kCopied > 1) {
        for (int64_t j = 0; j < taps; j += kCopied) {
          std::memcpy(at + j, from + j, kCopied * sizeof(T));
        }
      } else {
        for (int64_t j = 0; j < taps; ++j) at[j] = from[j * g.dilation_w];
      }
    }
  }
}

// to [samples, out_w, pitch] := U_row of samples [n0, n1)
template <class T>
void Bands<T>::unfold(T* to, T* line, int64_t group, int64_t n0, int64_t n1, int64_t row) const {
  with_simd([&](auto isa) HESSKERN_INLINE {
    constexpr int L = kLanes<T, decltype(isa)>;
    for (int64_t n = n0; n < n1; ++n, to += g.out_w * pitch) {
      if (g.dilation_w > 1) {
        unfold_row<1>(to, line, group, n, row);
      } else if (g.kernel_w <= L / 4) {
        unfold_row<L / 4>(to, line, group, n, row);
      } else if (g.kernel_w <= L / 2) {
        unfold_row<L / 2>(to, line, group, n, row);
      } else {
        unfold_row<L>(to, line, group, n, row);
      }
    }
  });
}

// tables [tables, columns, pitch] += a unit's products; kept [slots, samples, out_w, pitch].
template <class T>
void Bands<T>::unit_sums(double* tables, T* kept, T* line, int64_t group, int64_t unit) const {
  const int64_t bands = (height + band - 1) / band, lanes = simd_lanes<T>();
  const int64_t n0 = unit / bands * samples, n1 = std::min(images.size(0), n0 + samples);
  const int64_t first = unit % bands * band, end = std::min(height, first + band);
  const int64_t last = std::min(height, first + kept_rows);
  const int64_t positions = (n1 - n0) * g.out_w, slot_size = positions * pitch;
  for (int64_t phase = 0; phase < g.stride_h; ++phase) {
    for (int64_t row = first + phase; row < last; row += g.stride_h) {
      unfold(kept + slot(row, first, last) * slot_size, line, group, n0, n1, row);
    }
  }
  const int64_t per_lag = pitch / lanes;
  std::vector<Right<T>> rights;
  for (int64_t phase = 0; phase < g.stride_h; ++phase) {
    for (int64_t row = first + phase; row < end;) {
      const int32_t index = plan.class_of_row[row];
      int64_t next = row + g.stride_h;
      while (next < end && plan.class_of_row[next] == index) next += g.stride_h;
      const int64_t begin = row, K = (next - row) / g.stride_h * positions;
      row = next;
      if (index < 0) continue;
      const BandClass& rows = plan.classes[index];
      const T* left = kept + slot(begin, first, last) * slot_size;
      rights.clear();
      for (int64_t lag = 0; lag < rows.lags; ++lag) {
        const T* from = kept + slot(begin + lag * g.dilation_h, first, last) * slot_size;
        double* table = tables + (rows.first_table + lag) * columns * pitch;
        for (int64_t v = 0; v < per_lag; ++v) {
          rights.push_back({from + v * lanes, table + v * lanes});
        }
      }
      with_simd([&](auto isa) HESSKERN_INLINE {
        using Isa = decltype(isa);
        constexpr int R = kColumns<Isa>, N = kWide<Isa>;
        const int64_t tiles = (columns + R - 1) / R;
        for (int64_t k = 0; k < K; k += kBandSum) {
          for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t c0 = columns * tile / tiles, c1 = columns * (tile + 1) / tiles;
            const Rows<T> part{left, k, std::min(K, k + kBandSum), pitch, c0};
            // Of the products of rows with themselves the lower triangle is not needed.
            const int64_t skipped = c0 / lanes, vectors = std::ssize(rights) - skipped;
            const int64_t blocks = (vectors + N - 1) / N;
            for (int64_t block = 0; block < blocks; ++block) {
              const int64_t v0 = vectors * block / blocks, v1 = vectors * (block + 1) / blocks;
              band_product<T, Isa>(v1 - v0, c1 - c0, part, rights.data() + skipped + v0);
            }
          }
        }
      });
    }
  }
}

// The blocks of kernel rows i <= i', a pair, of one group's acc += alpha the tables of all parts.
template <class T>
void Bands<T>::assemble(const double* tables, int64_t parts, int64_t group, int64_t pair) const {
  const int64_t i = pair / g.kernel_h, other = pair % g.kernel_h, lag = other - i;
  if (lag < 0) return;
  std::vector<double> sum(columns * pitch, 0.0);
  with_simd([&](auto isa) HESSKERN_INLINE {
    using Isa = decltype(isa);
    for (const BandClass& rows : plan.classes) {
      if (lag >= rows.lags || !rows.sees(i)) continue;
      for (int64_t part = 0; part < parts; ++part) {
        const double* table =
            tables + part * table_size() + (rows.first_table + lag) * columns * pitch;
        for (int64_t k = 0; k < columns * pitch; k += kLanes<double, Isa>) {
          Vector<double, Isa> more;
          load<double, Isa>(more, table + k);
          add_to<double, Isa>(sum.data() + k, more);
        }
      }
    }
  });
  const int64_t ld = call.acc.stride(1), taps = g.kernel_w;
  T* acc = call.acc.mutable_data_ptr<T>() + group * call.acc.stride(0);
  for (int64_t left = 0; left < columns; ++left) {
    const int64_t row = (left / taps * g.kernel_h + i) * taps + left % taps;
    for (int64_t right = lag == 0 ? left : 0; right < columns; ++right) {
      const int64_t col = (right / taps * g.kernel_h + other) * taps + right % taps;
      acc[std::min(row, col) * ld + std::max(row, col)] +=
          static_cast<T>(call.alpha * sum[left * pitch + right]);
    }
  }
}

template <class T>
void Bands<T>::run() const {
  const int64_t groups = g.groups, threads = at::get_num_threads(), lanes = simd_lanes<T>();
  // Few groups: their samples are split among the threads as well.
  const int64_t parts = std::min(units(), (threads + groups - 1) / groups);
  const int64_t pairs = g.kernel_h * g.kernel_h;
  const int64_t kept_size = kept_rows * samples * g.out_w * pitch + channels * g.kernel_w + lanes;
  const int64_t line_size = channels * (width + 2 * g.padding_w + lanes) + lanes;
  const bool together = parts > 1;
  Scratch<double> all(together ? groups * parts * table_size() : 0);
  at::parallel_for(0, groups * parts, 1, [&](int64_t begin, int64_t end) {
    Scratch<double> own(together ? 0 : table_size());
    Scratch<T> scratch(kept_size + line_size);
    // Columns that pad a row to whole vectors are multiplied, too.
    std::fill(scratch.data(), scratch.data() + kept_size + line_size, T(0));
    for (int64_t task = begin; task < end; ++task) {
      double* tables = together ? all.data() + task * table_size() : own.data();
      std::fill(tables, tables + table_size(), 0.0);
      const int64_t group = task / parts, part = task % parts;
      for (int64_t unit = units() * part / parts; unit < units() * (part + 1) / parts; ++unit) {
        unit_sums(tables, scratch.data(), scratch.data() + kept_size, group, unit);
      }
      if (together) continue;
      for (int64_t pair = 0; pair < pairs; ++pair) assemble(tables, 1, group, pair);
    }
  });
  if (!together) return;
  at::parallel_for(0, groups * pairs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / pairs;
      assemble(all.data() + group * parts * table_size(), parts, group, task % pairs);
    }
  });
}

}  // namespace

void conv_bands(const ConvCall& call) {
  const BandPlan plan(call.geometry, call.images.size(2));
  const int64_t step = call.chunk_samples();
  for (int64_t start = 0; start < call.samples(); start += step) {
    const at::Tensor images =
        call.chunk(start, std::min(step, call.samples() - start)).contiguous();
    AT_DISPATCH_FLOATING_TYPES(call.acc.scalar_type(), "conv_bands",
                               [&] { Bands<scalar_t>(call, images, plan).run(); });
  }
}

}  // namespace hesskern::cpu
