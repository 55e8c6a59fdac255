// How the kernels over several regions find their part of the work, stage weights, and load and store tiles.
#pragma once

#include "../sums/access.cuh"
#include "work.cuh"

namespace fdk::cuda {

struct RegionItem {
  int64_t n;
  uint32_t tile, group, chunk;
};

// Returns the item of a block. Consecutive ones are the chunks and groups of a tile, which share weights and features.
__device__ inline RegionItem item_of(const RegionLayerWork& layer, uint32_t block, uint32_t chunks) {
  const uint32_t with_group = block / chunks, with_tile = with_group / layer.groups, n = with_tile / layer.tiles;
  return {n, with_tile - n * layer.tiles, with_group - with_tile * layer.groups, block - with_group * chunks};
}

struct RegionRange {
  int first, count;
};

__device__ inline RegionRange regions_of(const RegionWork& work, int chunk) {
  const int first = chunk * work.block_regions;
  return {first, min(work.block_regions, static_cast<int>(work.num_regions) - first)};
}

// The position of a thread in its block.
template <typename Acc>
struct TilePlace {
  int channel; // its first channel in the block
  int pixel;   // its first pixel in a step of the block
  int part;    // of the regions
  int channel_lane, pixel_lane, channel_warp;
  bool active;
  __device__ TilePlace(const RegionLayerWork& layer, int parts) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    channel_lane = lane % layer.lanes;
    pixel_lane = lane / layer.lanes;
    channel_warp = warp % layer.channel_warps;
    part = warp / layer.channel_warps % parts;
    const int pixel_warp = warp / (layer.channel_warps * parts);
    channel = (channel_warp * layer.lanes + channel_lane) * kTileChannels;
    pixel = (pixel_warp * layer.pixel_lanes() + pixel_lane) * kTilePixels<Acc>;
    active = pixel_warp < layer.pixel_warps;
  }
};

// Calls body with a value of the type of the weights.
template <typename Acc, typename Body>
__device__ void with_weight_type(const RegionLayerWork& layer, Body body) {
  if (static_cast<DType>(layer.weight_dtype) == DType::kUInt8) return body(uint8_t());
  body(Acc());
}

// Loads the weights of a block's regions at `count` pixels from `first` on into shared memory [regions,
// staged_pixels], 0 beyond the count up to whole tiles. Called by the whole block, which waits before and after.
template <typename Acc>
__device__ void stage_weights(const RegionWork& work, const RegionLayerWork& layer, int64_t n, const RegionRange& range,
                              int64_t first, int count, Acc* weights) {
  __syncthreads();
  const int64_t start = (n * work.num_regions + range.first) * layer.pixels + first;
  with_weight_type<Acc>(layer, [&](auto element) {
    using M = decltype(element);
    const M* from = static_cast<const M*>(layer.weights) + start;
    if constexpr (std::is_same_v<Acc, float>) {
      if (layer.weights_vector) { // then `count` is a multiple of 4 as well
        const int packs = count / 4;
#pragma unroll 4
        for (int i = threadIdx.x; i < range.count * packs; i += kThreads) {
          const int region = i / packs, pixel = 4 * (i - region * packs);
          const auto stored = *reinterpret_cast<const Pack<M, 4>*>(from + region * layer.pixels + pixel);
          Pack<float, 4> pack;
          for (int j = 0; j < 4; ++j)
            pack.words[j] = as_weight<float>(stored.template get<M>(j));
          *reinterpret_cast<Pack<float, 4>*>(weights + region * layer.staged_pixels + pixel) = pack;
        }
        return;
      }
    }
    const int padded = ceil_div(count, kTilePixels<Acc>) * kTilePixels<Acc>;
#pragma unroll 4
    for (int i = threadIdx.x; i < range.count * padded; i += kThreads) {
      const int region = i / padded, pixel = i - region * padded;
      weights[region * layer.staged_pixels + pixel] =
          pixel < count ? as_weight<Acc>(from[region * layer.pixels + pixel]) : Acc(0);
    }
  });
  __syncthreads();
}

// Notes in shared memory [pixels] which of `count` pixels from `first` on are ignored: those whose weights are 0 in all
// regions, of which `weights` has those of the range. Called by the whole block, which waits afterwards.
template <typename Acc>
__device__ void note_ignored(const RegionWork& work, const RegionLayerWork& layer, int64_t n, const RegionRange& range,
                             int64_t first, int count, const Acc* weights, uint8_t* ignored) {
  with_weight_type<Acc>(layer, [&](auto element) {
    using M = decltype(element);
    const M* from = static_cast<const M*>(layer.weights) + n * work.num_regions * layer.pixels + first;
    for (int pixel = threadIdx.x; pixel < count; pixel += kThreads) {
      bool any = false;
      for (int region = 0; region < range.count; ++region)
        any |= weights[region * layer.staged_pixels + pixel] != 0;
      for (int region = 0; region < work.num_regions - range.count; ++region) {
        const int64_t other = region < range.first ? region : region + range.count;
        any |= from[other * layer.pixels + pixel] != 0;
      }
      ignored[pixel] = !any;
    }
  });
  __syncthreads();
}

// Calls body with a value of the type of the features.
template <typename Acc, typename Body>
__device__ void with_feature_type(const RegionLayerWork& layer, Body body) {
  switch (static_cast<DType>(layer.feature_dtype)) {
    case DType::kBFloat16:
      return body(__nv_bfloat16());
    case DType::kFloat16:
      return body(__half());
    case DType::kFloat64:
      if constexpr (std::is_same_v<Acc, double>) body(double());
      return;
    default:
      return body(float());
  }
}

template <typename T>
using FourBits = std::conditional_t<sizeof(T) == 4, uint4, uint2>;

// Values of some channels at some pixels.
template <typename Acc>
using Tile = Acc[kTileChannels][kTilePixels<Acc>];

// Where a tile lies in a map.
template <typename Acc>
struct TileAddress {
  int64_t first, stride_c; // of the first channel, and from one to the next
  int64_t pixel_offsets[kTilePixels<Acc>];
  int channels, pixels; // of the tile that are inside of the layer
  bool vector;

  __device__ TileAddress(const RegionLayerWork& layer, const Map& map, bool vector, int64_t n, int channel,
                         int64_t pixel)
      : first(n * map.stride_n + channel * map.stride_c), stride_c(map.stride_c), vector(vector) {
    channels = min(kTileChannels, layer.channels - channel);
    pixels = static_cast<int>(min(static_cast<int64_t>(kTilePixels<Acc>), layer.pixels - pixel));
    if (layer.size2 == layer.pixels) {
      for (int j = 0; j < kTilePixels<Acc>; ++j)
        pixel_offsets[j] = (pixel + j) * map.stride[2];
      return;
    }
    int64_t row = pixel / layer.size2, column = pixel - row * layer.size2;
    int64_t slice = row / layer.size1;
    row -= slice * layer.size1;
    for (int j = 0; j < kTilePixels<Acc>; ++j) {
      pixel_offsets[j] = slice * map.stride[0] + row * map.stride[1] + column * map.stride[2];
      if (++column < layer.size2) continue;
      column = 0;
      if (++row < layer.size1) continue;
      row = 0;
      ++slice;
    }
  }
};

// Loads a tile, 0 outside of the layer. Adjacent warps may load the same one for other regions, hence through the L1
// cache.
template <typename Acc>
__device__ void load_tile(const RegionLayerWork& layer, const void* values, const TileAddress<Acc>& at,
                          Tile<Acc>& tile) {
  with_feature_type<Acc>(layer, [&](auto element) {
    using T = decltype(element);
    const T* from = static_cast<const T*>(values) + at.first;
    if constexpr (std::is_same_v<Acc, float>) {
      static_assert(kTileChannels == 4 && kTilePixels<Acc> == 4, "an access has four elements in either direction");
      if (at.vector) {
        auto load_packs = [&](int count, auto offset, auto put) {
          Pack<T, 4> packs[4] = {};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (i < count)
              packs[i] = bits_as<Pack<T, 4>>(__ldca(reinterpret_cast<const FourBits<T>*>(from + offset(i))));
          }
#pragma unroll
          for (int i = 0; i < 16; ++i)
            put(i / 4, i % 4, packs[i / 4].template get<Acc>(i % 4));
        };
        if (layer.along_channels) {
          load_packs(
              at.pixels, [&](int i) { return at.pixel_offsets[i]; },
              [&](int j, int k, Acc value) { tile[k][j] = value; });
        } else {
          load_packs(
              at.channels, [&](int i) { return i * at.stride_c + at.pixel_offsets[0]; },
              [&](int k, int j, Acc value) { tile[k][j] = value; });
        }
        return;
      }
    }
    T loaded[kTileChannels][kTilePixels<Acc>] = {};
#pragma unroll
    for (int k = 0; k < kTileChannels; ++k) {
#pragma unroll
      for (int j = 0; j < kTilePixels<Acc>; ++j) {
        if (k < at.channels && j < at.pixels) loaded[k][j] = from[k * at.stride_c + at.pixel_offsets[j]];
      }
    }
#pragma unroll
    for (int k = 0; k < kTileChannels; ++k) {
#pragma unroll
      for (int j = 0; j < kTilePixels<Acc>; ++j)
        tile[k][j] = widen<Acc>(loaded[k][j]);
    }
  });
}

// Writes a tile, as far as it is inside of the layer.
template <typename Acc>
__device__ void store_tile(const RegionLayerWork& layer, void* values, const TileAddress<Acc>& at,
                           const Tile<Acc>& tile) {
  with_feature_type<Acc>(layer, [&](auto element) {
    using T = decltype(element);
    T* to = static_cast<T*>(values) + at.first;
    if constexpr (std::is_same_v<Acc, float>) {
      if (at.vector) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (i >= (layer.along_channels ? at.pixels : at.channels)) continue;
          Pack<T, 4> pack = {};
#pragma unroll
          for (int j = 0; j < 4; ++j)
            pack.set(j, layer.along_channels ? tile[j][i] : tile[i][j]);
          T* address = to + (layer.along_channels ? at.pixel_offsets[i] : i * at.stride_c + at.pixel_offsets[0]);
          __stcs(reinterpret_cast<FourBits<T>*>(address), bits_as<FourBits<T>>(pack));
        }
        return;
      }
    }
#pragma unroll
    for (int k = 0; k < kTileChannels; ++k) {
#pragma unroll
      for (int j = 0; j < kTilePixels<Acc>; ++j) {
        if (k < at.channels && j < at.pixels) to[k * at.stride_c + at.pixel_offsets[j]] = narrow<T>(tile[k][j]);
      }
    }
  });
}

} // namespace fdk::cuda
