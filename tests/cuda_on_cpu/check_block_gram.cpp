// block_gram.cu, block_gram/halves.cu and block_gram/roles.cu on the CPU.
#include <algorithm>
#include <array>
#include <utility>

#include "accumulator.h"
#include "block_gram/block_gram.h"
#include "block_gram/halves.h"
#include "check.h"
#include "checks.h"
#include "core/warp.h"
#include "input_covariance.h"
#include "output_hessian.h"
#include "root_rows.h"

namespace hesskern::cuda::check {

namespace {

// What data is like: normal; samples of any magnitude; one magnitude a column.
enum class Numbers { kNormal, kSamplesApart, kColumnsApart };

double magnitude(Numbers numbers, int64_t sample, int64_t column) {
  if (numbers == Numbers::kSamplesApart) return std::pow(10.0, sample % 25 - 16);
  if (numbers == Numbers::kColumnsApart) return std::pow(10.0, column % 5 - 2);
  return 1.0;
}

const char* name_of(Numbers numbers) {
  return numbers == Numbers::kNormal         ? ""
         : numbers == Numbers::kSamplesApart ? " samples apart"
                                             : " columns apart";
}

// Device and layout.
struct Layout {
  int64_t gap = 0, shift = 0;  // numbers between rows, and before the first
  int processors = 2;
  int capability = 90;
  int shared = emulation::Properties().most_shared;
};

std::string describe(const Layout& layout) {
  return " gap " + std::to_string(layout.gap) + " shift " + std::to_string(layout.shift) + " on " +
         std::to_string(layout.processors) + (layout.capability < 90 ? " without bulk copies" : "");
}

template <typename In>
std::string name_of() {
  return std::is_same_v<In, float> ? "" : std::is_same_v<In, BFloat16> ? " bfloat16" : " float16";
}

// sum [d, d] += of double rows.
void add_product(Accumulator<float>& acc, const std::vector<double>& row, int64_t d) {
  for (int64_t i = 0; i < d; ++i) {
    const double left = acc.sum.alpha * row[static_cast<size_t>(i)];
    for (int64_t j = i; j < d; ++j) acc.expected(0, i, j) += left * row[static_cast<size_t>(j)];
  }
}

// The accumulator starts with zeros where the sums are small.
Accumulator<float> accumulator(int64_t m, Numbers numbers) {
  Accumulator<float> acc(1, m, m + 1, 0.7f);
  if (numbers == Numbers::kNormal) return acc;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = i; j < m; ++j) acc.at(0, i, j) = 0.0f, acc.expected(0, i, j) = 0.0;
  }
  return acc;
}

template <class Call>
void run_on(const Call& call, Accumulator<float>& acc, const std::string& name,
            const Layout& layout) {
  emulation::device().processors = layout.processors;
  emulation::device().capability = layout.capability;
  emulation::device().most_shared = layout.shared;
  if (call.fits()) {
    run(call, acc, name, limit_of<float>());
  } else {
    report(name + ": does not fit", 1, 0);
  }
  emulation::device() = emulation::Properties();
}

template <typename In = float>
void samples(int64_t n, int64_t c, int64_t m, const Layout& layout = {},
             Numbers numbers = Numbers::kNormal) {
  const int64_t pitch = m + layout.gap;
  const Memory<In> memory(layout.shift + n * c * pitch);
  const Memory<float> p(n * c);
  In* const g = memory.data() + layout.shift;
  Accumulator<float> acc = accumulator(m, numbers);
  for (int64_t i = 0; i < n; ++i) {
    double total = 0;
    for (int64_t j = 0; j < c; ++j) total += p[i * c + j] = static_cast<float>(std::exp(normal()));
    for (int64_t j = 0; j < c; ++j) p[i * c + j] /= static_cast<float>(total);
    std::vector<double> mean(static_cast<size_t>(m)), row(static_cast<size_t>(m));
    for (int64_t j = 0; j < c; ++j) {
      for (int64_t a = 0; a < m; ++a) {
        In& value = g[(i * c + j) * pitch + a];
        value = store<In>((1 + normal()) * magnitude(numbers, i, a));
        mean[static_cast<size_t>(a)] += static_cast<double>(p[i * c + j]) * value_of(value);
      }
    }
    for (int64_t j = 0; j < c; ++j) {
      for (int64_t a = 0; a < m; ++a) {
        row[static_cast<size_t>(a)] =
            std::sqrt(static_cast<double>(p[i * c + j])) *
            (value_of(g[(i * c + j) * pitch + a]) - mean[static_cast<size_t>(a)]);
      }
      add_product(acc, row, m);
    }
  }
  run_on(BlockSamples<In>{g, p.data(), n, c, m, c * pitch, pitch, acc.sum}, acc,
         "block_gram samples" + name_of<In>() + " [" + std::to_string(n) + ", " +
             std::to_string(c) + ", " + std::to_string(m) + "]" + describe(layout) +
             name_of(numbers),
         layout);
}

template <typename In = float>
void rows(int64_t n, int64_t m, const Layout& layout = {}, Numbers numbers = Numbers::kNormal) {
  const int64_t pitch = m + layout.gap;
  const Memory<In> memory(layout.shift + n * pitch);
  In* const x = memory.data() + layout.shift;
  Accumulator<float> acc = accumulator(m, numbers);
  std::vector<double> row(static_cast<size_t>(m));
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t a = 0; a < m; ++a) {
      In& value = x[i * pitch + a];
      value = store<In>(normal() * magnitude(numbers, i, a));
      row[static_cast<size_t>(a)] = value_of(value);
    }
    add_product(acc, row, m);
  }
  const auto call = [&] {
    if constexpr (sizeof(In) == 2) {
      return BlockHalves<In>{x, n, m, 1, pitch, 1, false, acc.sum};
    } else {
      return BlockRows{x, n, m, pitch, acc.sum};
    }
  }();
  run_on(call, acc,
         "block_gram rows" + name_of<In>() + " [" + std::to_string(n) + ", " + std::to_string(m) +
             "]" + describe(layout) + name_of(numbers),
         layout);
}

template <typename In = float>
void positions(int64_t n, int64_t m, int64_t t, const Layout& layout = {},
               Numbers numbers = Numbers::kNormal) {
  const int64_t pitch = t + layout.gap;
  const Memory<In> memory(layout.shift + n * m * pitch);
  In* const x = memory.data() + layout.shift;
  Accumulator<float> acc = accumulator(m, numbers);
  std::vector<double> row(static_cast<size_t>(m));
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t a = 0; a < m; ++a) {
      for (int64_t b = 0; b < t; ++b) {
        x[(i * m + a) * pitch + b] = store<In>(normal() * magnitude(numbers, i, a));
      }
    }
    for (int64_t b = 0; b < t; ++b) {
      for (int64_t a = 0; a < m; ++a)
        row[static_cast<size_t>(a)] = value_of(x[(i * m + a) * pitch + b]);
      add_product(acc, row, m);
    }
  }
  const auto call = [&] {
    if constexpr (sizeof(In) == 2) {
      return BlockHalves<In>{x, n, m, t, m * pitch, pitch, true, acc.sum};
    } else {
      return BlockPositions{x, n, m, t, m * pitch, pitch, acc.sum};
    }
  }();
  run_on(call, acc,
         "block_gram positions" + name_of<In>() + " [" + std::to_string(n) + ", " +
             std::to_string(m) + ", " + std::to_string(t) + "]" + describe(layout) +
             name_of(numbers),
         layout);
}

// One number that is none, anywhere: the diagonal must show it.
void not_a_number(float bad) {
  bool good = true;
  constexpr int64_t n = 9, c = 3, m = 70, wide = 132;
  const auto shows = [&](const auto& call, Accumulator<float>& acc) {
    const Work<float> work = call.plan();
    const Memory<float> workspace(work.workspace);
    if (work.run(workspace.data(), nullptr) != cudaSuccess) return false;
    for (int64_t i = 0; i < acc.sum.order; ++i) {
      if (!std::isfinite(acc.at(0, i, i))) return true;
    }
    return false;
  };
  for (const int64_t at : {int64_t{0}, (4 * c + 1) * m + 37, n * c * m - 1}) {
    const Memory<float> x(n * c * wide), p(n * c);
    for (int64_t i = 0; i < n * c * wide; ++i) x[i] = static_cast<float>(normal());
    for (int64_t i = 0; i < n * c; ++i) p[i] = 1.0f / c;
    x[at] = bad;
    Accumulator<float> centred(1, m, m, 1.0f), plain(1, m, m, 1.0f), along(1, m, m, 1.0f);
    Accumulator<float> roles(1, wide, wide, 1.0f);
    good = good &&
           shows(BlockSamples<float>{x.data(), p.data(), n, c, wide, c * wide, wide, roles.sum},
                 roles);
    good = good &&
           shows(BlockSamples<float>{x.data(), p.data(), n, c, m, c * m, m, centred.sum}, centred);
    good = good && shows(BlockRows{x.data(), n * c, m, m, plain.sum}, plain);
    good = good && shows(BlockPositions{x.data(), 1, m, n * c, 0, n * c, along.sum}, along);
  }
  report("block_gram of " + std::to_string(bad) + " shows on the diagonal", good ? 0 : 1, 0);
}

// An infinity in the first column leaves the columns of the last group of 32 alone, some of whose
// lanes have no columns.
void an_infinity_stays(int64_t m) {
  constexpr int64_t n = 9, c = 3;
  const Memory<float> x(n * c * m), p(n * c);
  for (int64_t i = 0; i < n * c * m; ++i) x[i] = static_cast<float>(normal());
  for (int64_t i = 0; i < n * c; ++i) p[i] = 1.0f / c;
  x[4 * c * m] = std::numeric_limits<float>::infinity();
  Accumulator<float> acc(1, m, m, 1.0f);
  const Work<float> work =
      BlockSamples<float>{x.data(), p.data(), n, c, m, c * m, m, acc.sum}.plan();
  const Memory<float> workspace(work.workspace);
  bool good = work.run(workspace.data(), nullptr) == cudaSuccess && !std::isfinite(acc.at(0, 0, 0));
  for (int64_t i = (m - 1) / 32 * 32; i < m; ++i) {
    for (int64_t j = i; j < m; ++j) good = good && std::isfinite(acc.at(0, i, j));
  }
  report("block_gram of an infinity in the first of " + std::to_string(m) + " columns",
         good ? 0 : 1, 0);
}

// The sum over a million non-negative rows as 132 blocks add it up: so many rows at a time on
// tensor cores that cut off, small products before large ones, in float32 over a block's slabs,
// then over blocks by eight warps.
void long_sum(int64_t slab_rows, int blocks, int64_t fresh_rows = 16) {
  constexpr int64_t kRows = 1000000;
  constexpr int kWarps = 8;
  double difference = 0, norm = 0;
  for (int entry = 0; entry < 6; ++entry) {
    const bool square = entry < 3;
    std::vector<float> totals(static_cast<size_t>(blocks));
    double exact = 0;
    std::vector<std::array<double, 16>> large;
    float recent = 0.0f;
    for (int64_t first = 0; first < kRows; first += 16) {
      double low_high[16], high_low[16];
      std::array<double, 16> high_high;
      for (int k = 0; k < 16; ++k) {
        // Powers of two as scales change nothing here.
        const float left = static_cast<float>(std::fmax(normal() + 0.5, 0.0) * 4096);
        const float right =
            square ? left : static_cast<float>(std::fmax(normal() + 0.5, 0.0) * 4096);
        exact += static_cast<double>(left) * right;
        float parts[2][2];
        for (const int side : {0, 1}) {
          const float value = side == 0 ? left : right;
          uint32_t ignored;
          const uint32_t high = float16_pair(value, 0.0f);
          floats_of_pair(high, parts[side][0], parts[side][1]);
          ignored = float16_pair(value - parts[side][0], 0.0f);
          float nothing;
          floats_of_pair(ignored, parts[side][1], nothing);
        }
        low_high[k] = static_cast<double>(parts[0][1]) * parts[1][0];
        high_low[k] = static_cast<double>(parts[0][0]) * parts[1][1];
        high_high[static_cast<size_t>(k)] = static_cast<double>(parts[0][0]) * parts[1][0];
      }
      recent = emulated::truncated_sum(recent, low_high);
      recent = emulated::truncated_sum(recent, high_low);
      large.push_back(high_high);
      if ((first + 16) % fresh_rows != 0 && first + 16 < kRows) continue;
      for (const auto& products : large) {
        double sixteen[16];
        std::copy(products.begin(), products.end(), sixteen);
        recent = emulated::truncated_sum(recent, sixteen);
      }
      large.clear();
      totals[static_cast<size_t>(first / slab_rows % blocks)] += recent;
      recent = 0.0f;
    }
    float warps[kWarps] = {};
    for (int block = 0; block < blocks; ++block) {
      warps[block % kWarps] += totals[static_cast<size_t>(block)];
    }
    float total = warps[0];
    for (int warp = 1; warp < kWarps; ++warp) total += warps[warp];
    difference += (total - exact) * (total - exact);
    norm += exact * exact;
  }
  report("block_gram of 10^6 non-negative rows, model of " + std::to_string(blocks) +
             " blocks, slabs of " + std::to_string(slab_rows) + ", fresh sums of " +
             std::to_string(fresh_rows),
         std::sqrt(difference / norm), 2e-6);
}

// 16-bit numbers: every number of groups of 32 columns and every size of a copy; each is one
// kernel for rows, one for positions and one for samples (without bulk copies).
template <typename In>
void halves() {
  const Layout lanes{0, 0, 1, 80}, gap_of_two{2, 2, 1}, one{0, 0, 1};
  for (const int64_t m : {72, 100, 132, 180, 196, 228}) {
    samples<In>(2, 3, m, lanes);
    rows<In>(35, m, m == 100 ? gap_of_two : one);
    positions<In>(1, m, m == 132 ? 34 : 44, one);
  }
}

// Slabs one after another, slabs that are not full, numbers far apart: of one type.
template <typename In>
void more_halves() {
  const Layout one{0, 0, 1}, gap_of_two{2, 2, 1}, gap_of_four{4, 4, 1};
  samples<In>(21, 10, 80);
  samples<In>(11, 9, 68, one);
  samples<In>(10, 3, 72, {}, Numbers::kColumnsApart);
  rows<In>(1, 66);
  rows<In>(300, 66, one);
  rows<In>(129, 67, {5, 8, 1});
  rows<In>(70, 68, gap_of_four);
  rows<In>(90, 72, one, Numbers::kColumnsApart);
  positions<In>(1, 65, 2);
  positions<In>(5, 65, 50, gap_of_two);
  positions<In>(2, 65, 92, gap_of_four);
  positions<In>(2, 70, 67, {5, 8, 1});
}

// Two roles: every width and type; samples that no set and sets that no slab fills; one set or two
// to a slab; places in turn, more or fewer of them.
void two_roles() {
  const Layout one{0, 0, 1};
  samples(21, 10, 200, one);
  samples(30, 3, 132, one);
  samples<BFloat16>(17, 4, 160, one);
  samples<BFloat16>(5, 4, 192);
  samples<BFloat16>(1, 2, 224);
  samples<Float16>(3, 8, 136);
  samples<Float16>(61, 1, 184, one);
  samples<Float16>(10, 12, 200, one);
  samples(30, 3, 132, {}, Numbers::kSamplesApart);
  samples(30, 3, 132, {}, Numbers::kColumnsApart);
}

// What a caller gets that knows nothing of these kernels, and where they refuse.
template <typename In>
void halves_are_chosen() {
  bool good = true;
  Accumulator<float> acc(1, 96, 96, 1.0f);
  const Memory<In> x(64 * 96);
  const In* const at = x.data();
  good = good && BlockHalves<In>{at, 64, 96, 1, 96, 1, false, acc.sum}.fits();
  // Not at odd steps or places, nor where the last four elements of a line are not all there.
  good = good && !BlockHalves<In>{at + 1, 64, 96, 1, 96, 1, false, acc.sum}.fits();
  good = good && !BlockHalves<In>{at, 64, 96, 1, 97, 1, false, acc.sum}.fits();
  good = good && !BlockHalves<In>{at, 2, 96, 33, 96 * 34, 34, true, acc.sum}.fits();
  good = good && BlockHalves<In>{at, 2, 96, 34, 96 * 34, 34, true, acc.sum}.fits();
  good = good && !BlockHalves<In>{at, 0, 96, 1, 96, 1, false, acc.sum}.fits();
  good = good && !BlockHalves<In>{at, 64, 95, 1, 96, 1, false, acc.sum}.fits();
  good = good && !BlockHalves<In>{at, 2, 96, int64_t{1} << 40, 8, 8, true, acc.sum}.fits();
  const Memory<float> p(4);
  const auto softmax = [&](int64_t shift, int64_t class_stride) {
    return OutputHessian<In, float>{at + shift,       p.data(),     2, 2, 96,    1,
                                    2 * class_stride, class_stride, 1, 0, false, acc.sum}
        .readable();
  };
  good = good && softmax(0, 96) && softmax(4, 100) && !softmax(2, 96) && !softmax(0, 98);
  report("block_gram halves fit" + name_of<In>(), good ? 0 : 1, 0);
}

void does_not_fit() {
  const auto wide = [](int64_t groups, int64_t order) {
    SymmetricSum<float> sum{};
    sum.groups = groups, sum.order = order;
    return sum;
  };
  const SymmetricSum<float> sum = wide(1, 256);
  bool good = !BlockSamples<float>{nullptr, nullptr, 9, 40, 256, 40 * 256, 256, sum}.fits();
  good = good && BlockSamples<float>{nullptr, nullptr, 9, 20, 256, 20 * 256, 256, sum}.fits();
  good = good && !BlockRows{nullptr, 9, 257, 257, wide(1, 257)}.fits();
  good = good && !BlockRows{nullptr, 9, 256, 256, wide(1, 257)}.fits();
  good = good && !BlockRows{nullptr, 9, 256, 256, wide(2, 256)}.fits();
  good = good && !BlockRows{nullptr, 0, 256, 256, sum}.fits();
  good = good && BlockRows{nullptr, 9, 256, 256, sum}.fits();
  good = good && !BlockPositions{nullptr, 1 << 20, 256, 1 << 20, 256 << 20, 1 << 20, sum}.fits();
  good = good && BlockPositions{nullptr, 1 << 10, 256, 1 << 20, 256 << 20, 1 << 20, sum}.fits();
  // On a device with little shared memory not even one buffer fits.
  emulation::device().most_shared = 99 << 10;
  good = good && !BlockSamples<float>{nullptr, nullptr, 9, 20, 256, 20 * 256, 256, sum}.fits();
  emulation::device() = emulation::Properties();
  report("block_gram fits", good ? 0 : 1, 0);
}

}  // namespace

void check_block_gram(bool few) {
  samples(9, 3, 70);
  positions(2, 66, 20);
  rows<BFloat16>(140, 66, {0, 0, 1});
  positions<Float16>(3, 66, 72, {0, 0, 1});
  samples(14, 2, 132, {0, 0, 1});
  if (few) return;
  two_roles();
  halves<BFloat16>();
  halves<Float16>();
  more_halves<BFloat16>();
  halves_are_chosen<Float16>();
  rows(21, 140);
  // Every number of groups of 32 columns; whole samples by the copy engine, by lanes in pieces of
  // 16 bytes and in words; slabs that are not full, and several a block.
  const Layout lanes{0, 0, 1, 80}, apart{4, 0, 1, 90}, words{1, 1, 1, 90};
  for (const int64_t m : {72, 100, 160, 180, 224, 256}) {
    samples(6, 10, m);
    rows(43, m);
    positions(2, m, 36);
  }
  for (const int64_t m : {65, 127, 129, 193, 225}) {
    samples(5, 4, m, m % 4 == 3 ? lanes : words);
    rows(35, m, m % 4 == 3 ? lanes : words);
    positions(3, m, 19, words);
  }
  samples(21, 10, 132);
  rows(133, 132);
  samples(40, 10, 80);
  samples(1, 1, 68);
  samples(1, 2, 4);
  samples(11, 1, 90, words);
  samples(3, 13, 200);
  samples(5, 20, 256, lanes);
  samples(9, 12, 256);
  // One buffer where two are better, one set where two are.
  samples(9, 10, 200, {0, 0, 1, 80, 163 << 10});
  samples(9, 10, 256, {0, 0, 1, 80, 99 << 10});
  samples(30, 2, 204);
  samples(13, 11, 68, lanes);
  samples(13, 11, 68, apart);
  rows(1, 1);
  rows(1, 200);
  rows(8, 68);
  rows(65, 68, lanes);
  rows(65, 68, apart);
  rows(300, 96, {0, 0, 3, 90});
  positions(1, 65, 1);
  positions(7, 65, 4);
  positions(1, 100, 200);
  positions(5, 70, 64, {4, 0, 1, 80});
  positions(5, 70, 17, {3, 4, 1, 80});
  for (const Numbers numbers : {Numbers::kSamplesApart, Numbers::kColumnsApart}) {
    samples(30, 3, 72, {}, numbers);
    rows(150, 72, {}, numbers);
    positions(26, 72, 5, {}, numbers);
  }
  not_a_number(std::numeric_limits<float>::quiet_NaN());
  not_a_number(float_of(0x7fffffffu));
  not_a_number(-std::numeric_limits<float>::infinity());
  for (const int64_t m : {68, 100, 132, 200}) an_infinity_stays(m);
  does_not_fit();
  long_sum(80, 132);
  long_sum(64, 2 * 132);
  // Two roles: a slab is one sum, with ten classes and with as many as go that way.
  long_sum(80, 132, 80);
  long_sum(128, 132, 128);
}

}  // namespace hesskern::cuda::check
