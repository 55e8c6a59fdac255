// The interface of the loops of the losses over the channels of a sample, which isa/kernels.cpp compiles once for each
// instruction set.
#pragma once

#include "../op.h"

namespace fdk::cpu {

// By what the sums of a sample are divided (L1).
struct Divisors {
  double fg, bg;
  bool is_masked; // whether the background is: M_fg - S_fg replaces S_bg
  double fg_mass; // M_fg
};

// Rows are [C] doubles; sums and slopes are those of a sample and a region, [C] of the accumulation dtype.
struct LossRowKernels {
  // Writes the region features f and b (L1).
  void (*divide_sums)(DType accumulate, const void* fg, const void* bg, const Divisors& by, int64_t count, double* f,
                      double* b);
  // Returns the sum of (f - b)², the distance (L2) of the vector norm.
  double (*squared_distance)(const double* f, const double* b, int64_t count);
  // Adds the gradient of q times that distance.
  void (*add_distance_gradient)(const double* f, const double* b, double q, int64_t count, double* grad_f,
                                double* grad_b);
  // Writes the slopes (L7) for the gradients of the region features. Under a masked background S_bg is not an input,
  // and its gradient goes to S_fg.
  void (*divide_gradients)(DType accumulate, const double* grad_f, const double* grad_b, const Divisors& by,
                           int64_t count, void* fg, void* bg);
};

LossRowKernels loss_row_kernels_baseline();
LossRowKernels loss_row_kernels_avx2();
LossRowKernels loss_row_kernels_avx512();
const LossRowKernels& loss_row_kernels();

} // namespace fdk::cpu
