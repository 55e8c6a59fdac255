// Normalisation and activation on CUDA. Forward takes a launch for the moments of tiles (N1), one that merges them, one
// for the output (N2), and where this has region sums of several tiles one that adds them up. Backward takes one for
// the affine rows, one for the sums (N4), one that merges them, and one for the gradient (N5).
#include "norm/along_channels.cuh"
#include "norm/along_pixels.cuh"
#include "norm/groups.cuh"

namespace fdk::cuda {
namespace {

// Blocks a multiprocessor: limits registers, as far as hardly any are spilled, so that enough loads are in flight.
template <typename Acc>
constexpr int kMomentsBlocks = std::is_same_v<Acc, float> ? 3 : 2;
template <typename Acc>
constexpr int kBlocks = std::is_same_v<Acc, float> ? 2 : 1;

// Each kernel but the first of a call may be launched early.
__device__ inline void follow_previous_launch() {
  wait_for_previous_launch();
  allow_next_launch();
}

// Calls one of two functions with the pack type of a map: of a block with contiguous channels, or of each warp.
template <typename Acc, typename AlongChannels, typename AlongPixels>
__device__ void with_tile(const NormWork<Acc>& work, uint32_t block, AlongChannels along_channels,
                          AlongPixels along_pixels) {
  with_pack<Acc>(work.layer, [&](auto pack) {
    if (work.layer.along_channels) {
      along_channels(pack, block);
    } else {
      along_pixels(pack, block * kWarps + threadIdx.x / kWarp);
    }
  });
}

template <typename Acc, bool kFirst>
__global__ void __launch_bounds__(kThreads, kMomentsBlocks<Acc>)
    norm_moments_kernel(const __grid_constant__ NormWork<Acc> work) {
  alignas(16) __shared__ char shared[kNormShared<Acc>];
  follow_previous_launch();
  const NormFormula<Acc, kFirst> formula(work);
  with_tile(
      work, blockIdx.x, [&](auto pack, uint32_t block) { moments_along_channels(pack, work, formula, block, shared); },
      [&](auto pack, uint32_t warp) { moments_along_pixels(pack, work, formula, warp); });
}

// The pass after a reduction goes backwards: what was read last is in the cache.
__device__ inline uint32_t block_from_the_end() { return gridDim.x - 1 - blockIdx.x; }

template <typename Acc, bool kFirst>
__global__ void __launch_bounds__(kThreads, kBlocks<Acc>)
    norm_output_kernel(const __grid_constant__ NormWork<Acc> work) {
  alignas(16) __shared__ char shared[kNormShared<Acc>];
  follow_previous_launch();
  const NormFormula<Acc, kFirst> formula(work);
  with_tile(
      work, block_from_the_end(),
      [&](auto pack, uint32_t block) { output_along_channels(pack, work, formula, block, shared); },
      [&](auto pack, uint32_t warp) { output_along_pixels(pack, work, formula, warp); });
}

template <typename Acc, bool kFirst>
__global__ void __launch_bounds__(kThreads, kBlocks<Acc>)
    norm_reduce_kernel(const __grid_constant__ NormWork<Acc> work) {
  alignas(16) __shared__ char shared[kNormShared<Acc>];
  follow_previous_launch();
  const NormFormula<Acc, kFirst> formula(work);
  with_tile(
      work, blockIdx.x, [&](auto pack, uint32_t block) { reduce_along_channels(pack, work, formula, block, shared); },
      [&](auto pack, uint32_t warp) { reduce_along_pixels(pack, work, formula, warp); });
}

template <typename Acc, bool kFirst>
__global__ void __launch_bounds__(kThreads, kBlocks<Acc>)
    norm_gradient_kernel(const __grid_constant__ NormWork<Acc> work) {
  alignas(16) __shared__ char shared[kNormShared<Acc>];
  follow_previous_launch();
  const NormFormula<Acc, kFirst> formula(work);
  with_tile(
      work, block_from_the_end(),
      [&](auto pack, uint32_t block) { gradient_along_channels(pack, work, formula, block, shared); },
      [&](auto pack, uint32_t warp) { gradient_along_pixels(pack, work, formula, warp); });
}

template <typename Acc>
__global__ void __launch_bounds__(kThreads) norm_affine_kernel(const NormGroups groups, Affine<Acc>* affine) {
  follow_previous_launch();
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (group < groups.count()) affine[group] = groups.affine<Acc>(group);
}

template <typename Acc>
__global__ void __launch_bounds__(kThreads)
    norm_statistics_kernel(const NormGroups groups, const Partial* partials, Affine<Acc>* affine) {
  __shared__ double room[kWarps];
  follow_previous_launch();
  merge_moments(groups, partials, blockIdx.x, affine, room);
}

template <typename Acc>
__global__ void __launch_bounds__(kThreads) norm_terms_kernel(const NormGroups groups, const Partial* partials,
                                                              Terms<Acc>* terms, void* grad_gamma, void* grad_beta) {
  __shared__ double room[kWarps];
  follow_previous_launch();
  merge_gradients(groups, partials, blockIdx.x, terms, grad_gamma, grad_beta, room);
}

template <typename Acc>
__global__ void __launch_bounds__(kThreads) norm_region_sums_kernel(const __grid_constant__ NormWork<Acc> work) {
  follow_previous_launch();
  merge_region_sums(work, static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp);
}

// The launches of a call, which follow each other on its stream.
template <typename Acc>
class NormCall {
 public:
  NormCall(const NormAct& call, void* workspace, int device, void* stream)
      : call_(call),
        work_(make_norm_work<Acc>(call)),
        groups_(call, work_.layer),
        stream_(stream),
        early_(may_launch_early(device)) {
    const NormScratch<Acc> scratch(call, work_.layer.tiles);
    char* const memory = static_cast<char*>(workspace);
    work_.partials = partials_ = reinterpret_cast<Partial*>(memory);
    work_.affine = affine_ = reinterpret_cast<Affine<Acc>*>(memory + scratch.affine_offset());
    terms_ = reinterpret_cast<Terms<Acc>*>(memory + scratch.terms_offset());
  }

  void forward(void* sums) {
    work_.sums = static_cast<Acc*>(sums);
    if (call_.given) {
      launch_affine();
    } else {
      run("norm_moments_kernel", norm_moments_kernel<Acc, false>, norm_moments_kernel<Acc, true>);
      put("norm_statistics_kernel", norm_statistics_kernel<Acc>, groups_.channels, groups_, partials_, affine_);
    }
    run("norm_output_kernel", norm_output_kernel<Acc, false>, norm_output_kernel<Acc, true>);
    if (!sums || work_.layer.tiles == 1) return;
    const int64_t planes = groups_.batch * groups_.channels;
    put("norm_region_sums_kernel", norm_region_sums_kernel<Acc>, ceil_div<int64_t>(planes, kWarps), work_);
  }

  void backward(const void* slopes, void* grad_gamma, void* grad_beta) {
    work_.slopes = static_cast<const Acc*>(slopes);
    work_.terms = call_.given ? nullptr : terms_;
    launch_affine();
    if (!call_.given || grad_gamma || grad_beta) {
      run("norm_reduce_kernel", norm_reduce_kernel<Acc, false>, norm_reduce_kernel<Acc, true>);
      put("norm_terms_kernel", norm_terms_kernel<Acc>, groups_.channels, groups_, partials_, terms_, grad_gamma,
          grad_beta);
    }
    if (call_.out) run("norm_gradient_kernel", norm_gradient_kernel<Acc, false>, norm_gradient_kernel<Acc, true>);
  }

 private:
  void launch_affine() {
    put("norm_affine_kernel", norm_affine_kernel<Acc>, ceil_div<int64_t>(groups_.count(), kThreads), groups_, affine_);
  }

  // Launches the kernel over the tiles that fits where the activation stands.
  using TileKernel = void (*)(const NormWork<Acc>);
  void run(const char* name, TileKernel activation_last, TileKernel activation_first) {
    put(name, call_.activation_first ? activation_first : activation_last, work_.blocks, work_);
  }

  template <typename... Parameters, typename... Arguments>
  void put(const char* name, void (*kernel)(Parameters...), int64_t blocks, const Arguments&... arguments) {
    launch(name, kernel, blocks, kThreads, Stream(stream_, early_ && follows_), arguments...);
    follows_ = true;
  }

  const NormAct& call_;
  NormWork<Acc> work_;
  NormGroups groups_;
  Partial* partials_;
  Affine<Acc>* affine_;
  Terms<Acc>* terms_;
  void* stream_;
  bool early_, follows_ = false; // whether launches may be early, and whether there was one before
};

// Calls body with a value of the accumulation dtype.
template <typename Body>
auto with_accumulate(const NormAct& call, Body body) {
  return call.accumulate == DType::kFloat64 ? body(double()) : body(float());
}

} // namespace

int64_t norm_workspace(const NormAct& call) {
  return with_accumulate(call, [&](auto zero) {
    using Acc = decltype(zero);
    return NormScratch<Acc>(call, make_norm_work<Acc>(call).layer.tiles).bytes();
  });
}

void norm_forward(const NormAct& call, void* sums, void* workspace, int device, void* stream) {
  const DeviceGuard guard(device);
  with_accumulate(call, [&](auto zero) { NormCall<decltype(zero)>(call, workspace, device, stream).forward(sums); });
}

void norm_backward(const NormAct& call, const void* slopes, void* grad_gamma, void* grad_beta, void* workspace,
                   int device, void* stream) {
  const DeviceGuard guard(device);
  with_accumulate(call, [&](auto zero) {
    NormCall<decltype(zero)>(call, workspace, device, stream).backward(slopes, grad_gamma, grad_beta);
  });
}

} // namespace fdk::cuda
