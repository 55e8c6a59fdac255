// Sums and gradients on CUDA, for all layers of a kind at a time: (R2) in one launch and a second pass, (R3) and (R4)
// in one launch each.
#include "losses/launch.cuh"
#include "sums/along_channels.cuh"
#include "sums/along_pixels.cuh"
#include "sums/second_pass.cuh"

namespace fdk::cuda {
namespace {

// Blocks a multiprocessor: limits registers, so that enough loads are in flight.
template <typename Acc>
constexpr int kBlocks = std::is_same_v<Acc, float> ? 3 : 2;

// Bytes for a block's staged weights and, later, its threads' sums: two for each channel, and two for the masses.
template <typename Acc>
constexpr int kSumsShared = kThreads * (std::is_same_v<Acc, float> ? 2 * kVector<__half> + 2 : 8) * sizeof(Acc);

template <typename Acc, typename Kind>
__global__ void __launch_bounds__(kThreads, kBlocks<Acc>)
    sums_kernel(const __grid_constant__ Work work, const Outputs<Acc> out) {
  wait_for_previous_launch(); // for the masks
  allow_next_launch();
  if (blockIdx.x == 0 && threadIdx.x < out.num_counters) out.counters[threadIdx.x] = 0;
  const int index = layer_of_block(work, blockIdx.x);
  const uint32_t block = blockIdx.x - work.layers[index].first_block;
  if constexpr (Kind::kAlongChannels) {
    alignas(16) __shared__ char shared[kSumsShared<Acc>];
    sum_along_channels(typename Kind::Elements(), work, index, block, out, shared);
  } else {
    sum_along_pixels(typename Kind::Elements(), work, index, block * kWarps + threadIdx.x / kWarp, out);
  }
}

template <typename Acc>
__global__ void __launch_bounds__(kThreads)
    second_pass_kernel(const __grid_constant__ SecondPass pass, const Outputs<Acc> out) {
  const int index = layer_of_block(pass, blockIdx.x);
  second_pass(pass, index, blockIdx.x - pass.layers[index].first_block, out);
}

template <typename Acc, typename Kind>
__global__ void __launch_bounds__(kThreads, kBlocks<Acc>)
    gradient_kernel(const __grid_constant__ Work work, const SumGradients<Acc> grad_sums) {
  const int index = layer_of_block(work, blockIdx.x);
  const uint32_t block = blockIdx.x - work.layers[index].first_block;
  if constexpr (Kind::kAlongChannels) {
    alignas(16) __shared__ char shared[kStagedPixels<Acc> * sizeof(Weights<Acc>)];
    gradient_along_channels(typename Kind::Elements(), work, index, block, grad_sums, shared);
  } else {
    gradient_along_pixels(typename Kind::Elements(), work, index, block * kWarps + threadIdx.x / kWarp, grad_sums);
  }
}

template <typename Acc, typename Kind>
__global__ void __launch_bounds__(kThreads, kBlocks<Acc>)
    mask_gradient_kernel(const __grid_constant__ Work work, const Acc* grad_sums) {
  const int index = layer_of_block(work, blockIdx.x);
  const uint32_t block = blockIdx.x - work.layers[index].first_block;
  if constexpr (Kind::kAlongChannels) {
    const uint32_t warp = block * kWarps + threadIdx.x / kWarp;
    mask_gradient_along_channels(typename Kind::Elements(), work, index, warp, grad_sums);
  } else {
    alignas(16) __shared__ char shared[2 * kWarps * kMaskRow<Acc> * sizeof(Acc)];
    mask_gradient_along_pixels(typename Kind::Elements(), work, index, block, grad_sums, shared);
  }
}

// The workspace of a launch: the scratch memory of the losses, if there are any, and then the partial sums.
int64_t partials_offset(const Pyramid& pyramid, bool with_losses) {
  return with_losses ? LossScratch::bytes(pyramid) : 0;
}

template <typename Acc>
void launch_sums(const Pyramid& pyramid, void* sums, void* masses, const Losses* losses, char* workspace,
                 const Stream& stream) {
  auto* partials = reinterpret_cast<Acc*>(workspace + partials_offset(pyramid, losses != nullptr));
  Outputs<Acc> out = {static_cast<Acc*>(sums), static_cast<Acc*>(masses), partials, nullptr, 0};
  const LossScratch scratch(pyramid, workspace);
  if (losses) {
    out.counters = reinterpret_cast<uint32_t*>(scratch.counters);
    out.num_counters = sizeof(Counters) / sizeof(uint32_t);
  }
  for (int64_t first = 0; first < pyramid.num_layers; first += kMaxLayers) {
    const Work work = make_work(pyramid, first, Kernel::kSums);
    const SecondPass pass = describe_second_pass(pyramid, work);
    Outputs<Acc> of_kind = out;
    for_each_kind<Acc>(work, [&](auto kind, const Work& layers) {
      launch("sums_kernel", sums_kernel<Acc, decltype(kind)>, layers.blocks, kThreads, stream, layers, of_kind);
      of_kind.num_counters = 0; // the first launch has set them
    });
    if (losses) {
      launch_losses(pass, *losses, out, scratch, stream);
    } else {
      launch("second_pass_kernel", second_pass_kernel<Acc>, pass.blocks, kThreads, stream.handle, pass, out);
    }
  }
}

template <typename Acc>
void launch_gradient(const Pyramid& pyramid, const void* grad_sums, const void* factor, int64_t factor_stride,
                     void* stream) {
  const SumGradients<Acc> gradients = {static_cast<const Acc*>(grad_sums), static_cast<const Acc*>(factor),
                                       factor_stride};
  for (int64_t first = 0; first < pyramid.num_layers; first += kMaxLayers) {
    const Work work = make_work(pyramid, first, Kernel::kGradient);
    for_each_kind<Acc>(work, [&](auto kind, const Work& layers) {
      launch("gradient_kernel", gradient_kernel<Acc, decltype(kind)>, layers.blocks, kThreads, stream, layers,
             gradients);
    });
  }
}

template <typename Acc>
void launch_mask_gradient(const Pyramid& pyramid, const void* grad_sums, void* stream) {
  for (int64_t first = 0; first < pyramid.num_layers; first += kMaxLayers) {
    const Work work = make_work(pyramid, first, Kernel::kMaskGradient);
    for_each_kind<Acc>(work, [&](auto kind, const Work& layers) {
      launch("mask_gradient_kernel", mask_gradient_kernel<Acc, decltype(kind)>, layers.blocks, kThreads, stream, layers,
             static_cast<const Acc*>(grad_sums));
    });
  }
}

} // namespace

int64_t sums_workspace(const Pyramid& pyramid, bool with_losses) {
  int64_t partials = 0; // of one launch: launches follow each other on the stream and share the workspace
  for (int64_t first = 0; first < pyramid.num_layers; first += kMaxLayers) {
    partials = std::max(partials, make_work(pyramid, first, Kernel::kSums).partials);
  }
  return partials_offset(pyramid, with_losses) + partials * element_size(pyramid.accumulate);
}

void sums(const Pyramid& pyramid, void* sums, void* masses, const Losses* losses, void* workspace, int device,
          void* stream) {
  const DeviceGuard guard(device);
  if (losses && pyramid.batch == 0) return zero_losses(pyramid, *losses, stream);
  const auto run = pyramid.accumulate == DType::kFloat64 ? launch_sums<double> : launch_sums<float>;
  run(pyramid, sums, masses, losses, static_cast<char*>(workspace), {stream, may_launch_early(device)});
}

void gradient(const Pyramid& pyramid, const void* grad_sums, const void* factor, int64_t factor_stride, int device,
              void* stream) {
  const DeviceGuard guard(device);
  const auto run = pyramid.accumulate == DType::kFloat64 ? launch_gradient<double> : launch_gradient<float>;
  run(pyramid, grad_sums, factor, factor_stride, stream);
}

void mask_gradient(const Pyramid& pyramid, const void* grad_sums, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto run = pyramid.accumulate == DType::kFloat64 ? launch_mask_gradient<double> : launch_mask_gradient<float>;
  run(pyramid, grad_sums, stream);
}

} // namespace fdk::cuda
