// The launch of losses_kernel, which sums.cu shares.
#pragma once

#include "../sums/second_pass.cuh"

namespace fdk::cuda {

// Contributions of a block to the loss of its layer: sum and number of its entries and of its pooled pairs.
enum Part { kEntries, kEntryCount, kPairs, kPairCount, kParts };

// Numbers of blocks; must be 0 before the launch.
struct Counters {
  uint32_t started;
  uint32_t summed[kMaxLayers];   // blocks that have written sums of a layer
  uint32_t reported[kMaxLayers]; // blocks that have written their parts of a layer's loss
};

// Scratch memory of a launch.
struct LossScratch {
  double* parts; // [layers of the launch, N, kParts]
  Counters* counters;

  static int64_t parts_bytes(const Pyramid& pyramid) {
    const int64_t layers = std::min<int64_t>(kMaxLayers, pyramid.num_layers);
    return layers * pyramid.batch * kParts * static_cast<int64_t>(sizeof(double));
  }
  static int64_t bytes(const Pyramid& pyramid) { // a multiple of 8: other numbers may follow
    constexpr int64_t kCounters = ceil_div<int64_t>(sizeof(Counters), sizeof(double)) * sizeof(double);
    return parts_bytes(pyramid) + kCounters;
  }
  LossScratch(const Pyramid& pyramid, char* memory)
      : parts(reinterpret_cast<double*>(memory)),
        counters(reinterpret_cast<Counters*>(memory + parts_bytes(pyramid))) {}
};

// Adds up the partial sums of the layers of `pass`, if they have any, and writes losses and slopes.
template <typename Acc>
void launch_losses(const SecondPass& pass, const Losses& losses, const Outputs<Acc>& sums, const LossScratch& scratch,
                   const Stream& stream);

// Writes the losses of a batch without samples, for which no block would run.
void zero_losses(const Pyramid& pyramid, const Losses& losses, void* stream);

} // namespace fdk::cuda
