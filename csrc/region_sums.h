// Stage region_sums: masked foreground and background sums over the pixels of every layer, and their backward.
// The mathematics and its tags (R1) to (R5) stand in fdkernels/region_sums/README.md.
#pragma once

#include <cstdint>

namespace fdk {

// The last four are of masks as a user gives them; bool counts as uint8.
enum class DType : int64_t {
  kFloat32 = 0,
  kFloat64 = 1,
  kBFloat16 = 2,
  kFloat16 = 3,
  kUInt8 = 4,
  kInt8 = 5,
  kInt16 = 6,
  kInt32 = 7,
  kInt64 = 8
};

// One layer of a pyramid. All strides count elements and may be 0; masks are contiguous [N, P] with P = d0*d1*d2.
// The field order is that of fdkernels/native.py: 64-bit words, no padding.
struct Layer {
  void* features;   // [N, C, d0, d1, d2], read by forward and mask_backward, written by backward
  DType dtype;      // of features and upstream: float32, float64, bfloat16 or float16
  int64_t channels; // C
  int64_t size[3];  // d0, d1, d2; missing spatial dimensions are 1 and come first
  int64_t stride_n, stride_c, stride[3];
  const void* fg;       // [N, P] weight of the foreground
  const void* bg;       // [N, P] weight of the background, or null: 1 - fg
  DType mask_dtype;     // of fg and bg: uint8 (0 or 1), float32 or float64
  const void* upstream; // backward only: the gradient to which this one is added, or null
  int64_t upstream_stride_n, upstream_stride_c, upstream_stride[3];
  void* grad_fg; // mask_backward only: [N, P], of the accumulation dtype
  void* grad_bg; // mask_backward only: [N, P], or null where bg is null

  int64_t pixels() const { return size[0] * size[1] * size[2]; }
};
static_assert(sizeof(Layer) == 22 * 8, "Layer is 22 words of 64 bits");

// What all layers of a call share. Sums are [2, N, total_channels] (foreground, background), layers side by side in
// the channel dimension; masses are [2, N, num_layers]; both of dtype `accumulate` (float32 or float64).
struct Pyramid {
  const Layer* layers;
  int64_t num_layers;
  int64_t batch;          // N
  int64_t total_channels; // sum of the layers' C
  DType accumulate;
};

} // namespace fdk

namespace fdk::cpu {

void region_sums_forward(const Pyramid& pyramid, void* sums, void* masses, int num_threads);
void region_sums_backward(const Pyramid& pyramid, const void* grad_sums, int num_threads);
void region_sums_mask_backward(const Pyramid& pyramid, const void* grad_sums, int num_threads);
// region_sums_backward of grad_loss [num_layers], its numbers a stride apart that may be 0, times slopes
// [2, N, total_channels], (F2) of fdkernels/layer_losses/README.md.
void layer_losses_backward(const Pyramid& pyramid, const void* grad_loss, int64_t grad_loss_stride, const void* slopes,
                           int num_threads);
const char* instruction_set();

} // namespace fdk::cpu

namespace fdk::cuda {

// Bytes of scratch memory that region_sums_forward needs for its partial sums.
int64_t region_sums_workspace(const Pyramid& pyramid);
void region_sums_forward(const Pyramid& pyramid, void* sums, void* masses, void* workspace, int device, void* stream);
void region_sums_backward(const Pyramid& pyramid, const void* grad_sums, int device, void* stream);
void region_sums_mask_backward(const Pyramid& pyramid, const void* grad_sums, int device, void* stream);

} // namespace fdk::cuda
