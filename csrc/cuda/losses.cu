// Losses and slopes on CUDA, (L1) to (F1) in double: one launch for all layers. After sums_kernel the same launch first
// adds up the partial sums, by further blocks; the block of a sample waits until the sums of its layer are written.
#include "losses/launch.cuh"

#include "losses/slopes.cuh"

namespace fdk::cuda {
namespace {

struct LossWork {
  SecondPass pass;
  Losses losses;
};

// Returns this block's ticket in start order. Waiting for lower tickets is safe: those blocks already run.
__device__ uint32_t take_ticket(uint32_t* started) {
  __shared__ uint32_t ticket;
  if (threadIdx.x == 0) ticket = atomicAdd(started, 1u);
  __syncthreads();
  return ticket;
}

// Publishes what this block has written, and returns how many blocks have done so before.
__device__ uint32_t publish(uint32_t* count) {
  __shared__ uint32_t before;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence(); // of all that the block has written: the barrier precedes it
    before = atomicAdd(count, 1u);
    __threadfence();
  }
  __syncthreads();
  return before;
}

// Waits until `count` blocks have published.
__device__ void wait_for(const uint32_t* published, uint32_t count) {
  if (count == 0) return;
  if (threadIdx.x == 0) {
    while (*static_cast<const volatile uint32_t*>(published) < count)
      __nanosleep(32);
    __threadfence();
  }
  __syncthreads();
}

// Sums the losses of the channels `first`, `first` + `step`, ..., (L6), and counts them.
template <typename T>
__device__ void losses_of_channels(const View<T>& view, int64_t first, int64_t step, double (&result)[2]) {
  for (int64_t c = first; c < view.layer.channels; c += step) {
    double entry = 0;
    for (int exchanged = 0; exchanged < view.kinds(); ++exchanged) {
      double D = 0;
      bool any = false;
      for (int64_t k = 0; k < view.pairs(exchanged); ++k) {
        const Pair pair = view.pair(exchanged, k);
        if (!pair.valid) continue;
        any = true;
        const Sample<T> i = view.sample(pair.i), j = view.sample(pair.j);
        D += (i.f(c) - j.b(c)) * (i.f(c) - j.b(c));
        if (view.is_pooled(exchanged)) D += (j.f(c) - i.b(c)) * (j.f(c) - i.b(c));
      }
      if (any) entry += view.loss(D);
      if (any && !exchanged) result[1] += 1;
    }
    result[0] += entry;
  }
}

// Computes the parts of the block of sample n, in every thread: the loss of the sample and every batch-th pooled pair.
// Under the norm over the batch it takes the losses of some channels instead. Also writes the slopes of the sample.
template <bool kOwnPairs, typename Acc>
__device__ void make_parts(const View<Acc>& view, int64_t n, Acc* slopes, double (&parts)[kParts]) {
  const Options& options = view.options;
  const int64_t batch = view.pass.batch;
  write_slopes<kOwnPairs>(view, n, slopes, parts[kEntries]);
  if constexpr (kOwnPairs) {
    parts[kEntryCount] = view.counts(n);
    return;
  }
  if (options.norm == Norm::kBatch) {
    double entries[2] = {0, 0};
    losses_of_channels(view, n * kThreads + threadIdx.x, batch * kThreads, entries);
    block_sums(entries);
    parts[kEntries] = entries[0];
    parts[kEntryCount] = entries[1];
    return;
  }
  parts[kEntryCount] = view.counts(n);
  if (options.exchange != Exchange::kPooled) return;
  for (int64_t k = n; k < view.call.num_pairs; k += batch) { // (L5)
    const Pair pair = view.pair(true, k);
    if (!pair.valid) continue;
    const double d_ij = Moments(view, pair.i, pair.j).distance(options);
    const double d_ji = Moments(view, pair.j, pair.i).distance(options);
    parts[kPairs] += view.loss(d_ij + d_ji);
    parts[kPairCount] += 1;
  }
}

// Writes the loss of a layer from the parts [N, kParts] of its blocks.
template <typename Acc>
__device__ void write_loss(Reduction reduction, int64_t batch, const double* parts, Acc* loss) {
  double total[kParts] = {};
  for (int64_t n = threadIdx.x; n < batch; n += kThreads) {
    for (int part = 0; part < kParts; ++part)
      total[part] += parts[n * kParts + part];
  }
  block_sums(total);
  if (threadIdx.x > 0) return;
  double value = total[kEntries] + total[kEntryCount] * total[kPairs] / max(total[kPairCount], 1.0);
  if (reduction == Reduction::kMean) value /= max(total[kEntryCount], 1.0);
  *loss = static_cast<Acc>(value);
}

// `kOwnPairs`: every term is that of a sample's own pair, under no exchange and no norm over the batch. That is what
// most calls ask for, and takes a fraction of the code, which a kernel waits for.
template <typename Acc, bool kOwnPairs>
__global__ void __launch_bounds__(kThreads)
    losses_kernel(const __grid_constant__ LossWork work, const Outputs<Acc> sums, const LossScratch scratch) {
  wait_for_previous_launch();
  const SecondPass& pass = work.pass;
  const bool waits = pass.blocks > 0;
  const uint32_t ticket = waits ? take_ticket(&scratch.counters->started) : blockIdx.x;
  if (ticket < pass.blocks) {
    const int index = layer_of_block(pass, ticket);
    second_pass(pass, index, ticket - pass.layers[index].first_block, sums);
    publish(&scratch.counters->summed[index]);
    return;
  }
  const uint32_t item = ticket - static_cast<uint32_t>(pass.blocks);
  const uint32_t batch = static_cast<uint32_t>(pass.batch);
  const uint32_t index = item / batch;
  const int64_t n = item - index * batch;
  const SecondPassLayer& layer = pass.layers[index];
  const int64_t layer_index = pass.first_layer + index; // among all layers
  const View<Acc> view = {work.losses, work.losses.options, pass, layer, sums.sums, sums.masses, layer_index};
  wait_for(&scratch.counters->summed[index], layer.blocks);

  double parts[kParts] = {};
  make_parts<kOwnPairs>(view, n, static_cast<Acc*>(work.losses.slopes), parts);
  double* layer_parts = scratch.parts + static_cast<int64_t>(index) * batch * kParts; // [N, kParts]
  if (threadIdx.x == 0) {
    for (int part = 0; part < kParts; ++part)
      layer_parts[n * kParts + part] = parts[part];
  }
  if (publish(&scratch.counters->reported[index]) == batch - 1) { // the last block of the layer
    write_loss(view.options.reduction, batch, layer_parts, static_cast<Acc*>(work.losses.losses) + layer_index);
  }
}

template <typename Acc>
void launch_all(const Pyramid& pyramid, const void* sums, const void* masses, const Losses& losses, char* workspace,
                void* stream) {
  // The kernel writes sums only after partial sums, of which there are none.
  const Outputs<Acc> given = {static_cast<Acc*>(const_cast<void*>(sums)), static_cast<Acc*>(const_cast<void*>(masses)),
                              nullptr, nullptr, 0};
  const LossScratch scratch(pyramid, workspace);
  for (int64_t first = 0; first < pyramid.num_layers; first += kMaxLayers) {
    check(cudaMemsetAsync(scratch.counters, 0, sizeof(Counters), static_cast<cudaStream_t>(stream)), "cudaMemsetAsync");
    launch_losses(describe_final_sums(pyramid, first), losses, given, scratch, stream);
  }
}

} // namespace

template <typename Acc>
void launch_losses(const SecondPass& pass, const Losses& losses, const Outputs<Acc>& sums, const LossScratch& scratch,
                   const Stream& stream) {
  const Options& options = losses.options;
  const bool own_pairs = options.exchange == Exchange::kNone && options.norm != Norm::kBatch;
  launch("losses_kernel", own_pairs ? losses_kernel<Acc, true> : losses_kernel<Acc, false>,
         pass.blocks + pass.count * pass.batch, kThreads, stream, LossWork{pass, losses}, sums, scratch);
}

template void launch_losses(const SecondPass&, const Losses&, const Outputs<float>&, const LossScratch&, const Stream&);
template void launch_losses(const SecondPass&, const Losses&, const Outputs<double>&, const LossScratch&,
                            const Stream&);

void zero_losses(const Pyramid& pyramid, const Losses& losses, void* stream) {
  const size_t bytes = pyramid.num_layers * element_size(pyramid.accumulate);
  check(cudaMemsetAsync(losses.losses, 0, bytes, static_cast<cudaStream_t>(stream)), "cudaMemsetAsync");
}

int64_t losses_workspace(const Pyramid& pyramid) { return LossScratch::bytes(pyramid); }

void losses(const Pyramid& pyramid, const void* sums, const void* masses, const Losses& losses, void* workspace,
            int device, void* stream) {
  const DeviceGuard guard(device);
  if (pyramid.batch == 0) return zero_losses(pyramid, losses, stream);
  const auto run = pyramid.accumulate == DType::kFloat64 ? launch_all<double> : launch_all<float>;
  run(pyramid, sums, masses, losses, static_cast<char*>(workspace), stream);
}

} // namespace fdk::cuda
