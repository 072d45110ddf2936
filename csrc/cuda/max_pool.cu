// Gradients of many rows through max pooling and a ReLU before it.
//
// Where the maxima lie is the same for all rows. A first kernel looks it up once, drops the maxima
// that the ReLU has cut off and brings them into the memory format of the gradients; a second one
// gathers all rows: each input looks at the few windows that it lies in. So no atomics and no
// zero fill are needed, and what is written depends on no order.
#include <algorithm>
#include <limits>

#include "core/elements.h"
#include "core/launch.h"
#include "max_pool.h"

namespace hesskern::cuda {

namespace {

constexpr int kTile = 32;
constexpr int kTileRows = 8;
// Rows that a thread sums up at once: as many loads are on their way together.
constexpr int kRowsAtOnce = 4;
// Blocks per processor below which rows go to blocks of their own.
constexpr int64_t kFewBlocks = 8;

template <typename T, int V>
struct alignas(V * sizeof(T)) Vector {
  T value[V];
};

// a / b of numbers that are not negative; narrow: both fit 32 bits.
__device__ inline int64_t quotient(int64_t a, int64_t b, bool narrow) {
  return narrow ? static_cast<int64_t>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b)) : a / b;
}

// Windows [first, last] may hold input `at`.
struct Windows {
  int first, last;
};
__device__ inline Windows windows_of(int at, const PoolAxis& axis) {
  const int shifted = at + axis.padding, beyond = shifted - axis.reach;
  const int last = shifted / axis.stride;
  return {beyond < 0 ? 0 : beyond / axis.stride + 1, last < axis.out ? last : axis.out - 1};
}

// places [N, h.out w.out, C], or [N, C, h.out w.out]: indices of maxima, -1 where none passes a
// gradient on. A block moves tiles [positions, channels] through shared memory, so that its
// reads and its writes both run along what lies side by side.
template <typename T>
__global__ void __launch_bounds__(kTile* kTileRows)
    places_kernel(const MaxPoolInputGradient<T> call, int* places, bool channels_last) {
  // One column more than a tile: a column is then read from distinct banks.
  __shared__ int tile[kTile][kTile + 1];
  const int64_t positions = static_cast<int64_t>(call.h.out) * call.w.out;
  const int64_t inputs = static_cast<int64_t>(call.h.in) * call.w.in;
  const int64_t position_tiles = ceil_div(positions, kTile);
  const int64_t channel_tiles = ceil_div(call.channels, kTile);
  const int64_t tiles = call.samples * position_tiles * channel_tiles;
  const bool from_channels = call.index_strides.channel < call.index_strides.x;
  const int lane = threadIdx.x;

  for (int64_t item = blockIdx.x; item < tiles; item += gridDim.x) {
    const int64_t first_channel = item % channel_tiles * kTile;
    const int64_t rest = item / channel_tiles;
    const int64_t first_position = rest % position_tiles * kTile, n = rest / position_tiles;

    for (int j = threadIdx.y; j < kTile; j += kTileRows) {
      const int p = from_channels ? j : lane, c = from_channels ? lane : j;
      const int64_t position = first_position + p, channel = first_channel + c;
      if (position >= positions || channel >= call.channels) continue;
      const int64_t y = position / call.w.out, x = position % call.w.out;
      int64_t where = call.indices[n * call.index_strides.sample + y * call.index_strides.y +
                                   x * call.index_strides.x + channel * call.index_strides.channel];
      if (where < 0 || where >= inputs) where = -1;
      if (call.relu != nullptr && where >= 0) {
        const T result =
            call.relu[n * call.relu_strides.sample + where / call.w.in * call.relu_strides.y +
                      where % call.w.in * call.relu_strides.x +
                      channel * call.relu_strides.channel];
        if (!(result > T(0))) where = -1;
      }
      tile[p][c] = static_cast<int>(where);
    }
    __syncthreads();
    for (int j = threadIdx.y; j < kTile; j += kTileRows) {
      const int p = channels_last ? j : lane, c = channels_last ? lane : j;
      const int64_t position = first_position + p, channel = first_channel + c;
      if (position >= positions || channel >= call.channels) continue;
      const int64_t at = channels_last ? (n * positions + position) * call.channels + channel
                                       : (n * call.channels + channel) * positions + position;
      places[at] = tile[p][c];
    }
    __syncthreads();
  }
}

// The gradients of V neighbouring channels of one input, of `group` rows a block. Inputs run as
// they lie in memory: [N, H, W, C], or [N, C, H, W] with V = 1.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(const MaxPoolInputGradient<T> call, const int* __restrict__ places,
                    int64_t items, int64_t group, bool channels_last, bool narrow) {
  using Values = Vector<T, V>;
  const T* __restrict__ grad = call.grad;
  T* __restrict__ out = call.out;
  const int64_t positions = static_cast<int64_t>(call.h.out) * call.w.out;
  const int64_t first_row = blockIdx.y * group;
  const int64_t last_row = first_row + group < call.rows ? first_row + group : call.rows;

  for (int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; item < items;
       item += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    int64_t n, y, x, c, rest;
    if (channels_last) {
      const int64_t vectors = call.channels / V;
      rest = quotient(item, vectors, narrow);
      c = (item - rest * vectors) * V;
      n = quotient(rest, call.w.in, narrow);
      x = rest - n * call.w.in;
      rest = n;
      n = quotient(rest, call.h.in, narrow);
      y = rest - n * call.h.in;
    } else {
      rest = quotient(item, call.w.in, narrow);
      x = item - rest * call.w.in;
      n = quotient(rest, call.h.in, narrow);
      y = rest - n * call.h.in;
      rest = n;
      n = quotient(rest, call.channels, narrow);
      c = rest - n * call.channels;
    }
    const int here = static_cast<int>(y * call.w.in + x);
    const Windows rows = windows_of(static_cast<int>(y), call.h);
    const Windows columns = windows_of(static_cast<int>(x), call.w);
    const ImageStrides& to_strides = call.out_strides;
    T* to = out + n * to_strides.sample + y * to_strides.y + x * to_strides.x +
            c * to_strides.channel + first_row * call.out_row;
    const int64_t place_step = channels_last ? call.channels : 1;
    const int* first_place =
        places + n * positions * call.channels + (channels_last ? c : c * positions);
    const T* first_grad = grad + n * call.grad_strides.sample + c * call.grad_strides.channel +
                          first_row * call.grad_row;
    T scale[V];
    for (int v = 0; v < V; ++v) {
      scale[v] =
          call.factor == nullptr
              ? T(1)
              : call.factor[n * call.factor_strides.sample + y * call.factor_strides.y +
                            x * call.factor_strides.x + (c + v) * call.factor_strides.channel];
    }
    for (int64_t left = last_row - first_row; left > 0; left -= kRowsAtOnce) {
      T sum[kRowsAtOnce][V] = {};
      for (int oy = rows.first; oy <= rows.last; ++oy) {
        for (int ox = columns.first; ox <= columns.last; ++ox) {
          const int64_t position = static_cast<int64_t>(oy) * call.w.out + ox;
          const auto place =
              *reinterpret_cast<const Vector<int, V>*>(first_place + position * place_step);
          bool any = false;
          for (int v = 0; v < V; ++v) any = any || place.value[v] == here;
          if (!any) continue;
          const T* from = first_grad + oy * call.grad_strides.y + ox * call.grad_strides.x;
#pragma unroll
          for (int i = 0; i < kRowsAtOnce; ++i) {
            if (i >= left) continue;
            const Values values = *reinterpret_cast<const Values*>(from + i * call.grad_row);
#pragma unroll
            for (int v = 0; v < V; ++v) {
              if (place.value[v] == here) sum[i][v] += values.value[v];
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        if (i >= left) continue;
        Values values;
#pragma unroll
        for (int v = 0; v < V; ++v) values.value[v] = sum[i][v] * scale[v];
        *reinterpret_cast<Values*>(to + i * call.out_row) = values;
      }
      to += kRowsAtOnce * call.out_row;
      first_grad += kRowsAtOnce * call.grad_row;
    }
  }
}

// Whether vectors of V channels lie at multiples of their size.
template <typename T, int V>
bool whole_vectors(const T* data, const ImageStrides& strides, int64_t row) {
  return strides.channel == 1 && is_aligned(data, V * sizeof(T)) && strides.sample % V == 0 &&
         strides.y % V == 0 && strides.x % V == 0 && row % V == 0;
}

template <typename T, int V>
cudaError_t gather(const MaxPoolInputGradient<T>& call, const int* places, bool channels_last,
                   cudaStream_t stream) {
  const int64_t items = call.samples * call.h.in * call.w.in * (call.channels / V);
  const int64_t blocks =
      std::min<int64_t>(ceil_div(items, kThreads), std::numeric_limits<int32_t>::max());
  const int64_t wanted = ceil_div(kFewBlocks * current_device().processors, blocks);
  const int64_t groups = std::min<int64_t>({wanted, ceil_div(call.rows, kRowsAtOnce), 65535});
  const int64_t group = ceil_div(call.rows, groups);
  return launch(
      gradient_kernel<T, V>,
      dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(ceil_div(call.rows, group))),
      dim3(kThreads), 0, stream, call, places, items, group, channels_last,
      items <= std::numeric_limits<int32_t>::max());
}

}  // namespace

template <typename T>
Work<float> MaxPoolInputGradient<T>::plan() const {
  if (samples == 0 || rows == 0 || channels == 0 || h.in == 0 || w.in == 0) {
    return {0, [](float*, cudaStream_t) { return cudaSuccess; }};
  }
  const MaxPoolInputGradient call = *this;
  const int64_t maxima = samples * h.out * w.out * channels;
  const bool channels_last = channels > 1 && out_strides.channel < out_strides.x;
  // Images in double have their channels first: cuDNN knows no other format for them.
  constexpr int wide = sizeof(T) == 4 ? 4 : 1;
  const bool vectors = channels_last && channels % wide == 0 &&
                       whole_vectors<T, wide>(out, out_strides, out_row) &&
                       whole_vectors<T, wide>(grad, grad_strides, grad_row);
  return {maxima, [=](float* workspace, cudaStream_t stream) {
            int* places = reinterpret_cast<int*>(workspace);
            const int64_t tiles = call.samples *
                                  ceil_div(static_cast<int64_t>(call.h.out) * call.w.out, kTile) *
                                  ceil_div(call.channels, kTile);
            if (tiles > 0) {
              const int64_t blocks = std::min<int64_t>(tiles, std::numeric_limits<int32_t>::max());
              const cudaError_t error =
                  launch(places_kernel<T>, dim3(static_cast<unsigned>(blocks)),
                         dim3(kTile, kTileRows), 0, stream, call, places, channels_last);
              if (error != cudaSuccess) return error;
            }
            return vectors ? gather<T, wide>(call, places, channels_last, stream)
                           : gather<T, 1>(call, places, channels_last, stream);
          }};
}

template struct MaxPoolInputGradient<float>;
template struct MaxPoolInputGradient<double>;

}  // namespace hesskern::cuda
