// Sums and gradients of layers with contiguous channels: threads keep a few channels and loop over pixels, whose
// weights the block keeps in shared memory.
#pragma once

#include "access.cuh"

namespace fdk::cuda {

// Loads the weights of `count` pixels from `first` on into shared memory, followed by zeros for what threads that take
// `loads` pixels at a time load beyond them; called by the whole block.
template <typename Acc>
__device__ void stage_weights(const LayerWork& layer, int64_t first, int count, int loads, Weights<Acc>* weights) {
  const int loaded = ceil_div(count, layer.rows * loads) * layer.rows * loads;
  for (int i = count + threadIdx.x; i < loaded; i += kThreads)
    weights[i] = {0, 0};
  with_mask_type(layer.mask_dtype, [&](auto element) {
    using M = decltype(element);
    const M* fg = static_cast<const M*>(layer.fg) + first;
    const M* bg = static_cast<const M*>(layer.bg) + (layer.bg ? first : 0);
#pragma unroll 4
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const Acc weight = as_weight<Acc>(fg[i]);
      weights[i] = {weight, layer.bg ? as_weight<Acc>(bg[i]) : 1 - weight};
    }
  });
  __syncthreads();
}

// The position of a thread among `lanes` packs of channels and `rows` pixels.
template <int kCount>
struct Place {
  int row, channel;
  bool active;
  __device__ Place(const LayerWork& layer, uint32_t group) {
    row = threadIdx.x / layer.lanes;
    channel = (group * layer.lanes + threadIdx.x - row * layer.lanes) * kCount;
    active = row < layer.rows && channel < layer.channels;
  }
};

// The offsets of kLoads pixels that are `rows` apart, from pixel `first` of the layer on.
template <int kLoads>
struct PixelOffsets {
  int64_t values[kLoads];

  __device__ PixelOffsets(const LayerWork& layer, const int64_t (&stride)[3], int64_t first) {
    if (layer.size2 == layer.pixels) { // one pitch
      const int64_t begin = first * stride[2], step = layer.rows * stride[2];
#pragma unroll
      for (int i = 0; i < kLoads; ++i)
        values[i] = begin + i * step;
    } else {
#pragma unroll
      for (int i = 0; i < kLoads; ++i)
        values[i] = pixel_offset(layer, stride, first + i * layer.rows);
    }
  }
};

// The features of a thread: kCount channels of kLoads pixels that are `rows` apart.
template <typename T, int kCount, int kLoads>
struct PixelRows {
  Pack<T, kCount> packs[kLoads];

  // Loads the pixels from `base` on of a tile that begins at `first` and has `count` of them; beyond it they are 0.
  __device__ void load(const LayerWork& layer, const T* features, int64_t first, int base, int count) {
    const PixelOffsets<kLoads> offsets(layer, layer.stride, first + base);
    if (base + (kLoads - 1) * layer.rows < count) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i)
        packs[i] = cuda::load<kCount>(features + offsets.values[i]);
      return;
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      packs[i] = {};
      if (base + i * layer.rows < count) packs[i] = cuda::load<kCount>(features + offsets.values[i]);
    }
  }

  // Sets ignored pixels to 0: their features may be NaN.
  template <typename Acc>
  __device__ void drop_ignored(const LayerWork& layer, const Weights<Acc>* weights) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const Weights<Acc> weight = weights[i * layer.rows];
      if (weight.fg == 0 && weight.bg == 0) packs[i] = {};
    }
  }
};

// Adds up the sums of the threads of a block over its rows, into those of row 0; called by the whole block, whose
// shared memory of [kSums, kThreads] numbers they overwrite.
template <typename Acc, int kSums>
__device__ void sum_rows(const LayerWork& layer, int row, Acc (&sums)[kSums], Acc* others) {
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSums; ++i)
    others[i * kThreads + threadIdx.x] = sums[i];
  for (int rows = layer.rows; rows > 1;) {
    const int kept = (rows + 1) / 2;
    __syncthreads();
    if (row + kept < rows) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        sums[i] += others[i * kThreads + threadIdx.x + kept * layer.lanes];
        others[i * kThreads + threadIdx.x] = sums[i];
      }
    }
    rows = kept;
  }
}

// Sums (R2) over a block's tile of pixels for a group of channels; the first group also sums the weights.
template <typename Acc, typename T, int kCount>
__device__ void sum_along_channels(Pack<T, kCount>, const Work& work, int index, uint32_t block,
                                   const Outputs<Acc>& out, char* shared) {
  constexpr int kSums = 2 * kCount + 2, kLoads = kSumLoads<Acc>;
  const LayerWork& layer = work.layers[index];
  const Item item = item_of(layer, block, true);
  const Place<kCount> place(layer, item.group);
  const int64_t first = static_cast<int64_t>(item.tile) * layer.tile_pixels;
  const int count = static_cast<int>(min(static_cast<int64_t>(layer.tile_pixels), layer.pixels - first));
  const T* features = static_cast<const T*>(layer.features) + item.n * layer.stride_n + place.channel;
  const int step = layer.rows * kLoads;
  int base = place.active ? place.row : count;
  PixelRows<T, kCount, kLoads> pixels;
  if (base < count) pixels.load(layer, features, first, base, count); // while the weights arrive
  auto* weights = reinterpret_cast<Weights<Acc>*>(shared);
  stage_weights(layer, item.n * layer.pixels + first, count, kLoads, weights);

  Acc sums[kSums] = {};
  for (; base < count; base += step) {
    if (layer.bg) pixels.drop_ignored(layer, weights + base);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const Weights<Acc> weight = weights[base + i * layer.rows];
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        const Acc value = pixels.packs[i].template get<Acc>(c);
        sums[2 * c] += weight.fg * value;
        sums[2 * c + 1] += weight.bg * value;
      }
      sums[2 * kCount] += weight.fg;
      sums[2 * kCount + 1] += weight.bg;
    }
    if (base + step < count) pixels.load(layer, features, first, base + step, count);
  }

  sum_rows(layer, place.row, sums, reinterpret_cast<Acc*>(shared));
  if (place.row > 0 || !place.active) return;
#pragma unroll
  for (int i = 0; i < 2 * kCount; ++i) {
    put_partial(work, index, item, place.channel + i / 2, i % 2, sums[i], out);
  }
  if (place.channel > 0) return;
  put_partial(work, index, item, layer.channels, 0, sums[2 * kCount], out);
  put_partial(work, index, item, layer.channels, 1, sums[2 * kCount + 1], out);
}

// Writes the gradient (R3) on a block's tile of pixels for a group of channels.
template <typename Acc, typename T, int kCount>
__device__ void gradient_along_channels(Pack<T, kCount>, const Work& work, int index, uint32_t block,
                                        const SumGradients<Acc>& grad_sums, char* shared) {
  const LayerWork& layer = work.layers[index];
  const Item item = item_of(layer, block, true);
  const Place<kCount> place(layer, item.group);
  const int64_t first = static_cast<int64_t>(item.tile) * layer.tile_pixels;
  const int count = static_cast<int>(min(static_cast<int64_t>(layer.tile_pixels), layer.pixels - first));
  auto* weights = reinterpret_cast<Weights<Acc>*>(shared);
  stage_weights(layer, item.n * layer.pixels + first, count, kPixelLoads, weights);
  if (!place.active) return;

  const Acc factor = factor_of(work, index, grad_sums);
  const Acc* g = grad_sums.values + item.n * work.total_channels + layer.channel_start + place.channel; // [C]
  Acc g_fg[kCount], g_bg[kCount];
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    g_fg[c] = factor * g[c];
    g_bg[c] = factor * g[work.batch * work.total_channels + c];
  }
  T* grad = static_cast<T*>(layer.features) + item.n * layer.stride_n + place.channel;
  const int64_t upstream = item.n * layer.upstream_stride_n + place.channel * layer.upstream_stride_c;
  for (int base = place.row; base < count; base += layer.rows * kPixelLoads) {
    Pack<T, kCount> packs[kPixelLoads] = {};
    if (layer.upstream) {
      const PixelOffsets<kPixelLoads> from(layer, layer.upstream_stride, first + base);
#pragma unroll
      for (int i = 0; i < kPixelLoads; ++i) {
        if (base + i * layer.rows < count) {
          packs[i] = load<kCount>(static_cast<const T*>(layer.upstream) + upstream + from.values[i],
                                  layer.upstream_stride_c, layer.upstream_vector);
        }
      }
    }
    const PixelOffsets<kPixelLoads> to(layer, layer.stride, first + base);
#pragma unroll
    for (int i = 0; i < kPixelLoads; ++i) {
      const Weights<Acc> weight = weights[base + i * layer.rows];
      const bool is_ignored = layer.bg && weight.fg == 0 && weight.bg == 0;
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        Acc sum = is_ignored ? Acc(0) : g_fg[c] * weight.fg + g_bg[c] * weight.bg;
        if (layer.upstream) sum += packs[i].template get<Acc>(c);
        packs[i].set(c, sum);
      }
      if (base + i * layer.rows < count) store(grad + to.values[i], packs[i]);
    }
  }
}

// Writes the gradients (R4) of a few pixels; `lanes` lanes of the warp share each pixel.
template <typename Acc, typename T, int kCount>
__device__ void mask_gradient_along_channels(Pack<T, kCount>, const Work& work, int index, uint32_t warp,
                                             const Acc* grad_sums) {
  const LayerWork& layer = work.layers[index];
  const Item item = item_of(layer, warp, true);
  if (item.n >= work.batch) return;
  const int lane = threadIdx.x % layer.lanes;
  const int row = threadIdx.x % kWarp / layer.lanes;
  const int64_t first = static_cast<int64_t>(item.tile) * layer.tile_pixels + row;
  const T* features = static_cast<const T*>(layer.features) + item.n * layer.stride_n;

  Acc fg[kPixelLoads] = {}, bg[kPixelLoads] = {};
  for (int channel = lane * kCount; channel < layer.channels; channel += layer.lanes * kCount) {
    Pack<T, kCount> packs[kPixelLoads] = {};
#pragma unroll
    for (int i = 0; i < kPixelLoads; ++i) {
      const int64_t pixel = first + i * layer.rows;
      if (pixel < layer.pixels) packs[i] = load<kCount>(features + channel + pixel_offset(layer, layer.stride, pixel));
    }
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      const Weights<Acc> g = mask_coefficients(work, layer, item.n, channel + c, grad_sums);
#pragma unroll
      for (int i = 0; i < kPixelLoads; ++i) {
        fg[i] += g.fg * packs[i].template get<Acc>(c);
        bg[i] += g.bg * packs[i].template get<Acc>(c);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kPixelLoads; ++i) {
    fg[i] = lane_sum(fg[i], layer.lanes);
    bg[i] = lane_sum(bg[i], layer.lanes);
    const int64_t pixel = first + i * layer.rows;
    if (lane == 0 && pixel < layer.pixels) put_mask_gradient(layer, item.n * layer.pixels + pixel, fg[i], bg[i]);
  }
}

} // namespace fdk::cuda
