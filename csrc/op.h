// The op: the arguments of a call, and the functions of both backends. fdkernels/op/README.md derives them under the
// tags (M1) to (M5), (R1) to (R5), (C1) to (C4), (L1) to (L7), (F1) and (F2).
#pragma once

#include <cstdint>

namespace fdk {

// The last four are of masks as a user gives them; bool counts as uint8.
enum class DType : int64_t { kFloat32, kFloat64, kBFloat16, kFloat16, kUInt8, kInt8, kInt16, kInt32, kInt64 };

// ---------------------------------------------------------------- layers

// One layer. Strides count elements and may be 0; missing spatial dimensions have size 1 and come first. fdkernels._C
// takes layers as lists of 64-bit words, whose places it tells Python as `layer_fields`.
struct Layer {
  void* features;   // [N, C, d0, d1, d2], read by sums and mask_gradient; gradient writes its result here
  DType dtype;      // of features and upstream: float32, float64, bfloat16 or float16
  int64_t channels; // C
  int64_t size[3];  // d0, d1, d2
  int64_t stride_n, stride_c, stride[3];
  const void* fg;       // [N, P] contiguous, weight of the foreground
  const void* bg;       // [N, P] contiguous, weight of the background, or null: 1 - fg
  DType mask_dtype;     // of fg and bg: uint8 (0, 1, or any other for NaN), float32 or float64
  const void* upstream; // [N, C, d0, d1, d2], added by gradient, or null
  int64_t upstream_stride_n, upstream_stride_c, upstream_stride[3];
  void* grad_fg; // [N, P], written by mask_gradient in the accumulation dtype
  void* grad_bg; // [N, P] likewise, or null where bg is null
};
static_assert(sizeof(Layer) == 22 * 8, "Layer is 22 words of 64 bits");

// The layers of a call.
struct Pyramid {
  const Layer* layers; // [L]
  int64_t num_layers;  // L
  int64_t batch;       // N
  int64_t total_channels;
  DType accumulate; // dtype of sums, masses, losses and slopes: float32 or float64
};

// ---------------------------------------------------------------- several regions

// Where the values [N, C, d0, d1, d2] of a layer lie. Strides count elements and may be 0.
struct Map {
  void* values; // or null
  int64_t stride_n, stride_c, stride[3];
};

// One layer of a call over R regions, as 64-bit words; see `region_layer_fields`. Missing spatial dimensions have size
// 1 and come first.
struct RegionLayer {
  Map features; // read by sums and weight_gradient, and with pivots by gradient
  Map gradient; // written by gradient
  Map upstream; // added by gradient, if not null
  DType dtype;  // of the three: float32, float64, bfloat16 or float16
  int64_t channels;
  int64_t size[3];     // d0, d1, d2
  const void* weights; // [N, R, P] contiguous
  DType weight_dtype;  // uint8 (0, 1, or any other for NaN), float32 or float64
  void* grad_weights;  // [N, R, P], written by weight_gradient in the accumulation dtype
};
static_assert(sizeof(Map) == 6 * 8 && sizeof(RegionLayer) == 26 * 8, "RegionLayer is 26 words of 64 bits");

// The layers of a call over R regions.
struct Regions {
  const RegionLayer* layers; // [L]
  int64_t num_layers;        // L
  int64_t batch;             // N
  int64_t num_regions;       // R
  bool selects;              // pixels whose weights are all 0 are ignored ones, whose features have no effect
  const void* pivots;        // [R, N, total_channels] of the accumulation dtype; null: no second moments
  int64_t total_channels;
  DType accumulate; // dtype of sums, masses and gradients of weights: float32 or float64
};

// ---------------------------------------------------------------- normalisation and activation

enum class Activation { kNone, kRelu, kLeakyRelu };

// One map of a normalisation with its activation. Its pixels follow each other, or its channels do.
struct NormAct {
  // The input, its weights if there are any, and as `upstream` the gradient that arrives, laid out like the input.
  const Layer& layer;
  int64_t batch;
  DType accumulate; // of sums and parameters: float32 or float64
  Activation activation;
  double slope;          // of kLeakyRelu below 0
  bool activation_first; // the activation comes before the normalisation
  bool instance;         // statistics are those of a sample, G = N * C, and else of the batch, G = C
  bool given;            // statistics are given, and no function of the input
  double eps;
  const void* gamma;      // [C], or null for 1
  const void* beta;       // [C], or null for 0
  DType parameters;       // of both: float32 or float64
  double* statistics;     // [2, G], mean and biased variance, given or written by forward
  void* running_mean;     // [C] of the dtype of the parameters, moved by forward; or null
  void* running_variance; // [C] likewise, the unbiased one
  double momentum;        // how much of the new statistics the running ones take
  void* out;              // laid out like the input: the output, or its gradient, or null where backward writes none
};

// ---------------------------------------------------------------- masks

enum class MaskResize { kArea, kMax, kNearest };

// Of weights in bytes: the pixel holds a value that is no weight, which is NaN in a floating-point dtype.
constexpr uint8_t kNoWeight = 255;

// The weights of one size. fdkernels._C takes them as lists of 64-bit words; see `mask_size_fields`.
struct MaskSize {
  void* fg;        // [N, P] contiguous, v·y
  void* bg;        // [N, P] contiguous, v·(1-y), or null without an ignored value
  int64_t size[3]; // d0, d1, d2; missing spatial dimensions have size 1 and come first
  DType dtype;     // of fg and bg: uint8 where every weight is 0, 1 or kNoWeight, else the accumulation dtype
};
static_assert(sizeof(MaskSize) == 6 * 8, "MaskSize is 6 words of 64 bits");

struct Masks {
  const void* mask; // [N, d0, d1, d2]
  DType dtype;
  int64_t batch;               // N
  int64_t size[3];             // d0, d1, d2, none of them 0
  int64_t stride_n, stride[3]; // in elements; may be 0
  MaskResize resize;
  // Pixels of this value are ignored, if `has_ignore`.
  bool has_ignore;
  double ignore_value;   // for floating-point masks, rounded to their dtype
  int64_t ignore_number; // for integer masks
  // How far a value may lie outside of [0, 1] and be taken as it is; beyond it, it counts as NaN.
  double tolerance;
  DType accumulate;      // float32 or float64
  const MaskSize* sizes; // [num_sizes], host memory
  int64_t num_sizes;
};

// ---------------------------------------------------------------- losses

enum class RegionWeight { kValid, kNone, kRegion, kPixels };
enum class Norm { kVector, kChannelSum, kRelative, kBatch };
enum class Exchange { kNone, kShuffle, kPooled };
enum class Reduction { kMean, kSum };

// How region sums become a loss; see `Options` in fdkernels/conventions.py.
struct Options {
  RegionWeight region_weight; // the divisor of the sums (L1)
  bool masked_background;     // M_fg - S_fg replaces the background sum
  Norm norm;                  // the distance of a pair (L2) or over the batch (L6)
  double log_scale;           // s in (L3)
  double eps;                 // added to the distance before the logarithm
  Exchange exchange;          // the cross-sample term (L4), (L5)
  Reduction reduction;        // of the entries of a layer to its loss
};

// The losses of a call: how to compute them, and where to write them.
struct Losses {
  Options options;
  // shuffle: [N], the sample whose foreground is paired with background n; pooled: [K, 2]; else null
  const int64_t* pairing;
  int64_t num_pairs; // N or K; pooled pairs with a negative entry do not count
  void* losses;      // [L]; or null on the CPU
  void* slopes;      // [2, N, total_channels], gradient of each layer's loss with respect to its sums; or null
  void* total;       // the sum of the losses, which `sums` on the CPU writes; or null
};

} // namespace fdk

// Sums and slopes are [2, N, total_channels], foreground first, the layers side by side; masses are [2, N, L].

namespace fdk::cpu {

// Resizes a mask to the weights (M3) to (M5) of every size.
void masks(const Masks& args, int num_threads);
// Whether every pixel that is not ignored is in [0, 1] to within the tolerance. `sizes` is not read.
bool mask_is_valid(const Masks& args, int num_threads);
// Sums and masses (R2) and, unless `losses` is null, the losses of these.
void sums(const Pyramid& pyramid, void* sums, void* masses, const Losses* losses, int num_threads);
// Losses (L1) to (L6) and slopes (F1) of given sums. Of the layers only channels and sizes are read.
void losses(const Pyramid& pyramid, const void* sums, const void* masses, const Losses& losses);
// Gradients of the features (R3), for grad_sums [2, N, total_channels] times factor[l * factor_stride] of layer l, or
// as they are where `factor` is null.
void gradient(const Pyramid& pyramid, const void* grad_sums, const void* factor, int64_t factor_stride,
              int num_threads);
// Gradients of the weights (R4).
void mask_gradient(const Pyramid& pyramid, const void* grad_sums, int num_threads);
// Sums (C1) [R, N, total_channels], with pivots followed by the moments (C2), and masses [R, N, L].
void region_sums(const Regions& regions, void* sums, void* masses, int num_threads);
// Gradients of the features (C3), for grad_sums of the shape of the sums.
void region_gradient(const Regions& regions, const void* grad_sums, int num_threads);
// Gradients of the weights (C4).
void region_weight_gradient(const Regions& regions, const void* grad_sums, int num_threads);

// Statistics (N1) unless they are given, the output (N2), and its region sums, double [2, N, C], unless null.
void norm_forward(const NormAct& call, double* sums, int num_threads);
// The gradients (N4) of gamma and beta, [C] of the dtype of the parameters, unless null, and the gradient (N5) of the
// input; `slopes` [2, N, C] of the accumulation dtype add (R3) to the gradient that arrives, unless null.
void norm_backward(const NormAct& call, const void* slopes, void* grad_gamma, void* grad_beta, int num_threads);

const char* instruction_set();

} // namespace fdk::cpu

namespace fdk::cuda {

// As in fdk::cpu. All data and the pairing are in device memory; layers and sizes are in host memory.
void masks(const Masks& args, int device, void* stream);
void sums(const Pyramid& pyramid, void* sums, void* masses, const Losses* losses, void* workspace, int device,
          void* stream);
void losses(const Pyramid& pyramid, const void* sums, const void* masses, const Losses& losses, void* workspace,
            int device, void* stream);
void gradient(const Pyramid& pyramid, const void* grad_sums, const void* factor, int64_t factor_stride, int device,
              void* stream);
void mask_gradient(const Pyramid& pyramid, const void* grad_sums, int device, void* stream);
void region_sums(const Regions& regions, void* sums, void* masses, void* workspace, int device, void* stream);
void region_gradient(const Regions& regions, const void* grad_sums, int device, void* stream);
void region_weight_gradient(const Regions& regions, const void* grad_sums, int device, void* stream);
// The map has no gaps; the region sums are of the accumulation dtype.
void norm_forward(const NormAct& call, void* sums, void* workspace, int device, void* stream);
void norm_backward(const NormAct& call, const void* slopes, void* grad_gamma, void* grad_beta, void* workspace,
                   int device, void* stream);

// Bytes of scratch memory that `sums`, with or without losses, `losses`, `region_sums`, and both functions of a
// normalisation need.
int64_t sums_workspace(const Pyramid& pyramid, bool with_losses);
int64_t losses_workspace(const Pyramid& pyramid);
int64_t region_sums_workspace(const Regions& regions);
int64_t norm_workspace(const NormAct& call);

} // namespace fdk::cuda
