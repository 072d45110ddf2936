// Input covariance of a convolution with few channels per group: every lag of
// conv_plan.h is a dot product of an image with itself, shifted, and a tile of
// channels and lags stays in registers while the images stream by once.
//
// Samples are stacked with rows of zeros between them and a gap of zeros after
// each row, so that a two-dimensional lag is one shift of a flat array. Border
// rows, columns and corner pixels are flat arrays of the same kind.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "conv_plan.h"
#include "cpu/blas/dot_tile.h"
#include "cpu/scratch.h"
#include "paths.h"

namespace hesskern::cpu {

namespace {

// So many samples in one flat array; its length without and with the margins.
struct Family : ConvFamily {
  int64_t samples, length, stride;
};

// A product of conv_plan.h, and where it and the one with its two sides exchanged are added.
struct Product {
  int64_t a, b, shift;
  std::vector<std::pair<int64_t, int>> terms, transposed;  // term, sign
};

template <class T>
struct Lags {
  const ConvCall& call;
  const at::Tensor images;  // [n, C, H, W], rows contiguous
  const ConvAxis &h, &w;
  int64_t channels;
  Family families[4];
  std::vector<Product> products[4];  // by left signal

  Lags(const ConvCall& call, const at::Tensor& images, const ConvAxis& h, const ConvAxis& w)
      : call(call), images(images), h(h), w(w), channels(call.group_channels()) {
    const auto geometry = make_families(h, w);
    for (size_t f = 0; f < geometry.size(); ++f) {
      const int64_t sample = geometry[f].lines * geometry[f].pitch;
      const int64_t samples = std::clamp<int64_t>(kRun / sample, 1, images.size(0));
      // Runs end on whole vectors of any width.
      const int64_t length = (samples * sample + 15) / 16 * 16;
      families[f] = {geometry[f], samples, length, length + 2 * geometry[f].margin};
    }
    const auto list_h = axis_products(h), list_w = axis_products(w);
    const auto combine = [&](const AxisProduct& a, const AxisProduct& b) {
      std::vector<std::pair<int64_t, int>> terms;
      for (const auto& [th, sh] : a.terms) {
        for (const auto& [tw, sw] : b.terms) terms.emplace_back(th * w.terms + tw, sh * sw);
      }
      return terms;
    };
    for (const ConvProduct& product : conv_products(geometry, list_h, list_w)) {
      const auto transposed =
          product.symmetric() ? std::vector<std::pair<int64_t, int>>()
                              : combine(list_h[product.transposed_h], list_w[product.transposed_w]);
      products[product.family].push_back({product.a, product.b, product.shift,
                                          combine(list_h[product.h], list_w[product.w]),
                                          transposed});
    }
  }

  int64_t table_size() const { return h.terms * w.terms * channels * channels; }
  void fill(T* flat, const Family& family, int64_t group, int64_t n0, int64_t n1) const;
  void family_sums(double* table, const Family& family, const std::vector<Product>& list,
                   int64_t group, int64_t part, int64_t parts) const;
  void assemble(double* table, int64_t group) const;
  void run() const;
};

// flat [signals, C_g, stride] := samples [n0, n1)
template <class T>
void Lags<T>::fill(T* flat, const Family& family, int64_t group, int64_t n0, int64_t n1) const {
  std::fill(flat, flat + family.signals * channels * family.stride, T(0));
  for (int64_t signal = 0; signal < family.signals; ++signal) {
    const int64_t sh = signal / family.signals_w, sw = signal % family.signals_w;
    const int64_t ph = family.border_h ? h.borders[sh].phase : sh;
    const int64_t pw = family.border_w ? w.borders[sw].phase : sw;
    const int64_t v0 = family.border_h ? h.borders[sh].position : h.low[ph];
    const int64_t v1 = family.border_h ? v0 + 1 : h.high[ph];
    const int64_t u0 = family.border_w ? w.borders[sw].position : w.low[pw];
    const int64_t u1 = family.border_w ? u0 + 1 : w.high[pw];
    for (int64_t c = 0; c < channels; ++c) {
      T* array = flat + (signal * channels + c) * family.stride + family.margin;
      for (int64_t n = n0; n < n1; ++n) {
        const T* plane = images.const_data_ptr<T>() + n * images.stride(0) +
                         (group * channels + c) * images.stride(1);
        for (int64_t v = v0; v < v1; ++v) {
          const int64_t line = (n - n0) * family.lines + (family.border_h ? 0 : v - h.first);
          T* to = array + line * family.pitch + (family.border_w ? 0 : u0 - w.first);
          const T* from = plane + h.pixel(ph, v) * images.stride(2) + w.pixel(pw, u0);
          if (w.stride == 1) {
            std::copy(from, from + (u1 - u0), to);
          } else {
            for (int64_t u = u0; u < u1; ++u) *to++ = from[(u - u0) * w.stride];
          }
        }
      }
    }
  }
}

// table [terms, C_g, C_g] += the products of one family, over part of parts of the samples.
template <class T>
void Lags<T>::family_sums(double* table, const Family& family, const std::vector<Product>& list,
                          int64_t group, int64_t part, int64_t parts) const {
  if (list.empty()) return;
  const int64_t n = images.size(0), batches = (n + family.samples - 1) / family.samples;
  const int64_t runs = (family.length + kRun - 1) / kRun, units = batches * runs;
  const int64_t begin = units * part / parts, end = units * (part + 1) / parts;
  if (begin == end) return;
  Scratch<T> scratch(family.signals * channels * family.stride + 64);
  T* flat = scratch.data();
  auto array = [&](int64_t signal, int64_t c) {
    return flat + (signal * channels + c) * family.stride + family.margin;
  };
  int64_t filled = -1;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t batch = unit / runs, run = unit % runs;
    if (batch != filled) {
      fill(flat, family, group, batch * family.samples, std::min(n, (batch + 1) * family.samples));
      filled = batch;
    }
    const int64_t from = run * kRun, K = std::min(kRun, family.length - from);
    with_simd([&](auto isa) HESSKERN_INLINE {
      using Isa = decltype(isa);
      constexpr int R = Isa::kDotRows, N = Isa::kDotColumns;
      for (size_t first = 0; first < list.size();) {
        size_t last = first;
        while (last < list.size() && list[last].a == list[first].a) ++last;
        const int64_t lags = static_cast<int64_t>(last - first), columns = lags * channels;
        for (int64_t row = 0; row < channels; row += R) {
          const int64_t rows = std::min<int64_t>(R, channels - row);
          const T* left[R];
          for (int64_t i = 0; i < R; ++i) {
            left[i] = array(list[first].a, row + std::min(i, rows - 1)) + from;
          }
          for (int64_t col = 0; col < columns; col += N) {
            const T* right[N];
            for (int64_t j = 0; j < N; ++j) {
              const int64_t column = std::min(col + j, columns - 1);
              const Product& product = list[first + column % lags];
              right[j] = array(product.b, column / lags) + product.shift + from;
            }
            T sums[R * N];
            if (rows > 2) {
              dot_tile<T, Isa, R, N>(K, left, right, sums);
            } else if (rows == 2) {
              dot_tile<T, Isa, 2, N>(K, left, right, sums);
            } else {
              dot_tile<T, Isa, 1, N>(K, left, right, sums);
            }
            for (int64_t j = 0; j < std::min<int64_t>(N, columns - col); ++j) {
              const Product& product = list[first + (col + j) % lags];
              const int64_t d = (col + j) / lags;
              for (int64_t i = 0; i < rows; ++i) {
                const int64_t c = row + i;
                const double value = sums[i * N + j];
                if (c <= d) {
                  for (const auto& [term, sign] : product.terms) {
                    table[(term * channels + c) * channels + d] += sign * value;
                  }
                }
                if (d <= c) {
                  for (const auto& [term, sign] : product.transposed) {
                    table[(term * channels + d) * channels + c] += sign * value;
                  }
                }
              }
            }
          }
        }
        first = last;
      }
    });
  }
}

// acc of one group += alpha table [terms, C_g, C_g], summed along its chains in place.
template <class T>
void Lags<T>::assemble(double* table, int64_t group) const {
  const int64_t block = channels * channels;
  for (int64_t t = 0; t < h.terms; ++t) {
    for (int64_t u = 0; u < w.terms; ++u) {
      double* to = table + (t * w.terms + u) * block;
      if (w.previous[u] >= 0) {
        const double* from = table + (t * w.terms + w.previous[u]) * block;
        for (int64_t i = 0; i < block; ++i) to[i] += from[i];
      }
    }
    if (h.previous[t] < 0) continue;
    double* to = table + t * w.terms * block;
    const double* from = table + h.previous[t] * w.terms * block;
    for (int64_t i = 0; i < w.terms * block; ++i) to[i] += from[i];
  }
  const int64_t kh = h.taps, kw = w.taps, taps = kh * kw, ld = call.acc.stride(1);
  T* acc = call.acc.mutable_data_ptr<T>() + group * call.acc.stride(0);
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t o = 0; o < taps; ++o) {
      const int64_t* pair_h = h.term_of_pair.data() + o / kw * kh;
      const int64_t* pair_w = w.term_of_pair.data() + o % kw * kw;
      T* row = acc + (c * taps + o) * ld;
      for (int64_t d = c; d < channels; ++d) {
        for (int64_t p = d == c ? o : 0; p < taps; ++p) {
          const int64_t term = pair_h[p / kw] * w.terms + pair_w[p % kw];
          row[d * taps + p] +=
              static_cast<T>(call.alpha * table[(term * channels + c) * channels + d]);
        }
      }
    }
  }
}

template <class T>
void Lags<T>::run() const {
  const int64_t groups = call.geometry.groups, threads = at::get_num_threads();
  // Few groups: their samples are split among the threads as well.
  const int64_t parts = groups >= 4 * threads ? 1 : (4 * threads + groups - 1) / groups;
  Scratch<double> tables(parts > 1 ? groups * parts * table_size() : 0);
  at::parallel_for(0, groups * parts, 1, [&](int64_t begin, int64_t end) {
    Scratch<double> own(parts > 1 ? 0 : table_size());
    for (int64_t task = begin; task < end; ++task) {
      double* table = parts > 1 ? tables.data() + task * table_size() : own.data();
      std::fill(table, table + table_size(), 0.0);
      for (int f = 0; f < 4; ++f) {
        family_sums(table, families[f], products[f], task / parts, task % parts, parts);
      }
      if (parts == 1) assemble(table, task);
    }
  });
  if (parts == 1) return;
  at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      double* table = tables.data() + group * parts * table_size();
      for (int64_t part = 1; part < parts; ++part) {
        const double* other = table + part * table_size();
        for (int64_t i = 0; i < table_size(); ++i) table[i] += other[i];
      }
      assemble(table, group);
    }
  });
}

}  // namespace

void conv_lags(const ConvCall& call) {
  const ConvAxis h = call.axis_h(), w = call.axis_w();
  if (h.span <= 0 || w.span <= 0) return;  // windows see padding alone
  const int64_t step = call.chunk_samples();
  for (int64_t start = 0; start < call.samples(); start += step) {
    const at::Tensor images =
        call.chunk(start, std::min(step, call.samples() - start)).contiguous();
    AT_DISPATCH_FLOATING_TYPES(call.acc.scalar_type(), "conv_lags",
                               [&] { Lags<scalar_t>(call, images, h, w).run(); });
  }
}

}  // namespace hesskern::cpu
