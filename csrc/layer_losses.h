// Stage layer_losses: region_sums and log_norm as one piece of work, and the gradient of the features as one more.
#pragma once

#include "log_norm.h"
#include "region_sums.h"

namespace fdk::cuda {

// Bytes of scratch memory that layer_losses_forward needs.
int64_t layer_losses_workspace(const Pyramid& pyramid);

// Sums and masses as region_sums_forward writes them, and each layer's loss [L], whose reduction is kMean or kSum.
// `slopes` [2, N, total_channels] becomes the gradient of a layer's loss with respect to its sums, unless it is null.
// The pairing lies in device memory, and the layers are those of the pyramid.
void layer_losses_forward(const Pyramid& pyramid, const LogNorm& options, void* sums, void* masses, void* loss,
                          void* slopes, void* workspace, int device, void* stream);

// The gradient of the features by (R3), for sums whose gradients are the slopes times grad_loss [L] of their layer.
void layer_losses_backward(const Pyramid& pyramid, const void* grad_loss, int64_t grad_loss_stride, const void* slopes,
                           int device, void* stream);

} // namespace fdk::cuda
