// Input covariance of a convolution from spectral densities.
//
// The correlations that conv_plan.h asks for are all lags of one function, so one
// product per frequency of a discrete Fourier transform serves every lag: with
// Z_c(f) the transform of channel c, zero-padded to T >= span + largest lag,
//
//     sum_u z_c[u] z_c'[u + lag] = 1/T sum_f conj(Z_c(f)) Z_c'(f) exp(2 pi i f lag / T).
//
// Two samples travel as the real and the imaginary part of one signal; the real
// part of the result is the sum of their correlations. Border rows and columns
// are one-dimensional signals of the same kind, corner pixels are zero-dimensional.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "assemble.h"
#include "conv_plan.h"
#include "cpu/blas/pack.h"
#include "cpu/scratch.h"
#include "cpu/vector.h"
#include "fft.h"
#include "paths.h"

namespace hesskern::cpu {

namespace {

// q [R, 2, lanes] := sum_k conj(a_k) b_k over K complex rows a [K, 2, lanes], of
// which R lanes from a on are used, and b [K, 2, lanes].
template <class T, class Isa, int R>
HESSKERN_FORCE_INLINE void spectral_tile(int64_t K, const T* a, const T* b, T* q) {
  using V = Vector<T, Isa>;
  constexpr int L = kLanes<T, Isa>;
  V re[R], im[R];
  HESSKERN_UNROLL
  for (int i = 0; i < R; ++i) re[i] = im[i] = V{};
  for (int64_t k = 0; k < K; ++k, a += 2 * L, b += 2 * L) {
    V br, bi;
    load<T, Isa>(br, b);
    load<T, Isa>(bi, b + L);
    HESSKERN_UNROLL
    for (int i = 0; i < R; ++i) {
      const T ar = a[i], ai = a[L + i];
      re[i] += ar * br;
      im[i] += ar * bi;
      re[i] += ai * bi;
      im[i] -= ai * br;
    }
  }
  HESSKERN_UNROLL
  for (int i = 0; i < R; ++i) {
    store<T, Isa>(q + 2 * i * L, re[i]);
    store<T, Isa>(q + (2 * i + 1) * L, im[i]);
  }
}

// exp(2 pi i f lag / T) for f [T] and lag [0, max_lag].
template <class T>
struct Waves {
  int64_t length, lags;
  std::vector<T> cosine, sine;  // [lags, length]

  Waves(int64_t length, int64_t max_lag) : length(length), lags(max_lag + 1) {
    for (int64_t lag = 0; lag < lags; ++lag) {
      for (int64_t f = 0; f < length; ++f) {
        const double angle =
            2.0 * M_PI * static_cast<double>(f * lag % length) / static_cast<double>(length);
        cosine.push_back(static_cast<T>(std::cos(angle)));
        sine.push_back(static_cast<T>(std::sin(angle)));
      }
    }
  }
  T cos(int64_t f, int64_t lag) const { return cosine[std::abs(lag) * length + f]; }
  T sin(int64_t f, int64_t lag) const {
    const T s = sine[std::abs(lag) * length + f];
    return lag < 0 ? -s : s;
  }
};

// Signals of a chunk of samples: slice s is [blocks, pairs, 2, lanes], channels in
// blocks of lanes, groups padded to whole blocks.
struct Slices {
  int64_t phases_h, phases_w, length_h, length_w, borders_h, borders_w;

  int64_t image(int64_t ph, int64_t pw, int64_t fh, int64_t fw) const {
    return ((ph * phases_w + pw) * length_w + fw) * length_h + fh;
  }
  int64_t row(int64_t border, int64_t pw, int64_t fw) const {
    return images() + (border * phases_w + pw) * length_w + fw;
  }
  int64_t column(int64_t border, int64_t ph, int64_t fh) const {
    return images() + rows() + (border * phases_h + ph) * length_h + fh;
  }
  int64_t pixel(int64_t border_h, int64_t border_w) const {
    return images() + rows() + columns() + border_h * borders_w + border_w;
  }
  int64_t images() const { return phases_h * phases_w * length_h * length_w; }
  int64_t rows() const { return borders_h * phases_w * length_w; }
  int64_t columns() const { return borders_w * phases_h * length_h; }
  int64_t count() const { return images() + rows() + columns() + borders_h * borders_w; }
};

// Pixels of an axis that no window sees.
std::vector<int64_t> unused_pixels(const ConvAxis& axis) {
  std::vector<char> used(axis.size, 0);
  for (int64_t phase = 0; phase < axis.phases; ++phase) {
    for (int64_t v = axis.low[phase]; v < axis.high[phase]; ++v) used[axis.pixel(phase, v)] = 1;
  }
  std::vector<int64_t> unused;
  for (int64_t i = 0; i < axis.size; ++i) {
    if (!used[i]) unused.push_back(i);
  }
  return unused;
}

template <class T>
struct Spectral {
  const ConvCall& call;
  ConvAxis h, w;
  FftPlan<T> fft_h, fft_w;
  Waves<T> waves_h, waves_w;
  Slices slices;
  int64_t lanes, group_channels, group_blocks, blocks;

  explicit Spectral(const ConvCall& call)
      : call(call),
        h(call.axis_h()),
        w(call.axis_w()),
        fft_h(fft_length(h.span + h.max_lag)),
        fft_w(fft_length(w.span + w.max_lag)),
        waves_h(fft_h.length, h.max_lag),
        waves_w(fft_w.length, w.max_lag),
        slices{h.phases,
               w.phases,
               fft_h.length,
               fft_w.length,
               static_cast<int64_t>(h.borders.size()),
               static_cast<int64_t>(w.borders.size())},
        lanes(simd_lanes<T>()),
        group_channels(call.group_channels()),
        group_blocks((group_channels + lanes - 1) / lanes),
        blocks(group_blocks * call.geometry.groups) {}

  void transform(const at::Tensor& chunk, T* signals) const;
  void accumulate(const T* signals, int64_t pairs) const;
  void run() const;

  int64_t tile_terms() const { return h.terms * w.terms * lanes * lanes; }
};

// Images [n, C, H, W] in memory.
template <class T>
struct Images {
  const T* x;
  int64_t samples, width, stride_n, stride_c, stride_h, stride_w;

  explicit Images(const at::Tensor& images)
      : x(images.const_data_ptr<T>()),
        samples(images.size(0)),
        width(images.size(3)),
        stride_n(images.stride(0)),
        stride_c(images.stride(1)),
        stride_h(images.stride(2)),
        stride_w(images.stride(3)) {}
};

// One thread's memory in a transform; whatever is not written stays zero.
template <class T>
struct TransformMemory {
  int64_t pitch, grid, columns_size;  // elements of a row of spectra, of all rows of a phase
  Scratch<T> scratch;
  T* pixels;   // [W, 2, lanes], with the zeros that transforms read before and after
  T* rows;     // [phases_w, T_h, T_w + 1, 2, lanes]: columns map to different cache sets
  T* columns;  // [borders_w, T_h, 2, lanes]
  T* work;

  TransformMemory(const Spectral<T>& plan, int64_t width)
      : pitch((plan.slices.length_w + 1) * 2 * plan.lanes),
        grid(plan.slices.length_h * pitch),
        columns_size(plan.slices.borders_w * plan.slices.length_h * 2 * plan.lanes),
        scratch(line(plan, width) + plan.w.phases * grid + columns_size +
                2 * std::max(plan.slices.length_h, plan.slices.length_w) * 2 * plan.lanes),
        pixels(scratch.data() + plan.w.stride * 2 * plan.lanes),
        rows(scratch.data() + line(plan, width)),
        columns(rows + plan.w.phases * grid),
        work(columns + columns_size) {
    std::fill(scratch.data(), work, T(0));
  }

 private:
  static int64_t line(const Spectral<T>& plan, int64_t width) {
    return (plan.w.stride * (1 + plan.slices.length_w) + width) * 2 * plan.lanes;
  }
};

// The signals of a pair of samples in one block of channels: row by row of each vertical phase,
// then along its columns.
template <class T, class Isa>
struct TransformTask {
  static constexpr int L = kLanes<T, Isa>;
  static constexpr int64_t kElement = 2 * L;
  const Spectral<T>& plan;
  const Images<T>& images;
  const std::vector<int64_t>& unused;  // pixels of a row that no window sees
  const TransformMemory<T>& memory;
  const T* x;  // the first sample's first channel
  int64_t samples, channels;
  T* signals;  // in slice 0
  int64_t slice;

  HESSKERN_FORCE_INLINE static void copy(T* to, const T* from) {
    Vector<T, Isa> re, im;
    load<T, Isa>(re, from);
    load<T, Isa>(im, from + L);
    store<T, Isa>(to, re);
    store<T, Isa>(to + L, im);
  }

  // pixels := the image row of position v of a phase, of both samples
  HESSKERN_FORCE_INLINE void read(int64_t phase, int64_t v) const {
    T* pixels = memory.pixels;
    for (int64_t part = 0; part < samples; ++part) {
      const T* from = x + part * images.stride_n + plan.h.pixel(phase, v) * images.stride_h;
      if (images.stride_w == 1) {
        transpose<T, Isa>(pixels + part * L, kElement, from, images.stride_c, channels,
                          images.width);
        continue;
      }
      for (int64_t i = 0; i < images.width; ++i) {
        for (int64_t c = 0; c < channels; ++c) {
          pixels[i * kElement + part * L + c] = from[c * images.stride_c + i * images.stride_w];
        }
      }
    }
    for (const int64_t i : unused) {
      std::fill(pixels + i * kElement, pixels + (i + 1) * kElement, T(0));
    }
  }

  // Row v, counted from the first, of a phase: its spectra, its pixels in the border columns, and
  // both as signals where it is a border itself.
  HESSKERN_FORCE_INLINE void row(int64_t phase, int64_t v) const {
    const ConvAxis &h = plan.h, &w = plan.w;
    const Slices& slices = plan.slices;
    T *rows = memory.rows + v * memory.pitch, *column = memory.columns + v * kElement;
    const int64_t position = h.first + v, step = slices.length_h * kElement;
    if (position < h.low[phase] || position >= h.high[phase]) {
      for (int64_t pw = 0; pw < w.phases; ++pw) {
        std::fill_n(rows + pw * memory.grid, memory.pitch, T(0));
      }
      return;
    }
    read(phase, position);
    for (int64_t b = 0; b < slices.borders_w; ++b) {
      copy(column + b * step,
           memory.pixels + w.pixel(w.borders[b].phase, w.borders[b].position) * kElement);
    }
    for (int64_t pw = 0; pw < w.phases; ++pw) {
      fft<T, Isa>(plan.fft_w, memory.pixels + w.pixel(pw, w.first) * kElement, w.stride * kElement,
                  rows + pw * memory.grid, kElement, memory.work);
    }
    for (int64_t b = 0; b < slices.borders_h; ++b) {
      if (h.borders[b].phase != phase || h.borders[b].position != position) continue;
      for (int64_t pw = 0; pw < w.phases; ++pw) {
        for (int64_t f = 0; f < slices.length_w; ++f) {
          copy(signals + slices.row(b, pw, f) * slice, rows + pw * memory.grid + f * kElement);
        }
      }
      for (int64_t c = 0; c < slices.borders_w; ++c) {
        copy(signals + slices.pixel(b, c) * slice, column + c * step);
      }
    }
  }

  // The columns of a phase's spectra, and its border columns.
  HESSKERN_FORCE_INLINE void column(int64_t phase) const {
    const Slices& slices = plan.slices;
    for (int64_t pw = 0; pw < plan.w.phases; ++pw) {
      for (int64_t f = 0; f < slices.length_w; ++f) {
        fft<T, Isa>(plan.fft_h, memory.rows + pw * memory.grid + f * kElement, memory.pitch,
                    signals + slices.image(phase, pw, 0, f) * slice, slice, memory.work);
      }
    }
    for (int64_t b = 0; b < slices.borders_w; ++b) {
      fft<T, Isa>(plan.fft_h, memory.columns + b * slices.length_h * kElement, kElement,
                  signals + slices.column(b, phase, 0) * slice, slice, memory.work);
    }
  }

  HESSKERN_FORCE_INLINE void run() const {
    // Lanes and parts that this task does not set may hold an earlier one's.
    if (samples < 2 || channels < L) std::fill_n(memory.pixels, images.width * kElement, T(0));
    for (int64_t phase = 0; phase < plan.h.phases; ++phase) {
      std::fill_n(memory.columns, memory.columns_size, T(0));
      for (int64_t v = 0; v < plan.h.span; ++v) row(phase, v);
      column(phase);
    }
  }
};

// chunk [n, C, H, W] -> signals [slices, blocks, (n + 1) / 2, 2, lanes]
template <class T>
void Spectral<T>::transform(const at::Tensor& chunk, T* signals) const {
  const Images<T> images(chunk);
  const int64_t pairs = (images.samples + 1) / 2;
  const std::vector<int64_t> unused = unused_pixels(w);
  at::parallel_for(0, blocks * pairs, 1, [&](int64_t begin, int64_t end) {
    const TransformMemory<T> memory(*this, images.width);
    with_simd([&](auto isa) HESSKERN_INLINE {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t block = task % blocks, pair = task / blocks;
        const int64_t first = block % group_blocks * lanes;
        const int64_t channel = block / group_blocks * group_channels + first;
        TransformTask<T, decltype(isa)>{
            *this,
            images,
            unused,
            memory,
            images.x + 2 * pair * images.stride_n + channel * images.stride_c,
            std::min<int64_t>(2, images.samples - 2 * pair),
            std::min(lanes, group_channels - first),
            signals + (block * pairs + pair) * 2 * lanes,
            blocks * pairs * 2 * lanes}
            .run();
      }
    });
  });
}

// Frequencies per step of the first inverse transform, two each.
constexpr int64_t kBatch = 8;

// The products of one pair of channel blocks; part of parts of the frequencies.
template <class T, class Isa>
struct SpectralTask {
  static constexpr int L = kLanes<T, Isa>, R = Isa::kComplexRows;
  using V = Vector<T, Isa>;
  const Spectral<T>& plan;
  const T* a;  // signals of the two blocks in slice 0
  const T* b;
  int64_t slice, pairs;
  int64_t part, parts;
  T* terms;  // [terms_h, terms_w, L, L]
  T* work;   // work_size() elements

  // images() lays out 2 kBatch and 2 lags complex tiles, border() one and a real tile per lag.
  static int64_t work_size(const Spectral<T>& plan) {
    const int64_t of_images = 2 * (2 * kBatch + 2 * (plan.h.max_lag + 1));
    const int64_t of_border =
        2 + static_cast<int64_t>(std::max(plan.h.lags.size(), plan.w.lags.size()));
    return R * L * std::max(of_images, of_border);
  }
  HESSKERN_FORCE_INLINE T* term(int64_t th, int64_t tw, int64_t row) const {
    return terms + ((th * plan.w.terms + tw) * L + row) * L;
  }
  HESSKERN_FORCE_INLINE void product(int64_t slice_a, int64_t slice_b, int64_t row, T* q) const {
    spectral_tile<T, Isa, R>(pairs, a + slice_a * slice + row, b + slice_b * slice, q);
  }
  // to [R, L] += scale from [R, L]
  HESSKERN_FORCE_INLINE static void add(T* to, const T* from, T scale, int64_t step = L) {
    HESSKERN_UNROLL
    for (int i = 0; i < R; ++i) {
      V x, y;
      load<T, Isa>(x, to + i * L);
      load<T, Isa>(y, from + i * step);
      store<T, Isa>(to + i * L, V(x + scale * y));
    }
  }
  // to [R, L] += c Re q - s Im q for q [R, 2, L]
  HESSKERN_FORCE_INLINE static void add_wave(T* to, const T* q, T c, T s) {
    HESSKERN_UNROLL
    for (int i = 0; i < R; ++i) {
      V x, re, im;
      load<T, Isa>(x, to + i * L);
      load<T, Isa>(re, q + 2 * i * L);
      load<T, Isa>(im, q + (2 * i + 1) * L);
      x += c * re;
      x -= s * im;
      store<T, Isa>(to + i * L, x);
    }
  }

  // Frequencies f and T - f of one column of frequencies at once: their waves
  // have the same cosine and opposite sines.
  HESSKERN_FORCE_INLINE void images(int64_t pha, int64_t phb, int64_t pwa, int64_t pwb, int64_t fw,
                                    int64_t row) const {
    const ConvAxis &h = plan.h, &w = plan.w;
    const Slices& s = plan.slices;
    const int64_t length = s.length_h, half = length / 2 + 1, lags = h.max_lag + 1;
    constexpr int64_t tile = 2 * R * L;
    T* q = work;                      // [kBatch, 2, R, 2, L]
    T* even = q + 2 * kBatch * tile;  // [lags, R, 2, L] sum of cos (Q(f) + Q(T - f))
    T* odd = even + lags * tile;      // [lags, R, 2, L] sum of sin (Q(f) - Q(T - f))
    std::fill(even, odd + lags * tile, T(0));
    for (int64_t f0 = 0; f0 < half; f0 += kBatch) {
      const int64_t count = std::min(kBatch, half - f0);
      for (int64_t e = 0; e < count; ++e) {
        const int64_t f = f0 + e, mirror = length - f;
        T* sum = q + 2 * e * tile;
        T* difference = sum + tile;
        product(s.image(pha, pwa, f, fw), s.image(phb, pwb, f, fw), row, sum);
        if (f == 0 || f == mirror) {
          std::copy(sum, sum + tile, difference);
          continue;
        }
        product(s.image(pha, pwa, mirror, fw), s.image(phb, pwb, mirror, fw), row, difference);
        for (int64_t i = 0; i < tile; i += L) {
          V x, y;
          load<T, Isa>(x, sum + i);
          load<T, Isa>(y, difference + i);
          store<T, Isa>(sum + i, V(x + y));
          store<T, Isa>(difference + i, V(x - y));
        }
      }
      for (int64_t lag = 0; lag < lags; ++lag) {
        const T* cosine = plan.waves_h.cosine.data() + lag * length + f0;
        const T* sine = plan.waves_h.sine.data() + lag * length + f0;
        for (int64_t i = 0; i < tile; i += L) {
          V x, y, p, r;
          load<T, Isa>(x, even + lag * tile + i);
          load<T, Isa>(y, odd + lag * tile + i);
          for (int64_t e = 0; e < count; ++e) {
            load<T, Isa>(p, q + 2 * e * tile + i);
            load<T, Isa>(r, q + (2 * e + 1) * tile + i);
            x += cosine[e] * p;
            y += sine[e] * r;
          }
          store<T, Isa>(even + lag * tile + i, x);
          store<T, Isa>(odd + lag * tile + i, y);
        }
      }
    }
    const T scale = T(1) / static_cast<T>(length * s.length_w);
    T* g = q;
    for (const auto& lag : h.lags) {
      if (lag.phase_a != pha || lag.phase_b != phb) continue;
      const T sign = lag.lag < 0 ? T(-1) : T(1);
      const int64_t m = std::abs(lag.lag);
      HESSKERN_UNROLL
      for (int i = 0; i < R; ++i) {
        V er, ei, or_, oi;
        load<T, Isa>(er, even + m * tile + 2 * i * L);
        load<T, Isa>(ei, even + m * tile + (2 * i + 1) * L);
        load<T, Isa>(or_, odd + m * tile + 2 * i * L);
        load<T, Isa>(oi, odd + m * tile + (2 * i + 1) * L);
        store<T, Isa>(g + 2 * i * L, V(er - sign * oi));
        store<T, Isa>(g + (2 * i + 1) * L, V(ei + sign * or_));
      }
      for (const auto& other : w.lags) {
        if (other.phase_a != pwa || other.phase_b != pwb) continue;
        add_wave(term(lag.term, other.term, row), g, scale * plan.waves_w.cos(fw, other.lag),
                 scale * plan.waves_w.sin(fw, other.lag));
      }
    }
  }

  // One single product of an axis against all lags of the other.
  template <bool IsRow>
  HESSKERN_FORCE_INLINE void border(int64_t index, int64_t pa, int64_t pb, int64_t row) const {
    const ConvAxis &own = IsRow ? plan.h : plan.w, &other = IsRow ? plan.w : plan.h;
    const Waves<T>& waves = IsRow ? plan.waves_w : plan.waves_h;
    const int64_t length = waves.length;
    const int64_t ba = own.border_a[index], bb = own.border_b[index];
    constexpr int64_t tile = R * L;
    T* q = work;             // [R, 2, L]
    T* sums = q + 2 * tile;  // [other.lags, R, L]
    std::fill(sums, sums + other.lags.size() * tile, T(0));
    const T scale = T(1) / static_cast<T>(length);
    for (int64_t f = length * part / parts; f < length * (part + 1) / parts; ++f) {
      if constexpr (IsRow) {
        product(plan.slices.row(ba, pa, f), plan.slices.row(bb, pb, f), row, q);
      } else {
        product(plan.slices.column(ba, pa, f), plan.slices.column(bb, pb, f), row, q);
      }
      for (size_t n = 0; n < other.lags.size(); ++n) {
        const auto& lag = other.lags[n];
        if (lag.phase_a != pa || lag.phase_b != pb) continue;
        add_wave(sums + n * tile, q, scale * waves.cos(f, lag.lag), scale * waves.sin(f, lag.lag));
      }
    }
    for (const auto& [own_term, sign] : own.singles[index].terms) {
      for (size_t n = 0; n < other.lags.size(); ++n) {
        const auto& lag = other.lags[n];
        if (lag.phase_a != pa || lag.phase_b != pb) continue;
        add(IsRow ? term(own_term, lag.term, row) : term(lag.term, own_term, row), sums + n * tile,
            static_cast<T>(sign));
      }
    }
  }

  HESSKERN_FORCE_INLINE void corner(int64_t i, int64_t j, int64_t row) const {
    const ConvAxis &h = plan.h, &w = plan.w;
    T* q = work;
    product(plan.slices.pixel(h.border_a[i], w.border_a[j]),
            plan.slices.pixel(h.border_b[i], w.border_b[j]), row, q);
    for (const auto& [th, sign_h] : h.singles[i].terms) {
      for (const auto& [tw, sign_w] : w.singles[j].terms) {
        add(term(th, tw, row), q, static_cast<T>(sign_h * sign_w), 2 * L);
      }
    }
  }

  HESSKERN_FORCE_INLINE void run(int64_t rows) const {
    const ConvAxis &h = plan.h, &w = plan.w;
    const int64_t fw0 = plan.slices.length_w * part / parts;
    const int64_t fw1 = plan.slices.length_w * (part + 1) / parts;
    for (int64_t pha = 0; pha < h.phases; ++pha) {
      for (int64_t phb = 0; phb < h.phases; ++phb) {
        for (int64_t pwa = 0; pwa < w.phases; ++pwa) {
          for (int64_t pwb = 0; pwb < w.phases; ++pwb) {
            for (int64_t fw = fw0; fw < fw1; ++fw) {
              for (int64_t row = 0; row < rows; row += R) images(pha, phb, pwa, pwb, fw, row);
            }
          }
        }
      }
    }
    for (size_t i = 0; i < h.singles.size(); ++i) {
      for (int64_t pa = 0; pa < w.phases; ++pa) {
        for (int64_t pb = 0; pb < w.phases; ++pb) {
          for (int64_t row = 0; row < rows; row += R) border<true>(i, pa, pb, row);
        }
      }
    }
    for (size_t j = 0; j < w.singles.size(); ++j) {
      for (int64_t pa = 0; pa < h.phases; ++pa) {
        for (int64_t pb = 0; pb < h.phases; ++pb) {
          for (int64_t row = 0; row < rows; row += R) border<false>(j, pa, pb, row);
        }
      }
    }
    for (size_t i = 0; i < h.singles.size(); ++i) {
      for (size_t j = 0; j < w.singles.size(); ++j) {
        if (static_cast<int64_t>(i * w.singles.size() + j) % parts != part) continue;
        for (int64_t row = 0; row < rows; row += R) corner(i, j, row);
      }
    }
  }
};

// signals [slices, blocks, pairs, 2, lanes]
template <class T>
void Spectral<T>::accumulate(const T* signals, int64_t pairs) const {
  const int64_t groups = call.geometry.groups;
  const int64_t tiles = groups * group_blocks * (group_blocks + 1) / 2;
  const int64_t threads = at::get_num_threads();
  // Few tiles: their frequencies are split among the threads as well.
  const int64_t parts =
      tiles >= 4 * threads ? 1 : std::min(slices.length_w, (4 * threads + tiles - 1) / tiles);
  const int64_t slice = blocks * pairs * 2 * lanes;
  int64_t work = 0;
  with_simd([&](auto isa) {
    work = std::max(SpectralTask<T, decltype(isa)>::work_size(*this), assembly_size(h, w, lanes));
  });
  T* acc = call.acc.mutable_data_ptr<T>();
  const int64_t ld = call.acc.stride(1), group_stride = call.acc.stride(0);
  const T alpha = static_cast<T>(call.alpha);
  struct Tile {
    int64_t group, i, j;
  };
  std::vector<Tile> list;
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t j = 0; j < group_blocks; ++j) {
      for (int64_t i = 0; i <= j; ++i) list.push_back({g, i, j});
    }
  }
  auto compute = [&](const Tile& t, int64_t part, T* terms, T* scratch) {
    std::fill(terms, terms + tile_terms(), T(0));
    with_simd([&](auto isa) HESSKERN_INLINE {
      const int64_t i = t.group * group_blocks + t.i, j = t.group * group_blocks + t.j;
      const SpectralTask<T, decltype(isa)> task{*this,
                                                signals + i * pairs * 2 * lanes,
                                                signals + j * pairs * 2 * lanes,
                                                slice,
                                                pairs,
                                                part,
                                                parts,
                                                terms,
                                                scratch};
      task.run(std::min(lanes, group_channels - t.i * lanes));
    });
  };
  auto assemble = [&](const Tile& t, T* terms, T* scratch) {
    with_simd([&](auto isa) HESSKERN_INLINE {
      const ChannelTile channels{t.i * lanes, std::min(lanes, group_channels - t.i * lanes),
                                 t.j * lanes, std::min(lanes, group_channels - t.j * lanes)};
      assemble_tile<T, decltype(isa)>(acc + t.group * group_stride, ld, h, w, channels, terms,
                                      lanes, alpha, scratch);
    });
  };
  // Tasks differ in cost, so threads take the next one when they are free; every
  // task writes its own memory, which keeps the result independent of the order.
  std::atomic<int64_t> next{0};
  Scratch<T> partial(parts > 1 ? tiles * parts * tile_terms() : 0);
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    Scratch<T> own(work + (parts > 1 ? 0 : tile_terms()));
    for (int64_t task = next++; task < tiles * parts; task = next++) {
      const Tile& tile = list[task / parts];
      T* terms = parts > 1 ? partial.data() + task * tile_terms() : own.data() + work;
      compute(tile, task % parts, terms, own.data());
      if (parts == 1) assemble(tile, terms, own.data());
    }
  });
  if (parts == 1) return;
  at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> own(work);
    for (int64_t tile = begin; tile < end; ++tile) {
      T* terms = partial.data() + tile * parts * tile_terms();
      for (int64_t part = 1; part < parts; ++part) {
        const T* other = terms + part * tile_terms();
        for (int64_t i = 0; i < tile_terms(); ++i) terms[i] += other[i];
      }
      assemble(list[tile], terms, own.data());
    }
  });
}

template <class T>
void Spectral<T>::run() const {
  if (h.span <= 0 || w.span <= 0) return;  // windows see padding alone
  const int64_t per_pair = slices.count() * blocks * 2 * lanes;
  const int64_t n = call.samples();
  const int64_t pairs = std::min(std::max(kSignals / per_pair, kFewestPairs), (n + 1) / 2);
  const int64_t chunks = ((n + 1) / 2 + pairs - 1) / pairs;
  const int64_t step = 2 * (((n + 1) / 2 + chunks - 1) / chunks);
  Scratch<T> signals(pairs * per_pair);
  for (int64_t start = 0; start < n; start += step) {
    const at::Tensor images = call.chunk(start, std::min(step, n - start));
    transform(images, signals.data());
    accumulate(signals.data(), (images.size(0) + 1) / 2);
  }
}

}  // namespace

void conv_spectral(const ConvCall& call) {
  AT_DISPATCH_FLOATING_TYPES(call.acc.scalar_type(), "conv_spectral",
                             [&] { Spectral<scalar_t>(call).run(); });
}

}  // namespace hesskern::cpu
