// Accumulators that the checks of symmetric sums share, and how they run an operator into one.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

#include "check.h"
#include "core/axis.h"

namespace hesskern::cuda::check {

// An accumulator [groups, d, d] in rows of ld, with known values in its upper triangle and NaN
// elsewhere, and what it must hold afterwards.
template <typename T>
class Accumulator {
 public:
  Accumulator(int64_t groups, int64_t d, int64_t ld, T alpha)
      : groups_(groups), d_(d), ld_(ld), memory_(groups * d * ld), expected_(groups * d * d) {
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t i = 0; i < d; ++i) {
        for (int64_t j = i; j < d; ++j) {
          at(g, i, j) = static_cast<T>(normal());
          expected(g, i, j) = at(g, i, j);
        }
      }
    }
    sum = {memory_.data(), groups, d, d * ld, ld, 1, alpha};
  }
  T& at(int64_t g, int64_t i, int64_t j) { return memory_[(g * d_ + i) * ld_ + j]; }
  double& expected(int64_t g, int64_t i, int64_t j) { return expected_[(g * d_ + i) * d_ + j]; }

  // Error on the upper triangles; infinite if anything else was written.
  double error() {
    double worst = relative_error(
        groups_ * d_ * d_,
        [&](int64_t e) { return upper(e) ? at(e / d_ / d_, e / d_ % d_, e % d_) : 0.0; },
        [&](int64_t e) { return upper(e) ? expected_[e] : 0.0; });
    for (int64_t g = 0; g < groups_; ++g) {
      for (int64_t i = 0; i < d_; ++i) {
        for (int64_t j = 0; j < ld_; ++j) {
          if ((j < i || j >= d_) && !std::isnan(at(g, i, j))) {
            worst = std::numeric_limits<double>::infinity();
          }
        }
      }
    }
    return worst;
  }

  SymmetricSum<T> sum;

 private:
  bool upper(int64_t e) const { return e / d_ % d_ <= e % d_; }
  int64_t groups_, d_, ld_;
  Memory<T> memory_;
  Memory<double> expected_;
};

// What call adds to acc against what acc expects.
template <class Call, typename T>
void run(const Call& call, Accumulator<T>& acc, const std::string& name, double limit) {
  const auto work = call.plan();
  const Memory<T> workspace(work.workspace);
  if (work.run(workspace.data(), nullptr) != cudaSuccess) {
    return report(name + ": not launched", 1, 0);
  }
  report(name, acc.error(), limit);
}

}  // namespace hesskern::cuda::check
