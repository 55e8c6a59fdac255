// Stage layer_losses on CUDA: two launches forward, one backward, for all layers. The first launch forward is that of
// region_sums; the second one finishes the sums, which takes many blocks, and makes losses and slopes of them, which
// takes all sums of a layer.
#include "layer_losses.h"

#include "log_norm/gradient.cuh"
#include "log_norm/losses.cuh"
#include "region_sums/finish.cuh"
#include "region_sums/launch.cuh"

namespace fdk::cuda {
namespace {

static_assert(kThreads == kBackwardThreads, "blocks that finish sums and blocks that make slopes are of one launch");

// What a block adds to the loss of its layer.
enum Part { kEntries, kEntryCount, kPairs, kPairCount, kParts };

// Counts of blocks; the first launch sets them to 0.
struct Counters {
  uint32_t started;
  uint32_t finished[kMaxLayers]; // blocks that have finished sums of a layer
  uint32_t reported[kMaxLayers]; // blocks that have reported their parts of a layer's loss
};

struct LayerLosses {
  Finish finish;
  LogNorm options; // without its pointers to host memory
};

template <typename Acc>
struct LossOutputs {
  Outputs<Acc> sums;
  Acc* loss;     // [L]
  Acc* slopes;   // [2, N, total_channels], or null
  double* parts; // [layers of the launch, N, kParts]
  Counters* counters;
};

// The number of this block in the order in which blocks have started: a block may wait for those before it, as none of
// these is still to be scheduled.
__device__ uint32_t take_turn(uint32_t* started) {
  __shared__ uint32_t turn;
  if (threadIdx.x == 0) turn = atomicAdd(started, 1u);
  __syncthreads();
  return turn;
}

// Makes known what this block has written, and returns how many blocks have done so before.
__device__ uint32_t announce(uint32_t* count) {
  __shared__ uint32_t before;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    before = atomicAdd(count, 1u);
    __threadfence();
  }
  __syncthreads();
  return before;
}

// Waits until `count` blocks have announced what they have written.
__device__ void wait_for(const uint32_t* announced, uint32_t count) {
  if (count == 0) return;
  if (threadIdx.x == 0) {
    while (*static_cast<const volatile uint32_t*>(announced) < count)
      __nanosleep(32);
    __threadfence();
  }
  __syncthreads();
}

// The parts of sample n, or over the batch those of the channels that fall to its block; in every thread.
template <typename Acc>
__device__ void make_parts(const View<Acc>& view, int64_t n, Acc* slopes, double (&parts)[kParts]) {
  const LogNorm& options = view.options;
  put_gradient<Acc>(view, n, nullptr, slopes, nullptr, parts[kEntries]);
  if (options.norm == Norm::kBatch) {
    double entries[2] = {0, 0};
    losses_of_channels<Acc>(view, n * kThreads + threadIdx.x, options.batch * kThreads, nullptr, entries);
    block_sums<kThreads>(entries);
    parts[kEntries] = entries[0];
    parts[kEntryCount] = entries[1];
    return;
  }
  parts[kEntryCount] = view.counts(n);
  if (options.exchange != Exchange::kPooled) return;
  for (int64_t k = n; k < options.num_pairs; k += options.batch) { // (L5)
    const Pair pair = view.pair(true, k);
    if (!pair.met) continue;
    Moments there(view, view.sample(pair.i), view.sample(pair.j), threadIdx.x, kThreads);
    Moments back(view, view.sample(pair.j), view.sample(pair.i), threadIdx.x, kThreads);
    block_sums<kThreads>(there.sums);
    block_sums<kThreads>(back.sums);
    parts[kPairs] += view.loss(there.distance(options) + back.distance(options));
    parts[kPairCount] += 1;
  }
}

// The loss of a layer from the parts [N, kParts] that all of its blocks have reported.
template <typename Acc>
__device__ void put_loss(const LogNorm& options, const double* reported, Acc* loss) {
  double total[kParts] = {};
  for (int64_t n = threadIdx.x; n < options.batch; n += kThreads) {
    for (int part = 0; part < kParts; ++part)
      total[part] += reported[n * kParts + part];
  }
  block_sums<kThreads>(total);
  if (threadIdx.x > 0) return;
  double value = total[kEntries] + total[kEntryCount] * total[kPairs] / max(total[kPairCount], 1.0);
  if (options.reduction == Reduction::kMean) value /= max(total[kEntryCount], 1.0);
  *loss = static_cast<Acc>(value);
}

template <typename Acc>
__global__ void __launch_bounds__(kThreads)
    layer_losses_forward_kernel(const __grid_constant__ LayerLosses work, const LossOutputs<Acc> out) {
  wait_for_previous_launch();
  const Finish& finish = work.finish;
  const bool waits = finish.blocks > 0;
  const uint32_t turn = waits ? take_turn(&out.counters->started) : blockIdx.x;
  if (turn < finish.blocks) {
    const int index = layer_of(finish, turn);
    finish_sums(finish, index, turn - finish.layers[index].first_block, out.sums);
    announce(&out.counters->finished[index]);
    return;
  }
  const LogNorm& options = work.options;
  const uint32_t item = turn - static_cast<uint32_t>(finish.blocks);
  const uint32_t batch = static_cast<uint32_t>(options.batch);
  const uint32_t index = item / batch;
  const int64_t n = item - index * batch;
  const LayerFinish& layer = finish.layers[index];
  const LayerShape shape = {layer.channels, layer.pixels, layer.channel_start};
  const int64_t place = finish.first_layer + index; // among all layers
  const View<Acc> view = {options, shape, out.sums.sums, out.sums.masses, place};
  wait_for(&out.counters->finished[index], layer.blocks);

  double parts[kParts] = {};
  make_parts(view, n, out.slopes, parts);
  double* reported = out.parts + static_cast<int64_t>(index) * batch * kParts; // [N, kParts]
  if (threadIdx.x == 0) {
    for (int part = 0; part < kParts; ++part)
      reported[n * kParts + part] = parts[part];
  }
  if (announce(&out.counters->reported[index]) == batch - 1) put_loss(options, reported, out.loss + place);
}

// How the workspace is divided: the partial sums of a launch, then the blocks' parts of losses, then the counters.
struct Workspace {
  int64_t parts, counters, bytes; // where they begin, and where the whole ends

  Workspace(const Pyramid& pyramid, int64_t partials) {
    const int64_t layers = std::min<int64_t>(kMaxLayers, pyramid.num_layers);
    parts = ceil_div<int64_t>(partials * element_size(pyramid.accumulate), sizeof(double)) * sizeof(double);
    counters = parts + layers * pyramid.batch * kParts * static_cast<int64_t>(sizeof(double));
    bytes = counters + static_cast<int64_t>(sizeof(Counters));
  }
};

template <typename Acc>
void forward(const Pyramid& pyramid, const LogNorm& options, void* sums, void* masses, void* loss, void* slopes,
             char* workspace, const Stream& stream) {
  for (int64_t first = 0; first < pyramid.num_layers; first += kMaxLayers) {
    const Work work = make_work(pyramid, first, Stage::kForward);
    const Workspace divided(pyramid, work.partials);
    auto* counters = reinterpret_cast<Counters*>(workspace + divided.counters);
    LayerLosses losses = {make_finish(work), options};
    losses.options.channels = losses.options.pixels = nullptr;
    const LossOutputs<Acc> out = {
        {static_cast<Acc*>(sums), static_cast<Acc*>(masses), reinterpret_cast<Acc*>(workspace),
         reinterpret_cast<uint32_t*>(counters), sizeof(Counters) / sizeof(uint32_t)},
        static_cast<Acc*>(loss),
        static_cast<Acc*>(slopes),
        reinterpret_cast<double*>(workspace + divided.parts),
        counters};
    launch_forward(work, out.sums, stream.handle);
    launch("layer_losses_forward_kernel", layer_losses_forward_kernel<Acc>,
           losses.finish.blocks + work.count * pyramid.batch, kThreads, stream, losses, out);
  }
}

} // namespace

int64_t layer_losses_workspace(const Pyramid& pyramid) {
  int64_t bytes = 0; // launches follow each other on the stream and share the workspace
  for (int64_t first = 0; first < pyramid.num_layers; first += kMaxLayers) {
    bytes = std::max(bytes, Workspace(pyramid, make_work(pyramid, first, Stage::kForward).partials).bytes);
  }
  return bytes;
}

void layer_losses_forward(const Pyramid& pyramid, const LogNorm& options, void* sums, void* masses, void* loss,
                          void* slopes, void* workspace, int device, void* stream) {
  const DeviceGuard guard(device);
  if (pyramid.batch == 0) { // no block would run
    const size_t bytes = pyramid.num_layers * element_size(pyramid.accumulate);
    return check(cudaMemsetAsync(loss, 0, bytes, static_cast<cudaStream_t>(stream)), "cudaMemsetAsync");
  }
  const auto run = pyramid.accumulate == DType::kFloat64 ? forward<double> : forward<float>;
  run(pyramid, options, sums, masses, loss, slopes, static_cast<char*>(workspace), {stream, may_launch_early(device)});
}

void layer_losses_backward(const Pyramid& pyramid, const void* grad_loss, int64_t grad_loss_stride, const void* slopes,
                           int device, void* stream) {
  const DeviceGuard guard(device);
  auto run = [&](auto zero) {
    using Acc = decltype(zero);
    const SumGradients<Acc> gradients = {static_cast<const Acc*>(slopes), static_cast<const Acc*>(grad_loss),
                                         grad_loss_stride};
    launch_backward(pyramid, gradients, stream);
  };
  pyramid.accumulate == DType::kFloat64 ? run(0.0) : run(0.0f);
}

} // namespace fdk::cuda
