// The interface of the vector kernels, which isa/kernels.cpp compiles once for each instruction set.
#pragma once

#include "../layout.h"

namespace fdk::cpu {

// A tile: sample n, channels [channel_begin, channel_end), pixels [pixel_begin, pixel_end).
struct Tile {
  int64_t n, channel_begin, channel_end, pixel_begin, pixel_end;
};

// Whether channels are contiguous and pixels are not, as in channels_last.
static inline bool channels_are_inner(const Layer& layer) {
  return layer.stride_c == 1 && layer.channels > 1 && pixels_of(layer) > 1;
}

inline constexpr int64_t kMaxTileChannels = 1024;

// The sums over the foreground and the background, [channels] each.
struct TileSums {
  double *fg, *bg;

  TileSums from(int64_t channel) const { return {fg + channel, bg + channel}; }
};

// The names are those of the kernels' headers in isa/.
struct TileKernels {
  // Writes the sums (R2) of a tile.
  void (*sums)(const Layer& layer, const Tile& tile, DType accumulate, TileSums sums);
  // Writes the masses (R2) of sample n, double [2].
  void (*masses)(const Layer& layer, int64_t n, double* mass);
  // Writes the gradient (R3) of a tile; g_fg and g_bg are rows [C] of the accumulation dtype.
  void (*gradient)(const Layer& layer, const Tile& tile, DType accumulate, const void* g_fg, const void* g_bg);
  // Writes the gradients (R4) of the weights of a tile that spans all channels.
  void (*mask_gradient)(const Layer& layer, const Tile& tile, DType accumulate, const void* g_fg, const void* g_bg);
};

TileKernels tile_kernels_baseline();
TileKernels tile_kernels_avx2();
TileKernels tile_kernels_avx512();
// Those of the instruction set in use.
const TileKernels& tile_kernels();

// A tile of a call over several regions.
struct RegionTile {
  const Regions& regions;
  const RegionLayer& layer;
  int64_t first_channel; // of the layer, among all channels
  Tile tile;
  void* room; // of room_bytes(), aligned to a cache line, for the kernels to compute in
};

static inline bool channels_are_inner(const RegionLayer& layer, const Map& map) {
  return map.stride_c == 1 && layer.channels > 1 && pixels_of(layer) > 1;
}

// Channels of a tile with contiguous channels, pixels of the largest block that is computed at a time, and of the
// smallest.
inline constexpr int64_t kRegionTileChannels = 256, kMaxBlock = 1024, kMinBlock = 16;
// Elements of the blocks: the weights of all regions for the pixels of a block, and features of as many.
inline constexpr int64_t kBlockElements = 1 << 14;

// Elements between the rows of a block beyond its pixels: rows a power of two apart would share the sets of the cache.
inline constexpr int64_t kPadding = 16;

// The room consists of four buffers of so many elements, each for a block of at least kMinBlock pixels.
static inline int64_t room_elements(const Regions& regions) {
  return kBlockElements + (kMinBlock + kPadding) * regions.num_regions;
}
static inline int64_t room_bytes(const Regions& regions) {
  return 4 * room_elements(regions) * element_size(regions.accumulate);
}

// Rows of sums, or of their gradients: R, with second moments 2R.
static inline int64_t rows_of(const Regions& regions) {
  return regions.num_regions * (regions.pivots != nullptr ? 2 : 1);
}

struct RegionKernels {
  // Writes the sums (C1), (C2) of a tile, double [R or 2R][channels], and if it begins at channel 0 the masses of its
  // pixels, double [R].
  void (*sums)(const RegionTile& tile, double* sums, double* masses);
  // Writes the gradient (C3) of a tile for grad_sums [R or 2R, N, total_channels] of the accumulation dtype.
  void (*gradient)(const RegionTile& tile, const void* grad_sums);
  // Writes the gradients (C4) of the weights of a tile that spans all channels.
  void (*weight_gradient)(const RegionTile& tile, const void* grad_sums);
};

RegionKernels region_kernels_baseline();
RegionKernels region_kernels_avx2();
RegionKernels region_kernels_avx512();
const RegionKernels& region_kernels();

} // namespace fdk::cpu
