// centre_split.cu on the CPU.
#include <algorithm>

#include "centre_split.h"
#include "check.h"
#include "checks.h"

namespace hesskern::cuda::check {

namespace {

// Rows of g are gap numbers apart, and g begins shift numbers behind an aligned address; what lies
// between is NaN. Columns of many magnitudes, one of zeros; bad: in one place, unless zero.
void centred(int64_t n, int64_t c, int64_t m, int64_t gap, int64_t shift, float bad = 0.0f) {
  const int64_t step = m + gap, pitch = (m + 7) / 8 * 8, rows = n * c, part_step = rows * pitch + 8;
  const Memory<float> memory(shift + rows * step), p(rows);
  float* const g = memory.data() + shift;
  const Memory<uint16_t> parts(part_step + rows * pitch);
  const Memory<int> exponents(pitch);
  for (int64_t i = 0; i < n; ++i) {
    double total = 0;
    for (int64_t j = 0; j < c; ++j) {
      total += p[i * c + j] = static_cast<float>(std::exp(3 * normal()));
    }
    for (int64_t j = 0; j < c; ++j) p[i * c + j] /= static_cast<float>(total);
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < m; ++i) {
      const double size = i == 2 ? 0.0 : std::pow(10.0, i % 76 - 39);
      g[row * step + i] = static_cast<float>((1 + normal()) * size);
    }
  }
  const int64_t spoilt = m / 2;
  if (bad != 0.0f) g[(rows - 1) * step + spoilt] = bad;
  const CentreSplit call{g,         p.data(),        n, c, m, c * step, step, parts.data(), pitch,
                         part_step, exponents.data()};
  const std::string name = "centre_split [" + std::to_string(n) + ", " + std::to_string(c) + ", " +
                           std::to_string(m) + "] gap " + std::to_string(gap) + " shift " +
                           std::to_string(shift) +
                           (bad != 0.0f ? " with " + std::to_string(bad) : "");
  if (!call.fits() || call.run(nullptr) != cudaSuccess) {
    return report(name + ": not launched", 1, 0);
  }
  const auto part = [&](int64_t which, int64_t row, int64_t i) {
    Float16 stored{parts[which * part_step + row * pitch + i]};
    return value_of(stored);
  };
  double worst = 0;
  bool in_place = true;
  for (int64_t i = 0; i < pitch; ++i) {
    // Against the rows before a mean is taken off, which may leave little of them.
    double difference = 0, norm = 0, largest = 0;
    bool finite = true;
    for (int64_t s = 0; s < n; ++s) {
      double mean = 0;
      for (int64_t j = 0; i < m && j < c; ++j) {
        mean += static_cast<double>(p[s * c + j]) * g[(s * c + j) * step + i];
      }
      for (int64_t j = 0; j < c; ++j) {
        const int64_t row = s * c + j;
        const double value = i < m ? static_cast<double>(g[row * step + i]) : 0.0;
        const double expected = std::sqrt(static_cast<double>(p[row])) * (value - mean);
        const double found = std::ldexp(part(0, row, i) + part(1, row, i), -exponents[i]);
        largest = std::fmax(largest, std::fabs(value));
        finite = finite && std::isfinite(found);
        difference += (found - expected) * (found - expected);
        norm += static_cast<double>(p[row]) * value * value;
        if (i >= m) in_place = in_place && part(0, row, i) == 0 && part(1, row, i) == 0;
      }
    }
    if (bad != 0.0f && i == spoilt) {
      in_place = in_place && !finite;
      continue;
    }
    in_place = in_place && finite;
    if (largest > 0) {
      const double top = std::ldexp(largest, exponents[i]);
      in_place = in_place && top >= 16384 && top < 32768;
    }
    if (norm > 0) worst = std::fmax(worst, std::sqrt(difference / norm));
  }
  report(name, in_place ? worst : std::numeric_limits<double>::infinity(), limit_of<float>());
}

}  // namespace

void check_centre_split(bool few) {
  multiprocessor_count_is(2);
  centred(9, 3, 20, 0, 0);
  centred(2, 12, 133, 1, 1);
  if (few) return;
  centred(1, 1, 1, 0, 0);
  centred(3, 2, 8, 0, 0);
  centred(150, 4, 132, 0, 0);
  centred(17, 10, 260, 0, 0);
  centred(3, 9, 77, 0, 1);
  centred(5, 3, 77, 3, 0);
  centred(5, 4, 76, 3, 0);
  for (const int64_t classes : {11, 64, 65, 104, 105, 160}) {
    centred(3, classes, 140, 0, 0);
    centred(2, classes, 76, 4, 1);
  }
  centred(9, 5, 80, 0, 0, std::numeric_limits<float>::quiet_NaN());
  centred(9, 5, 80, 0, 0, -std::numeric_limits<float>::infinity());
  const CentreSplit many{nullptr, nullptr, 3, 161, 8, 8 * 161, 8, nullptr, 8, 8 * 161, nullptr};
  report("centre_split of 161 classes does not fit", many.fits() ? 1 : 0, 0);
}

}  // namespace hesskern::cuda::check
