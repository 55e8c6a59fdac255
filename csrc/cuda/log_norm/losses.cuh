// Forward of log_norm: the entries of a layer's loss, by samples or, under the norm over the batch, by channels.
#pragma once

#include "view.cuh"

namespace fdk::cuda {

constexpr int kForwardThreads = 512; // for a layer; a warp takes an entry at a time

// The losses of samples, summed over those that this warp takes, and their number; in lane 0.
template <typename T>
__device__ void losses_of_samples(const View<T>& view, T* loss, double (&result)[2]) {
  const LogNorm& options = view.options;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  constexpr int kWarps = kForwardThreads / kWarp;
  auto distance = [&](int64_t i, int64_t j) {
    Moments moments(view, view.sample(i), view.sample(j), lane, kWarp);
    for (double& sum : moments.sums)
      sum = lane_sum(sum);
    return moments.distance(options);
  };

  double pooled[2] = {0, 0}; // the sum over the pairs, and their number
  if (options.exchange == Exchange::kPooled) {
    for (int64_t k = warp; k < options.num_pairs; k += kWarps) {
      const Pair pair = view.pair(true, k);
      if (!pair.met) continue;
      const double term = view.loss(distance(pair.i, pair.j) + distance(pair.j, pair.i)); // (L5)
      if (lane == 0) pooled[0] += term, pooled[1] += 1;
    }
    block_sums<kForwardThreads>(pooled);
  }

  for (int64_t n = warp; n < options.batch; n += kWarps) {
    double entry = 0;
    if (view.counts(n)) {
      entry = view.loss(distance(n, n)) + pooled[0] / max(pooled[1], 1.0); // (L3)
      if (options.exchange == Exchange::kShuffle) {
        const Pair pair = view.pair(true, n);
        if (pair.met) entry += view.loss(distance(pair.i, pair.j)); // (L4)
      }
      if (lane == 0) result[0] += entry, result[1] += 1;
    }
    if (lane == 0 && options.reduction == Reduction::kNone) loss[n * options.num_layers + view.index] = entry;
  }
}

// The losses of channels (L6), summed over those that this thread takes, first, first + step, ..., and their number.
template <typename T>
__device__ void losses_of_channels(const View<T>& view, int64_t first, int64_t step, T* loss, double (&result)[2]) {
  for (int64_t c = first; c < view.shape.channels; c += step) {
    double entry = 0;
    for (int exchanged = 0; exchanged < view.terms(); ++exchanged) {
      double D = 0;
      bool any = false;
      for (int64_t k = 0; k < view.pairs(exchanged); ++k) {
        const Pair pair = view.pair(exchanged, k);
        if (!pair.met) continue;
        any = true;
        const Sample<T> i = view.sample(pair.i), j = view.sample(pair.j);
        D += (i.f(c) - j.b(c)) * (i.f(c) - j.b(c));
        if (view.crossed(exchanged)) D += (j.f(c) - i.b(c)) * (j.f(c) - i.b(c));
      }
      if (any) entry += view.loss(D);
      if (any && !exchanged) result[1] += 1;
    }
    result[0] += entry;
    if (view.options.reduction == Reduction::kNone) loss[view.shape.channel_start + c] = static_cast<T>(entry);
  }
}

} // namespace fdk::cuda
