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

__device__ inline uint32_t warp_of(uint32_t block) { return block * kWarps + threadIdx.x / kWarp; }

template <typename Acc, typename Kind, bool kFirst>
__global__ void __launch_bounds__(kThreads, kMomentsBlocks<Acc>)
    norm_moments_kernel(const __grid_constant__ NormWork<Acc> work) {
  follow_previous_launch();
  const NormFormula<Acc, kFirst> formula(work);
  if constexpr (Kind::kAlongChannels) {
    alignas(16) __shared__ char shared[kNormShared<Acc>];
    moments_along_channels(typename Kind::Elements(), work, formula, blockIdx.x, shared);
  } else {
    moments_along_pixels(typename Kind::Elements(), work, formula, warp_of(blockIdx.x));
  }
}

// The pass after a reduction goes backwards: what was read last is in the cache.
__device__ inline uint32_t block_from_the_end() { return gridDim.x - 1 - blockIdx.x; }

template <typename Acc, typename Kind, bool kFirst>
__global__ void __launch_bounds__(kThreads, kBlocks<Acc>)
    norm_output_kernel(const __grid_constant__ NormWork<Acc> work) {
  follow_previous_launch();
  const NormFormula<Acc, kFirst> formula(work);
  if constexpr (Kind::kAlongChannels) {
    alignas(16) __shared__ char shared[kNormShared<Acc>];
    output_along_channels(typename Kind::Elements(), work, formula, block_from_the_end(), shared);
  } else {
    output_along_pixels(typename Kind::Elements(), work, formula, warp_of(block_from_the_end()));
  }
}

template <typename Acc, typename Kind, bool kFirst>
__global__ void __launch_bounds__(kThreads, kBlocks<Acc>)
    norm_reduce_kernel(const __grid_constant__ NormWork<Acc> work) {
  follow_previous_launch();
  const NormFormula<Acc, kFirst> formula(work);
  if constexpr (Kind::kAlongChannels) {
    alignas(16) __shared__ char shared[kNormShared<Acc>];
    reduce_along_channels(typename Kind::Elements(), work, formula, blockIdx.x, shared);
  } else {
    reduce_along_pixels(typename Kind::Elements(), work, formula, warp_of(blockIdx.x));
  }
}

template <typename Acc, typename Kind, bool kFirst>
__global__ void __launch_bounds__(kThreads, kBlocks<Acc>)
    norm_gradient_kernel(const __grid_constant__ NormWork<Acc> work) {
  follow_previous_launch();
  const NormFormula<Acc, kFirst> formula(work);
  if constexpr (Kind::kAlongChannels) {
    alignas(16) __shared__ char shared[kNormShared<Acc>];
    gradient_along_channels(typename Kind::Elements(), work, formula, block_from_the_end(), shared);
  } else {
    gradient_along_pixels(typename Kind::Elements(), work, formula, warp_of(block_from_the_end()));
  }
}

template <typename Acc>
__global__ void __launch_bounds__(kThreads) norm_affine_kernel(const NormGroups groups, Affine<Acc>* affine) {
  follow_previous_launch();
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (group >= groups.count()) return;
  affine[group] = groups.affine<Acc>(group % groups.channels, groups.mean(group), groups.variance(group));
}

template <typename Acc>
__global__ void __launch_bounds__(kThreads)
    norm_statistics_kernel(const NormGroups groups, const Partial* partials, Affine<Acc>* affine) {
  __shared__ Partial room[kWarps];
  follow_previous_launch();
  merge_moments(groups, partials, blockIdx.x, affine, room);
}

template <typename Acc>
__global__ void __launch_bounds__(kThreads) norm_terms_kernel(const NormGroups groups, const Partial* partials,
                                                              Terms<Acc>* terms, void* grad_gamma, void* grad_beta) {
  __shared__ Partial room[kWarps];
  follow_previous_launch();
  merge_gradients(groups, partials, blockIdx.x, terms, grad_gamma, grad_beta, room);
}

template <typename Acc>
__global__ void __launch_bounds__(kThreads) norm_region_sums_kernel(const __grid_constant__ NormWork<Acc> work) {
  follow_previous_launch();
  merge_region_sums(work, static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp);
}

// The kernels over the tiles of a map.
template <typename Acc>
using TileKernel = void (*)(const NormWork<Acc>);
template <typename Acc>
struct TileKernels {
  TileKernel<Acc> moments, output, reduce, gradient;
};

template <typename Acc, typename Kind, bool kFirst>
TileKernels<Acc> kernels_of() {
  return {norm_moments_kernel<Acc, Kind, kFirst>, norm_output_kernel<Acc, Kind, kFirst>,
          norm_reduce_kernel<Acc, Kind, kFirst>, norm_gradient_kernel<Acc, Kind, kFirst>};
}

// Those for the kind of a map and the place of the activation.
template <typename Acc>
TileKernels<Acc> choose_kernels(const LayerWork& map, bool activation_first) {
  TileKernels<Acc> chosen = {};
  with_kind<Acc>(map, [&](auto kind) {
    using Kind = decltype(kind);
    chosen = activation_first ? kernels_of<Acc, Kind, true>() : kernels_of<Acc, Kind, false>();
  });
  return chosen;
}

// The launches of a call, which follow each other on its stream.
template <typename Acc>
class NormCall {
 public:
  NormCall(const NormAct& call, void* workspace, int device, void* stream)
      : call_(call),
        work_(make_norm_work<Acc>(call)),
        groups_(call, work_.layer),
        kernels_(choose_kernels<Acc>(work_.layer, call.activation_first)),
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
      run("norm_moments_kernel", kernels_.moments);
      put("norm_statistics_kernel", norm_statistics_kernel<Acc>, groups_.channels, groups_, partials_, affine_);
    }
    run("norm_output_kernel", kernels_.output);
    if (!sums || work_.layer.tiles == 1) return;
    const int64_t planes = groups_.batch * groups_.channels;
    put("norm_region_sums_kernel", norm_region_sums_kernel<Acc>, ceil_div<int64_t>(planes, kWarps), work_);
  }

  void backward(const void* slopes, void* grad_gamma, void* grad_beta) {
    work_.slopes = static_cast<const Acc*>(slopes);
    work_.terms = call_.given ? nullptr : terms_;
    launch_affine();
    if (!call_.given || grad_gamma || grad_beta) {
      run("norm_reduce_kernel", kernels_.reduce);
      put("norm_terms_kernel", norm_terms_kernel<Acc>, groups_.channels, groups_, partials_, terms_, grad_gamma,
          grad_beta);
    }
    if (call_.out) run("norm_gradient_kernel", kernels_.gradient);
  }

 private:
  void launch_affine() {
    put("norm_affine_kernel", norm_affine_kernel<Acc>, ceil_div<int64_t>(groups_.count(), kThreads), groups_, affine_);
  }

  void run(const char* name, TileKernel<Acc> kernel) { put(name, kernel, work_.blocks, work_); }

  template <typename... Parameters, typename... Arguments>
  void put(const char* name, void (*kernel)(Parameters...), int64_t blocks, const Arguments&... arguments) {
    launch(name, kernel, blocks, kThreads, Stream(stream_, early_ && follows_), arguments...);
    follows_ = true;
  }

  const NormAct& call_;
  NormWork<Acc> work_;
  NormGroups groups_;
  TileKernels<Acc> kernels_;
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
