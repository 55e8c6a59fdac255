// The kernels of a normalisation and its activation; see kernels.cpp.
#include "norm_pixels.h"
#include "norm_planes.h"

#if defined(FDK_ISA_AVX512)
#define FDK_NORM_KERNELS norm_kernels_avx512
#elif defined(FDK_ISA_AVX2)
#define FDK_NORM_KERNELS norm_kernels_avx2
#else
#define FDK_NORM_KERNELS norm_kernels_baseline
#endif

namespace fdk::cpu {
namespace {

// Calls body with the formula of a call, for its accumulation dtype.
template <class Body>
void with_formula_of(const NormAct& call, const Body& body) {
  call.accumulate == DType::kFloat64 ? with_formula<double>(call, [&](auto formula) { body(formula, double()); })
                                     : with_formula<float>(call, [&](auto formula) { body(formula, float()); });
}

void norm_moments_of_tile(const NormTile& tile, double* moments) {
  with_formula_of(tile.call, [&](auto formula, auto zero) {
    using T = decltype(zero);
    channels_are_inner(tile.call.layer) ? moments_of_pixels<T>(tile, formula, moments)
                                        : moments_of_plane<T>(tile, formula, moments);
  });
}

void norm_forward_of_tile(const NormTile& tile, const NormRows& rows) {
  with_formula_of(tile.call, [&](auto formula, auto zero) {
    using T = decltype(zero);
    channels_are_inner(tile.call.layer) ? forward_of_pixels<T>(tile, rows, formula)
                                        : forward_of_plane<T>(tile, rows, formula);
  });
}

void norm_reduce_tile(const NormTile& tile, const NormRows& rows, const NormRows& slopes, double* sums) {
  with_formula_of(tile.call, [&](auto formula, auto zero) {
    using T = decltype(zero);
    channels_are_inner(tile.call.layer) ? reduce_pixels<T>(tile, rows, slopes, formula, sums)
                                        : reduce_plane<T>(tile, rows, slopes, formula, sums);
  });
}

void norm_gradient_of_tile(const NormTile& tile, const NormRows& rows, const NormRows& slopes) {
  with_formula_of(tile.call, [&](auto formula, auto zero) {
    using T = decltype(zero);
    channels_are_inner(tile.call.layer) ? gradient_of_pixels<T>(tile, rows, slopes, formula)
                                        : gradient_of_plane<T>(tile, rows, slopes, formula);
  });
}

} // namespace

NormKernels FDK_NORM_KERNELS() {
  return {norm_moments_of_tile, norm_forward_of_tile, norm_reduce_tile, norm_gradient_of_tile};
}

} // namespace fdk::cpu
