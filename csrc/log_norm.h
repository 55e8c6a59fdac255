// Stage log_norm: region sums -> region features -> discrepancy D -> loss -scale * log(D + eps), and its backward.
// The mathematics and its tags (L1) to (L7) stand in fdkernels/log_norm/README.md.
#pragma once

#include "region_sums.h"

namespace fdk {

enum class RegionWeight : int64_t { kValid = 0, kNone = 1, kRegion = 2, kPixels = 3 };
enum class Norm : int64_t { kVector = 0, kChannelSum = 1, kRelative = 2, kBatch = 3 };
enum class Exchange : int64_t { kNone = 0, kShuffle = 1, kPooled = 2 };
enum class Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

// Sums [2, N, total_channels] and masses [2, N, num_layers] as region_sums writes them.
struct LogNorm {
  int64_t batch;           // N
  int64_t num_layers;      // L
  int64_t total_channels;  // sum of the layers' C
  const int64_t* channels; // [L], host memory
  const int64_t* pixels;   // [L], host memory
  const int64_t* pairing;  // shuffle: [N], the sample whose foreground meets background n; pooled: [K, 2]; else null
  int64_t num_pairs;       // N or K; pooled pairs with a negative entry do not count
  RegionWeight region_weight;
  bool masked_background; // the background sum is M_fg - S_fg, as in the authors' code
  Norm norm;
  Exchange exchange;
  Reduction reduction;
  double log_scale;
  double eps;
  DType accumulate;
};

// Loss: [N, L] for Reduction::kNone ([total_channels] under Norm::kBatch), else [L].

} // namespace fdk

namespace fdk::cpu {

void log_norm_forward(const LogNorm& args, const void* sums, const void* masses, void* loss);
void log_norm_backward(const LogNorm& args, const void* grad_loss, const void* sums, const void* masses,
                       void* grad_sums, void* grad_masses);
// Forward without Reduction::kNone. With a `share` of 0 loss is [L], else one number, the sum of the layers' losses
// times `share`. `slopes` [2, N, total_channels], unless null, becomes the gradient of it, each layer's of its own
// loss.
void log_norm_forward_with_slopes(const LogNorm& args, const void* sums, const void* masses, double share, void* loss,
                                  void* slopes);

} // namespace fdk::cpu

namespace fdk::cuda {

// `channels` and `pixels` stay in host memory; `pairing` and all data are in device memory.
void log_norm_forward(const LogNorm& args, const void* sums, const void* masses, void* loss, int device, void* stream);
void log_norm_backward(const LogNorm& args, const void* grad_loss, const void* sums, const void* masses,
                       void* grad_sums, void* grad_masses, int device, void* stream);

} // namespace fdk::cuda
