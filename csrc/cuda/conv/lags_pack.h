// Images to the signals whose products lags.cu takes, channels last: float32, or the 16-bit
// parts of core/parts_product.h.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "cuda/core/float16_parts.h"
#include "cuda/core/launch.h"
#include "cuda/core/packed_rows.h"
#include "cuda/core/warp.h"
#include "lags_plan.h"

namespace hesskern::cuda {

constexpr int kPackSide = 32, kPackLines = 8;

struct LagBorders {
  int32_t h[kMostBorders], w[kMostBorders];
};

// One family's signals, packed [groups, signals, rows, channels] with channels rounded up.
template <typename In>
struct LagPacking {
  ConvInputCovariance<In, float> call;
  LagFamily family;
  int64_t rows, groups, packed_channels, borders_w;
  // Where they go, in elements.
  int64_t begin;
  // Of the axes, the positions v in [low, high) that are not zero; pixel v - padding.
  int64_t first_h, low_h, high_h, first_w, low_w, high_w;

  LagPacking() = default;
  LagPacking(const ConvInputCovariance<In, float>& call_, const LagPlan& plan, int f,
             int64_t packed_channels_, int64_t begin_)
      : call(call_),
        family(plan.families[f]),
        rows(family.rows(call_.samples)),
        groups(call_.sum.groups),
        packed_channels(packed_channels_),
        borders_w(family.border_w ? static_cast<int64_t>(plan.w.borders.size()) : 1),
        begin(begin_),
        first_h(plan.h.first),
        low_h(plan.h.low[0]),
        high_h(plan.h.high[0]),
        first_w(plan.w.first),
        low_w(plan.w.low[0]),
        high_w(plan.w.high[0]) {}

  int64_t tiles() const {
    return groups * family.signals * ceil_div(rows, kPackSide) *
           ceil_div(packed_channels, kPackSide);
  }
};

// Families that are packed in one launch, one after another; ends: of their blocks.
template <typename In>
struct LagPackings {
  LagPacking<In> families[4];
  int64_t ends[4];
  int count;
};

// A block's tile of 32 rows and 32 channels, which it reads along the positions of an image.
template <typename In>
struct LagTile {
  int64_t row0, channel0, signal, group;

  __device__ LagTile(const LagPacking<In>& packing, int64_t block) {
    const int64_t row_tiles = ceil_div(packing.rows, kPackSide);
    const int64_t channel_tiles = ceil_div(packing.packed_channels, kPackSide);
    row0 = block % row_tiles * kPackSide;
    channel0 = block / row_tiles % channel_tiles * kPackSide;
    signal = block / row_tiles / channel_tiles;
    group = signal / packing.family.signals;
  }

  // tile [row, channel], complete for all threads; borders: null of whole images.
  __device__ void read(const LagPacking<In>& packing, const LagBorders* borders,
                       float (&tile)[kPackSide][kPackSide + 1]) const {
    const ConvInputCovariance<In, float>& call = packing.call;
    const LagFamily& family = packing.family;
    const int64_t own = signal % family.signals;
    const int x = static_cast<int>(threadIdx.x);
    const int64_t row = row0 + x - family.margin;
    const int64_t line = row / family.pitch, column = row % family.pitch;
    const int64_t n = line / family.lines;
    const int64_t v = borders != nullptr && family.border_h ? borders->h[own / packing.borders_w]
                                                            : packing.first_h + line % family.lines;
    const int64_t u = borders != nullptr && family.border_w ? borders->w[own % packing.borders_w]
                                                            : packing.first_w + column;
    const bool inside = row >= 0 && n < call.samples && v >= packing.low_h && v < packing.high_h &&
                        u >= packing.low_w && u < packing.high_w;
    const In* from = call.x + n * call.sample_stride + (v - call.padding_h) * call.row_stride +
                     (u - call.padding_w) * call.column_stride;
    for (int y = static_cast<int>(threadIdx.y); y < kPackSide; y += kPackLines) {
      const int64_t channel = channel0 + y;
      tile[x][y] =
          inside && channel < call.group_channels
              ? to_float(from[(group * call.group_channels + channel) * call.channel_stride])
              : 0.0f;
    }
    __syncthreads();
  }
};

template <typename In>
__global__ void __launch_bounds__(kPackSide* kPackLines)
    pack_signals_kernel(const __grid_constant__ LagPackings<In> packings,
                        const __grid_constant__ LagBorders borders, float* out) {
  __shared__ float tile[kPackSide][kPackSide + 1];
  int which = 0;
  while (which + 1 < packings.count && blockIdx.x >= packings.ends[which]) ++which;
  const LagPacking<In>& packing = packings.families[which];
  out += packing.begin;
  const LagTile<In> place(packing, blockIdx.x - (which == 0 ? 0 : packings.ends[which - 1]));
  place.read(packing, &borders, tile);
  const int x = static_cast<int>(threadIdx.x);
  for (int y = static_cast<int>(threadIdx.y); y < kPackSide; y += kPackLines) {
    const int64_t target = place.row0 + y, channel = place.channel0 + x;
    if (target < packing.rows && channel < packing.packed_channels) {
      out[(place.signal * packing.rows + target) * packing.packed_channels + channel] = tile[y][x];
    }
  }
}

// Two neighbouring channels as 16-bit words.
template <typename In>
__device__ inline uint32_t narrow_pair(float x, float y) {
  if constexpr (std::is_same_v<In, BFloat16>) return bits_of(x) >> 16 | (bits_of(y) & 0xffff0000u);
  return float16_pair(x, y);
}

// Whole images to parts [parts, groups, rows, channels]; exponents [groups, pitch], of float32.
template <typename In>
__global__ void __launch_bounds__(kPackSide* kPackLines)
    pack_parts_kernel(const __grid_constant__ LagPacking<In> packing, const int* exponents,
                      int64_t exponent_pitch, int64_t part_words, uint32_t* out) {
  __shared__ float tile[kPackSide][kPackSide + 1];
  constexpr int kPairs = kPackSide / 2;
  const LagTile<In> place(packing, blockIdx.x);
  place.read(packing, nullptr, tile);
  const int thread = static_cast<int>(threadIdx.y) * kPackSide + static_cast<int>(threadIdx.x);
  const int pair = thread % kPairs;
  const int64_t channel = place.channel0 + 2 * pair;
  if (channel >= packing.packed_channels) return;
  [[maybe_unused]] int exponent[2];
  if constexpr (sizeof(In) == 4) {
    const int* const own = exponents + place.group * exponent_pitch + channel;
    exponent[0] = own[0];
    exponent[1] = own[1];
  }
  constexpr int kStep = kPackSide * kPackLines / kPairs;
#pragma unroll
  for (int y = thread / kPairs; y < kPackSide; y += kStep) {
    const int64_t target = place.row0 + y;
    if (target >= packing.rows) break;
    uint32_t* const to =
        out + ((place.signal * packing.rows + target) * packing.packed_channels + channel) / 2;
    const float one = tile[y][2 * pair], two = tile[y][2 * pair + 1];
    if constexpr (sizeof(In) == 4) {
      split_pair(times_power(one, exponent[0]), times_power(two, exponent[1]), to[0],
                 to[part_words]);
    } else {
      to[0] = narrow_pair<In>(one, two);
    }
  }
}

constexpr int kLargestParts = 64;

// largest [parts, groups * channels]: bits of the largest magnitude of every channel over a part of
// the samples. A block: 32 channels and a part.
template <typename In>
__global__ void __launch_bounds__(kThreads)
    largest_of_channels_kernel(ConvInputCovariance<In, float> call, uint32_t* largest) {
  constexpr int kWarps = kThreads / 32;
  __shared__ uint32_t all[kWarps][32];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t channels = call.sum.groups * call.group_channels;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * 32, pixels = call.height * call.width;
  const auto bits_at = [&](int64_t n, int64_t channel, int64_t pixel) {
    const int64_t place = n * call.sample_stride + channel * call.channel_stride +
                          pixel / call.width * call.row_stride +
                          pixel % call.width * call.column_stride;
    return bits_of(to_float(call.x[place])) & 0x7fffffffu;
  };
  uint32_t* const out = largest + static_cast<int64_t>(blockIdx.y) * channels;
  if (call.channel_stride == 1) {
    // Neighbouring lanes take neighbouring channels.
    uint32_t most = 0;
    if (first + lane < channels) {
      for (int64_t n = blockIdx.y; n < call.samples; n += gridDim.y) {
#pragma unroll 4
        for (int64_t pixel = warp; pixel < pixels; pixel += kWarps) {
          const uint32_t bits = bits_at(n, first + lane, pixel);
          most = bits > most ? bits : most;
        }
      }
    }
    all[warp][lane] = most;
    __syncthreads();
    if (warp != 0 || first + lane >= channels) return;
    for (int w = 1; w < kWarps; ++w) most = all[w][lane] > most ? all[w][lane] : most;
    out[first + lane] = most;
    return;
  }
  for (int64_t channel = first + warp; channel < first + 32 && channel < channels;
       channel += kWarps) {
    uint32_t most = 0;
    for (int64_t n = blockIdx.y; n < call.samples; n += gridDim.y) {
#pragma unroll 4
      for (int64_t pixel = lane; pixel < pixels; pixel += 32) {
        const uint32_t bits = bits_at(n, channel, pixel);
        most = bits > most ? bits : most;
      }
    }
    most = warp_max(most);
    if (lane == 0) out[channel] = most;
  }
}

// exponents [groups, repeats, packed_channels] from largest [parts, groups * channels].
__global__ void __launch_bounds__(kThreads)
    channel_exponents_kernel(const uint32_t* largest, int parts, int64_t channels, int64_t groups,
                             int64_t packed_channels, int64_t repeats, int* exponents) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= groups * packed_channels) return;
  const int64_t group = index / packed_channels, channel = index % packed_channels;
  uint32_t most = 0;
  for (int part = 0; part < parts && channel < channels; ++part) {
    const uint32_t bits = largest[part * groups * channels + group * channels + channel];
    most = bits > most ? bits : most;
  }
  const int exponent = packed_exponent(most, 0);
  for (int64_t i = 0; i < repeats; ++i) {
    exponents[(group * repeats + i) * packed_channels + channel] = exponent;
  }
}

}  // namespace hesskern::cuda
