// Selects the instruction set of the vector kernels when first asked for.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "loss_rows.h"
#include "mask_kernels.h"
#include "norm.h"
#include "tiles.h"

namespace fdk::cpu {
namespace {

struct Isa {
  const char* name;
  TileKernels tile;
  RegionKernels region;
  NormKernels norm;
  MaskKernels mask;
  LossRowKernels loss_rows;
};

// Lists the instruction sets that both this build and this processor have, best first.
std::vector<Isa> usable_isas() {
  std::vector<Isa> usable;
#if defined(FDK_HAVE_AVX512) || defined(FDK_HAVE_AVX2)
  __builtin_cpu_init();
#endif
#if defined(FDK_HAVE_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    usable.push_back({"avx512", tile_kernels_avx512(), region_kernels_avx512(), norm_kernels_avx512(),
                      mask_kernels_avx512(), loss_row_kernels_avx512()});
  }
#endif
#if defined(FDK_HAVE_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    usable.push_back({"avx2", tile_kernels_avx2(), region_kernels_avx2(), norm_kernels_avx2(), mask_kernels_avx2(),
                      loss_row_kernels_avx2()});
  }
#endif
  usable.push_back({"baseline", tile_kernels_baseline(), region_kernels_baseline(), norm_kernels_baseline(),
                    mask_kernels_baseline(), loss_row_kernels_baseline()});
  return usable;
}

// Returns the best instruction set, or the one that FDKERNELS_CPU_ISA names, so that one machine can test each.
Isa best_isa() {
  const std::vector<Isa> usable = usable_isas();
  const char* wanted = std::getenv("FDKERNELS_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return usable.front();
  for (const Isa& isa : usable) {
    if (std::string(wanted) == isa.name) return isa;
  }
  throw std::runtime_error("FDKERNELS_CPU_ISA must be an instruction set that this build and this processor have, " +
                           std::string("baseline, avx2 or avx512, got ") + wanted);
}

const Isa& isa() {
  static const Isa best = best_isa();
  return best;
}

} // namespace

const char* instruction_set() { return isa().name; }
const TileKernels& tile_kernels() { return isa().tile; }
const RegionKernels& region_kernels() { return isa().region; }
const NormKernels& norm_kernels() { return isa().norm; }
const MaskKernels& mask_kernels() { return isa().mask; }
const LossRowKernels& loss_row_kernels() { return isa().loss_rows; }

} // namespace fdk::cpu
