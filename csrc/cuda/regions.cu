// Sums and gradients over several regions on CUDA, for all layers at a time: (C1) and (C2) in one launch and a second
// pass, (C3) and (C4) in one launch each.
#include "regions/gradient.cuh"
#include "regions/sums.cuh"
#include "regions/weight_gradient.cuh"

namespace fdk::cuda {
namespace {

// Blocks a multiprocessor: limits registers, as far as the sums of a thread allow.
template <typename Acc>
constexpr int kBlocks = std::is_same_v<Acc, float> ? 2 : 1;

template <typename Acc, bool kMoments>
__global__ void __launch_bounds__(kThreads, kBlocks<Acc>)
    region_sums_kernel(const __grid_constant__ RegionWork work, const RegionOutputs<Acc> out) {
  __shared__ SumsShared<Acc, kMoments> shared;
  const int index = layer_of_block(work, blockIdx.x);
  sum_regions(work, index, blockIdx.x - work.layers[index].first_block, out, shared);
}

template <typename Acc>
__global__ void __launch_bounds__(kThreads)
    region_second_pass_kernel(const __grid_constant__ RegionSecondPass pass, const RegionOutputs<Acc> out) {
  const int index = layer_of_block(pass, blockIdx.x);
  second_region_pass(pass, index, blockIdx.x - pass.layers[index].first_block, out);
}

template <typename Acc, bool kMoments>
__global__ void __launch_bounds__(kThreads, kBlocks<Acc>)
    region_gradient_kernel(const __grid_constant__ RegionWork work, const Acc* grad_sums) {
  __shared__ GradientShared<Acc> shared;
  const int index = layer_of_block(work, blockIdx.x);
  region_gradient<Acc, kMoments>(work, index, blockIdx.x - work.layers[index].first_block, grad_sums, shared);
}

template <typename Acc, bool kMoments>
__global__ void __launch_bounds__(kThreads, kBlocks<Acc>)
    region_weight_gradient_kernel(const __grid_constant__ RegionWork work, const Acc* grad_sums) {
  __shared__ WeightGradientShared<Acc> shared;
  const int index = layer_of_block(work, blockIdx.x);
  region_weight_gradient<Acc, kMoments>(work, index, blockIdx.x - work.layers[index].first_block, grad_sums, shared);
}

template <typename Acc>
void launch_sums(const Regions& regions, const RegionOutputs<Acc>& out, void* stream) {
  for (int64_t first = 0; first < regions.num_layers; first += kMaxLayers) {
    const RegionWork work = make_work<Acc>(regions, first, RegionKernel::kSums);
    const RegionSecondPass pass = describe_second_pass(work);
    const auto kernel = regions.pivots ? region_sums_kernel<Acc, true> : region_sums_kernel<Acc, false>;
    launch("region_sums_kernel", kernel, work.blocks, kThreads, stream, work, out);
    launch("region_second_pass_kernel", region_second_pass_kernel<Acc>, pass.blocks, kThreads, stream, pass, out);
  }
}

template <typename Acc>
void launch_gradient(const Regions& regions, const Acc* grad_sums, void* stream) {
  for (int64_t first = 0; first < regions.num_layers; first += kMaxLayers) {
    const RegionWork work = make_work<Acc>(regions, first, RegionKernel::kGradient);
    const auto kernel = regions.pivots ? region_gradient_kernel<Acc, true> : region_gradient_kernel<Acc, false>;
    launch("region_gradient_kernel", kernel, work.blocks, kThreads, stream, work, grad_sums);
  }
}

template <typename Acc>
void launch_weight_gradient(const Regions& regions, const Acc* grad_sums, void* stream) {
  for (int64_t first = 0; first < regions.num_layers; first += kMaxLayers) {
    const RegionWork work = make_work<Acc>(regions, first, RegionKernel::kWeightGradient);
    const auto kernel =
        regions.pivots ? region_weight_gradient_kernel<Acc, true> : region_weight_gradient_kernel<Acc, false>;
    launch("region_weight_gradient_kernel", kernel, work.blocks, kThreads, stream, work, grad_sums);
  }
}

// Calls body with a value of the accumulation dtype.
template <typename Body>
auto with_accumulate(const Regions& regions, Body body) {
  return regions.accumulate == DType::kFloat64 ? body(double()) : body(float());
}

} // namespace

int64_t region_sums_workspace(const Regions& regions) {
  return with_accumulate(regions, [&](auto zero) {
    using Acc = decltype(zero);
    int64_t partials = 0; // of one launch: launches follow each other on the stream and share the workspace
    for (int64_t first = 0; first < regions.num_layers; first += kMaxLayers)
      partials = std::max(partials, make_work<Acc>(regions, first, RegionKernel::kSums).partials);
    return partials * static_cast<int64_t>(sizeof(Acc));
  });
}

void region_sums(const Regions& regions, void* sums, void* masses, void* workspace, int device, void* stream) {
  const DeviceGuard guard(device);
  with_accumulate(regions, [&](auto zero) {
    using Acc = decltype(zero);
    launch_sums<Acc>(regions, {static_cast<Acc*>(sums), static_cast<Acc*>(masses), static_cast<Acc*>(workspace)},
                     stream);
  });
}

void region_gradient(const Regions& regions, const void* grad_sums, int device, void* stream) {
  const DeviceGuard guard(device);
  with_accumulate(regions, [&](auto zero) {
    using Acc = decltype(zero);
    launch_gradient(regions, static_cast<const Acc*>(grad_sums), stream);
  });
}

void region_weight_gradient(const Regions& regions, const void* grad_sums, int device, void* stream) {
  const DeviceGuard guard(device);
  with_accumulate(regions, [&](auto zero) {
    using Acc = decltype(zero);
    launch_weight_gradient(regions, static_cast<const Acc*>(grad_sums), stream);
  });
}

} // namespace fdk::cuda
