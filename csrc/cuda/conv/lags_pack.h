// Images to the signals whose products lags.cu takes, channels last: float32, or the 16-bit
// parts of core/parts_product.h.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "cuda/core/elements.h"
#include "cuda/core/float16_parts.h"
#include "cuda/core/launch.h"
#include "cuda/core/warp.h"
#include "lags_plan.h"

namespace hesskern::cuda {

// Rows and channels of a tile, and threads of a block: so many rows, and lines of them.
constexpr int kPackSide = 32, kPackLines = 8, kPackChannels = 64;
// Channels that a block packs, tile after tile: finding its rows takes longer than a tile.
constexpr int64_t kBlockChannels = 2 * kPackChannels;

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

  int64_t blocks() const {
    return groups * family.signals * ceil_div(rows, kPackSide) *
           ceil_div(packed_channels, kBlockChannels);
  }
  // Words of 16-bit elements of a part.
  __device__ int64_t part_words() const {
    return groups * family.signals * rows * packed_channels / 2;
  }
};

// Families that are packed in one launch, one after another; ends: of their blocks.
template <typename In>
struct LagPackings {
  LagPacking<In> families[4];
  int64_t ends[4];
  int count;
};

// A block's rows and channels, which it reads along the positions of an image.
template <typename In>
class LagRows {
 public:
  // A tile [row, channel]. Neighbouring rows, and neighbouring pairs of channels, are in different
  // banks.
  struct Tile {
    static constexpr int kPitch = kPackChannels + 1;
    float values[kPackSide * kPitch];

    __device__ float& at(int row, int channel) {
      return values[row * kPitch + channel % 2 * (kPackChannels / 2) + channel / 2];
    }
  };

  int64_t row0, channel0, end, signal, group;

  __device__ LagRows(const LagPacking<In>& packing, const LagBorders& borders, int64_t block) {
    const ConvInputCovariance<In, float>& call = packing.call;
    const LagFamily& family = packing.family;
    const int64_t row_tiles = ceil_div(packing.rows, kPackSide);
    const int64_t channel_blocks = ceil_div(packing.packed_channels, kBlockChannels);
    row0 = block % row_tiles * kPackSide;
    block /= row_tiles;
    channel0 = block % channel_blocks * kBlockChannels;
    end = channel0 + kBlockChannels < packing.packed_channels ? channel0 + kBlockChannels
                                                              : packing.packed_channels;
    signal = block / channel_blocks;
    group = signal / family.signals;
    const int64_t own = signal % family.signals;
    const int64_t row = row0 + static_cast<int>(threadIdx.x) - family.margin;
    const int64_t line = row / family.pitch, column = row % family.pitch;
    const int64_t n = line / family.lines;
    const int64_t v = family.border_h ? borders.h[own / packing.borders_w]
                                      : packing.first_h + line % family.lines;
    const int64_t u =
        family.border_w ? borders.w[own % packing.borders_w] : packing.first_w + column;
    inside_ = row >= 0 && n < call.samples && v >= packing.low_h && v < packing.high_h &&
              u >= packing.low_w && u < packing.high_w;
    from_ = call.x + n * call.sample_stride + (v - call.padding_h) * call.row_stride +
            (u - call.padding_w) * call.column_stride +
            group * call.group_channels * call.channel_stride;
  }

  // The tile from that channel on, complete for all threads, which may read others until then.
  __device__ void read(const LagPacking<In>& packing, int64_t first, Tile& tile) const {
    constexpr int kCount = kPackChannels / kPackLines;
    const ConvInputCovariance<In, float>& call = packing.call;
    const int y = static_cast<int>(threadIdx.y);
    float values[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int64_t channel = first + y + i * kPackLines;
      values[i] = inside_ && channel < call.group_channels
                      ? to_float(from_[channel * call.channel_stride])
                      : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      tile.at(static_cast<int>(threadIdx.x), y + i * kPackLines) = values[i];
    }
    __syncthreads();
  }

 private:
  bool inside_;
  const In* from_;
};

// The family that a block packs, and the block's place in it.
template <typename In>
__device__ const LagPacking<In>& family_of(const LagPackings<In>& packings, int64_t& block) {
  block = blockIdx.x;
  int which = 0;
  while (which + 1 < packings.count && block >= packings.ends[which]) ++which;
  if (which > 0) block -= packings.ends[which - 1];
  return packings.families[which];
}

// All families to float32.
template <typename In>
__global__ void __launch_bounds__(kPackSide* kPackLines)
    pack_signals_kernel(const __grid_constant__ LagPackings<In> packings,
                        const __grid_constant__ LagBorders borders, float* out) {
  __shared__ typename LagRows<In>::Tile tile;
  int64_t block;
  const LagPacking<In>& packing = family_of(packings, block);
  const LagRows<In> place(packing, borders, block);
  out += packing.begin;
  const int x = static_cast<int>(threadIdx.x);
  for (int64_t first = place.channel0; first < place.end; first += kPackChannels) {
    place.read(packing, first, tile);
    for (int y = static_cast<int>(threadIdx.y); y < kPackSide; y += kPackLines) {
      const int64_t target = place.row0 + y;
      if (target >= packing.rows) break;
      float* const to =
          out + (place.signal * packing.rows + target) * packing.packed_channels + first;
      for (int c = x; c < kPackChannels && first + c < packing.packed_channels; c += kPackSide) {
        to[c] = tile.at(y, c);
      }
    }
  }
}

// Two neighbouring channels as 16-bit words.
template <typename In>
__device__ inline uint32_t narrow_pair(float x, float y) {
  if constexpr (std::is_same_v<In, BFloat16>) return bits_of(x) >> 16 | (bits_of(y) & 0xffff0000u);
  return float16_pair(x, y);
}

// All families to parts, of each [parts, groups, signals, rows, channels]; exponents [groups,
// pitch], of float32.
template <typename In>
__global__ void __launch_bounds__(kPackSide* kPackLines)
    pack_parts_kernel(const __grid_constant__ LagPackings<In> packings,
                      const __grid_constant__ LagBorders borders, const int* exponents,
                      int64_t exponent_pitch, uint32_t* out) {
  static_assert(kPackChannels == 2 * kPackSide);
  __shared__ typename LagRows<In>::Tile tile;
  int64_t block;
  const LagPacking<In>& packing = family_of(packings, block);
  const LagRows<In> place(packing, borders, block);
  out += packing.begin;
  [[maybe_unused]] const int64_t part_words = packing.part_words();
  const int pair = static_cast<int>(threadIdx.x);
  for (int64_t first = place.channel0; first < place.end; first += kPackChannels) {
    place.read(packing, first, tile);
    const int64_t channel = first + 2 * pair;
    // Not return: barriers follow.
    if (channel >= packing.packed_channels) continue;
    [[maybe_unused]] int exponent[2];
    if constexpr (sizeof(In) == 4) {
      const int* const own = exponents + place.group * exponent_pitch + channel;
      exponent[0] = own[0];
      exponent[1] = own[1];
    }
#pragma unroll
    for (int i = 0; i < kPackSide / kPackLines; ++i) {
      const int y = static_cast<int>(threadIdx.y) + i * kPackLines;
      const int64_t target = place.row0 + y;
      if (target >= packing.rows) break;
      uint32_t* const to =
          out + ((place.signal * packing.rows + target) * packing.packed_channels + channel) / 2;
      const float one = tile.at(y, 2 * pair), two = tile.at(y, 2 * pair + 1);
      if constexpr (sizeof(In) == 4) {
        split_pair(times_power(one, exponent[0]), times_power(two, exponent[1]), to[0],
                   to[part_words]);
      } else {
        to[0] = narrow_pair<In>(one, two);
      }
    }
  }
}

// How the search for every channel's largest value is cut: planes in pieces of so many pixels, all
// samples' pieces among so many parts. A plane's pixels may lie one step apart (flat), and in fours
// at multiples of 16 bytes.
struct LargestCut {
  static constexpr int kWarps = kThreads / 32;
  // Of all channels, and of a channel's pixels.
  static constexpr int64_t kMostParts = 256;

  int64_t pieces, length;
  int parts;
  bool by_channels, flat, fours;

  explicit LargestCut(const ConvInputCovariance<float, float>& call)
      : by_channels(call.channel_stride == 1 && call.column_stride != 1),
        flat(call.height == 1 || call.row_stride == call.width * call.column_stride),
        fours(flat && call.column_stride == 1 && call.sample_stride % 4 == 0 &&
              call.channel_stride % 4 == 0 && is_aligned(call.x, 16)) {
    // What keeps a block's loads in flight for some time, and about as many warps as are resident
    // twice over.
    const int64_t least = by_channels ? 256 : 1024;
    const int64_t warps = blocks(call) * kWarps, most_warps = 128 * current_device().processors;
    const int64_t pixels = call.height * call.width;
    pieces = std::clamp<int64_t>(kMostParts / call.samples, 1, ceil_div(pixels, least));
    length = ceil_div(ceil_div(pixels, pieces), 128) * 128;
    pieces = ceil_div(pixels, length);
    parts = static_cast<int>(
        std::min({call.samples * pieces, kMostParts, std::max<int64_t>(most_warps / warps, 1)}));
  }
  // Of a part.
  int64_t blocks(const ConvInputCovariance<float, float>& call) const {
    return ceil_div(call.sum.groups * call.group_channels, by_channels ? 32 : kWarps);
  }
};

// largest [groups * channels, parts]: bits of the largest magnitude of every channel over a part of
// the pieces. A warp takes a channel; by channels a block takes 32 of them, its lanes neighbours.
// Bound by memory: one read.
__global__ void __launch_bounds__(kThreads)
    largest_of_channels_kernel(ConvInputCovariance<float, float> call, LargestCut cut,
                               uint32_t* largest) {
  constexpr int kWarps = LargestCut::kWarps;
  __shared__ uint32_t all[kWarps][32];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t channels = call.sum.groups * call.group_channels;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * (cut.by_channels ? 32 : kWarps) +
                          (cut.by_channels ? lane : warp);
  const int64_t pixels = call.height * call.width;
  const int first = cut.by_channels ? warp : lane, step = cut.by_channels ? kWarps : 32;
  uint32_t most = 0;
  const auto take = [&](float value) {
    const uint32_t bits = bits_of(value) & 0x7fffffffu;
    most = bits > most ? bits : most;
  };
  for (int64_t item = blockIdx.y; channel < channels && item < call.samples * cut.pieces;
       item += gridDim.y) {
    const float* const plane =
        call.x + item / cut.pieces * call.sample_stride + channel * call.channel_stride;
    const int64_t begin = item % cut.pieces * cut.length;
    const int64_t end = begin + cut.length < pixels ? begin + cut.length : pixels;
    int64_t pixel = begin + first;
    if (cut.fours) {
#pragma unroll 8
      for (int64_t four = begin / 4 + lane; four < end / 4; four += 32) {
        const Four<float> values = load_four(plane + 4 * four);
#pragma unroll
        for (int i = 0; i < 4; ++i) take(values.value[i]);
      }
      pixel = end / 4 * 4 + lane;
    }
    if (cut.flat) {
#pragma unroll 8
      for (; pixel < end; pixel += step) take(plane[pixel * call.column_stride]);
    } else {
      const int width = static_cast<int>(call.width);
#pragma unroll 4
      for (; pixel < end; pixel += step) {
        const int at = static_cast<int>(pixel);
        take(plane[at / width * call.row_stride + at % width * call.column_stride]);
      }
    }
  }
  if (!cut.by_channels) {
    most = warp_max(most);
    if (lane == 0 && channel < channels) largest[channel * gridDim.y + blockIdx.y] = most;
    return;
  }
  all[warp][lane] = most;
  __syncthreads();
  if (warp != 0 || channel >= channels) return;
  for (int w = 1; w < kWarps; ++w) most = all[w][lane] > most ? all[w][lane] : most;
  largest[channel * gridDim.y + blockIdx.y] = most;
}

// exponents [groups, repeats, packed_channels] from largest [groups * channels, parts], by a warp
// each.
__global__ void __launch_bounds__(kThreads)
    channel_exponents_kernel(const uint32_t* largest, int parts, int64_t channels, int64_t groups,
                             int64_t packed_channels, int64_t repeats, int* exponents) {
  constexpr int kWarps = kThreads / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t index =
      static_cast<int64_t>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32;
  if (index >= groups * packed_channels) return;
  const int64_t group = index / packed_channels, channel = index % packed_channels;
  uint32_t most = 0;
  if (channel < channels) {
    const uint32_t* const own = largest + (group * channels + channel) * parts;
#pragma unroll 8
    for (int part = lane; part < parts; part += 32) most = own[part] > most ? own[part] : most;
  }
  const int exponent = packed_exponent(warp_max(most), 0);
  for (int64_t i = lane; i < repeats; i += 32) {
    exponents[(group * repeats + i) * packed_channels + channel] = exponent;
  }
}

}  // namespace hesskern::cuda
