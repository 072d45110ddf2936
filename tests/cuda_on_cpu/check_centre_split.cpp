// centre_split.cu on the CPU.
#include <algorithm>

#include "centre_split.h"
#include "check.h"
#include "checks.h"

namespace hesskern::cuda::check {

namespace {

struct Sizes {
  int64_t n, c, m;
  // Rows of g are gap numbers apart, and g begins shift numbers behind an aligned address; what
  // lies between is NaN.
  int64_t gap = 0, shift = 0;
};

// What the kernel may look at before all the rest.
bool is_sampled(const Sizes& sizes, int64_t sample) {
  const int64_t count = std::min(sizes.n, std::max<int64_t>(2048 / sizes.c, 1));
  for (int64_t s = 0; s < count; ++s) {
    if (s * sizes.n / count == sample) return true;
  }
  return false;
}

using Number = std::function<double(int64_t sample, int64_t c, int64_t column)>;

// g by `number`, p in proportion to exp(spread times a normal number). least: of every column, what
// its largest stored value is at least.
void centred(const std::string& what, const Sizes& sizes, double spread, const Number& number,
             double least = 16) {
  const auto [n, c, m, gap, shift] = sizes;
  const int64_t step = m + gap, pitch = (m + 7) / 8 * 8, rows = n * c, part_step = rows * pitch + 8;
  const Memory<float> memory(shift + rows * step), p(rows);
  float* const g = memory.data() + shift;
  for (int64_t i = 0; i < n; ++i) {
    double total = 0;
    std::vector<double> shares(static_cast<size_t>(c));
    for (int64_t j = 0; j < c; ++j) {
      // What no class takes part in must not show.
      const bool none = c > 2 && i % 3 == 0 && j == 1;
      total += shares[static_cast<size_t>(j)] = none ? 0.0 : std::exp(spread * normal());
    }
    for (int64_t j = 0; j < c; ++j) {
      p[i * c + j] = static_cast<float>(shares[static_cast<size_t>(j)] / total);
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < m; ++i) {
      g[row * step + i] = static_cast<float>(number(row / c, row % c, i));
    }
  }
  const Memory<uint16_t> parts(part_step + rows * pitch), again(part_step + rows * pitch);
  const Memory<int> exponents(pitch), exponents_again(pitch), guesses(4 * pitch);
  const CentreSplit call{g,
                         p.data(),
                         n,
                         c,
                         m,
                         c * step,
                         step,
                         parts.data(),
                         pitch,
                         part_step,
                         exponents.data(),
                         guesses.data()};
  const std::string name = "centre_split [" + std::to_string(n) + ", " + std::to_string(c) + ", " +
                           std::to_string(m) + "] gap " + std::to_string(gap) + " shift " +
                           std::to_string(shift) + what;
  if (!call.fits() || call.run(nullptr) != cudaSuccess) {
    return report(name + ": not launched", 1, 0);
  }
  const auto part = [&](int64_t which, int64_t row, int64_t i) {
    Float16 stored{parts[which * part_step + row * pitch + i]};
    return value_of(stored);
  };
  double worst = 0;
  std::string wrong;
  for (int64_t i = 0; i < pitch; ++i) {
    // Against the rows before a mean is taken off, which may leave little of them.
    double difference = 0, norm = 0, largest = 0, top = 0, beyond = 0;
    bool finite = true, numbers_are_finite = true;
    std::vector<double> expected(static_cast<size_t>(rows)), size(static_cast<size_t>(rows));
    for (int64_t s = 0; s < n; ++s) {
      double mean = 0, of_sample = 0;
      for (int64_t j = 0; i < m && j < c; ++j) {
        const double value = g[(s * c + j) * step + i], weight = p[s * c + j];
        mean += weight * value;
        if (weight > 0) of_sample = std::fmax(of_sample, std::fabs(value));
        numbers_are_finite = numbers_are_finite && std::isfinite(value);
      }
      for (int64_t j = 0; j < c; ++j) {
        const auto row = static_cast<size_t>(s * c + j);
        const double value = i < m ? static_cast<double>(g[(s * c + j) * step + i]) : 0.0;
        const double root = std::sqrt(static_cast<double>(p[s * c + j]));
        expected[row] = root == 0 && numbers_are_finite ? 0 : root * (value - mean);
        size[row] = root * (root == 0 ? 0.0 : std::fmax(of_sample, std::fabs(value)));
        largest = std::fmax(largest, std::fabs(expected[row]));
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      const double stored = part(0, row, i) + part(1, row, i);
      const double found = std::ldexp(stored, -exponents[i]);
      const double own = expected[static_cast<size_t>(row)], scale = size[static_cast<size_t>(row)];
      finite = finite && std::isfinite(stored);
      top = std::fmax(top, std::fabs(stored));
      difference += (found - own) * (found - own);
      norm += scale * scale;
      // Of what float32 leaves of a value and its mean, and of the lowest bits of lo.
      const double bound = std::ldexp(scale, -20) + std::ldexp(largest, -28);
      beyond = std::fmax(beyond, bound > 0 ? std::fabs(found - own) / bound : std::fabs(found));
      if (i >= m && stored != 0) wrong = "padding is not zero";
    }
    if (finite != numbers_are_finite) wrong = "infinite or NaN where it does not belong";
    if (!numbers_are_finite) continue;
    if (beyond > 1) wrong = "a value of column " + std::to_string(i) + " is off";
    if (top > 0 ? top < least : largest > 0)
      wrong = "too low a scale of column " + std::to_string(i);
    if (norm > 0) worst = std::fmax(worst, std::sqrt(difference / norm));
  }
  if (n > 20) {
    // With another number of blocks, and after whatever the first run left.
    CentreSplit second = call;
    second.parts = again.data();
    second.exponents = exponents_again.data();
    multiprocessor_count_is(5);
    if (second.run(nullptr) != cudaSuccess) wrong = "not launched again";
    multiprocessor_count_is(2);
    for (int64_t i = 0; i < rows * pitch; ++i) {
      if (parts[i] != again[i] || parts[part_step + i] != again[part_step + i]) {
        wrong = "parts differ the second time";
      }
    }
    for (int64_t i = 0; i < pitch; ++i) {
      if (exponents[i] != exponents_again[i]) wrong = "exponents differ the second time";
    }
  }
  report(wrong.empty() ? name : name + ": " + wrong,
         wrong.empty() ? worst : std::numeric_limits<double>::infinity(), limit_of<float>());
}

// Columns of many magnitudes, one of zeros.
double of_any_size(int64_t, int64_t, int64_t column) {
  return column == 2 ? 0.0 : (1 + normal()) * std::pow(10.0, column % 76 - 39);
}

void centred(const Sizes& sizes) {
  centred("", sizes, 3, of_any_size);
}

// One number that is none, in a sample that the guess sees or not.
void with_bad(const Sizes& sizes, float bad, bool sampled) {
  int64_t place = 0;
  while (place < sizes.n - 1 && is_sampled(sizes, place) != sampled) ++place;
  centred(" with " + std::to_string(bad), sizes, 3, [=](int64_t s, int64_t c, int64_t column) {
    if (s == place && c == sizes.c - 1 && column == sizes.m / 2) return static_cast<double>(bad);
    return of_any_size(s, c, column);
  });
}

// Columns, of which the sample says little or the wrong thing.
void misled(const Sizes& sizes, double spread) {
  int64_t rare = 0;
  while (is_sampled(sizes, rare)) ++rare;
  centred(
      " misled, spread " + std::to_string(static_cast<int>(spread)), sizes, spread,
      [=](int64_t s, int64_t c, int64_t column) {
        const bool sampled = is_sampled(sizes, s), outlier = s == rare && c == sizes.c - 1;
        const double usual = 1 + normal();
        // Eight columns that are all zero in the sample.
        if (column / 8 == 2) return sampled ? 0.0 : std::pow(10.0, 7 * (column % 8) - 30) * usual;
        switch (column % 8) {
          case 1:
            return outlier ? 1e6 : usual;
          case 2:
            // So far apart that one exponent is infinite for the other, unless p is as well.
            return (outlier ? -1e16 : 1e-10 * usual) * (spread > 1 ? 1 : outlier ? 1e12 : 1e-20);
          case 3:
            return sampled ? 0.0 : usual;
          case 4:
            return sampled ? 0.0 : 1e-12 * usual;
          case 5:
            return sampled ? 0.0 : 1e12 * usual;
          case 6:
            return column < 8 ? 1000 + 0.01 * usual : s == rare ? 1e-35 * usual : 0.0;
          // Huge where p is zero.
          case 7:
            return c == 1 && s % 3 == 0 && !sampled ? 1e6 : usual;
          default:
            return usual;
        }
      });
}

}  // namespace

void check_centre_split(bool few) {
  multiprocessor_count_is(2);
  centred({9, 3, 20});
  centred({2, 12, 133, 1, 1});
  misled({26, 160, 27}, 1);
  if (few) return;
  centred({1, 1, 1});
  centred({3, 2, 8});
  centred({150, 4, 132});
  centred({17, 10, 260});
  centred({3, 9, 77, 0, 1});
  centred({5, 3, 77, 3, 0});
  centred({5, 4, 76, 3, 0});
  for (const int64_t classes : {11, 64, 65, 104, 105, 160}) {
    centred({3, classes, 140});
    centred({2, classes, 76, 4, 1});
  }
  misled({40, 100, 28, 4, 0}, 1);
  misled({75, 40, 28}, 1);
  misled({260, 10, 131}, 8);
  misled({700, 4, 25}, 1);
  for (const bool sampled : {false, true}) {
    with_bad({260, 10, 40}, std::numeric_limits<float>::quiet_NaN(), sampled);
    with_bad({30, 100, 40}, -std::numeric_limits<float>::infinity(), sampled);
  }
  // All certain: values are far below the numbers of g.
  centred(" certain", {12, 10, 24}, 60, of_any_size);
  // Of every column one class alone, as the Jacobian of the outputs themselves.
  centred(" diagonal", {60, 40, 40}, 12,
          [](int64_t, int64_t c, int64_t column) { return c == column ? 1.0 : 0.0; });
  const CentreSplit many{nullptr, nullptr, 3, 161,     8,       8 * 161,
                         8,       nullptr, 8, 8 * 161, nullptr, nullptr};
  report("centre_split of 161 classes does not fit", many.fits() ? 1 : 0, 0);
}

}  // namespace hesskern::cuda::check
