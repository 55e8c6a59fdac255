// One tile of one layer, and the vector kernels that work on it; compiled once for each instruction set.
#pragma once

#include "../region_sums.h"

namespace fdk::cpu {

// A tile: sample n, channels [channel_begin, channel_end), pixels [pixel_begin, pixel_end).
struct Tile {
  int64_t n, channel_begin, channel_end, pixel_begin, pixel_end;
};

// Whether pixels lie further apart in memory than channels, as in channels_last.
// Static, like everything that files of several instruction sets include: the linker must not merge their copies.
static inline bool channels_are_inner(const Layer& layer) {
  return layer.stride_c == 1 && layer.channels > 1 && layer.size[0] * layer.size[1] * layer.size[2] > 1;
}

inline constexpr int64_t kMaxTileChannels = 1024;

struct TileKernels {
  // (R2): sums of a tile, double [channels][2], foreground first.
  void (*forward)(const Layer& layer, const Tile& tile, DType accumulate, double* partial);
  // (R3): g_fg and g_bg are rows [C] of the accumulation dtype.
  void (*backward)(const Layer& layer, const Tile& tile, DType accumulate, const void* g_fg, const void* g_bg);
  // (R4): the tile spans all channels.
  void (*mask_backward)(const Layer& layer, const Tile& tile, DType accumulate, const void* g_fg, const void* g_bg);
  // The masses of sample n, double [2].
  void (*masses)(const Layer& layer, int64_t n, double* mass);
};

TileKernels tile_kernels_baseline();
TileKernels tile_kernels_avx2();
TileKernels tile_kernels_avx512();

} // namespace fdk::cpu
