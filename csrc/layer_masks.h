// Stage layer_masks: one mask at the size of every layer, as foreground and background weights. What a cell of a layer
// holds stands in fdkernels/layer_masks/README.md, (M1) to (M5).
#pragma once

#include <cstdint>

#include "region_sums.h"

namespace fdk {

enum class MaskResize : int64_t { kArea = 0, kMax = 1, kNearest = 2 };

// One size at which the mask is wanted. The field order is that of `size_words` in
// fdkernels/layer_masks/impl/native.py: 64-bit words, no padding.
struct MaskSize {
  void* fg;        // [N, P] contiguous, v·y
  void* bg;        // [N, P] contiguous, v·(1-y), or null where every pixel is valid
  int64_t size[3]; // d0, d1, d2; missing spatial dimensions are 1 and come first
  DType dtype;     // of fg and bg: uint8, where every weight is 0 or 1, else the accumulation dtype

  int64_t pixels() const { return size[0] * size[1] * size[2]; }
};
static_assert(sizeof(MaskSize) == 6 * 8, "MaskSize is 6 words of 64 bits");

struct LayerMasks {
  const void* mask;            // [N, d0, d1, d2]
  DType dtype;                 // of the mask: see DType; bool is uint8
  int64_t batch;               // N
  int64_t size[3];             // full size, not 0
  int64_t stride_n, stride[3]; // in elements; may be 0
  // Pixels that hold this value are left out, if there is one.
  bool has_ignore;
  double ignore_value;   // that of floating-point masks, already rounded to their dtype
  int64_t ignore_number; // that of integers
  MaskResize resize;
  DType accumulate; // float32 or float64
  const MaskSize* sizes;
  int64_t num_sizes;
};

} // namespace fdk

namespace fdk::cpu {

void layer_masks(const LayerMasks& args, int num_threads);
// Whether every pixel of the mask, but for what is left out, is in [0, 1], of integers 0 or 1. Sizes do not matter.
bool layer_masks_is_valid(const LayerMasks& args, int num_threads);

} // namespace fdk::cpu

namespace fdk::cuda {

// `sizes` lies in host memory, all masks in device memory.
void layer_masks(const LayerMasks& args, int device, void* stream);

} // namespace fdk::cuda
