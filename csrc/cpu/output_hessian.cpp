// acc += alpha sum_n sum_t G_nt^T (diag(p_n) - p_n p_n^T) G_nt in one read of G.
//
// The weights have rank c - 1. With q_i the sum and mu_i the weighted mean of the
// classes after i, the matrix of a sample is the sum over i < c of
//   p_i q_i / (p_i + q_i) (g_i - mu_i) (g_i - mu_i)^T
// (Chan, Golub and LeVeque's update of a covariance by one observation): c - 1
// roots, found in one pass from the last class to the first, with no difference
// of large sums.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "checks.h"
#include "cpu/blas/pack.h"
#include "cpu/blas/symmetric_update.h"
#include "cpu/blas/triangle.h"
#include "scratch.h"

namespace hesskern::cpu {

namespace {

// Elements converted at a time when the Jacobian is not of acc's dtype: 4 MB of float32.
constexpr int64_t kConvert = 1 << 20;

// Roots are scale_i (g_i - mu_i), and mu_(i - 1) = mu_i + step_i (g_i - mu_i).
template <typename T>
struct Weights {
  const T* scale;  // [N, c], both; the last class has none
  const T* step;
};

template <typename T>
void find_weights(T* scale, T* step, const T* p, int64_t n, int64_t c) {
  at::parallel_for(0, n, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t sample = begin; sample < end; ++sample) {
      const int64_t row = sample * c;
      T after = p[row + c - 1];
      for (int64_t i = c - 2; i >= 0; --i) {
        const T total = after + p[row + i];
        const T share = total == 0 ? T(0) : p[row + i] / total;
        scale[row + i] = std::sqrt(share * after);
        step[row + i] = share;
        after = total;
      }
    }
  });
}

// The Jacobian with element strides. Each sample contributes `roots` rows: its c
// classes themselves, or the c - 1 roots of the weighted ones.
template <typename T>
struct Jacobian {
  const T* g;  // [n, c, m, t]
  int64_t n, c, m, t;
  int64_t g_n, g_c, g_t;
  const Weights<T>* weights;  // null: roots are given

  int64_t roots() const { return weights != nullptr ? c - 1 : c; }
};

// Layouts with contiguous outputs [n, c, t, m], any strides otherwise. A unit is one
// position of one sample; row k of P is root k % roots of unit k / roots.
template <typename T>
class RowRoots {
 public:
  explicit RowRoots(const Jacobian<T>& jacobian) : j_(jacobian), roots_(jacobian.roots()) {}

  int64_t rows() const { return j_.n * j_.t * roots_; }

  // dst [rows, W] := columns [panel W, panel W + W) of rows [row, row + rows)
  void fill(T* dst, int64_t panel, int64_t row, int64_t rows) const {
    const int64_t W = panel_width<T>(), column = panel * W, columns = std::min(W, j_.m - column);
    with_simd([&](auto isa) HESSKERN_INLINE {
      using Isa = decltype(isa);
      for (int64_t done = 0; done < rows;) {
        const int64_t unit = (row + done) / roots_, first = (row + done) % roots_;
        const int64_t count = std::min(roots_ - first, rows - done);
        const int64_t sample = unit / j_.t;
        const T* g = j_.g + sample * j_.g_n + unit % j_.t * j_.g_t + column;
        unit_rows<Isa>(dst + done * W, g, sample, first, count, columns);
        done += count;
      }
    });
  }

 private:
  // Roots [first, first + count) of one unit.
  template <class Isa>
  HESSKERN_FORCE_INLINE void unit_rows(T* dst, const T* g, int64_t sample, int64_t first,
                                       int64_t count, int64_t columns) const {
    constexpr int L = kLanes<T, Isa>, W = kPanel<T, Isa>;
    if (columns < W) return edge_rows<W>(dst, g, sample, first, count, columns);
    Vector<T, Isa> a, b;
    if (j_.weights == nullptr) {
      for (int64_t i = 0; i < count; ++i) {
        load<T, Isa>(a, g + (first + i) * j_.g_c);
        load<T, Isa>(b, g + (first + i) * j_.g_c + L);
        store<T, Isa>(dst + i * W, a);
        store<T, Isa>(dst + i * W + L, b);
      }
      return;
    }
    const T *scale = j_.weights->scale + sample * j_.c, *step = j_.weights->step + sample * j_.c;
    Vector<T, Isa> mean_a, mean_b;
    load<T, Isa>(mean_a, g + (j_.c - 1) * j_.g_c);
    load<T, Isa>(mean_b, g + (j_.c - 1) * j_.g_c + L);
    for (int64_t i = j_.c - 2; i >= first; --i) {
      load<T, Isa>(a, g + i * j_.g_c);
      load<T, Isa>(b, g + i * j_.g_c + L);
      a = a - mean_a;
      b = b - mean_b;
      mean_a += step[i] * a;
      mean_b += step[i] * b;
      if (i >= first + count) continue;
      a = scale[i] * a;
      b = scale[i] * b;
      store<T, Isa>(dst + (i - first) * W, a);
      store<T, Isa>(dst + (i - first) * W + L, b);
    }
  }

  // The same for the last panel, which m may not fill.
  template <int W>
  HESSKERN_FORCE_INLINE void edge_rows(T* dst, const T* g, int64_t sample, int64_t first,
                                       int64_t count, int64_t columns) const {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = columns; j < W; ++j) dst[i * W + j] = T(0);
    }
    if (j_.weights == nullptr) {
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t j = 0; j < columns; ++j) dst[i * W + j] = g[(first + i) * j_.g_c + j];
      }
      return;
    }
    const T *scale = j_.weights->scale + sample * j_.c, *step = j_.weights->step + sample * j_.c;
    T mean[W];
    for (int64_t j = 0; j < columns; ++j) mean[j] = g[(j_.c - 1) * j_.g_c + j];
    for (int64_t i = j_.c - 2; i >= first; --i) {
      const T* gi = g + i * j_.g_c;
      const bool wanted = i < first + count;
      T* row = dst + (wanted ? i - first : 0) * W;
      for (int64_t j = 0; j < columns; ++j) {
        const T difference = gi[j] - mean[j];
        mean[j] += step[i] * difference;
        if (wanted) row[j] = scale[i] * difference;
      }
    }
  }

  Jacobian<T> j_;
  int64_t roots_;
};

// Layouts with contiguous positions: one class of one sample is a run [m, t]. Row k
// of P is position k % t of root k / t, counted over all samples.
template <typename T>
class PositionRoots {
 public:
  explicit PositionRoots(const Jacobian<T>& jacobian) : j_(jacobian) {}

  // Samples whose roots are computed together.
  int64_t run() const { return j_.m * j_.t; }
  int64_t rows(int64_t samples) const { return samples * j_.roots() * j_.t; }
  // Elements of scratch memory for the roots of so many samples; none if they are given.
  int64_t scratch_size(int64_t samples) const {
    return j_.weights != nullptr ? (samples * j_.roots() + 1) * run() : 0;
  }

  // The roots of samples [first, first + count), each a run; scratch holds them
  // unless they are given.
  void find(T* scratch, int64_t first, int64_t count) const {
    if (j_.weights == nullptr) return;
    const int64_t q = run();
    T* mean = scratch + count * j_.roots() * q;
    with_simd([&](auto) HESSKERN_INLINE {
      for (int64_t n = 0; n < count; ++n) {
        const int64_t row = (first + n) * j_.c;
        const T *scale = j_.weights->scale + row, *step = j_.weights->step + row;
        const T* g = j_.g + (first + n) * j_.g_n;
        T* roots = scratch + n * j_.roots() * q;
        std::copy_n(g + (j_.c - 1) * j_.g_c, q, mean);
        for (int64_t i = j_.c - 2; i >= 0; --i) {
          const T* gi = g + i * j_.g_c;
          T* root = roots + i * q;
          const T a = scale[i], b = step[i];
#pragma omp simd
          for (int64_t j = 0; j < q; ++j) {
            const T difference = gi[j] - mean[j];
            mean[j] += b * difference;
            root[j] = a * difference;
          }
        }
      }
    });
  }

  // dst [rows, W] := columns [panel W, panel W + W) of rows [row, row + rows) of the
  // samples from `first` on.
  void fill(T* dst, const T* scratch, int64_t first, int64_t panel, int64_t row,
            int64_t rows) const {
    const int64_t W = panel_width<T>(), column = panel * W, columns = std::min(W, j_.m - column);
    const int64_t roots = j_.roots();
    for (int64_t done = 0; done < rows;) {
      const int64_t root = (row + done) / j_.t, position = (row + done) % j_.t;
      const int64_t count = std::min(j_.t - position, rows - done);
      const T* run_of_root = j_.weights != nullptr
                                 ? scratch + root * run()
                                 : j_.g + (first + root / roots) * j_.g_n + root % roots * j_.g_c;
      pack_panel<T>(dst + done * W, W, run_of_root + column * j_.t + position, 1, j_.t, count,
                    columns);
      done += count;
    }
  }

 private:
  Jacobian<T> j_;
};

template <typename T>
void update_by_rows(const Triangle<T>& to, const Jacobian<T>& jacobian, T alpha) {
  const RowRoots<T> source(jacobian);
  const int64_t m = jacobian.m;
  gram<T>(to, m, source.rows(), alpha, gram_threads(source.rows(), m),
          [&](T* dst, int64_t panel, int64_t row, int64_t rows) {
            source.fill(dst, panel, row, rows);
          });
}

// Bytes of the roots that one thread keeps until they are packed.
constexpr int64_t kRootBytes = 1 << 18;

template <typename T>
void update_by_positions(Triangle<T> to, const Jacobian<T>& jacobian, T alpha) {
  const PositionRoots<T> source(jacobian);
  const int64_t n = jacobian.n, m = jacobian.m, W = panel_width<T>(), panels = (m + W - 1) / W;
  const int64_t threads = std::min(gram_threads(source.rows(n), m), n);
  const int64_t sample_bytes =
      std::max<int64_t>(1, jacobian.roots()) * source.run() * static_cast<int64_t>(sizeof(T));
  if (m <= kPrivateOrder && n >= 2 * threads) {
    const int64_t step = std::clamp<int64_t>(kRootBytes / sample_bytes, 1, n);
    const int64_t at_once = (source.rows(step) + kPanelRows - 1) / kPanelRows;
    const int64_t additions = (n / threads / step + 2) * at_once;
    gram_private_sums<T>(to, m, alpha, threads, additions, [&](int64_t thread, auto& sum) {
      const Scratch<T> roots(source.scratch_size(step)), packed(panels * kPanelRows * W);
      const int64_t begin = n * thread / threads, end = n * (thread + 1) / threads;
      for (int64_t first = begin; first < end; first += step) {
        const int64_t count = std::min(step, end - first), rows = source.rows(count);
        source.find(roots.data(), first, count);
        for (int64_t row = 0; row < rows; row += kPanelRows) {
          const int64_t used = std::min(kPanelRows, rows - row);
          sum.add(used, packed_panels<T>(packed.data(), m, row, used,
                                         [&](T* dst, int64_t panel, int64_t from, int64_t count) {
                                           source.fill(dst, roots.data(), first, panel, from,
                                                       count);
                                         }));
        }
      }
    });
    return;
  }
  // Large m: the roots of a few samples for all threads, which share the triangle.
  const int64_t step = std::clamp<int64_t>(16 * kRootBytes / sample_bytes, 1, n);
  const Scratch<T> roots(source.scratch_size(step));
  for (int64_t first = 0; first < n; first += step) {
    const int64_t count = std::min(step, n - first);
    source.find(roots.data(), first, count);
    gram_split_units<T>(to, m, source.rows(count), alpha, threads,
                        [&](T* dst, int64_t panel, int64_t row, int64_t rows) {
                          source.fill(dst, roots.data(), first, panel, row, rows);
                        });
    to = to.in_place();
  }
}

// acc and the addend [m, m] with unit column stride, jacobian [N, c, m] or [N, c, m, t] of acc's
// dtype, p [N, c] or undefined
template <typename T>
void update(const at::Tensor& acc, const Addend& addend, const at::Tensor& jacobian,
            const at::Tensor& p, double alpha) {
  const bool positions = jacobian.dim() == 4;
  const int64_t n = jacobian.size(0), c = jacobian.size(1), m = jacobian.size(2);
  const int64_t t = positions ? jacobian.size(3) : 1;
  const Scratch<T> memory(p.defined() ? 2 * n * c : 0);
  Weights<T> weights{};
  if (p.defined()) {
    T *scale = memory.data(), *step = scale + n * c;
    find_weights(scale, step, p.const_data_ptr<T>(), n, c);
    weights = {scale, step};
  }
  const Jacobian<T> j{jacobian.const_data_ptr<T>(),
                      n,
                      c,
                      m,
                      t,
                      jacobian.stride(0),
                      jacobian.stride(1),
                      positions ? jacobian.stride(3) : 0,
                      p.defined() ? &weights : nullptr};
  const Triangle<T> to{acc.mutable_data_ptr<T>(), acc.stride(0), addend.base.const_data_ptr<T>(),
                       addend.base.stride(0), static_cast<T>(addend.beta)};
  if (jacobian.stride(2) == 1 || m == 1) {
    update_by_rows<T>(to, j, static_cast<T>(alpha));
  } else {
    update_by_positions<T>(to, j, static_cast<T>(alpha));
  }
}

// Whether outputs are contiguous, or positions are and outputs follow them.
bool has_layout(const at::Tensor& jacobian) {
  if (jacobian.size(2) == 1 || jacobian.stride(2) == 1) return true;
  if (jacobian.dim() == 3) return false;
  const int64_t t = jacobian.size(3);
  return (t == 1 || jacobian.stride(3) == 1) && jacobian.stride(2) == t;
}

// acc and base [m, m], jacobian [N, c, m] or [N, c, m, t], probabilities [N, c]
void output_hessian_(at::Tensor& acc, const at::Tensor& jacobian,
                     const std::optional<at::Tensor>& probabilities, double alpha,
                     const std::optional<at::Tensor>& base, double beta) {
  check_output_hessian(acc, jacobian, probabilities, base);
  Addend addend{base.value_or(acc), beta};
  // The weights of a single class are zero.
  if (jacobian.numel() == 0 || (probabilities.has_value() && jacobian.size(1) == 1)) {
    start_triangle_(acc, addend);
    return;
  }
  const auto dtype = acc.scalar_type();
  if (acc.stride(1) != 1) {
    at::Tensor sum = at::zeros(acc.sizes(), acc.options());
    output_hessian_(sum, jacobian, probabilities, alpha, std::nullopt, 1);
    start_triangle_(acc, addend);
    acc.add_(sum);
    return;
  }
  if (!probabilities.has_value() && jacobian.dim() == 3 && jacobian.scalar_type() == dtype &&
      jacobian.is_contiguous()) {
    symmetric_update_(acc, addend, jacobian.view({-1, jacobian.size(2)}), alpha);
    return;
  }
  if (addend.base.stride(1) != 1) addend = start_triangle_(acc, addend);
  const at::Tensor p =
      probabilities.has_value() ? probabilities->to(dtype).contiguous() : at::Tensor();
  const int64_t n = jacobian.size(0);
  const bool direct = jacobian.scalar_type() == dtype && has_layout(jacobian);
  const int64_t step = direct ? n : std::clamp<int64_t>(kConvert / (jacobian.numel() / n), 1, n);
  for (int64_t start = 0; start < n; start += step) {
    const int64_t count = std::min(step, n - start);
    at::Tensor chunk = jacobian.narrow(0, start, count).to(dtype);
    if (!has_layout(chunk)) chunk = chunk.contiguous();
    AT_DISPATCH_FLOATING_TYPES(dtype, "output_hessian_", [&] {
      update<scalar_t>(acc, addend, chunk, p.defined() ? p.narrow(0, start, count) : p, alpha);
    });
    addend = {acc, 1};
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(hesskern, CPU, m) {
  m.impl("output_hessian_", &output_hessian_);
}

}  // namespace hesskern::cpu
