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
// 18). Bound by these: N H W C^2 k (2 k - 1) in all, and two reads of the images.
#include <algorithm>
#include <type_traits>

#include "conv_few_channels.h"
#include "core/device.h"
#include "core/elements.h"
#include "core/launch.h"
#include "core/warp.h"

namespace hesskern::cuda {

namespace {

// Zeros on both sides of a row, at least the largest lag.
constexpr int kPad = 8;
// Rows of a tile; elements of images that are made contiguous at a time: 256 MB; and bytes of
// shared memory for the strips of one block, of which several should fit on a multiprocessor.
constexpr int kTileRows = 16;
constexpr int64_t kPacked = 1 << 26;
constexpr size_t kStripBytes = 48 << 10;

// x [samples, channels, height, width] contiguous; border: how many lines at each end of an axis
// some entries of the kernel do not see.
struct Image {
  const float* x;
  int64_t samples;
  int height, width, border;
};

// partial [blocks, dy, c, c', dx]: sums of all lags over the middle of the images.
template <int kChannels, int kLag, bool kVector>
__global__ void __launch_bounds__(32 * (kLag + 1), 1) lag_kernel(Image image, float* partial) {
  constexpr int kBlock = 32 * (kLag + 1), kWide = 2 * kLag + 1, kLines = kTileRows + kLag;
  static_assert(kLag <= kPad);
  float* const memory = reinterpret_cast<float*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, dy = thread / 32;
  const int fours = (image.width + 3) / 4, pitch = 4 * fours + 2 * kPad;
  const int tile_size = kChannels * kLines * pitch;
  const int rows = image.height - 2 * image.border;
  const int chunks = (rows + kTileRows - 1) / kTileRows;
  const int64_t tiles = image.samples * chunks;

  // Zeros beside the rows stay.
  for (int i = thread; i < 2 * kChannels * kLines * 2 * kPad; i += kBlock) {
    const int line = i / (2 * kPad), place = i % (2 * kPad);
    memory[line * pitch + (place < kPad ? place : 4 * fours + place)] = 0.0f;
  }
  const auto copy = [&](int64_t tile, int buffer) {
    if (tile < tiles) {
      const int top = image.border + static_cast<int>(tile % chunks) * kTileRows;
      const float* const from = image.x + tile / chunks * kChannels * image.height * image.width;
      float* const to = memory + buffer * tile_size + kPad;
      for (int i = thread; i < kChannels * kLines * fours; i += kBlock) {
        const int f = i % fours, line = i / fours, channel = line / kLines;
        const int row = top + line % kLines, left = image.width - 4 * f;
        const int count = row >= image.height ? 0 : left < 4 ? left : 4;
        const int64_t place =
            (static_cast<int64_t>(channel) * image.height + row) * image.width + 4 * f;
        copy_four(to + line * pitch + 4 * f, count > 0 ? from + place : image.x, count, kVector);
      }
    }
    close_copies();
  };

  float sum[kChannels][kChannels][kWide];
#pragma unroll
  for (int a = 0; a < kChannels; ++a) {
#pragma unroll
    for (int b = 0; b < kChannels; ++b) {
#pragma unroll
      for (int d = 0; d < kWide; ++d) sum[a][b][d] = 0.0f;
    }
  }
  copy(blockIdx.x, 0);
  int buffer = 0;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x, buffer ^= 1) {
    copy(tile + gridDim.x, buffer ^ 1);
    wait_for_copies<1>();
    __syncthreads();
    const int left = rows - static_cast<int>(tile % chunks) * kTileRows;
    const int here = left < kTileRows ? left : kTileRows;
    const float* const lines = memory + buffer * tile_size + kPad;
    int row = 0, f = lane;
    while (f >= fours) f -= fours, ++row;
    while (row < here) {
      const float* const place = lines + row * pitch + 4 * f;
      float one[kChannels][4];
#pragma unroll
      for (int a = 0; a < kChannels; ++a) {
        const Four<float> four = load_four(place + a * kLines * pitch);
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
#pragma unroll
      for (int b = 0; b < kChannels; ++b) {
        const float* const from = place + (b * kLines + dy) * pitch - kPad;
        float window[2 * kPad + 4];
#pragma unroll
        for (int i = 0; i < (2 * kPad + 4) / 4; ++i) {
          // Words that no lag reaches are not read.
          if (4 * i + 3 < kPad - kLag || 4 * i > kPad + kLag + 3) continue;
          const Four<float> four = load_four(from + 4 * i);
#pragma unroll
          for (int e = 0; e < 4; ++e) window[4 * i + e] = four.value[e];
        }
#pragma unroll
        for (int a = 0; a < kChannels; ++a) {
#pragma unroll
          for (int d = 0; d < kWide; ++d) {
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[a][b][d] += one[a][e] * window[kPad - kLag + d + e];
          }
        }
      }
      f += 32;
      while (f >= fours) f -= fours, ++row;
    }
    __syncthreads();
  }
  wait_for_copies<0>();
  float* const out = partial + (static_cast<int64_t>(blockIdx.x) * (kLag + 1) + dy) *
                                   (kChannels * kChannels * kWide);
#pragma unroll
  for (int a = 0; a < kChannels; ++a) {
#pragma unroll
    for (int b = 0; b < kChannels; ++b) {
#pragma unroll
      for (int d = 0; d < kWide; ++d) {
        const float total = warp_sum(sum[a][b][d]);
        if (lane == 0) out[(a * kChannels + b) * kWide + d] = total;
      }
    }
  }
}

// Which line a border class is: the first `border` ones, then, behind the middle, the last.
__device__ inline int line_of(int number, int size, int border) {
  return number < border ? number : size - 2 * border + number;
}
__device__ inline int class_of(int number, int border) {
  return number < border ? number : number + 1;
}

// The same sums over border lines, from strips in shared memory: blockIdx.x a border row (its
// middle columns, and its border pixels one by one) or a border column (its middle rows),
// blockIdx.y some samples; a thread a lag. partial [pair of classes, parts, dy, c, c', dx].
template <int kChannels, int kLag>
__global__ void __launch_bounds__(((kLag + 1) * (2 * kLag + 1) + 31) / 32 * 32)
    border_kernel(Image image, int each, float* partial) {
  constexpr int kWide = 2 * kLag + 1, kLags = (kLag + 1) * kWide;
  constexpr int kSize = kLags * kChannels * kChannels, kWarps = (kLags + 31) / 32;
  float* const memory = reinterpret_cast<float*>(dynamic_shared());
  const int border = image.border, classes = 2 * border + 1;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int block = static_cast<int>(blockIdx.x);
  const bool is_row = block < 2 * border;
  const int number = is_row ? block : block - 2 * border;
  // Strips [each, kChannels, lines, pitch], zeros outside of the image.
  const int top = is_row ? line_of(number, image.height, border) : border;
  const int first = (is_row ? 0 : line_of(number, image.width, border)) - kLag;
  const int lines = is_row ? kLag + 1 : image.height - 2 * border + kLag;
  const int pitch = is_row ? image.width + 2 * kLag : kWide;
  const int channel_step = lines * pitch, sample_step = kChannels * channel_step;
  const int64_t begin_sample = static_cast<int64_t>(blockIdx.y) * each;
  const int64_t left = image.samples - begin_sample;
  const int samples = left < each ? static_cast<int>(left) : each;
  const float* const from = image.x + begin_sample * kChannels * image.height * image.width;
  for (int line = warp; line < samples * kChannels * lines; line += kWarps) {
    const int u = top + line % lines;
    const float* const row =
        from + (static_cast<int64_t>(line / lines) * image.height + u) * image.width;
#pragma unroll 4
    for (int place = lane; place < pitch; place += 32) {
      const int w = first + place;
      memory[line * pitch + place] = u < image.height && w >= 0 && w < image.width ? row[w] : 0.0f;
    }
  }
  __syncthreads();
  if (thread >= kLags) return;
  const int dy = thread / kWide, dx = thread % kWide - kLag;
  const int step = is_row ? 1 : pitch;
  const float* const here = memory + kLag;
  const float* const there = here + dy * pitch + dx;
  // Over elements begin, ..., end - 1 of the line, of all samples.
  const auto add = [&](int begin, int end, int row_class, int column_class) {
    float sum[kChannels][kChannels] = {};
    for (int n = 0; n < samples; ++n) {
#pragma unroll 4
      for (int i = begin; i < end; ++i) {
        const int at = n * sample_step + i * step;
#pragma unroll
        for (int a = 0; a < kChannels; ++a) {
          const float x = here[at + a * channel_step];
#pragma unroll
          for (int b = 0; b < kChannels; ++b) sum[a][b] += x * there[at + b * channel_step];
        }
      }
    }
    const int64_t pair = row_class * classes + column_class;
    float* const out = partial + (pair * gridDim.y + blockIdx.y) * kSize + dx + kLag;
#pragma unroll
    for (int a = 0; a < kChannels; ++a) {
#pragma unroll
      for (int b = 0; b < kChannels; ++b) {
        out[((dy * kChannels + a) * kChannels + b) * kWide] = sum[a][b];
      }
    }
  };
  if (!is_row) return add(0, lines - kLag, border, class_of(number, border));
  const int own = class_of(number, border);
  add(border, image.width - border, own, border);
  for (int corner = 0; corner < 2 * border; ++corner) {
    const int place = line_of(corner, image.width, border);
    add(place, place + 1, own, class_of(corner, border));
  }
}

// table [pairs of classes, size] := sums over parts, in their order; the middle's from `middle`.
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const float* middle, int middle_parts, const float* borders, int border_parts,
                  int size, float* table) {
  constexpr int kWarps = kThreads / 32;
  __shared__ float sums[kWarps][32];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int f = static_cast<int>(blockIdx.x) * 32 + lane;
  const int pair = static_cast<int>(blockIdx.y), centre = static_cast<int>(gridDim.y) / 2;
  const bool inside = f < size;
  const float* const from =
      pair == centre ? middle : borders + static_cast<int64_t>(pair) * border_parts * size;
  const int parts = pair == centre ? middle_parts : border_parts;
  float total = 0.0f;
#pragma unroll 4
  for (int i = warp; i < parts; i += kWarps) {
    if (inside) total += from[static_cast<int64_t>(i) * size + f];
  }
  sums[warp][lane] = total;
  __syncthreads();
  if (warp != 0 || !inside) return;
#pragma unroll
  for (int w = 1; w < kWarps; ++w) total += sums[w][lane];
  table[static_cast<int64_t>(pair) * size + f] = total;
}

// sum += alpha times the sums of the classes that an entry's first tap sees; a warp an entry,
// lanes over the pairs of classes.
template <int kChannels, int kLag>
__global__ void __launch_bounds__(kThreads)
    assemble_kernel(const float* table, int border, SymmetricSum<float> sum) {
  constexpr int kSide = kLag + 1, kOrder = kChannels * kSide * kSide, kWide = 2 * kLag + 1;
  constexpr int kSize = (kLag + 1) * kWide * kChannels * kChannels;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int column = static_cast<int>(blockIdx.x) * (kThreads / 32) + thread / 32;
  const int row = static_cast<int>(blockIdx.y);
  if (column >= kOrder || column < row) return;
  int a = row / (kSide * kSide), y = row / kSide % kSide, x = row % kSide;
  int b = column / (kSide * kSide), y2 = column / kSide % kSide, x2 = column % kSide;
  if (y2 < y || (y2 == y && x2 < x)) {
    int other = a;
    a = b, b = other;
    other = y, y = y2, y2 = other;
    other = x, x = x2, x2 = other;
  }
  const int classes = 2 * border + 1, padding = kLag - border;
  const float* const from =
      table + (((y2 - y) * kChannels + a) * kChannels + b) * kWide + x2 - x + kLag;
  // Of the first lines a tap sees those from tap - padding on, of the last as many as the tap is.
  const auto seen = [&](int which, int tap) {
    return which < border ? which >= tap - padding : which == border || which - border - 1 < tap;
  };
  float total = 0.0f;
  for (int pair = lane; pair < classes * classes; pair += 32) {
    if (seen(pair / classes, y) && seen(pair % classes, x)) {
      total += from[static_cast<int64_t>(pair) * kSize];
    }
  }
  total = warp_sum(total);
  if (lane == 0) add_to(sum, 0, row, column, total);
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
  int blocks, pairs, each, parts;
  size_t lag_bytes, strip_bytes;
  // Elements of the workspace: table, sums of the middle, sums of the borders.
  int64_t table, middle, size;
};

template <int kChannels, int kLag, bool kVector>
Schedule schedule(const Image& image) {
  constexpr int kLags = (kLag + 1) * (2 * kLag + 1), kSize = kLags * kChannels * kChannels;
  Schedule s{};
  const int64_t pitch = ceil_div(image.width, 4) * 4 + 2 * kPad;
  s.lag_bytes = static_cast<size_t>(2 * kChannels * (kTileRows + kLag) * pitch) * sizeof(float);
  const int most =
      resident_blocks(reinterpret_cast<const void*>(lag_kernel<kChannels, kLag, kVector>),
                      32 * (kLag + 1), s.lag_bytes);
  const int64_t tiles = image.samples * ceil_div(image.height - 2 * image.border, kTileRows);
  s.blocks = static_cast<int>(std::min<int64_t>(most, tiles));
  const int classes = 2 * image.border + 1;
  s.pairs = classes * classes;
  const int64_t row = (kLag + 1) * (image.width + 2 * kLag);
  const int64_t column = (image.height - 2 * image.border + kLag) * (2 * kLag + 1);
  const size_t strip = static_cast<size_t>(kChannels * std::max(row, column)) * sizeof(float);
  // More samples a block leave fewer sums to add, as long as blocks fill the device.
  const int64_t share = image.samples * 4 * image.border / (8 * current_device().processors);
  s.each = static_cast<int>(std::clamp<int64_t>(
      std::min<int64_t>(share, static_cast<int64_t>(kStripBytes / strip)), 1, image.samples));
  // Blocks along y.
  constexpr int64_t kMostParts = 65535;
  s.each = static_cast<int>(std::max<int64_t>(s.each, ceil_div(image.samples, kMostParts)));
  s.parts = image.border == 0 ? 0 : static_cast<int>(ceil_div(image.samples, s.each));
  s.strip_bytes = strip * static_cast<size_t>(s.each);
  s.table = static_cast<int64_t>(s.pairs) * kSize;
  s.middle = static_cast<int64_t>(s.blocks) * kSize;
  s.size = s.table + s.middle + static_cast<int64_t>(s.pairs) * s.parts * kSize;
  return s;
}

template <int kChannels, int kLag, bool kVector>
cudaError_t run(const Image& image, const SymmetricSum<float>& sum, const Schedule& s, float* table,
                cudaStream_t stream) {
  constexpr int kLags = (kLag + 1) * (2 * kLag + 1), kSize = kLags * kChannels * kChannels;
  constexpr int kOrder = kChannels * (kLag + 1) * (kLag + 1);
  float *middle = table + s.table, *borders = middle + s.middle;
  cudaError_t error =
      launch(lag_kernel<kChannels, kLag, kVector>, dim3(static_cast<unsigned>(s.blocks)),
             dim3(32 * (kLag + 1)), s.lag_bytes, stream, image, middle);
  if (error == cudaSuccess && s.parts > 0) {
    error = launch(border_kernel<kChannels, kLag>,
                   dim3(static_cast<unsigned>(4 * image.border), static_cast<unsigned>(s.parts)),
                   dim3((kLags + 31) / 32 * 32), s.strip_bytes, stream, image, s.each, borders);
  }
  if (error == cudaSuccess) {
    error = launch(gather_kernel,
                   dim3(static_cast<unsigned>(ceil_div(kSize, 32)), static_cast<unsigned>(s.pairs)),
                   dim3(kThreads), 0, stream, static_cast<const float*>(middle), s.blocks,
                   static_cast<const float*>(borders), s.parts, kSize, table);
  }
  if (error != cudaSuccess) return error;
  return launch(assemble_kernel<kChannels, kLag>,
                dim3(static_cast<unsigned>(ceil_div(kOrder, kThreads / 32)), kOrder),
                dim3(kThreads), 0, stream, static_cast<const float*>(table), image.border, sum);
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
  constexpr int64_t kLargest = 1 << 15;
  if (std::min(call.height, call.width) < 2 * k || std::max(call.height, call.width) > kLargest) {
    return false;
  }
  const size_t lines = static_cast<size_t>(2 * call.group_channels * (kTileRows + k - 1));
  const size_t lag_bytes = lines * static_cast<size_t>(call.width + 3 + 2 * kPad) * sizeof(float);
  const size_t strip = static_cast<size_t>(call.group_channels * (2 * k - 1) *
                                           (std::max(call.height, call.width) + 2 * k)) *
                       sizeof(float);
  return std::max(lag_bytes, strip) <= current_device().shared;
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
      return Image{x, samples, static_cast<int>(call.height), static_cast<int>(call.width),
                   static_cast<int>(kBorder)};
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
