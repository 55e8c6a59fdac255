// The gradients (C4) of the weights of several regions: each block sums over all channels at a few pixels.
#pragma once

#include "tile.cuh"

namespace fdk::cuda {

// Where a block of the weight gradient keeps what its threads share.
template <typename Acc>
struct WeightGradientShared {
  Acc parts[kThreads * kTilePixels<Acc>]; // of one region of each warp: [warps, pixels]
  uint8_t ignored[kMaxStagedPixels];
};

// Adds a tile's part in the gradients of a thread's weights. The pointers are at the tile's first channel, in the row
// of the thread's first region; rows are `stride` apart, and the gradients of the moments `of_squares` further on.
template <typename Acc, bool kMoments>
__device__ void add_weight_gradients(const Tile<Acc>& tile, int regions, int channels, const Acc* grad_sums,
                                     int64_t of_squares, const Acc* pivots, int64_t stride,
                                     Acc (&totals)[kThreadRegions][kTilePixels<Acc>]) {
#pragma unroll
  for (int r = 0; r < kThreadRegions; ++r) {
    if (r >= regions) continue;
#pragma unroll
    for (int k = 0; k < kTileChannels; ++k) {
      if (k >= channels) continue;
      const int64_t at = r * stride + k;
      const Acc g = grad_sums[at];
      Acc h = 0, pivot = 0;
      if constexpr (kMoments) {
        h = grad_sums[of_squares + at];
        pivot = pivots[at];
      }
#pragma unroll
      for (int j = 0; j < kTilePixels<Acc>; ++j) {
        const Acc x = tile[k][j] - pivot;
        totals[r][j] += kMoments ? (g + h * x) * x : g * x;
      }
    }
  }
}

// Writes the gradients (C4) at a step of pixels for a chunk of regions; each warp sums over a part of the channels.
template <typename Acc, bool kMoments>
__device__ void region_weight_gradient(const RegionWork& work, int index, uint32_t block, const Acc* grad_sums,
                                       WeightGradientShared<Acc>& shared) {
  const RegionLayerWork& layer = work.layers[index];
  const RegionItem item = item_of(layer, block, work.chunks);
  const RegionRange range = regions_of(work, item.chunk);
  const TilePlace<Acc> place(layer, work.parts);
  const int64_t first = static_cast<int64_t>(item.tile) * layer.tile_pixels;
  const int count = static_cast<int>(min(static_cast<int64_t>(layer.tile_pixels), layer.pixels - first));
  if (work.selects) {
    const Acc* none = nullptr;
    note_ignored(work, layer, item.n, RegionRange{0, 0}, first, count, none, shared.ignored);
  }

  const int first_region = place.part * work.thread_regions; // of the thread, in the block
  const int regions = min(work.thread_regions, range.count - first_region);
  const int64_t of_squares = work.num_regions * work.batch * work.total_channels;
  const int64_t row = (range.first + first_region) * work.batch + item.n;
  const int64_t start = row * work.total_channels + layer.channel_start;
  Acc totals[kThreadRegions][kTilePixels<Acc>] = {};
  const bool active = place.active && place.pixel < count;
  for (int channel = active ? place.channel : layer.channels; channel < layer.channels;
       channel += layer.block_channels()) {
    Tile<Acc> tile;
    load_tile<Acc>(layer, layer.features.values,
                   TileAddress<Acc>(layer, layer.features, layer.features_vector, item.n, channel, first + place.pixel),
                   tile);
    const Acc* pivots = kMoments ? static_cast<const Acc*>(work.pivots) + start + channel : nullptr;
    add_weight_gradients<Acc, kMoments>(tile, regions, layer.channels - channel, grad_sums + start + channel,
                                        of_squares, pivots, work.batch * work.total_channels, totals);
  }

  const int warp = threadIdx.x / kWarp, warp_pixels = layer.pixel_lanes() * kTilePixels<Acc>;
#pragma unroll
  for (int r = 0; r < kThreadRegions; ++r) {
    if (r >= work.thread_regions) break;
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kTilePixels<Acc>; ++j) {
      const Acc total = lane_sum(totals[r][j], layer.lanes);
      if (place.channel_lane == 0) shared.parts[warp * warp_pixels + place.pixel_lane * kTilePixels<Acc> + j] = total;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < work.parts * layer.step_pixels; i += kThreads) {
      const int part = i / layer.step_pixels, pixel = i - part * layer.step_pixels;
      const int region = part * work.thread_regions + r;
      if (region >= range.count || pixel >= count) continue;
      const int pixel_warp = pixel / warp_pixels;
      const int first_warp = (pixel_warp * work.parts + part) * layer.channel_warps;
      Acc total = 0;
      for (int k = 0; k < layer.channel_warps; ++k)
        total += shared.parts[(first_warp + k) * warp_pixels + pixel - pixel_warp * warp_pixels];
      const int64_t at = (item.n * work.num_regions + range.first + region) * layer.pixels + first + pixel;
      static_cast<Acc*>(layer.grad_weights)[at] = work.selects && shared.ignored[pixel] ? Acc(0) : total;
    }
  }
}

} // namespace fdk::cuda
