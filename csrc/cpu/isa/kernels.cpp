// The vector kernels. This file is compiled once for each instruction set (FDK_ISA_*), so it must not instantiate
// anything that another file could share: no standard library beyond <cstdint> and <cstring>.
#include "gradient.h"
#include "loss_rows.h"
#include "mask_bytes.h"
#include "mask_gradient.h"
#include "sums.h"

#if defined(FDK_ISA_AVX512)
#define FDK_TILE_KERNELS tile_kernels_avx512
#define FDK_MASK_KERNELS mask_kernels_avx512
#define FDK_LOSS_ROW_KERNELS loss_row_kernels_avx512
#elif defined(FDK_ISA_AVX2)
#define FDK_TILE_KERNELS tile_kernels_avx2
#define FDK_MASK_KERNELS mask_kernels_avx2
#define FDK_LOSS_ROW_KERNELS loss_row_kernels_avx2
#else
#define FDK_TILE_KERNELS tile_kernels_baseline
#define FDK_MASK_KERNELS mask_kernels_baseline
#define FDK_LOSS_ROW_KERNELS loss_row_kernels_baseline
#endif

namespace fdk::cpu {

TileKernels FDK_TILE_KERNELS() { return {sums_of_tile, masses_of_sample, gradient_of_tile, mask_gradient_of_tile}; }
MaskKernels FDK_MASK_KERNELS() { return {bytes_of_row}; }
LossRowKernels FDK_LOSS_ROW_KERNELS() {
  return {divide_sums_of, squared_distance, add_distance_gradient, divide_gradients_of};
}

} // namespace fdk::cpu
