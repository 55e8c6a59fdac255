// Stage log_norm on CUDA: (L1) to (L7) in double, one launch forward and one backward for all layers. Every distance is
// computed where it is needed, backward by both samples of a pair: so nothing is scattered and nothing stored.
#include <algorithm>

#include "log_norm/gradient.cuh"
#include "log_norm/losses.cuh"

namespace fdk::cuda {
namespace {

constexpr int kMaxShapes = 64; // of a launch, which carries the shapes of its layers by value

struct Arguments {
  LayerShape layers[kMaxShapes];
  int64_t first_layer;
  LogNorm options; // without its pointers to host memory
};

template <typename T>
__device__ View<T> view_of(const Arguments& arguments, int64_t layer, const T* sums, const T* masses) {
  return {arguments.options, arguments.layers[layer], sums, masses, arguments.first_layer + layer};
}

template <typename T>
__global__ void __launch_bounds__(kForwardThreads, 1)
    log_norm_forward_kernel(const __grid_constant__ Arguments arguments, const T* sums, const T* masses, T* loss) {
  const View<T> view = view_of(arguments, blockIdx.x, sums, masses);
  const LogNorm& options = arguments.options;
  double result[2] = {0, 0}; // the sum of the entries, and their number
  if (options.norm == Norm::kBatch) {
    losses_of_channels(view, threadIdx.x, kForwardThreads, loss, result);
  } else {
    losses_of_samples(view, loss, result);
  }
  if (options.reduction == Reduction::kNone) return;
  block_sums<kForwardThreads>(result);
  if (threadIdx.x > 0) return;
  if (options.reduction == Reduction::kMean) result[0] /= max(result[1], 1.0);
  loss[view.index] = static_cast<T>(result[0]);
}

template <typename T>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    log_norm_backward_kernel(const __grid_constant__ Arguments arguments, const T* grad_loss, const T* sums,
                             const T* masses, T* grad_sums, T* grad_masses) {
  const int64_t layer = blockIdx.x / arguments.options.batch;
  const int64_t n = blockIdx.x % arguments.options.batch;
  const View<T> view = view_of(arguments, layer, sums, masses);
  double entry = 0;
  put_gradient(view, n, grad_loss, grad_sums, grad_masses, entry);
}

// Calls body(arguments, number of layers) for every launch that the layers need.
template <typename Body>
void for_each_launch(const LogNorm& args, Body body) {
  Arguments arguments = {};
  arguments.options = args;
  arguments.options.channels = arguments.options.pixels = nullptr;
  int64_t channel_start = 0;
  for (int64_t first = 0; first < args.num_layers; first += kMaxShapes) {
    const int64_t count = std::min<int64_t>(kMaxShapes, args.num_layers - first);
    arguments.first_layer = first;
    for (int64_t i = 0; i < count; ++i) {
      arguments.layers[i] = {args.channels[first + i], args.pixels[first + i], channel_start};
      channel_start += args.channels[first + i];
    }
    body(arguments, count);
  }
}

template <typename T>
void forward(const LogNorm& args, const void* sums, const void* masses, void* loss, void* stream) {
  for_each_launch(args, [&](const Arguments& arguments, int64_t layers) {
    launch("log_norm_forward_kernel", log_norm_forward_kernel<T>, layers, kForwardThreads, stream, arguments,
           static_cast<const T*>(sums), static_cast<const T*>(masses), static_cast<T*>(loss));
  });
}

template <typename T>
void backward(const LogNorm& args, const void* grad_loss, const void* sums, const void* masses, void* grad_sums,
              void* grad_masses, void* stream) {
  for_each_launch(args, [&](const Arguments& arguments, int64_t layers) {
    launch("log_norm_backward_kernel", log_norm_backward_kernel<T>, layers * args.batch, kBackwardThreads, stream,
           arguments, static_cast<const T*>(grad_loss), static_cast<const T*>(sums), static_cast<const T*>(masses),
           static_cast<T*>(grad_sums), static_cast<T*>(grad_masses));
  });
}

} // namespace

void log_norm_forward(const LogNorm& args, const void* sums, const void* masses, void* loss, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto run = args.accumulate == DType::kFloat64 ? forward<double> : forward<float>;
  run(args, sums, masses, loss, stream);
}

void log_norm_backward(const LogNorm& args, const void* grad_loss, const void* sums, const void* masses,
                       void* grad_sums, void* grad_masses, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto run = args.accumulate == DType::kFloat64 ? backward<double> : backward<float>;
  run(args, grad_loss, sums, masses, grad_sums, grad_masses, stream);
}

} // namespace fdk::cuda
