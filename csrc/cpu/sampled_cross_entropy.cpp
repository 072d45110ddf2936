#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "checks.h"

namespace hesskern::cpu {

namespace {

// Elements that a thread takes at least.
constexpr int64_t kGrain = 1 << 14;

// out [c] := scale (p - e_k), with k the first class at which the sum of p [c] passes uniform; p
// and out with element strides, and out may be p. Sums are float64.
template <typename T, typename Out>
void write_row(const T* p, int64_t p_stride, Out* out, int64_t out_stride, int64_t c,
               double uniform, T scale) {
  // Four sums, none of which waits for another.
  double parts[4] = {};
  int64_t k = 0;
  for (; k + 4 <= c; k += 4) {
    for (int64_t i = 0; i < 4; ++i) parts[i] += p[(k + i) * p_stride];
  }
  for (; k < c; ++k) parts[0] += p[k * p_stride];
  const double total = (parts[0] + parts[1]) + (parts[2] + parts[3]);
  const double threshold = uniform * total;
  // Where rounding or NaN leaves no class: the last one with a probability.
  int64_t chosen = -1, last = 0;
  double up_to = 0;
  for (k = 0; k < c && chosen < 0; ++k) {
    const T own = p[k * p_stride];
    up_to += own;
    if (own > 0) last = k;
    if (up_to > threshold) chosen = k;
  }
  if (chosen < 0) chosen = last;
  // Not 1: where one class is nearly certain, its p - 1 has no digits left in T.
  const T at_chosen = static_cast<T>((p[chosen * p_stride] - total) * scale);
  for (k = 0; k < c; ++k) out[k * out_stride] = static_cast<Out>(p[k * p_stride] * scale);
  out[chosen * out_stride] = static_cast<Out>(at_chosen);
}

// logits [N, c] or [N, c, t], uniform [N t], targets [N] or [N, t], terms [N]
at::Tensor sampled_cross_entropy_gradient(const at::Tensor& logits, const at::Tensor& uniform,
                                          const std::optional<at::Tensor>& targets,
                                          int64_t ignore_index,
                                          const std::optional<at::Tensor>& terms, double alpha) {
  check_sampled_cross_entropy_gradient(logits, uniform, targets, terms);
  if (logits.numel() == 0) return at::empty_like(logits);
  const int64_t c = logits.size(1), positions = logits.dim() == 3 ? logits.size(2) : 1;
  const auto position_stride = [](const at::Tensor& t) { return t.dim() == 3 ? t.stride(2) : 0; };
  // Torch's softmax over a last axis takes three times as long where it fills no vector.
  const bool few = logits.dim() == 2 && c < 16;
  const at::Tensor wide = logits.to(logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  const at::Tensor p = at::_softmax(few ? wide.unsqueeze(2) : wide, 1, false);
  // A vocabulary's probabilities are many: what is made of them takes their place.
  const bool in_place = !few && p.scalar_type() == logits.scalar_type() && logits.is_contiguous();
  const at::Tensor out = in_place ? p : at::empty_like(logits);
  const int64_t* target = targets.has_value() ? targets->const_data_ptr<int64_t>() : nullptr;
  const int64_t target_n = target ? targets->stride(0) : 0;
  const int64_t target_t = target && targets->dim() == 2 ? targets->stride(1) : 0;
  const int64_t* term = terms.has_value() ? terms->const_data_ptr<int64_t>() : nullptr;
  const int64_t term_n = term ? terms->stride(0) : 0;

  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, logits.scalar_type(), "sampled_cross_entropy_gradient", [&] {
        using T = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
        const T* probabilities = p.const_data_ptr<T>();
        const double* u = uniform.const_data_ptr<double>();
        scalar_t* rows = out.mutable_data_ptr<scalar_t>();
        const int64_t out_n = out.stride(0), out_c = out.stride(1), out_t = position_stride(out);
        const int64_t p_n = p.stride(0), p_c = p.stride(1), p_t = position_stride(p);
        const int64_t u_step = uniform.stride(0), grain = std::max<int64_t>(1, kGrain / c);
        at::parallel_for(0, logits.size(0) * positions, grain, [&](int64_t begin, int64_t end) {
          int64_t n = begin / positions, t = begin % positions;
          for (int64_t index = begin; index < end; ++index) {
            scalar_t* row = rows + n * out_n + t * out_t;
            if (target && target[n * target_n + t * target_t] == ignore_index) {
              for (int64_t k = 0; k < c; ++k) row[k * out_c] = scalar_t(0);
            } else {
              const double scale =
                  term ? alpha / std::sqrt(static_cast<double>(term[n * term_n])) : alpha;
              write_row(probabilities + n * p_n + t * p_t, p_c, row, out_c, c, u[index * u_step],
                        static_cast<T>(scale));
            }
            if (++t == positions) t = 0, ++n;
          }
        });
      });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(hesskern, CPU, m) {
  m.impl("sampled_cross_entropy_gradient", &sampled_cross_entropy_gradient);
}

}  // namespace hesskern::cpu
