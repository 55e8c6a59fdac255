// The vector kernels over several regions; see kernels.cpp.
#include "region_gradient.h"
#include "region_sums.h"
#include "region_weight_gradient.h"

#if defined(FDK_ISA_AVX512)
#define FDK_REGION_KERNELS region_kernels_avx512
#elif defined(FDK_ISA_AVX2)
#define FDK_REGION_KERNELS region_kernels_avx2
#else
#define FDK_REGION_KERNELS region_kernels_baseline
#endif

namespace fdk::cpu {

RegionKernels FDK_REGION_KERNELS() {
  return {region_sums_of_tile, region_gradient_of_tile, region_weight_gradient_of_tile};
}

} // namespace fdk::cpu
