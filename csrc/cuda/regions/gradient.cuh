// The gradient (C3) of the features: each block writes a tile of pixels of a group of channels.
#pragma once

#include "tile.cuh"

namespace fdk::cuda {

// Where a block of the gradient keeps what its threads share.
template <typename Acc>
struct GradientShared {
  alignas(16) Acc weights[kStagedWeights<Acc>];      // [regions, staged_pixels]
  alignas(16) Acc coefficients[kStagedCoefficients]; // [1 or 3, regions, block_channels]
  uint8_t ignored[kMaxStagedPixels];
};

// Stages g_k, and with moments 2 h_k and the pivots, of a block's channels and of some regions. The barriers of
// stage_weights precede and follow it.
template <typename Acc, bool kMoments>
__device__ void stage_coefficients(const RegionWork& work, const RegionLayerWork& layer, int64_t n, int first_channel,
                                   const RegionRange& range, const Acc* grad_sums, Acc* coefficients) {
  const int block_channels = layer.block_channels(), size = range.count * block_channels;
  for (int i = threadIdx.x; i < size; i += kThreads) {
    const int region = i / block_channels, channel = first_channel + i - region * block_channels;
    const bool inside = channel < layer.channels;
    const int64_t at = ((range.first + region) * work.batch + n) * work.total_channels + layer.channel_start + channel;
    coefficients[i] = inside ? grad_sums[at] : Acc(0);
    if constexpr (kMoments) {
      const int64_t of_squares = work.num_regions * work.batch * work.total_channels;
      coefficients[size + i] = inside ? 2 * grad_sums[of_squares + at] : Acc(0);
      coefficients[2 * size + i] = inside ? static_cast<const Acc*>(work.pivots)[at] : Acc(0);
    }
  }
}

// Adds to `grads` the part of some regions in the gradient of a tile.
template <typename Acc, bool kMoments>
__device__ void add_gradients(const Tile<Acc>& tile, int regions, const Acc* weights, int weight_stride,
                              const Acc* coefficients, int coefficient_stride, Tile<Acc>& grads) {
  using Channels = Pack<Acc, kTileChannels>;
  const int of_kind = regions * coefficient_stride;
#pragma unroll 2
  for (int r = 0; r < regions; ++r) {
    const auto weight = *reinterpret_cast<const Pack<Acc, kTilePixels<Acc>>*>(weights + r * weight_stride);
    const Acc* of_region = coefficients + r * coefficient_stride;
    const auto g = *reinterpret_cast<const Channels*>(of_region);
    Channels h = {}, pivot = {};
    if constexpr (kMoments) {
      h = *reinterpret_cast<const Channels*>(of_region + of_kind);
      pivot = *reinterpret_cast<const Channels*>(of_region + 2 * of_kind);
    }
#pragma unroll
    for (int k = 0; k < kTileChannels; ++k) {
#pragma unroll
      for (int j = 0; j < kTilePixels<Acc>; ++j) {
        if constexpr (kMoments) {
          grads[k][j] += weight.words[j] * (g.words[k] + h.words[k] * (tile[k][j] - pivot.words[k]));
        } else {
          grads[k][j] += weight.words[j] * g.words[k];
        }
      }
    }
  }
}

// Writes the gradient (C3) on a block's tile of pixels for a group of channels. Where the regions exceed one chunk, a
// stage is one step of the threads, which then goes through all chunks.
template <typename Acc, bool kMoments>
__device__ void region_gradient(const RegionWork& work, int index, uint32_t block, const Acc* grad_sums,
                                GradientShared<Acc>& shared) {
  const RegionLayerWork& layer = work.layers[index];
  const RegionItem item = item_of(layer, block, 1);
  const TilePlace<Acc> place(layer, 1);
  const int block_channels = layer.block_channels(), first_channel = item.group * block_channels;
  const int channel = first_channel + place.channel;
  const bool active = place.active && channel < layer.channels;
  const int64_t begin = static_cast<int64_t>(item.tile) * layer.tile_pixels;
  const int64_t end = min(begin + layer.tile_pixels, layer.pixels);
  Tile<Acc> tile = {}, grads;
  for (int64_t first = begin; first < end; first += layer.staged_pixels) {
    const int count = static_cast<int>(min(static_cast<int64_t>(layer.staged_pixels), end - first));
    for (int chunk = 0; chunk < work.chunks; ++chunk) {
      const RegionRange range = regions_of(work, chunk);
      if (first == begin || work.chunks > 1) {
        __syncthreads();
        stage_coefficients<Acc, kMoments>(work, layer, item.n, first_channel, range, grad_sums, shared.coefficients);
      }
      stage_weights(work, layer, item.n, range, first, count, shared.weights);
      if (work.selects && chunk == 0) {
        note_ignored(work, layer, item.n, range, first, count, shared.weights, shared.ignored);
      }
      for (int pixel = active ? place.pixel : count; pixel < count; pixel += layer.step_pixels) {
        if (chunk == 0) {
          if constexpr (kMoments) {
            load_tile<Acc>(
                layer, layer.features.values,
                TileAddress<Acc>(layer, layer.features, layer.features_vector, item.n, channel, first + pixel), tile);
          }
#pragma unroll
          for (int i = 0; i < kTileChannels * kTilePixels<Acc>; ++i)
            grads[i / kTilePixels<Acc>][i % kTilePixels<Acc>] = 0;
        }
        add_gradients<Acc, kMoments>(tile, range.count, shared.weights + pixel, layer.staged_pixels,
                                     shared.coefficients + place.channel, block_channels, grads);
        if (chunk + 1 < work.chunks) continue;
        if (work.selects) {
#pragma unroll
          for (int j = 0; j < kTilePixels<Acc>; ++j) {
            for (int k = 0; k < kTileChannels; ++k)
              grads[k][j] = shared.ignored[pixel + j] ? Acc(0) : grads[k][j];
          }
        }
        if (layer.upstream.values) {
          Tile<Acc> added;
          load_tile<Acc>(layer, layer.upstream.values,
                         TileAddress<Acc>(layer, layer.upstream, layer.upstream_vector, item.n, channel, first + pixel),
                         added);
#pragma unroll
          for (int i = 0; i < kTileChannels * kTilePixels<Acc>; ++i)
            grads[i / kTilePixels<Acc>][i % kTilePixels<Acc>] += added[i / kTilePixels<Acc>][i % kTilePixels<Acc>];
        }
        store_tile<Acc>(layer, layer.gradient.values,
                        TileAddress<Acc>(layer, layer.gradient, layer.gradient_vector, item.n, channel, first + pixel),
                        grads);
      }
    }
  }
}

} // namespace fdk::cuda
