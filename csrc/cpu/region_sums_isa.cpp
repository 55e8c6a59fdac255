// The vector kernels of region_sums. This file is compiled once for each instruction set (FDK_ISA_*), so it must not
// instantiate anything that another file could share: no standard library beyond <cstdint> and <cstring>.
#include "isa/backward.h"
#include "isa/forward.h"
#include "isa/mask_backward.h"

#if defined(FDK_ISA_AVX512)
#define FDK_TILE_KERNELS tile_kernels_avx512
#elif defined(FDK_ISA_AVX2)
#define FDK_TILE_KERNELS tile_kernels_avx2
#else
#define FDK_TILE_KERNELS tile_kernels_baseline
#endif

namespace fdk::cpu {

TileKernels FDK_TILE_KERNELS() { return {forward_tile, backward_tile, mask_backward_tile, mass_of_sample}; }

} // namespace fdk::cpu
