// Stage layer_masks on the CPU: one mask brought to the size of every layer, as weights of foreground and background.
// The mathematics and its tags (M1) to (M5) stand in fdkernels/layer_masks/README.md.
#pragma once

#include "../region_sums.h"

namespace fdk::cpu {

enum class MaskDType : int64_t {
  kUInt8 = 0,
  kInt8 = 1,
  kInt16 = 2,
  kInt32 = 3,
  kInt64 = 4,
  kFloat32 = 5,
  kFloat64 = 6,
  kBFloat16 = 7,
  kFloat16 = 8
};
enum class MaskResize : int64_t { kArea = 0, kMax = 1, kNearest = 2 };

// The fields of both are the words of fdkernels/layer_masks/impl/cpu.py. Strides count elements.
struct Mask {
  const void* values; // [N, d0, d1, d2]
  MaskDType dtype;
  int64_t batch;   // N
  int64_t size[3]; // d0, d1, d2; missing spatial dimensions are 1 and come first
  int64_t stride_n, stride[3];
  MaskResize resize;
  int64_t has_ignore; // 0 or 1
};
static_assert(sizeof(Mask) == 12 * 8, "Mask is 12 words of 64 bits");

struct MaskWeights {
  int64_t size[3];
  void* fg;    // [N, P], written
  void* bg;    // [N, P], or null where there is no ignore_index
  DType dtype; // of both: uint8, float32 or float64
};
static_assert(sizeof(MaskWeights) == 6 * 8, "MaskWeights is 6 words of 64 bits");

void layer_masks(const Mask& mask, double ignore_index, const MaskWeights* sizes, int64_t num_sizes, int num_threads);

} // namespace fdk::cpu
