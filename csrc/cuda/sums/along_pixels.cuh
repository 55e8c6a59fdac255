// Sums and gradients of all other layers, with contiguous pixels or none: lanes keep the weights of their pixels and
// loop over channels.
#pragma once

#include "access.cuh"

namespace fdk::cuda {

// The pixels of a lane in a tile: kLoads packs, a warp's width apart.
template <typename Acc, typename T, int kCount>
struct PixelRun {
  static constexpr int kLoads = kCount > 1 ? 1 : kScalarBytes / sizeof(T);
  static constexpr int kPixels = kWarp * kCount * kLoads; // of the warp
  Acc fg[kLoads * kCount], bg[kLoads * kCount];           // weights; 0 outside of the layer
  bool inside[kLoads];

  static __device__ int64_t pixel(int64_t first, int load) {
    return first + (load * kWarp + static_cast<int>(threadIdx.x % kWarp)) * kCount;
  }

  // Loads the weights of the lane's pixels; `first` is the warp's first one.
  __device__ void load(const LayerWork& layer, int64_t n, int64_t first, int64_t end) {
    for (int i = 0; i < kLoads; ++i)
      inside[i] = pixel(first, i) < end;
    load_mask(layer.fg, layer.mask_dtype, n * layer.pixels + first, fg);
    if (layer.bg) return load_mask(layer.bg, layer.mask_dtype, n * layer.pixels + first, bg);
#pragma unroll
    for (int i = 0; i < kLoads * kCount; ++i)
      bg[i] = inside[i / kCount] ? 1 - fg[i] : 0;
  }

  // Whether the pixel is outside or, with stored background weights, ignored.
  __device__ bool is_ignored(int i) const { return fg[i] == 0 && bg[i] == 0; }

 private:
  __device__ void load_mask(const void* mask, DType dtype, int64_t first, Acc (&weights)[kLoads * kCount]) {
    with_mask_type(dtype, [&](auto element) {
      using M = decltype(element);
      Pack<M, kCount> packs[kLoads] = {};
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if (inside[i])
          packs[i] = *reinterpret_cast<const Pack<M, kCount>*>(static_cast<const M*>(mask) + pixel(first, i));
      }
#pragma unroll
      for (int i = 0; i < kLoads * kCount; ++i)
        weights[i] = as_weight<Acc>(packs[i / kCount].template get<M>(i % kCount));
    });
  }
};

// Sums (R2) over a warp's tile of pixels for kSlots channels. The slot after the last channel holds ones, so that its
// sums are the masses.
template <typename Acc, typename T, int kCount>
__device__ void sum_along_pixels(Pack<T, kCount>, const Work& work, int index, uint32_t warp, const Outputs<Acc>& out) {
  using Run = PixelRun<Acc, T, kCount>;
  const LayerWork& layer = work.layers[index];
  const Item item = item_of(layer, warp, true);
  if (item.n >= work.batch) return;
  const int slot = item.group * kSlots;
  const int64_t begin = static_cast<int64_t>(item.tile) * layer.tile_pixels;
  const int64_t end = min(begin + layer.tile_pixels, layer.pixels);
  const T* features = static_cast<const T*>(layer.features) + item.n * layer.stride_n + slot * layer.stride_c;

  Acc sums[kSlots * 2] = {};
  for (int64_t first = begin; first < end; first += Run::kPixels) {
    Pack<T, kCount> packs[kSlots][Run::kLoads] = {};
#pragma unroll
    for (int i = 0; i < Run::kLoads; ++i) {
      const int64_t pixel = Run::pixel(first, i);
      const int64_t offset = pixel_offset(layer, layer.stride, pixel, kCount > 1);
#pragma unroll
      for (int k = 0; k < kSlots; ++k) {
        for (int j = 0; j < kCount; ++j)
          packs[k][i].set(j, slot + k == layer.channels ? Acc(1) : Acc(0));
        if (slot + k < layer.channels && pixel < end)
          packs[k][i] = load<kCount>(features + k * layer.stride_c + offset);
      }
    }
    Run run;
    run.load(layer, item.n, first, end);
    if (layer.bg) {
#pragma unroll
      for (int i = 0; i < Run::kLoads * kCount; ++i) {
        if (!run.is_ignored(i)) continue;
        for (int k = 0; k < kSlots; ++k)
          packs[k][i / kCount].set(i % kCount, Acc(0));
      }
    }
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      Acc fg = 0, bg = 0; // short sums first: they lose fewer digits
#pragma unroll
      for (int i = 0; i < Run::kLoads * kCount; ++i) {
        const Acc value = packs[k][i / kCount].template get<Acc>(i % kCount);
        fg += run.fg[i] * value;
        bg += run.bg[i] * value;
      }
      sums[2 * k] += fg;
      sums[2 * k + 1] += bg;
    }
  }

  const Acc partial = warp_sums(sums);
  constexpr int kLanesOfSum = kWarp / (2 * kSlots);
  const int lane = threadIdx.x % kWarp;
  const int sum = lane / kLanesOfSum;
  if (lane % kLanesOfSum == 0 && slot + sum / 2 <= layer.channels) {
    put_partial(work, index, item, slot + sum / 2, sum % 2, partial, out);
  }
}

// Writes the gradient (R3) on a warp's run of pixels for a group of channels.
template <typename Acc, typename T, int kCount>
__device__ void gradient_along_pixels(Pack<T, kCount>, const Work& work, int index, uint32_t warp,
                                      const SumGradients<Acc>& grad_sums) {
  using Run = PixelRun<Acc, T, kCount>;
  const LayerWork& layer = work.layers[index];
  const Item item = item_of(layer, warp, false);
  if (item.n >= work.batch) return;
  const int channel = item.group * layer.group_channels;
  const int channels = min(layer.group_channels, layer.channels - channel);
  const int lane = threadIdx.x % kWarp;
  const Acc factor = factor_of(work, index, grad_sums);
  const Acc* g = grad_sums.values + item.n * work.total_channels + layer.channel_start + channel; // [C]
  const Acc g_fg = lane < channels ? factor * g[lane] : Acc(0);
  const Acc g_bg = lane < channels ? factor * g[work.batch * work.total_channels + lane] : Acc(0);

  const int64_t first = static_cast<int64_t>(item.tile) * layer.tile_pixels;
  Run run;
  run.load(layer, item.n, first, layer.pixels);
  T* grad[Run::kLoads];
  int64_t upstream[Run::kLoads] = {};
#pragma unroll
  for (int i = 0; i < Run::kLoads; ++i) {
    const int64_t pixel = Run::pixel(first, i);
    grad[i] = static_cast<T*>(layer.features) + item.n * layer.stride_n + channel * layer.stride_c +
              pixel_offset(layer, layer.stride, pixel, kCount > 1);
    if (!layer.upstream) continue;
    upstream[i] = item.n * layer.upstream_stride_n + channel * layer.upstream_stride_c +
                  pixel_offset(layer, layer.upstream_stride, pixel);
  }

  for (int base = 0; base < channels; base += kSlots) {
    Pack<T, kCount> packs[kSlots][Run::kLoads] = {};
    if (layer.upstream) {
#pragma unroll
      for (int k = 0; k < kSlots; ++k) {
#pragma unroll
        for (int i = 0; i < Run::kLoads; ++i) {
          if (base + k < channels && run.inside[i]) {
            packs[k][i] =
                load<kCount>(static_cast<const T*>(layer.upstream) + upstream[i] + (base + k) * layer.upstream_stride_c,
                             layer.upstream_stride[2], layer.upstream_vector);
          }
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      if (base + k >= channels) break;
      const Acc fg = __shfl_sync(kAllLanes, g_fg, base + k);
      const Acc bg = __shfl_sync(kAllLanes, g_bg, base + k);
#pragma unroll
      for (int i = 0; i < Run::kLoads * kCount; ++i) {
        auto& pack = packs[k][i / kCount];
        Acc sum = fg * run.fg[i] + bg * run.bg[i];
        if (layer.bg && run.is_ignored(i)) sum = 0;
        if (layer.upstream) sum += pack.template get<Acc>(i % kCount);
        pack.set(i % kCount, sum);
      }
#pragma unroll
      for (int i = 0; i < Run::kLoads; ++i) {
        if (run.inside[i]) store(grad[i] + (base + k) * layer.stride_c, packs[k][i]);
      }
    }
  }
}

template <typename Acc>
constexpr int kMaskPixels = kWarp * (std::is_same_v<Acc, float> ? kVector<__half> : kScalarBytes / 2); // at most

__device__ inline int padded(int i) { return i + i / kWarp; } // puts packs of adjacent lanes into different banks

template <typename Acc>
constexpr int kMaskRow = kMaskPixels<Acc> + kMaskPixels<Acc> / kWarp; // padded

// Writes the gradients (R4) of a block's run of pixels; each warp sums a part of the channels.
template <typename Acc, typename T, int kCount>
__device__ void mask_gradient_along_pixels(Pack<T, kCount>, const Work& work, int index, uint32_t block,
                                           const Acc* grad_sums, char* shared) {
  using Run = PixelRun<Acc, T, kCount>;
  const LayerWork& layer = work.layers[index];
  const Item item = item_of(layer, block, false);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t first = static_cast<int64_t>(item.tile) * layer.tile_pixels;
  const T* features[Run::kLoads];
#pragma unroll
  for (int i = 0; i < Run::kLoads; ++i) {
    features[i] = static_cast<const T*>(layer.features) + item.n * layer.stride_n +
                  pixel_offset(layer, layer.stride, Run::pixel(first, i), kCount > 1);
  }

  Acc fg[Run::kLoads * kCount] = {}, bg[Run::kLoads * kCount] = {};
  const int part = ceil_div(layer.channels, kWarps);
  const int end = min((warp + 1) * part, layer.channels);
  for (int channel = warp * part; channel < end; channel += kWarp) {
    const int channels = min(kWarp, end - channel);
    Weights<Acc> g = {0, 0};
    if (lane < channels) g = mask_coefficients(work, layer, item.n, channel + lane, grad_sums);
    for (int base = 0; base < channels; base += kSlots) {
      Pack<T, kCount> packs[kSlots][Run::kLoads] = {};
#pragma unroll
      for (int k = 0; k < kSlots; ++k) {
#pragma unroll
        for (int i = 0; i < Run::kLoads; ++i) {
          if (base + k < channels && Run::pixel(first, i) < layer.pixels) {
            packs[k][i] = load<kCount>(features[i] + (channel + base + k) * layer.stride_c);
          }
        }
      }
#pragma unroll
      for (int k = 0; k < kSlots; ++k) {
        const Acc g_fg = __shfl_sync(kAllLanes, g.fg, base + k);
        const Acc g_bg = __shfl_sync(kAllLanes, g.bg, base + k);
        if (base + k >= channels) continue;
#pragma unroll
        for (int i = 0; i < Run::kLoads * kCount; ++i) {
          const Acc value = packs[k][i / kCount].template get<Acc>(i % kCount);
          fg[i] += g_fg * value;
          bg[i] += g_bg * value;
        }
      }
    }
  }

  Acc* parts = reinterpret_cast<Acc*>(shared); // [warps, 2, kMaskRow]
#pragma unroll
  for (int i = 0; i < Run::kLoads * kCount; ++i) {
    const int pixel = static_cast<int>(Run::pixel(0, i / kCount)) + i % kCount;
    parts[2 * warp * kMaskRow<Acc> + padded(pixel)] = fg[i];
    parts[(2 * warp + 1) * kMaskRow<Acc> + padded(pixel)] = bg[i];
  }
  __syncthreads();
  const int pixel = threadIdx.x;
  if (pixel >= Run::kPixels || first + pixel >= layer.pixels) return;
  Acc total_fg = 0, total_bg = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    total_fg += parts[2 * i * kMaskRow<Acc> + padded(pixel)];
    total_bg += parts[(2 * i + 1) * kMaskRow<Acc> + padded(pixel)];
  }
  put_mask_gradient(layer, item.n * layer.pixels + first + pixel, total_fg, total_bg);
}

} // namespace fdk::cuda
