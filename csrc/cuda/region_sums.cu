// Stage region_sums on CUDA: (R2) in one launch and a second pass, (R3) and (R4) in one launch each, for all layers.
#include "region_sums/along_channels.cuh"
#include "region_sums/along_pixels.cuh"
#include "region_sums/finish.cuh"
#include "region_sums/launch.cuh"

namespace fdk::cuda {
namespace {

// Blocks of a multiprocessor at least, so that registers leave room for enough loads in flight.
template <typename Acc>
constexpr int kBlocks = std::is_same_v<Acc, float> ? 3 : 2;

// Bytes for the staged weights of a block and, later, for the sums of its threads: two for each channel and the masses.
template <typename Acc>
constexpr int kForwardShared = kThreads * (std::is_same_v<Acc, float> ? 2 * kVector<__half> + 2 : 8) * sizeof(Acc);

template <typename Acc>
__global__ void __launch_bounds__(kThreads, kBlocks<Acc>)
    region_sums_forward_kernel(const __grid_constant__ Work work, const Outputs<Acc> out) {
  alignas(16) __shared__ char shared[kForwardShared<Acc>];
  allow_next_launch();
  if (blockIdx.x == 0 && threadIdx.x < out.num_counters) out.counters[threadIdx.x] = 0;
  const int index = layer_of(work, blockIdx.x);
  const LayerWork& layer = work.layers[index];
  const uint32_t block = blockIdx.x - layer.first_block;
  with_pack<Acc>(layer, [&](auto pack) {
    if (layer.along_channels) {
      sum_along_channels(pack, work, index, block, out, shared);
    } else {
      sum_along_pixels(pack, work, index, block * kWarps + threadIdx.x / kWarp, out);
    }
  });
}

template <typename Acc>
__global__ void __launch_bounds__(kThreads)
    region_sums_reduce_kernel(const __grid_constant__ Finish finish, const Outputs<Acc> out) {
  const int index = layer_of(finish, blockIdx.x);
  finish_sums(finish, index, blockIdx.x - finish.layers[index].first_block, out);
}

template <typename Acc>
__global__ void __launch_bounds__(kThreads, kBlocks<Acc>)
    region_sums_backward_kernel(const __grid_constant__ Work work, const SumGradients<Acc> grad_sums) {
  alignas(16) __shared__ char shared[kStagedPixels<Acc> * sizeof(Weights<Acc>)];
  const int index = layer_of(work, blockIdx.x);
  const LayerWork& layer = work.layers[index];
  const uint32_t block = blockIdx.x - layer.first_block;
  with_pack<Acc>(layer, [&](auto pack) {
    if (layer.along_channels) {
      gradient_along_channels(pack, work, index, block, grad_sums, shared);
    } else {
      gradient_along_pixels(pack, work, index, block * kWarps + threadIdx.x / kWarp, grad_sums);
    }
  });
}

template <typename Acc>
__global__ void __launch_bounds__(kThreads, kBlocks<Acc>)
    region_sums_mask_backward_kernel(const __grid_constant__ Work work, const Acc* grad_sums) {
  alignas(16) __shared__ char shared[2 * kWarps * kMaskRow<Acc> * sizeof(Acc)];
  const int index = layer_of(work, blockIdx.x);
  const LayerWork& layer = work.layers[index];
  const uint32_t block = blockIdx.x - layer.first_block;
  with_pack<Acc>(layer, [&](auto pack) {
    if (layer.along_channels) {
      mask_gradient_along_channels(pack, work, index, block * kWarps + threadIdx.x / kWarp, grad_sums);
    } else {
      mask_gradient_along_pixels(pack, work, index, block, grad_sums, shared);
    }
  });
}

} // namespace

template <typename Acc>
void launch_forward(const Work& work, const Outputs<Acc>& out, void* stream) {
  launch("region_sums_forward_kernel", region_sums_forward_kernel<Acc>, work.blocks, kThreads, stream, work, out);
}

template <typename Acc>
void launch_backward(const Pyramid& pyramid, const SumGradients<Acc>& grad_sums, void* stream) {
  for (int64_t first = 0; first < pyramid.num_layers; first += kMaxLayers) {
    const Work work = make_work(pyramid, first, Stage::kBackward);
    launch("region_sums_backward_kernel", region_sums_backward_kernel<Acc>, work.blocks, kThreads, stream, work,
           grad_sums);
  }
}

template void launch_forward(const Work&, const Outputs<float>&, void*);
template void launch_forward(const Work&, const Outputs<double>&, void*);
template void launch_backward(const Pyramid&, const SumGradients<float>&, void*);
template void launch_backward(const Pyramid&, const SumGradients<double>&, void*);

namespace {

template <typename Acc>
void forward(const Pyramid& pyramid, void* sums, void* masses, void* workspace, void* stream) {
  const Outputs<Acc> out = {static_cast<Acc*>(sums), static_cast<Acc*>(masses), static_cast<Acc*>(workspace), nullptr,
                            0};
  for (int64_t first = 0; first < pyramid.num_layers; first += kMaxLayers) {
    const Work work = make_work(pyramid, first, Stage::kForward);
    const Finish finish = make_finish(work);
    launch_forward(work, out, stream);
    launch("region_sums_reduce_kernel", region_sums_reduce_kernel<Acc>, finish.blocks, kThreads, stream, finish, out);
  }
}

template <typename Acc>
void backward(const Pyramid& pyramid, const void* grad_sums, void* stream) {
  launch_backward(pyramid, SumGradients<Acc>{static_cast<const Acc*>(grad_sums), nullptr, 0}, stream);
}

template <typename Acc>
void mask_backward(const Pyramid& pyramid, const void* grad_sums, void* stream) {
  for (int64_t first = 0; first < pyramid.num_layers; first += kMaxLayers) {
    const Work work = make_work(pyramid, first, Stage::kMaskBackward);
    launch("region_sums_mask_backward_kernel", region_sums_mask_backward_kernel<Acc>, work.blocks, kThreads, stream,
           work, static_cast<const Acc*>(grad_sums));
  }
}

} // namespace

int64_t region_sums_workspace(const Pyramid& pyramid) {
  int64_t partials = 0; // launches follow each other on the stream and share the workspace
  for (int64_t first = 0; first < pyramid.num_layers; first += kMaxLayers) {
    partials = std::max(partials, make_work(pyramid, first, Stage::kForward).partials);
  }
  return partials * element_size(pyramid.accumulate);
}

void region_sums_forward(const Pyramid& pyramid, void* sums, void* masses, void* workspace, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto run = pyramid.accumulate == DType::kFloat64 ? forward<double> : forward<float>;
  run(pyramid, sums, masses, workspace, stream);
}

void region_sums_backward(const Pyramid& pyramid, const void* grad_sums, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto run = pyramid.accumulate == DType::kFloat64 ? backward<double> : backward<float>;
  run(pyramid, grad_sums, stream);
}

void region_sums_mask_backward(const Pyramid& pyramid, const void* grad_sums, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto run = pyramid.accumulate == DType::kFloat64 ? mask_backward<double> : mask_backward<float>;
  run(pyramid, grad_sums, stream);
}

} // namespace fdk::cuda
