// Input covariance of a convolution of few channels, stride 1, by lags in float32 arithmetic.
//
// Entry (c, ky, kx), (c', ky + dy, kx + dx) sums x[c, u, w] x[c', u + dy, w + dx] over the rows u
// and columns w that entry (ky, kx) sees: all but some of the first and last `border` lines. So the
// sums over the middle of the image are those of all entries of a lag, k (2 k - 1) C^2 of them
// instead of (C k^2)^2 / 2, and border lines and corner pixels are summed by themselves and added
// to the entries that see them.
//
// lag_kernel: a block holds a tile of rows of all channels in shared memory, zeros around it, the
// next tile on its way; warp dy, lanes at four columns each, C^2 (2 k - 1) sums in registers:
// C^2 (2 k - 1) 4 fused multiply-adds for C (1 + 5) reads of 16 bytes (3 channels, 7 x 7: 468 for
// 18). Border rows are tiles of several samples; of border columns and corners a lane takes a pixel
// instead of four columns. They are cut into parts that all blocks take in turn behind their share
// of the middle: what a part costs beside a tile of the middle need not be known, as it hangs on
// copies as much as on arithmetic. assemble_kernel: eight lags a block, all of their sums and
// entries.
// Bound by the multiply-adds: N H W C^2 k (2 k - 1) in all, and two reads of the images.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cuda/core/device.h"
#include "cuda/core/elements.h"
#include "cuda/core/launch.h"
#include "cuda/core/warp.h"
#include "few_channels.h"

namespace hesskern::cuda {

namespace {

// Zeros on both sides of a row, at least the largest lag.
constexpr int kPad = 8;
// Rows of a tile; and elements of images that are made contiguous at a time: 256 MB.
constexpr int kTileRows = 16;
constexpr int64_t kPacked = 1 << 26;
// From a line of a strip to the next: the pieces of four that a lane reads of it, and no two of
// eight lanes from the same banks.
constexpr int kStripPitch = 20;

// x [samples, channels, height, width] contiguous; border: how many lines at each end of an axis
// some entries of the kernel do not see.
struct Image {
  const float* x;
  int samples, height, width, border;
};

// How the sums are shared out. Classes of rows are the first border ones, the middle, and the last
// ones, and so of columns; a part is the sums over some samples of one class of each. First the
// middle's, at most one a block; then so many of every border row's middle, of every border
// column's, and of every corner pixel. Blocks take them in turn.
struct Parts {
  int middle, of_row, of_column, of_corner;

  __host__ __device__ int rows(int border) const { return 2 * border * of_row; }
  __host__ __device__ int columns(int border) const { return 2 * border * of_column; }
  __host__ __device__ int all(int border) const {
    return middle + rows(border) + columns(border) + 4 * border * border * of_corner;
  }
};

// Which line of `size` a border line is: the first ones, then the last.
__device__ inline int line_of(int number, int size, int border) {
  return number < border ? number : size - 2 * border + number;
}

// What a part sums over: rows [top, top + rows) of samples [begin, end), of them the middle columns
// or, of `pixels`, one column; tiles of some samples or, where a sample takes several, of some
// rows.
struct PartTiles {
  bool pixels;
  int column, top, rows, tile_rows, tile_samples, chunks;
  int begin, end, first, step, count;

  template <int kLag>
  __device__ static PartTiles of(const Image& image, const Parts& parts, int part, int pitch) {
    constexpr int kLines = kTileRows + kLag;
    const int border = image.border, middle_rows = image.height - 2 * border;
    PartTiles t{false, 0, border, middle_rows, kTileRows, 1, 0, 0, image.samples, 0, 1, 0};
    int number = part - parts.middle, of = parts.of_row;
    if (number < 0) {
      t.first = part;
      t.step = parts.middle;
    } else if (number < parts.rows(border)) {
      t.top = line_of(number / of, image.height, border);
      t.rows = t.tile_rows = 1;
      t.tile_samples = kLines / (kLag + 1);
    } else {
      t.pixels = true;
      number -= parts.rows(border);
      of = parts.of_column;
      int column = number / of;
      if (number >= parts.columns(border)) {
        number -= parts.columns(border);
        of = parts.of_corner;
        column = number / of % (2 * border);
        t.top = line_of(number / of / (2 * border), image.height, border);
        t.rows = 1;
      }
      t.column = line_of(column, image.width, border);
      const int lines = kLines * pitch / kStripPitch;
      t.tile_rows = t.rows < lines - kLag ? t.rows : lines - kLag;
      t.tile_samples = t.tile_rows < t.rows ? 1 : lines / (t.tile_rows + kLag);
    }
    t.chunks = (t.rows + t.tile_rows - 1) / t.tile_rows;
    if (part >= parts.middle) {
      const int each = (image.samples + of - 1) / of;
      t.begin = number % of * each;
      t.end = t.begin + each < image.samples ? t.begin + each : image.samples;
    }
    const int samples = t.end > t.begin ? t.end - t.begin : 0;
    t.count = (samples + t.tile_samples - 1) / t.tile_samples * t.chunks;
    return t;
  }
};

// One of the tiles.
struct PartTile {
  int sample, samples, top, rows;

  __device__ PartTile(const PartTiles& t, int tile) {
    const int chunk = tile % t.chunks * t.tile_rows;
    sample = t.begin + tile / t.chunks * t.tile_samples;
    samples = t.end - sample < t.tile_samples ? t.end - sample : t.tile_samples;
    top = t.top + chunk;
    rows = t.rows - chunk < t.tile_rows ? t.rows - chunk : t.tile_rows;
  }
};

// Adds up kUsed values over the lanes, each half of the lanes taking half of the values with it: of
// value i of the result, place_of says which it was. A quarter of the exchanges that sums one by
// one take.
template <int kMask, int kUsed, int kCount>
__device__ inline void fold(float (&values)[kCount], int lane) {
  constexpr int kHalf = (kUsed + 1) / 2;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float low = values[i], high = i + kHalf < kUsed ? values[i + kHalf] : 0.0f;
    const bool upper = (lane & kMask) != 0;
    values[i] = (upper ? high : low) + from_lane_xor(upper ? low : high, kMask);
  }
  if constexpr (kMask > 1) fold<kMask / 2, kHalf>(values, lane);
}
template <int kMask, int kUsed>
__device__ inline int place_of(int i, int lane) {
  constexpr int kHalf = (kUsed + 1) / 2;
  if constexpr (kMask > 1) i = place_of<kMask / 2, kHalf>(i, lane);
  if (i >= 0 && (lane & kMask) != 0) i += kHalf;
  return i < kUsed ? i : -1;
}

// A lane's sums over lags dx of one dy.
template <int kChannels, int kLag>
struct LagSums {
  static constexpr int kWide = 2 * kLag + 1;
  float value[kChannels][kChannels][kWide];

  __device__ void clear() {
#pragma unroll
    for (int a = 0; a < kChannels; ++a) {
#pragma unroll
      for (int b = 0; b < kChannels; ++b) {
#pragma unroll
        for (int d = 0; d < kWide; ++d) value[a][b][d] = 0.0f;
      }
    }
  }

  // Of neighbouring pixels, against those from kFirst words behind other on, which is of the first
  // channel, dy lines below, and a multiple of 16 bytes.
  template <int kFirst, int kCount>
  __device__ void add(const float (&one)[kChannels][kCount], const float* other, int channel_step) {
    constexpr int kEnd = kFirst + kWide + kCount - 1;
#pragma unroll
    for (int b = 0; b < kChannels; ++b) {
      const float* const from = other + b * channel_step;
      float window[(kEnd + 3) / 4 * 4];
#pragma unroll
      for (int i = kFirst / 4; i < (kEnd + 3) / 4; ++i) {
        const Four<float> four = load_four(from + 4 * i);
#pragma unroll
        for (int e = 0; e < 4; ++e) window[4 * i + e] = four.value[e];
      }
#pragma unroll
      for (int a = 0; a < kChannels; ++a) {
#pragma unroll
        for (int d = 0; d < kWide; ++d) {
#pragma unroll
          for (int e = 0; e < kCount; ++e) {
            value[a][b][d] += one[a][e] * window[kFirst + d + e];
          }
        }
      }
    }
  }

  // out [c, c', dx], over all lanes.
  __device__ void write(float* out, int lane) const {
    constexpr int kCount = kChannels * kChannels * kWide;
    float all[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      all[i] = value[i / kWide / kChannels][i / kWide % kChannels][i % kWide];
    fold<16, kCount>(all, lane);
#pragma unroll
    for (int i = 0; i < (kCount + 31) / 32; ++i) {
      const int place = place_of<16, kCount>(i, lane);
      if (place >= 0) out[place] = all[i];
    }
  }
};

// Blocks of the next kernel that a multiprocessor's registers hold, by channels and lag / 2: what
// the middle's loop alone would leave room for.
constexpr int kLagBlocks[3][3] = {{9, 5, 4}, {7, 3, 2}, {5, 2, 1}};

// partial [parts, dy, c, c', dx].
template <int kChannels, int kLag, bool kVector>
__global__ void __launch_bounds__(32 * (kLag + 1), kLagBlocks[kChannels - 1][kLag / 2 - 1])
    lag_kernel(Image image, Parts parts, float* partial) {
  constexpr int kBlock = 32 * (kLag + 1), kWide = 2 * kLag + 1, kLines = kTileRows + kLag;
  // Pieces of four of a strip's line, wherever among four its first column lies.
  constexpr int kAcross = (3 + kWide + 3) / 4;
  static_assert(kLag <= kPad && 4 * kAcross <= kStripPitch);
  float* const memory = reinterpret_cast<float*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, dy = thread / 32;
  const int fours = (image.width + 3) / 4, pitch = 4 * fours + 2 * kPad;
  const int channel_step = kLines * pitch, tile_size = kChannels * channel_step;
  const int64_t plane = static_cast<int64_t>(image.height) * image.width;
  const int all = parts.all(image.border);
  LagSums<kChannels, kLag> sums;
  for (int part = static_cast<int>(blockIdx.x); part < all; part += static_cast<int>(gridDim.x)) {
    const PartTiles tiles = PartTiles::of<kLag>(image, parts, part, pitch);
    const int depth = tiles.tile_rows + kLag, lines = tiles.tile_samples * depth;
    // Where a strip's lines begin in the image: at a multiple of four, with the first lag's column
    // among the first four.
    const int strip = (tiles.column - kLag + kPad) / 4 - kPad / 4;
    const int shift = tiles.column - kLag - 4 * strip;
    // Zeros beside the rows stay.
    for (int i = thread; !tiles.pixels && i < 2 * kChannels * kLines * 2 * kPad; i += kBlock) {
      const int line = i / (2 * kPad), place = i % (2 * kPad);
      memory[line * pitch + (place < kPad ? place : 4 * fours + place)] = 0.0f;
    }
    const auto copy = [&](int number, int buffer) {
      if (number < tiles.count) {
        const PartTile tile(tiles, number);
        const float* const from = image.x + static_cast<int64_t>(tile.sample) * kChannels * plane;
        float* const to = memory + buffer * tile_size;
        // Of a line of the tile the piece f of the image, to that many words behind its first one.
        const auto copy_piece_of = [&](int line, int f, int words) {
          const int n = tiles.tile_samples == 1 ? 0 : line / depth;
          const int row = tile.top + line - n * depth;
          const int left = image.width - 4 * f;
          const bool inside = n < tile.samples && row < image.height && f >= 0 && left > 0;
          const int64_t place = n * kChannels * plane + static_cast<int64_t>(row) * image.width;
#pragma unroll
          for (int c = 0; c < kChannels; ++c) {
            copy_four(to + c * channel_step + words,
                      inside ? from + place + c * plane + 4 * f : image.x,
                      !inside    ? 0
                      : left < 4 ? left
                                 : 4,
                      kVector);
          }
        };
        if (tiles.pixels) {
          for (int i = thread; i < lines * kAcross; i += kBlock) {
            const int line = i / kAcross, f = i % kAcross;
            copy_piece_of(line, strip + f, line * kStripPitch + 4 * f);
          }
        } else {
          for (int i = thread; i < lines * fours; i += kBlock) {
            const int line = i / fours, f = i - line * fours;
            copy_piece_of(line, f, line * pitch + kPad + 4 * f);
          }
        }
      }
      close_copies();
    };

    sums.clear();
    copy(tiles.first, 0);
    int buffer = 0;
    for (int number = tiles.first; number < tiles.count; number += tiles.step, buffer ^= 1) {
      copy(number + tiles.step, buffer ^ 1);
      wait_for_copies<1>();
      __syncthreads();
      const PartTile tile(tiles, number);
      const float* const begin = memory + buffer * tile_size;
      if (tiles.pixels) {
        const auto add_pixels = [&](auto first) {
          for (int i = lane; i < tile.samples * tile.rows; i += 32) {
            const int n = i / tile.rows;
            const float* const place = begin + (n * depth + i - n * tile.rows) * kStripPitch;
            float one[kChannels][1];
#pragma unroll
            for (int a = 0; a < kChannels; ++a) {
              one[a][0] = place[a * channel_step + decltype(first)::value + kLag];
            }
            sums.template add<decltype(first)::value>(one, place + dy * kStripPitch, channel_step);
          }
        };
        if (shift == 0) {
          add_pixels(std::integral_constant<int, 0>());
        } else if (shift == 1) {
          add_pixels(std::integral_constant<int, 1>());
        } else if (shift == 2) {
          add_pixels(std::integral_constant<int, 2>());
        } else {
          add_pixels(std::integral_constant<int, 3>());
        }
      } else {
        // Several rows of a sample, or one of several.
        const bool alone = tiles.tile_samples == 1;
        const int here = alone ? tile.rows : tile.samples;
        const int row_step = alone ? pitch : depth * pitch;
        int row = 0, f = lane;
        while (f >= fours) f -= fours, ++row;
        while (row < here) {
          const float* const place = begin + row * row_step + 4 * f;
          float one[kChannels][4];
#pragma unroll
          for (int a = 0; a < kChannels; ++a) {
            const Four<float> four = load_four(place + a * channel_step + kPad);
#pragma unroll
            for (int e = 0; e < 4; ++e) one[a][e] = four.value[e];
          }
          if (4 * f < image.border || 4 * f + 4 > image.width - image.border) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int w = 4 * f + e;
              if (w < image.border || w >= image.width - image.border) {
#pragma unroll
                for (int a = 0; a < kChannels; ++a) one[a][e] = 0.0f;
              }
            }
          }
          sums.template add<kPad - kLag>(one, place + dy * pitch, channel_step);
          f += 32;
          while (f >= fours) f -= fours, ++row;
        }
      }
      __syncthreads();
    }
    wait_for_copies<0>();
    sums.write(
        partial + (static_cast<int64_t>(part) * (kLag + 1) + dy) * (kChannels * kChannels * kWide),
        lane);
  }
}

constexpr int kAssembleThreads = 1024, kAssembledLags = 8;
// Of an axis: border lines and the middle.
constexpr int kMostClasses = 13;

// sum += alpha times the sums of the classes that an entry's first tap sees. partial as in
// lag_kernel; a block has eight lags, adds up their parts, in order, and assembles their entries.
template <int kChannels, int kLag>
__global__ void __launch_bounds__(kAssembleThreads)
    assemble_kernel(const float* partial, int border, Parts parts, SymmetricSum<float> sum) {
  constexpr int kSide = kLag + 1, kWide = 2 * kLag + 1;
  constexpr int kSize = kSide * kWide * kChannels * kChannels;
  // Half of the threads add up the middle, the other half all else.
  constexpr int kHalf = kAssembleThreads / 2, kDown = kHalf / kAssembledLags, kWarps = kHalf / 32;
  static_assert(kMostClasses >= 2 * kLag + 1);
  __shared__ float table[kMostClasses * kMostClasses][kAssembledLags];
  __shared__ float middle[kWarps][kAssembledLags];
  const int thread = static_cast<int>(threadIdx.x), own = thread % kAssembledLags;
  const int first = static_cast<int>(blockIdx.x) * kAssembledLags;
  const int classes = 2 * border + 1, pairs = classes * classes, centre = pairs / 2;
  const bool inside = first + own < kSize;
  const float* const from = partial + first + own;
  if (thread < kHalf) {
    float total = 0.0f;
#pragma unroll 4
    for (int i = thread / kAssembledLags; i < parts.middle; i += kDown) {
      if (inside) total += from[static_cast<int64_t>(i) * kSize];
    }
    for (int mask = kAssembledLags; mask < 32; mask *= 2) total += from_lane_xor(total, mask);
    if (thread % 32 < kAssembledLags) middle[thread / 32][own] = total;
  } else {
    const auto number_of = [&](int of_axis) { return of_axis < border ? of_axis : of_axis - 1; };
    for (int pair = (thread - kHalf) / kAssembledLags; pair < pairs; pair += kDown) {
      if (pair == centre) continue;
      const int y = pair / classes, x = pair % classes;
      int begin = parts.middle, count = parts.of_row;
      if (x == border) {
        begin += number_of(y) * count;
      } else if (y == border) {
        count = parts.of_column;
        begin += parts.rows(border) + number_of(x) * count;
      } else {
        count = parts.of_corner;
        begin += parts.rows(border) + parts.columns(border) +
                 (number_of(y) * 2 * border + number_of(x)) * count;
      }
      float total = 0.0f;
#pragma unroll 4
      for (int i = begin; i < begin + count; ++i) {
        if (inside) total += from[static_cast<int64_t>(i) * kSize];
      }
      table[pair][own] = total;
    }
  }
  __syncthreads();
  if (thread < kAssembledLags) {
    float total = 0.0f;
    for (int w = 0; w < kWarps; ++w) total += middle[w][thread];
    table[centre][thread] = total;
  }
  __syncthreads();
  const int padding = kLag - border;
  for (int i = thread; i < kAssembledLags * kSide * kSide; i += kAssembleThreads) {
    const int number = i / (kSide * kSide), lag = first + number;
    const int y = i / kSide % kSide, x = i % kSide;
    const int dx = lag % kWide - kLag, b = lag / kWide % kChannels;
    const int a = lag / kWide / kChannels % kChannels, dy = lag / kWide / kChannels / kChannels;
    if (lag >= kSize || y + dy >= kSide || x + dx < 0 || x + dx >= kSide) continue;
    // Each pair of entries once.
    if (dy == 0 && (dx < 0 || (dx == 0 && a > b))) continue;
    // Of the first lines a tap sees those from tap - padding on, of the last as many as the tap is.
    const int top = y > padding ? y - padding : 0, left = x > padding ? x - padding : 0;
    const int bottom = border + (y < border ? y : border);
    const int right = border + (x < border ? x : border);
    float total = 0.0f;
    for (int v = top; v <= bottom; ++v) {
      for (int u = left; u <= right; ++u) total += table[v * classes + u][number];
    }
    const int one = (a * kSide + y) * kSide + x, other = (b * kSide + y + dy) * kSide + x + dx;
    add_to(sum, 0, one < other ? one : other, one < other ? other : one, total);
  }
}

// Images of any strides and type to out [samples, channels, height, width].
template <typename In>
__global__ void __launch_bounds__(kThreads)
    contiguous_kernel(ConvInputCovariance<In, float> call, float* out) {
  const int64_t count = call.samples * call.group_channels * call.height * call.width;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; index < count;
       index += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t column = index % call.width, line = index / call.width;
    const int64_t row = line % call.height, channel = line / call.height % call.group_channels;
    const int64_t sample = line / call.height / call.group_channels;
    out[index] = to_float(call.x[sample * call.sample_stride + channel * call.channel_stride +
                                 row * call.row_stride + column * call.column_stride]);
  }
}

// What a plan has chosen for so many samples.
struct Schedule {
  Parts parts;
  int blocks;
  size_t bytes;
  // Elements of the workspace.
  int64_t size;
};

template <int kChannels, int kLag, bool kVector>
Schedule schedule(const Image& image) {
  constexpr int kSize = (kLag + 1) * (2 * kLag + 1) * kChannels * kChannels;
  const int64_t fours = ceil_div(image.width, 4), pitch = 4 * fours + 2 * kPad;
  const int64_t rows = image.height - 2 * image.border, lines = 2 * image.border;
  Schedule s{};
  s.bytes = static_cast<size_t>(2 * kChannels * (kTileRows + kLag) * pitch) * sizeof(float);
  const int most =
      resident_blocks(reinterpret_cast<const void*>(lag_kernel<kChannels, kLag, kVector>),
                      32 * (kLag + 1), s.bytes);
  const int64_t tiles = image.samples * ceil_div(rows, kTileRows);
  s.parts.middle = static_cast<int>(std::min<int64_t>(most, tiles));
  if (lines > 0) {
    // About, in steps of a lane over four columns, copies among it: a pixel of a column takes half
    // of one, one of a corner more, to add up a part's sums two. Parts that cost the same, three a
    // block, if they are worth it.
    constexpr double kPixel = 0.5, kCorner = 1.5, kSums = 2.0, kLeast = 8.0, kRounds = 3.0;
    const auto samples = static_cast<double>(image.samples);
    const double of_row = samples * static_cast<double>(fours) / 32.0;
    const double of_column = samples * static_cast<double>(rows) * kPixel / 32.0;
    const double of_corner = samples * kCorner / 32.0;
    const auto borders = static_cast<double>(lines);
    const double all =
        borders * (of_row + of_column + 2 * kSums) + borders * borders * (of_corner + kSums);
    const double each = std::max(all / (kRounds * static_cast<double>(most)), kLeast);
    const auto parts_of = [&](double cost) {
      return static_cast<int>(
          std::clamp<int64_t>(static_cast<int64_t>(std::ceil(cost / each)), 1, image.samples));
    };
    s.parts.of_row = parts_of(of_row);
    s.parts.of_column = parts_of(of_column);
    s.parts.of_corner = parts_of(of_corner);
  }
  s.blocks = std::min(most, s.parts.all(image.border));
  s.size = static_cast<int64_t>(s.parts.all(image.border)) * kSize;
  return s;
}

template <int kChannels, int kLag, bool kVector>
cudaError_t run(const Image& image, const SymmetricSum<float>& sum, const Schedule& s,
                float* partial, cudaStream_t stream) {
  constexpr int kSize = (kLag + 1) * (2 * kLag + 1) * kChannels * kChannels;
  const cudaError_t error =
      launch(lag_kernel<kChannels, kLag, kVector>, dim3(static_cast<unsigned>(s.blocks)),
             dim3(32 * (kLag + 1)), s.bytes, stream, image, s.parts, partial);
  if (error != cudaSuccess) return error;
  return launch(assemble_kernel<kChannels, kLag>,
                dim3(static_cast<unsigned>(ceil_div(kSize, kAssembledLags))),
                dim3(kAssembleThreads), 0, stream, static_cast<const float*>(partial), image.border,
                s.parts, sum);
}

// visit(channels, lag, vector) as constants.
template <class Visit>
auto with_constants(int64_t channels, int64_t kernel, bool vector, Visit visit) {
  const auto with_vector = [&](auto c, auto l) {
    return vector ? visit(c, l, std::true_type()) : visit(c, l, std::false_type());
  };
  const auto with_lag = [&](auto c) {
    if (kernel == 3) return with_vector(c, std::integral_constant<int, 2>());
    if (kernel == 5) return with_vector(c, std::integral_constant<int, 4>());
    return with_vector(c, std::integral_constant<int, 6>());
  };
  if (channels == 1) return with_lag(std::integral_constant<int, 1>());
  if (channels == 2) return with_lag(std::integral_constant<int, 2>());
  return with_lag(std::integral_constant<int, 3>());
}

template <typename In>
bool is_contiguous(const ConvInputCovariance<In, float>& call) {
  return std::is_same_v<In, float> && call.column_stride == 1 && call.row_stride == call.width &&
         call.channel_stride == call.height * call.width &&
         (call.samples == 1 || call.sample_stride == call.group_channels * call.channel_stride);
}

}  // namespace

template <typename In>
bool ConvFewChannels<In>::fits() const {
  const int64_t k = call.kernel_h, border = k - 1 - call.padding_h;
  if (k != call.kernel_w || call.padding_h != call.padding_w || border < 0) return false;
  if (k != 3 && k != 5 && k != 7) return false;
  if (call.stride_h != 1 || call.stride_w != 1 || call.dilation_h != 1 || call.dilation_w != 1) {
    return false;
  }
  if (call.sum.groups != 1 || call.group_channels > 3) return false;
  // Entries of the kernel see all of the middle; 32-bit places within an image.
  constexpr int64_t kLargest = 1 << 15, kMostTiles = int64_t{1} << 30;
  if (std::min(call.height, call.width) < 2 * k || std::max(call.height, call.width) > kLargest ||
      call.samples * call.height > kMostTiles) {
    return false;
  }
  const size_t lines = static_cast<size_t>(2 * call.group_channels * (kTileRows + k - 1));
  const size_t lag_bytes = lines * static_cast<size_t>(call.width + 3 + 2 * kPad) * sizeof(float);
  return lag_bytes <= current_device().shared;
}

template <typename In>
Work<float> ConvFewChannels<In>::plan() const {
  const bool contiguous = is_contiguous(call);
  const int64_t sample = call.group_channels * call.height * call.width;
  const int64_t step =
      contiguous ? call.samples : std::clamp<int64_t>(kPacked / sample, 1, call.samples);
  // Packed images begin at a multiple of 16 bytes.
  const int64_t packed = contiguous ? 0 : ceil_div(step * sample, 4) * 4;
  const bool vector =
      call.width % 4 == 0 && (!contiguous || reinterpret_cast<uintptr_t>(call.x) % 16 == 0);
  return with_constants(call.group_channels, call.kernel_h, vector, [&](auto c, auto l, auto v) {
    constexpr int kChannels = decltype(c)::value, kLag = decltype(l)::value;
    constexpr bool kVector = decltype(v)::value;
    const auto image_of = [call = call, kBorder = kLag - call.padding_h](const float* x,
                                                                         int64_t samples) {
      return Image{x, static_cast<int>(samples), static_cast<int>(call.height),
                   static_cast<int>(call.width), static_cast<int>(kBorder)};
    };
    const Schedule whole = schedule<kChannels, kLag, kVector>(image_of(nullptr, step));
    const int64_t last_samples = (call.samples - 1) % step + 1;
    const Schedule last = schedule<kChannels, kLag, kVector>(image_of(nullptr, last_samples));
    return Work<float>{packed + std::max(whole.size, last.size),
                       [=, call = call](float* memory, cudaStream_t stream) {
                         for (int64_t first = 0; first < call.samples; first += step) {
                           ConvInputCovariance<In, float> some = call;
                           some.samples = std::min(step, call.samples - first);
                           some.x += first * call.sample_stride;
                           const float* x = memory;
                           if constexpr (std::is_same_v<In, float>) {
                             if (contiguous) x = some.x;
                           }
                           if (!contiguous) {
                             const cudaError_t error =
                                 launch(contiguous_kernel<In>, grid_for(some.samples * sample),
                                        dim3(kThreads), 0, stream, some, memory);
                             if (error != cudaSuccess) return error;
                           }
                           const cudaError_t error = run<kChannels, kLag, kVector>(
                               image_of(x, some.samples), call.sum,
                               some.samples == step ? whole : last, memory + packed, stream);
                           if (error != cudaSuccess) return error;
                         }
                         return cudaSuccess;
                       }};
  });
}

template struct ConvFewChannels<float>;
template struct ConvFewChannels<BFloat16>;
template struct ConvFewChannels<Float16>;

}  // namespace hesskern::cuda
