// layer_hessian/coefficients.cu on the CPU.
#include <algorithm>
#include <utility>

#include "check.h"
#include "checks.h"
#include "core/packed_rows.h"
#include "layer_hessian/coefficients.h"

namespace hesskern::cuda::check {

namespace {

struct Sizes {
  int64_t n, c, m, vectors;
};

// Rows of s are gap numbers apart, and s and y begin shift numbers behind an aligned address; what
// lies between is NaN. bad: of one sample's s.
void coefficients(const Sizes& z, int64_t gap, int64_t shift, float bad = 0.0f) {
  const int64_t pitch = z.m + gap, size = z.n * z.vectors * z.m;
  const Memory<float> s_memory(shift + z.n * z.c * pitch), y_memory(shift + size);
  float *const s = s_memory.data() + shift, *const y = y_memory.data() + shift;
  for (int64_t row = 0; row < z.n * z.c; ++row) {
    for (int64_t i = 0; i < z.m; ++i) s[row * pitch + i] = static_cast<float>(normal());
  }
  for (int64_t i = 0; i < size; ++i) y[i] = static_cast<float>(normal());
  const int64_t spoilt = z.n / 2;
  if (bad != 0.0f) s[(spoilt * z.c + z.c - 1) * pitch + z.m - 1] = bad;
  std::vector<double> expected(static_cast<size_t>(size));
  for (int64_t n = 0; n < z.n; ++n) {
    for (int64_t v = 0; v < z.vectors; ++v) {
      const int64_t first = (n * z.vectors + v) * z.m;
      for (int64_t c = 0; c < z.c; ++c) {
        const float* row = s + (n * z.c + c) * pitch;
        double a = 0;
        for (int64_t i = 0; i < z.m; ++i) a += static_cast<double>(row[i]) * y[first + i];
        for (int64_t i = 0; i < z.m; ++i) expected[static_cast<size_t>(first + i)] += a * row[i];
      }
    }
  }
  const LayerHessianCoefficients call{s, z.c * pitch, pitch, y,   z.vectors * z.m,
                                      y, z.n,         z.c,   z.m, z.vectors};
  std::string name = "layer_hessian_coefficients [" + std::to_string(z.n) + ", " +
                     std::to_string(z.c) + ", " + std::to_string(z.m) + "] of " +
                     std::to_string(z.vectors) + " gap " + std::to_string(gap) + " shift " +
                     std::to_string(shift);
  if (call.run(nullptr) != cudaSuccess) return report(name + ": not launched", 1, 0);
  if (bad == 0.0f) {
    return report(name,
                  relative_error(
                      size, [&](int64_t e) { return y[e]; },
                      [&](int64_t e) { return expected[static_cast<size_t>(e)]; }),
                  limit_of<float>());
  }
  // All that the bad number meets, and no other sample.
  bool good = true;
  for (int64_t e = 0; e < size; ++e) {
    good = good && std::isfinite(y[e]) == (e / z.m / z.vectors != spoilt);
  }
  report(name + " with " + std::to_string(bad), good ? 0 : 1, 0);
}

// What some samples say of the others: samples whose numbers are 2^20 times as large, or that alone
// have numbers in some columns; one is among those that exponents are guessed from.
enum class Hidden { kNothing, kLarge, kLargeSeen, kColumns, kSmallColumns, kNan };

// The packed rows are to the last bit those of the results.
void packed_coefficients(const Sizes& z, Hidden hidden) {
  const int64_t columns = z.vectors * z.m, odd = 37;
  const Memory<float> s(z.n * z.c * z.m), y(z.n * columns), plain(z.n * columns);
  for (int64_t i = 0; i < s.size(); ++i) {
    const int64_t sample = i / (z.c * z.m), column = i % z.m;
    double value = normal();
    if (hidden == Hidden::kLarge && sample == odd) value *= 1 << 20;
    if (hidden == Hidden::kLargeSeen && sample == 32) value *= 1 << 20;
    if ((hidden == Hidden::kColumns || hidden == Hidden::kSmallColumns) && column % 5 == 2) {
      value *= sample != odd ? 0.0 : hidden == Hidden::kColumns ? 1.0 : std::ldexp(1.0, -40);
    }
    if (hidden == Hidden::kNan && sample == odd && column == z.m / 2) {
      value = std::numeric_limits<double>::quiet_NaN();
    }
    s[i] = static_cast<float>(value);
  }
  for (int64_t i = 0; i < y.size(); ++i) y[i] = static_cast<float>(normal());
  LayerHessianCoefficients call{s.data(), z.c * z.m, z.m, y.data(), columns,
                                y.data(), z.n,       z.c, z.m,      z.vectors};
  std::string name = "layer_hessian_coefficients [" + std::to_string(z.n) + ", " +
                     std::to_string(z.c) + ", " + std::to_string(z.m) + "] of " +
                     std::to_string(z.vectors) + " packed, case " +
                     std::to_string(static_cast<int>(hidden));
  const PackedPlace place(0, 2, z.n, columns);
  const Memory<float> expected(place.end), found(place.end);
  const PackedRows to = place.in(found.data(), z.n), reference = place.in(expected.data(), z.n);
  call.out = plain.data();
  bool launched = call.run(nullptr) == cudaSuccess;
  const auto source =
      rows_by_axes(static_cast<const float*>(plain.data()), {columns}, {1}, z.n, columns);
  launched = launched && pack_rows<2>(source, 0, false, reference, nullptr) == cudaSuccess;
  call.out = y.data();
  launched = launched && call.aligned() && call.run_packed(to, nullptr) == cudaSuccess;
  if (!launched) return report(name + ": not launched", 1, 0);
  int64_t different = 0, flagged = 0;
  for (int64_t i = 0; i < to.padded(); ++i) {
    different += to.exponents[i] != reference.exponents[i];
  }
  for (int64_t i = 0; i < 2 * ceil_div(columns, kPackedBlock); ++i) {
    different += to.flags[i] != reference.flags[i];
    flagged += i % 2 == 0 && to.flags[i] != 0;
  }
  for (int64_t i = 0; i < 2 * to.part_step(); ++i) different += to.parts[i] != reference.parts[i];
  const bool wanted =
      hidden == Hidden::kLarge || hidden == Hidden::kSmallColumns || hidden == Hidden::kNan;
  // Of few samples one says little.
  const bool free = hidden == Hidden::kColumns || z.n < 32;
  report(name, static_cast<double>(different), 0);
  report(name + ": flags", free || (flagged > 0) == wanted ? 0 : 1, 0);
}

}  // namespace

void check_layer_hessian_coefficients(bool few) {
  coefficients({5, 3, 20, 2}, 0, 0);
  coefficients({3, 12, 70, 3}, 1, 1);
  packed_coefficients({40, 3, 20, 1}, Hidden::kLarge);
  if (few) return;
  for (const Hidden hidden : {Hidden::kNothing, Hidden::kLargeSeen, Hidden::kColumns,
                              Hidden::kSmallColumns, Hidden::kNan}) {
    packed_coefficients({66, 9, 36, 1}, hidden);
  }
  packed_coefficients({39, 2, 12, 5}, Hidden::kLarge);
  // One sample, and every kernel.
  packed_coefficients({1, 1, 4, 1}, Hidden::kNothing);
  for (const int64_t m : {124, 200, 260, 516}) {
    packed_coefficients({2, 2, m, 1}, Hidden::kNothing);
    packed_coefficients({5, 9, m, 2}, Hidden::kNothing);
    if (m <= 200) packed_coefficients({3, 11, m, 3}, Hidden::kNothing);
  }
  coefficients({1, 1, 1, 1}, 0, 0);
  coefficients({9, 2, 1, 3}, 2, 0);
  coefficients({4, 4, 128, 1}, 0, 0);
  // More classes than registers hold: one vector, and several, not as many as go together.
  for (const int64_t vectors : {1, 3, 5}) {
    for (const int64_t m : {84, 85, 200, 201, 256, 300, 512, 511, 640, 1024, 1023}) {
      coefficients({3, 12, m, vectors}, 0, 0);
    }
  }
  // All classes in registers.
  for (const int64_t c : {1, 2, 5, 9, 10}) {
    for (const int64_t m : {127, 132, 199, 260, 516}) coefficients({2, c, m, 2}, 0, 0);
  }
  // Rows apart, samples that begin anywhere.
  for (const int64_t m : {60, 61, 204, 520}) {
    coefficients({3, 11, m, 2}, 4, 0);
    coefficients({3, 3, m, 2}, 3, 0);
    coefficients({3, 3, m, 1}, 0, 1);
  }
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    for (const int64_t m : {129, 200}) coefficients({6, 9, m, 2}, 0, 0, bad);
  }
}

}  // namespace hesskern::cuda::check
