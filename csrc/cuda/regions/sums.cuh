// Sums over several regions (C1) and (C2): each block sums a tile of pixels, and a second pass adds up the tiles.
#pragma once

#include "tile.cuh"

namespace fdk::cuda {

template <typename Acc>
struct RegionOutputs {
  Acc* sums;     // [R, N, total_channels], with pivots [2R, N, total_channels]
  Acc* masses;   // [R, N, L]
  Acc* partials; // layer by layer [N, outputs_of, tiles]
};

// Where a block of sums keeps what its threads share.
template <typename Acc, bool kMoments>
struct SumsShared {
  alignas(16) Acc weights[kStagedWeights<Acc>];         // [regions, staged_pixels]; later the threads' sums
  alignas(16) Acc pivots[kMoments ? kStagedPivots : 1]; // [regions, block_channels]
  Acc masses[kBlockRegions];
  uint8_t ignored[kMaxStagedPixels];
};

// Writes an output of a sample: the sum of a channel in row `row` of the sums, or of the masses where `channel` is that
// of the layer.
template <typename Acc, typename AnyWork>
__device__ void put_region_total(const AnyWork& work, int index, int64_t n, int row, int channel, Acc total,
                                 const RegionOutputs<Acc>& out) {
  const auto& layer = work.layers[index];
  if (channel < layer.channels) {
    out.sums[(row * work.batch + n) * work.total_channels + layer.channel_start + channel] = total;
  } else {
    out.masses[(row * work.batch + n) * work.num_layers + work.first_layer + index] = total;
  }
}

// Writes the same for one tile, or the final output if the layer has one tile.
template <typename Acc>
__device__ void put_region_partial(const RegionWork& work, int index, const RegionItem& item, int row, int channel,
                                   Acc partial, const RegionOutputs<Acc>& out) {
  const RegionLayerWork& layer = work.layers[index];
  if (layer.tiles == 1) return put_region_total(work, index, item.n, row, channel, partial, out);
  const int64_t sums = outputs_of(work.num_regions, work.pivots, layer.channels) - work.num_regions;
  const int64_t output = channel < layer.channels ? static_cast<int64_t>(row) * layer.channels + channel : sums + row;
  out.partials[layer.partial_start + (item.n * (sums + work.num_regions) + output) * layer.tiles + item.tile] = partial;
}

// Adds a tile, weighted, to the sums and moments of a thread.
template <typename Acc, bool kMoments>
__device__ void add_tile(const Tile<Acc>& tile, int regions, const Acc* weights, int weight_stride, const Acc* pivots,
                         int pivot_stride, Acc (&sums)[kThreadRegions][kTileChannels],
                         Acc (&squares)[kMoments ? kThreadRegions : 1][kTileChannels]) {
#pragma unroll
  for (int r = 0; r < kThreadRegions; ++r) {
    if (r >= regions) continue;
    const auto weight = *reinterpret_cast<const Pack<Acc, kTilePixels<Acc>>*>(weights + r * weight_stride);
    Pack<Acc, kTileChannels> pivot = {};
    if constexpr (kMoments) pivot = *reinterpret_cast<const Pack<Acc, kTileChannels>*>(pivots + r * pivot_stride);
#pragma unroll
    for (int k = 0; k < kTileChannels; ++k) {
      Acc sum = 0, square = 0; // short sums first: they lose fewer digits
#pragma unroll
      for (int j = 0; j < kTilePixels<Acc>; ++j) {
        if constexpr (kMoments) {
          const Acc x = tile[k][j] - pivot.words[k], weighted = weight.words[j] * x;
          sum += weighted;
          square += weighted * x;
        } else {
          sum += weight.words[j] * tile[k][j];
        }
      }
      sums[r][k] += sum;
      if constexpr (kMoments) squares[r][k] += square;
    }
  }
}

// Adds the weights of `count` pixels to the masses; a warp takes every eighth region.
template <typename Acc>
__device__ void add_masses(const RegionLayerWork& layer, const RegionRange& range, int count, const Acc* weights,
                           Acc* masses) {
  const int lane = threadIdx.x % kWarp;
  for (int region = threadIdx.x / kWarp; region < range.count; region += kWarps) {
    Acc sum = 0;
    for (int pixel = lane; pixel < count; pixel += kWarp)
      sum += weights[region * layer.staged_pixels + pixel];
    sum = lane_sum(sum);
    if (lane == 0) masses[region] += sum;
  }
}

// Sums values over the lanes along the pixels, whose numbers are the upper bits of a lane's. The lane keeps `lanes` of
// the sums, in its first values: those from lane / lanes * lanes on.
template <int kHalf = kWarp / 2, typename Acc>
__device__ void sum_over_pixel_lanes(Acc (&values)[kWarp], int lanes) {
  if (kHalf < lanes) return;
  const bool upper = threadIdx.x & kHalf;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const Acc kept = upper ? values[i + kHalf] : values[i];
    const Acc given = upper ? values[i] : values[i + kHalf];
    values[i] = kept + __shfl_xor_sync(kAllLanes, given, kHalf);
  }
  if constexpr (kHalf > 1) sum_over_pixel_lanes<kHalf / 2>(values, lanes);
}

// Sums the threads' values over the pixels of a block and writes them from row `first_row` of the sums on.
template <typename Acc>
__device__ void put_block_sums(const RegionWork& work, int index, const RegionItem& item, const RegionRange& range,
                               const TilePlace<Acc>& place, int first_row,
                               const Acc (&of_thread)[kThreadRegions][kTileChannels], Acc* shared,
                               const RegionOutputs<Acc>& out) {
  static_assert(kThreadRegions * kTileChannels == kWarp, "the lanes of a warp share the sums of a thread");
  static_assert(kMaxChannelLanes * kThreads <= kStagedWeights<Acc>, "the threads' sums take the place of the weights");
  const RegionLayerWork& layer = work.layers[index];
  Acc values[kWarp];
#pragma unroll
  for (int i = 0; i < kWarp; ++i)
    values[i] = of_thread[i / kTileChannels][i % kTileChannels];
  sum_over_pixel_lanes(values, layer.lanes);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kMaxChannelLanes; ++i) {
    if (i < layer.lanes) shared[i * kThreads + threadIdx.x] = values[i];
  }
  __syncthreads();
  const int threads = kWarp * work.parts * layer.channel_warps; // of the same pixels
  if (static_cast<int>(threadIdx.x) >= threads) return;
#pragma unroll
  for (int i = 0; i < kMaxChannelLanes; ++i) {
    if (i >= layer.lanes) continue;
    Acc total = 0;
    for (int warp = 0; warp < layer.pixel_warps; ++warp)
      total += shared[i * kThreads + warp * threads + threadIdx.x];
    const int value = place.pixel_lane * layer.lanes + i;
    const int region = value / kTileChannels;
    const int channel = item.group * layer.block_channels() + place.channel + value % kTileChannels;
    const int in_block = place.part * work.thread_regions + region;
    if (region >= work.thread_regions || in_block >= range.count || channel >= layer.channels) continue;
    put_region_partial(work, index, item, first_row + in_block, channel, total, out);
  }
}

// Sums (C1) and (C2) over a block's tile of pixels for a group of channels and a chunk of regions; the first group also
// sums the weights.
template <typename Acc, bool kMoments>
__device__ void sum_regions(const RegionWork& work, int index, uint32_t block, const RegionOutputs<Acc>& out,
                            SumsShared<Acc, kMoments>& shared) {
  const RegionLayerWork& layer = work.layers[index];
  const RegionItem item = item_of(layer, block, work.chunks);
  const RegionRange range = regions_of(work, item.chunk);
  const TilePlace<Acc> place(layer, work.parts);
  const int block_channels = layer.block_channels(), first_channel = item.group * block_channels;
  if constexpr (kMoments) { // read after the barriers of stage_weights
    for (int i = threadIdx.x; i < range.count * block_channels; i += kThreads) {
      const int region = i / block_channels, channel = first_channel + i - region * block_channels;
      const int64_t row = (range.first + region) * work.batch + item.n;
      shared.pivots[i] =
          channel < layer.channels
              ? static_cast<const Acc*>(work.pivots)[row * work.total_channels + layer.channel_start + channel]
              : Acc(0);
    }
  }

  const bool active = place.active && first_channel + place.channel < layer.channels;
  const int first_region = place.part * work.thread_regions; // of the thread, in the block
  const int regions = min(work.thread_regions, range.count - first_region);
  const Acc* weights = shared.weights + first_region * layer.staged_pixels;
  const Acc* pivots = shared.pivots + (kMoments ? first_region * block_channels + place.channel : 0);
  Acc sums[kThreadRegions][kTileChannels] = {};
  Acc squares[kMoments ? kThreadRegions : 1][kTileChannels] = {};
  if (threadIdx.x < kBlockRegions) shared.masses[threadIdx.x] = 0;
  const int64_t begin = static_cast<int64_t>(item.tile) * layer.tile_pixels;
  const int64_t end = min(begin + layer.tile_pixels, layer.pixels);
  for (int64_t first = begin; first < end; first += layer.staged_pixels) {
    const int count = static_cast<int>(min(static_cast<int64_t>(layer.staged_pixels), end - first));
    stage_weights(work, layer, item.n, range, first, count, shared.weights);
    if (work.selects) note_ignored(work, layer, item.n, range, first, count, shared.weights, shared.ignored);
    if (item.group == 0) add_masses(layer, range, count, shared.weights, shared.masses);
    for (int pixel = active ? place.pixel : count; pixel < count; pixel += layer.step_pixels) {
      Tile<Acc> tile;
      load_tile<Acc>(layer, layer.features.values,
                     TileAddress<Acc>(layer, layer.features, layer.features_vector, item.n,
                                      first_channel + place.channel, first + pixel),
                     tile);
      if (work.selects) {
#pragma unroll
        for (int j = 0; j < kTilePixels<Acc>; ++j) {
          for (int k = 0; k < kTileChannels; ++k)
            tile[k][j] = shared.ignored[pixel + j] ? Acc(0) : tile[k][j];
        }
      }
      add_tile<Acc, kMoments>(tile, regions, weights + pixel, layer.staged_pixels, pivots, block_channels, sums,
                              squares);
    }
  }

  put_block_sums(work, index, item, range, place, range.first, sums, shared.weights, out);
  if constexpr (kMoments) {
    const int first_row = static_cast<int>(work.num_regions) + range.first;
    put_block_sums(work, index, item, range, place, first_row, squares, shared.weights, out);
  }
  const int region = static_cast<int>(threadIdx.x);
  if (item.group > 0 || region >= range.count) return;
  put_region_partial(work, index, item, range.first + region, layer.channels, shared.masses[region], out);
}

struct RegionSecondPassLayer {
  int64_t channel_start, partial_start;
  int32_t channels;
  uint32_t tiles; // partial sums of each output
  uint32_t lanes; // that share an output
  uint32_t first_block;
};

// The layers of a launch; those of one tile, whose sums are final, have no blocks.
struct RegionSecondPass {
  RegionSecondPassLayer layers[kMaxLayers];
  int64_t batch, total_channels, num_layers, num_regions;
  int64_t blocks;
  int32_t first_layer, count;
  bool moments;
};

// Describes the second pass after region_sums_kernel.
inline RegionSecondPass describe_second_pass(const RegionWork& work) {
  RegionSecondPass pass = {};
  pass.batch = work.batch;
  pass.total_channels = work.total_channels;
  pass.num_layers = work.num_layers;
  pass.num_regions = work.num_regions;
  pass.first_layer = work.first_layer;
  pass.count = work.count;
  pass.moments = work.pivots;
  for (int32_t index = 0; index < pass.count; ++index) {
    const RegionLayerWork& from = work.layers[index];
    RegionSecondPassLayer& layer = pass.layers[index];
    layer = {from.channel_start, from.partial_start, from.channels, from.tiles, 1, static_cast<uint32_t>(pass.blocks)};
    while (layer.lanes < kWarp && layer.lanes * 4 < layer.tiles)
      layer.lanes *= 2;
    const int64_t outputs = work.batch * outputs_of(work.num_regions, work.pivots, layer.channels);
    if (layer.tiles > 1) pass.blocks += ceil_div<int64_t>(outputs * layer.lanes, kThreads);
  }
  return pass;
}

// Writes a block's part of the sums and masses of a layer, adding up partial sums always in the same order.
template <typename Acc>
__device__ void second_region_pass(const RegionSecondPass& pass, int index, uint32_t block,
                                   const RegionOutputs<Acc>& out) {
  const RegionSecondPassLayer& layer = pass.layers[index];
  const int64_t output = (static_cast<int64_t>(block) * kThreads + threadIdx.x) / layer.lanes;
  const uint32_t lane = threadIdx.x % layer.lanes;
  const int64_t of_sample = outputs_of(pass.num_regions, pass.moments, layer.channels);
  const bool valid = output < pass.batch * of_sample;
  double total = 0;
  if (valid) {
    const Acc* partials = out.partials + layer.partial_start + output * layer.tiles;
#pragma unroll 16
    for (uint32_t tile = lane; tile < layer.tiles; tile += layer.lanes)
      total += partials[tile];
  }
  total = lane_sum(total, layer.lanes);
  if (!valid || lane != 0) return;
  const int64_t n = output / of_sample, slot = output - n * of_sample, sums = of_sample - pass.num_regions;
  const int64_t row = slot < sums ? slot / layer.channels : slot - sums;
  const int64_t channel = slot < sums ? slot - row * layer.channels : layer.channels;
  put_region_total(pass, index, n, static_cast<int>(row), static_cast<int>(channel), static_cast<Acc>(total), out);
}

} // namespace fdk::cuda
