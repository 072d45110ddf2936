// Discrete Fourier transforms of short signals, one per vector lane: mixed-radix
// Stockham, lengths with factors 2, 3, 5 and 7.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/vector.h"

namespace hesskern::cpu {

// Smallest supported length >= n.
inline int64_t fft_length(int64_t n) {
  n = std::max<int64_t>(n, 1);
  for (;; ++n) {
    int64_t rest = n;
    for (const int64_t factor : {2, 3, 5, 7}) {
      while (rest % factor == 0) rest /= factor;
    }
    if (rest == 1) return n;
  }
}

template <class T>
struct FftPlan {
  struct Stage {
    int64_t radix, butterflies, stride;  // length = radix butterflies
    int64_t twiddles;                    // offset into the table
    // Odd radix P, H = (P - 1) / 2: [H, H] of cos, sin(2 pi j k / P), j and k from 1.
    T cosines[9], sines[9];
  };
  int64_t length;
  std::vector<Stage> stages;
  std::vector<T> table;  // per stage [butterflies, radix - 1, 2]: exp(-2 pi i q k / length)

  explicit FftPlan(int64_t n) : length(n) {
    int64_t rest = n, stride = 1;
    while (rest > 1) {
      int64_t radix = 2;
      for (const int64_t candidate : {8, 7, 5, 4, 3}) {
        // 4 4 beats 8 2: fewer passes of equal work.
        if (rest % candidate == 0 && !(candidate == 8 && rest == 16)) {
          radix = candidate;
          break;
        }
      }
      const int64_t butterflies = rest / radix;
      Stage stage{radix, butterflies, stride, static_cast<int64_t>(table.size()), {}, {}};
      const int64_t half = radix % 2 == 1 ? (radix - 1) / 2 : 0;
      for (int64_t k = 0; k < half; ++k) {
        for (int64_t j = 0; j < half; ++j) {
          const double angle = 2.0 * M_PI * static_cast<double>((k + 1) * (j + 1) % radix) /
                               static_cast<double>(radix);
          stage.cosines[k * half + j] = static_cast<T>(std::cos(angle));
          stage.sines[k * half + j] = static_cast<T>(std::sin(angle));
        }
      }
      stages.push_back(stage);
      for (int64_t q = 0; q < butterflies; ++q) {
        for (int64_t k = 1; k < radix; ++k) {
          const double angle = -2.0 * M_PI * static_cast<double>(q * k) / static_cast<double>(rest);
          table.push_back(static_cast<T>(std::cos(angle)));
          table.push_back(static_cast<T>(std::sin(angle)));
        }
      }
      rest = butterflies;
      stride *= radix;
    }
  }
};

// In-register DFT of P complex vectors.
template <class V, class T, int P>
struct Butterfly {
  static_assert(P % 2 == 1);
  static constexpr int H = (P - 1) / 2;
  const T *c, *s;  // [H, H]

  HESSKERN_FORCE_INLINE void operator()(V (&re)[P], V (&im)[P]) const {
    V sum_re[H], sum_im[H], dif_re[H], dif_im[H];
    const V re0 = re[0], im0 = im[0];
    HESSKERN_UNROLL
    for (int j = 0; j < H; ++j) {
      sum_re[j] = re[j + 1] + re[P - 1 - j];
      sum_im[j] = im[j + 1] + im[P - 1 - j];
      dif_re[j] = re[j + 1] - re[P - 1 - j];
      dif_im[j] = im[j + 1] - im[P - 1 - j];
      re[0] += sum_re[j];
      im[0] += sum_im[j];
    }
    HESSKERN_UNROLL
    for (int k = 0; k < H; ++k) {
      V even_re = re0, even_im = im0, odd_re = s[k * H] * dif_re[0], odd_im = s[k * H] * dif_im[0];
      HESSKERN_UNROLL
      for (int j = 0; j < H; ++j) {
        even_re += c[k * H + j] * sum_re[j];
        even_im += c[k * H + j] * sum_im[j];
        if (j == 0) continue;
        odd_re += s[k * H + j] * dif_re[j];
        odd_im += s[k * H + j] * dif_im[j];
      }
      re[k + 1] = even_re + odd_im;
      im[k + 1] = even_im - odd_re;
      re[P - 1 - k] = even_re - odd_im;
      im[P - 1 - k] = even_im + odd_re;
    }
  }
};

template <class V, class T>
struct Butterfly<V, T, 2> {
  const T *c = nullptr, *s = nullptr;
  HESSKERN_FORCE_INLINE void operator()(V (&re)[2], V (&im)[2]) const {
    const V r = re[1], i = im[1];
    re[1] = re[0] - r;
    im[1] = im[0] - i;
    re[0] += r;
    im[0] += i;
  }
};

template <class V, class T>
struct Butterfly<V, T, 4> {
  const T *c = nullptr, *s = nullptr;
  HESSKERN_FORCE_INLINE void operator()(V (&re)[4], V (&im)[4]) const {
    const V ar = re[0] + re[2], ai = im[0] + im[2], br = re[0] - re[2], bi = im[0] - im[2];
    const V cr = re[1] + re[3], ci = im[1] + im[3], dr = re[1] - re[3], di = im[1] - im[3];
    re[0] = ar + cr;
    im[0] = ai + ci;
    re[1] = br + di;
    im[1] = bi - dr;
    re[2] = ar - cr;
    im[2] = ai - ci;
    re[3] = br - di;
    im[3] = bi + dr;
  }
};

template <class V, class T>
struct Butterfly<V, T, 8> {
  const T *c = nullptr, *s = nullptr;
  HESSKERN_FORCE_INLINE void operator()(V (&re)[8], V (&im)[8]) const {
    const T h = static_cast<T>(M_SQRT1_2);
    V er[4] = {re[0], re[2], re[4], re[6]}, ei[4] = {im[0], im[2], im[4], im[6]};
    V pr[4] = {re[1], re[3], re[5], re[7]}, pi[4] = {im[1], im[3], im[5], im[7]};
    const Butterfly<V, T, 4> four{};
    four(er, ei);
    four(pr, pi);
    const V r1 = h * (pr[1] + pi[1]), i1 = h * (pi[1] - pr[1]);
    const V r3 = h * (pi[3] - pr[3]), i3 = T(-1) * (h * (pr[3] + pi[3]));
    const V tr[4] = {pr[0], r1, pi[2], r3}, ti[4] = {pi[0], i1, T(-1) * pr[2], i3};
    HESSKERN_UNROLL
    for (int k = 0; k < 4; ++k) {
      re[k] = er[k] + tr[k];
      im[k] = ei[k] + ti[k];
      re[k + 4] = er[k] - tr[k];
      im[k + 4] = ei[k] - ti[k];
    }
  }
};

// One stage from x to y: element i of a signal is [2, lanes], real parts first, at
// x[i * step_x].
template <class T, class Isa, int P>
HESSKERN_FORCE_INLINE void fft_stage(const FftPlan<T>& plan,
                                     const typename FftPlan<T>::Stage& stage, const T* x,
                                     int64_t step_x, T* y, int64_t step_y) {
  using V = Vector<T, Isa>;
  constexpr int L = kLanes<T, Isa>;
  const int64_t m = stage.butterflies, stride = stage.stride;
  const T* twiddle = plan.table.data() + stage.twiddles;
  const Butterfly<V, T, P> butterfly{stage.cosines, stage.sines};
  for (int64_t q = 0; q < m; ++q, twiddle += 2 * (P - 1)) {
    for (int64_t j = 0; j < stride; ++j) {
      V re[P], im[P];
      HESSKERN_UNROLL
      for (int i = 0; i < P; ++i) {
        const T* from = x + (j + stride * (q + m * i)) * step_x;
        load<T, Isa>(re[i], from);
        load<T, Isa>(im[i], from + L);
      }
      butterfly(re, im);
      T* to = y + (j + stride * P * q) * step_y;
      store<T, Isa>(to, re[0]);
      store<T, Isa>(to + L, im[0]);
      HESSKERN_UNROLL
      for (int k = 1; k < P; ++k) {
        const T c = twiddle[2 * (k - 1)], s = twiddle[2 * (k - 1) + 1];
        T* target = to + stride * k * step_y;
        store<T, Isa>(target, V(c * re[k] - s * im[k]));
        store<T, Isa>(target + L, V(c * im[k] + s * re[k]));
      }
    }
  }
}

// Forward transform of the signal x, elements step_x apart, into y, elements step_y
// apart. Needs work of 2 length elements [2, lanes]; x and y must not overlap.
template <class T, class Isa>
HESSKERN_FORCE_INLINE void fft(const FftPlan<T>& plan, const T* x, int64_t step_x, T* y,
                               int64_t step_y, T* work) {
  constexpr int64_t element = 2 * kLanes<T, Isa>;
  if (plan.stages.empty()) {
    std::copy(x, x + element, y);
    return;
  }
  T* next = work;
  T* other = work + plan.length * element;
  for (size_t n = 0; n < plan.stages.size(); ++n) {
    const auto& stage = plan.stages[n];
    const bool last = n + 1 == plan.stages.size();
    T* to = last ? y : next;
    const int64_t step = last ? step_y : element;
    switch (stage.radix) {
      case 2:
        fft_stage<T, Isa, 2>(plan, stage, x, step_x, to, step);
        break;
      case 3:
        fft_stage<T, Isa, 3>(plan, stage, x, step_x, to, step);
        break;
      case 4:
        fft_stage<T, Isa, 4>(plan, stage, x, step_x, to, step);
        break;
      case 5:
        fft_stage<T, Isa, 5>(plan, stage, x, step_x, to, step);
        break;
      case 7:
        fft_stage<T, Isa, 7>(plan, stage, x, step_x, to, step);
        break;
      default:
        fft_stage<T, Isa, 8>(plan, stage, x, step_x, to, step);
    }
    x = to;
    step_x = element;
    std::swap(next, other);
  }
}

}  // namespace hesskern::cpu
