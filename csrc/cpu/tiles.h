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

// The names are those of the kernels' headers in isa/.
struct TileKernels {
  // Writes the sums (R2) of a tile, double [channels][2], foreground first.
  void (*sums)(const Layer& layer, const Tile& tile, DType accumulate, double* partial);
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

} // namespace fdk::cpu
