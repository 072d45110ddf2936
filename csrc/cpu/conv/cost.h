// What each way of accumulating a convolution's covariance costs, counted in
// multiply-adds on one vector of the machine; everything else (shuffles, copies,
// stores) is counted as the multiply-adds that take as long. The constants were
// measured once; only their ratios matter for the choice.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "band_plan.h"
#include "checks.h"
#include "conv_plan.h"
#include "cpu/blas/triangle.h"
#include "fft.h"
#include "paths.h"

namespace hesskern::cpu {

struct ConvSizes {
  int64_t samples, channels, height, width;
};

namespace cost {

constexpr double kPack = 0.5;          // per patch element packed, unit stride
constexpr double kPackStrided = 1.5;   // with gaps between pixels
constexpr double kPackLine = 8;        // per line of positions and patch element
constexpr double kUpdate = 0.3;        // per element of the triangle and chunk
constexpr double kTileProduct = 0.45;  // per vector product, on the tile unit
constexpr double kTileSplit = 1.4;     // per patch element laid out for it
constexpr double kPixel = 6;           // per vector of pixels brought into lanes
constexpr double kFft = 8;             // per complex vector and factor of the length
constexpr double kScatter = 10;        // per complex vector written to its frequency
constexpr double kAssemble = 3;        // per vector of covariance entries assembled
constexpr double kDot = 1.4;           // per vector product of the lag tiles
constexpr double kSingleDot = 2.5;     // the same where a tile has one channel
constexpr double kDotSum = 12;         // per dot product: its reduction and bookkeeping
constexpr double kLagPair = 400;       // per pair of taps: planning and bookkeeping
constexpr double kSpectralPair = 1000;
constexpr double kBandProduct = 0.55;  // per vector product of the register tiles
constexpr double kBandCopy = 4.5;      // per window of a channel copied
constexpr double kBandLine = 15;       // per image row of a channel brought in
constexpr double kBandTable = 15;      // per vector of sums added to a table
constexpr double kBandAssemble = 35;   // per vector of a table added to the covariance
constexpr double kBandCall = 5e3;      // memory and plan
// Beyond so many elements the tables outgrow the caches.
constexpr double kBandTables = 1 << 18;

}  // namespace cost

// How much longer work takes that only so many threads can share.
inline double idle_factor(double tasks) {
  const double threads = at::get_num_threads();
  return threads / std::min(threads, std::max(tasks, 1.0));
}

inline double patches_cost(const ConvSizes& x, const ConvGeometry& g, double lanes, bool is_float) {
  const double d = static_cast<double>(x.channels / g.groups * g.taps());
  const double rows = static_cast<double>(x.samples * g.positions());
  const double width = 2 * lanes, panels = std::ceil(d / width);
  const double products = d <= lanes ? d : (panels * (panels + 1) / 2 - panels / 4) * width * 2;
  const bool tiles =
      is_float && tiles_pay<float>(x.channels / g.groups * g.taps(), x.samples * g.positions());
  const double pack =
      (g.stride_w == 1 ? cost::kPack : cost::kPackStrided) + (tiles ? cost::kTileSplit : 0);
  const double least = static_cast<double>(kPanelRows * kSlabs);
  const double most = static_cast<double>(kPanelRows * kLevel);
  const double fitting = static_cast<double>(kChunk) / (panels * width);
  const double together =
      d <= static_cast<double>(kPrivateOrder) ? most : std::clamp(fitting, least, most);
  const double chunks = std::ceil(rows / together);
  const double lines = static_cast<double>(x.samples * g.out_h);
  return static_cast<double>(g.groups) *
         (rows * (products * (tiles ? cost::kTileProduct : 1) + pack * d) +
          lines * d * cost::kPackLine + chunks * d * d / 2 * cost::kUpdate);
}

// What the other ways cost at least: their planning alone, pair of taps by pair.
inline double least_planned_cost(const ConvGeometry& g) {
  const double taps = static_cast<double>(g.taps());
  return static_cast<double>(g.groups) * taps * taps *
         std::min(cost::kLagPair, cost::kSpectralPair);
}

// Factors that a transform of this length passes through.
inline double fft_factors(int64_t length) {
  double factors = 0;
  for (const int64_t radix : {8, 7, 5, 4, 3, 2}) {
    while (length % radix == 0) {
      length /= radix;
      factors += radix > 4 ? 1.3 : 1;
    }
  }
  return factors;
}

inline double spectral_cost(const ConvSizes& x, const ConvGeometry& g, const ConvAxis& h,
                            const ConvAxis& w, double lanes) {
  const double length_h = static_cast<double>(fft_length(h.span + h.max_lag));
  const double length_w = static_cast<double>(fft_length(w.span + w.max_lag));
  const double phases_h = static_cast<double>(h.phases), phases_w = static_cast<double>(w.phases);
  const double group_blocks = std::ceil(static_cast<double>(x.channels / g.groups) / lanes);
  const double blocks = group_blocks * static_cast<double>(g.groups);
  const double tiles = blocks * (group_blocks + 1) / 2;
  const double pairs = std::ceil(static_cast<double>(x.samples) / 2);
  const double taps = static_cast<double>(g.taps());

  const double pixels = 2 * static_cast<double>(x.width) * phases_h * static_cast<double>(h.span);
  const double rows = phases_h * phases_w * static_cast<double>(h.span) * length_w;
  const double grid = phases_h * phases_w * length_h * length_w;
  const double transform =
      pairs * blocks *
      (pixels * cost::kPixel + rows * cost::kFft * (0.5 + fft_factors(w.span + w.max_lag)) +
       grid * (cost::kFft * (0.5 + fft_factors(h.span + h.max_lag)) + cost::kScatter));

  const double per_pair = grid * blocks * 2 * lanes;
  const double fewest = static_cast<double>(kFewestPairs);
  const double chunk = std::clamp(static_cast<double>(kSignals) / per_pair, fewest, pairs);
  const double chunks = std::ceil(pairs / std::max(chunk, 1.0));
  const double lags_h = static_cast<double>(h.max_lag), lags_w = static_cast<double>(w.lags.size());
  const double singles_h = static_cast<double>(h.singles.size());
  const double singles_w = static_cast<double>(w.singles.size());
  const double image = phases_h * phases_w * grid * (4 * pairs + chunks * (8 + 4 * lags_h));
  const double row_singles = singles_h * phases_w * phases_w * length_w *
                             (4 * pairs + chunks * 4 * lags_w / (phases_w * phases_w));
  const double column_singles =
      singles_w * phases_h * phases_h * length_h *
      (4 * pairs + chunks * 4 * static_cast<double>(h.lags.size()) / (phases_h * phases_h));
  const double corners = singles_h * singles_w * (4 * pairs + 6 * chunks);
  const double terms = static_cast<double>(h.terms * w.terms);
  const double pairs_of_taps = static_cast<double>(g.groups) * taps * taps * cost::kSpectralPair *
                               idle_factor(static_cast<double>(g.groups));
  return pairs_of_taps + transform +
         tiles * lanes *
             (image + row_singles + column_singles + corners +
              chunks * (4 * terms + cost::kAssemble * taps * taps));
}

inline double lags_cost(const ConvSizes& x, const ConvGeometry& g, const ConvAxis& h,
                        const ConvAxis& w, double lanes) {
  const double channels = static_cast<double>(x.channels / g.groups);
  const double n = static_cast<double>(x.samples), taps = static_cast<double>(g.taps());
  const double dot = channels < 2 ? cost::kSingleDot : cost::kDot;
  double total = 0;
  for (const ConvFamily& family : make_families(h, w)) {
    const double products =
        static_cast<double>(family.border_h ? h.singles.size() : h.lags.size()) *
        static_cast<double>(family.border_w ? w.singles.size() : w.lags.size()) / 2;
    if (products == 0) continue;
    const double signals = static_cast<double>(family.signals);
    const double elements = n * static_cast<double>(family.lines * family.pitch);
    const double runs = std::ceil(elements / static_cast<double>(kRun));
    const double idle = idle_factor(static_cast<double>(g.groups) * runs);
    total +=
        idle * products * channels * channels * (elements / lanes * dot + runs * cost::kDotSum);
    total += idle * signals * channels * elements / lanes * 2;
  }
  const double terms = static_cast<double>(h.terms * w.terms);
  const double assembly = channels * channels * (2 * terms + cost::kAssemble * taps * taps) +
                          taps * taps * cost::kLagPair;
  const double idle = idle_factor(static_cast<double>(g.groups));
  return static_cast<double>(g.groups) * (total + idle * assembly);
}

inline double bands_cost(const ConvSizes& x, const ConvGeometry& g, double lanes) {
  const BandPlan plan(g, x.height);
  const double channels = static_cast<double>(x.channels / g.groups);
  const double columns = channels * static_cast<double>(g.kernel_w);
  const double vectors = columns * std::ceil(columns / lanes);
  if (static_cast<double>(plan.tables) * vectors * lanes > cost::kBandTables) {
    return std::numeric_limits<double>::infinity();
  }
  const double n = static_cast<double>(x.samples), height = static_cast<double>(x.height);
  const double positions = static_cast<double>(g.out_w);
  const double kept = positions * std::ceil(columns / lanes) * lanes;
  const double samples = std::clamp(static_cast<double>(kBandElements) / (height * kept), 1.0, n);
  double pairs = 0, flushed = 0, assembled = 0;
  for (const BandClass& rows : plan.classes) {
    const double count = static_cast<double>(rows.rows), lags = static_cast<double>(rows.lags);
    pairs += count * lags;
    flushed += lags * std::ceil(count * samples * positions / static_cast<double>(kBandSum));
    assembled += lags * static_cast<double>(rows.taps.size());
  }
  const double lines = n * height * channels;
  const double copies =
      lines * positions * (g.dilation_w == 1 ? 1 : static_cast<double>(g.kernel_w));
  const double work = n * positions * pairs * vectors * cost::kBandProduct +
                      copies * cost::kBandCopy + lines * cost::kBandLine +
                      n / samples * flushed * vectors * cost::kBandTable;
  const double groups = static_cast<double>(g.groups);
  return groups * (work * idle_factor(groups * n) + assembled * vectors * cost::kBandAssemble) +
         cost::kBandCall;
}

}  // namespace hesskern::cpu
