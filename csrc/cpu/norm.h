// The interface of the kernels of a normalisation and its activation, which isa/norm_kernels.cpp compiles once for each
// instruction set.
#pragma once

#include "tiles.h"

namespace fdk::cpu {

// A tile of a call: one plane of pixels, or with contiguous channels some pixels of all channels.
struct NormTile {
  const NormAct& call;
  Tile tile;
};

// Rows of parameters of one sample, [row][C] in the accumulation dtype, one `stride` after the other.
struct NormRows {
  const void* values;
  int64_t stride;
};

struct NormKernels {
  // Writes mean and sum of squared deviations (N1) of a tile, double [2][channels].
  void (*moments)(const NormTile& tile, double* moments);
  // Writes the output (N2) of a tile.
  void (*forward)(const NormTile& tile, const NormRows& rows);
  // Writes the sums (N4) of a tile, double [2][channels]; slopes are g_fg and g_bg, or without values.
  void (*reduce)(const NormTile& tile, const NormRows& rows, const NormRows& slopes, double* sums);
  // Writes the gradient (N5) of a tile.
  void (*gradient)(const NormTile& tile, const NormRows& rows, const NormRows& slopes);
};

NormKernels norm_kernels_baseline();
NormKernels norm_kernels_avx2();
NormKernels norm_kernels_avx512();
const NormKernels& norm_kernels();

} // namespace fdk::cpu
