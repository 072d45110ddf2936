// H V = alpha sum_n sum_c <V, R_nc> R_nc with R_nc = sum_t s_nct x_nt^T, over
// tiles of samples: no [N, m] intermediate reaches memory.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ThreadLocalState.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "checks.h"
#include "simd.h"

namespace hesskern::cpu {

namespace {

// y [k, q] := S^T (S y) for s [c, q], row by row of y; coefficient: scratch [c].
template <typename T>
void gram_times(T* y, const T* s, int64_t k, int64_t c, int64_t q, T* coefficient) {
  vectorize([&]() HESSKERN_INLINE {
    for (int64_t b = 0; b < k; ++b) {
      T* row = y + b * q;
      for (int64_t i = 0; i < c; ++i) {
        const T* si = s + i * q;
        T sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < q; ++j) sum += si[j] * row[j];
        coefficient[i] = sum;
      }
      for (int64_t j = 0; j < q; ++j) row[j] = 0;
      for (int64_t i = 0; i < c; ++i) {
        const T* si = s + i * q;
        const T a = coefficient[i];
        for (int64_t j = 0; j < q; ++j) row[j] += a * si[j];
      }
    }
  });
}

// out [k m, d] += y [k m, n] rows [n, d]. A GEMM with a small result adds term after term to it;
// summed apart first, float32 holds for millions of samples (1e-6 instead of 1e-4).
void add_product(at::Tensor& out, const at::Tensor& y, const at::Tensor& rows) {
  constexpr int64_t kSmall = 1 << 12;
  if (out.numel() <= kSmall) {
    out.add_(at::mm(y, rows));
  } else {
    out.addmm_(y, rows);
  }
}

// x [N, d], s [N, c, m], V [k m, d] -> out [k m, d] += sum over samples
template <typename T>
void linear_range(at::Tensor& out, const at::Tensor& x, const at::Tensor& s, const at::Tensor& V,
                  int64_t begin, int64_t end) {
  const int64_t c = s.size(1), m = s.size(2), k = V.size(0) / m;
  // The tile's x, V x and s together stay within the second-level cache.
  const int64_t per_sample = x.size(1) + k * m + c * m;
  const int64_t tile = std::clamp<int64_t>((1 << 17) / std::max<int64_t>(per_sample, 1), 16, 512);
  std::vector<T> coefficient(c);
  for (int64_t start = begin; start < end; start += tile) {
    const int64_t count = std::min(tile, end - start);
    const at::Tensor rows = x.narrow(0, start, count);
    at::Tensor y = at::mm(rows, V.t());
    T* yp = y.mutable_data_ptr<T>();
    const at::Tensor roots = s.narrow(0, start, count).contiguous();
    const T* sp = roots.const_data_ptr<T>();
    for (int64_t n = 0; n < count; ++n) {
      gram_times<T>(yp + n * k * m, sp + n * c * m, k, c, m, coefficient.data());
    }
    add_product(out, y.t(), rows);
  }
}

// x [N, d, t], s [N, c, m, t], V [k m, d]
template <typename T>
void position_range(at::Tensor& out, const at::Tensor& x, const at::Tensor& s, const at::Tensor& V,
                    int64_t begin, int64_t end) {
  const int64_t c = s.size(1), m = s.size(2), t = s.size(3), k = V.size(0) / m;
  std::vector<T> coefficient(c);
  for (int64_t n = begin; n < end; ++n) {
    const at::Tensor columns = x.select(0, n), roots = s.select(0, n).contiguous();
    at::Tensor y = at::mm(V, columns);
    gram_times<T>(y.mutable_data_ptr<T>(), roots.const_data_ptr<T>(), k, c, m * t,
                  coefficient.data());
    add_product(out, y, columns.t());
  }
}

// x [N, d] or [N, d, t], s [N, c, m] or [N, c, m, t], V [m, d] or [k, m, d]
at::Tensor layer_hessian_matmul(const at::Tensor& x, const at::Tensor& s, const at::Tensor& V,
                                double alpha) {
  check_layer_hessian_matmul(x, s, V);
  const int64_t n = x.size(0), d = x.size(1);
  at::Tensor out = at::zeros(V.sizes(), V.options());
  if (s.numel() == 0 || x.numel() == 0 || V.numel() == 0) return out;
  const int64_t rows = V.numel() / d;
  const at::Tensor vectors = V.reshape({rows, d});
  // One partial sum per thread, added in fixed order: the result depends on the
  // number of threads but not on their timing.
  const int64_t threads = std::clamp<int64_t>(n / 16, 1, at::get_num_threads());
  const at::Tensor partial = at::zeros({threads, rows, d}, V.options());
  // Worker threads do not inherit the caller's dispatch state (inference mode among it).
  const at::ThreadLocalState caller;
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    const at::ThreadLocalStateGuard state(caller);
    at::AutoDispatchBelowADInplaceOrView guard;
    for (int64_t worker = first; worker < last; ++worker) {
      at::Tensor sum = partial.select(0, worker);
      const int64_t begin = n * worker / threads, end = n * (worker + 1) / threads;
      AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "layer_hessian_matmul", [&] {
        if (x.dim() == 2) {
          linear_range<scalar_t>(sum, x, s, vectors, begin, end);
        } else {
          position_range<scalar_t>(sum, x, s, vectors, begin, end);
        }
      });
    }
  });
  return at::sum(partial, 0).mul_(alpha).view(V.sizes());
}

}  // namespace

TORCH_LIBRARY_IMPL(hesskern, CPU, m) {
  m.impl("layer_hessian_matmul", &layer_hessian_matmul);
}

}  // namespace hesskern::cpu
