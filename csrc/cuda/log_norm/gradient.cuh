// Backward of log_norm (L7) for a sample of a layer.
#pragma once

#include "view.cuh"

namespace fdk::cuda {

constexpr int kBackwardThreads = 256; // for a sample of a layer
constexpr int kChannelsOfThread = 8;  // whose gradients a thread collects in registers

// Hands the gradients of f and b of one sample through (L7).
template <typename T>
struct Gradient {
  const View<T>& view;
  const Sample<T>& sample;
  int64_t n;
  T* grad_sums;                 // [2, N, total_channels], or null
  T* grad_masses;               // [2, N, L], or null
  double totals[3] = {0, 0, 0}; // of this thread's channels: the gradients of w_fg, w_bg and, if masked, of M_fg

  __device__ void put_sums(int64_t c, double grad_f, double grad_b) {
    if (!grad_sums) return;
    double grad_fg = grad_f * sample.scale_fg;
    double grad_bg = grad_b * sample.scale_bg;
    totals[0] -= grad_fg * sample.f(c);
    totals[1] -= grad_bg * sample.b(c);
    if (sample.masked_background) {
      totals[2] += grad_bg;
      grad_fg -= grad_bg;
      grad_bg = 0;
    }
    grad_sums[view.sum_at(0, n) + c] = static_cast<T>(grad_fg);
    grad_sums[view.sum_at(1, n) + c] = static_cast<T>(grad_bg);
  }

  // Of a sample that is left out.
  __device__ void put_nothing() const {
    for (int64_t c = threadIdx.x; grad_sums && c < view.shape.channels; c += kBackwardThreads) {
      grad_sums[view.sum_at(0, n) + c] = grad_sums[view.sum_at(1, n) + c] = 0;
    }
    if (grad_masses && threadIdx.x == 0) grad_masses[view.mass_at(0, n)] = grad_masses[view.mass_at(1, n)] = 0;
  }

  __device__ void put_masses() {
    if (!grad_masses) return;
    block_sums<kBackwardThreads>(totals);
    if (threadIdx.x > 0) return;
    double grad_fg = 0, grad_bg = 0;
    if (view.options.region_weight == RegionWeight::kValid) grad_fg = grad_bg = totals[0] + totals[1];
    if (view.options.region_weight == RegionWeight::kRegion) grad_fg = totals[0], grad_bg = totals[1];
    grad_masses[view.mass_at(0, n)] = static_cast<T>(grad_fg + totals[2]);
    grad_masses[view.mass_at(1, n)] = static_cast<T>(grad_bg);
  }
};

// The gradients of f and b that a thread collects for its channels of sample n.
template <typename T>
struct Collected {
  const View<T>& view;
  int64_t n, first; // the first channel of the thread
  double f[kChannelsOfThread] = {}, b[kChannelsOfThread] = {};

  // Adds those of the distance of i and j, which comes with the factor q; either of them may be sample n.
  __device__ void add(const Pair& pair, const Moments& moments, double q) {
    const bool vector = view.options.norm == Norm::kVector;
    double slope_f = 2 * q, slope_b = -2 * q;
    if (!vector) {
      const double x = moments.sums[0], z = moments.sums[1];
      const bool relative = view.options.norm == Norm::kRelative;
      const double d = relative ? z * z + view.options.eps : 1;
      const double turn = relative ? x * z / d : 0;
      slope_f *= x / d * (1 - turn);
      slope_b *= x / d * (1 + turn);
    }
    const Sample<T> i = view.sample(pair.i), j = view.sample(pair.j);
#pragma unroll
    for (int t = 0; t < kChannelsOfThread; ++t) {
      const int64_t c = first + t * kBackwardThreads;
      if (c >= view.shape.channels) continue;
      const double along = vector ? i.f(c) - j.b(c) : 1;
      if (pair.i == n) f[t] += slope_f * along;
      if (pair.j == n) b[t] += slope_b * along;
    }
  }
};

// Without `grad_loss` it is 1. `entry` becomes what the sample adds to its loss by (L3) and (L4).
template <typename T>
__device__ void gradient_of_sample(const View<T>& view, const T* grad_loss, Gradient<T>& gradient, double& entry) {
  const LogNorm& options = view.options;
  auto entry_gradient = [&](int64_t m) {
    if (!grad_loss) return 1.0;
    return static_cast<double>(
        grad_loss[options.reduction == Reduction::kNone ? m * options.num_layers + view.index : view.index]);
  };
  // The entries that count, the gradients that arrive at them, and the pairs among which pooled shares these.
  double totals[3] = {0, 0, 0};
  for (int64_t m = threadIdx.x; m < options.batch; m += kBackwardThreads) {
    if (view.counts(m)) totals[0] += 1, totals[1] += entry_gradient(m);
  }
  if (options.exchange == Exchange::kPooled) {
    for (int64_t k = threadIdx.x; k < options.num_pairs; k += kBackwardThreads)
      totals[2] += view.pair(true, k).met;
  }
  block_sums<kBackwardThreads>(totals);
  const double share = options.reduction == Reduction::kMean ? 1 / max(totals[0], 1.0) : 1;
  const double pooled = totals[1] / max(totals[2], 1.0);

  auto moments_of = [&](int64_t i, int64_t j) {
    Moments moments(view, view.sample(i), view.sample(j), threadIdx.x, kBackwardThreads);
    block_sums<kBackwardThreads>(moments.sums);
    return moments;
  };
  for (int64_t start = 0; start == 0 || start < view.shape.channels; start += kChannelsOfThread * kBackwardThreads) {
    Collected<T> collected = {view, gradient.n, start + threadIdx.x};
    for (int exchanged = 0; exchanged < view.terms(); ++exchanged) {
      const bool crossed = view.crossed(exchanged);
      const int64_t first = exchanged ? 0 : gradient.n;
      const int64_t end = exchanged ? options.num_pairs : gradient.n + 1;
      for (int64_t k = first; k < end; ++k) {
        const Pair pair = view.pair(exchanged, k);
        if (!pair.met || (pair.i != gradient.n && pair.j != gradient.n)) continue;
        const Moments moments = moments_of(pair.i, pair.j);
        const Moments others = crossed ? moments_of(pair.j, pair.i) : moments;
        const double D = moments.distance(options) + (crossed ? others.distance(options) : 0);
        if (k == gradient.n && !crossed && start == 0) entry += view.loss(D);
        const double q = -options.log_scale * share * (crossed ? pooled : entry_gradient(k)) / (D + options.eps);
        collected.add(pair, moments, q);
        if (crossed) collected.add({pair.j, pair.i, true}, others, q);
      }
    }
#pragma unroll
    for (int t = 0; t < kChannelsOfThread; ++t) {
      const int64_t c = collected.first + t * kBackwardThreads;
      if (c < view.shape.channels) gradient.put_sums(c, collected.f[t], collected.b[t]);
    }
  }
}

// The same under the norm over the batch, where all pairs of a channel share one logarithm.
template <typename T>
__device__ void gradient_over_batch(const View<T>& view, const T* grad_loss, Gradient<T>& gradient) {
  const LogNorm& options = view.options;
  const int64_t n = gradient.n;
  const double share = options.reduction == Reduction::kMean ? 1.0 / view.shape.channels : 1;
  for (int64_t c = threadIdx.x; c < view.shape.channels; c += kBackwardThreads) {
    const int64_t at = options.reduction == Reduction::kNone ? view.shape.channel_start + c : view.index;
    const double G = grad_loss ? static_cast<double>(grad_loss[at]) : 1.0;
    double grad_f = 0, grad_b = 0;
    for (int exchanged = 0; exchanged < view.terms(); ++exchanged) {
      double D = 0, along_f = 0, along_b = 0;
      auto add = [&](int64_t i, int64_t j) {
        const double difference = view.sample(i).f(c) - view.sample(j).b(c);
        D += difference * difference;
        if (i == n) along_f += difference;
        if (j == n) along_b -= difference;
      };
      for (int64_t k = 0; k < view.pairs(exchanged); ++k) {
        const Pair pair = view.pair(exchanged, k);
        if (!pair.met) continue;
        add(pair.i, pair.j);
        if (view.crossed(exchanged)) add(pair.j, pair.i);
      }
      const double q = -options.log_scale * share * G / (D + options.eps);
      grad_f += 2 * q * along_f;
      grad_b += 2 * q * along_b;
    }
    gradient.put_sums(c, grad_f, grad_b);
  }
}

// The gradient of sample n, by the whole block. `entry` becomes the sample's own loss, except over the batch.
template <typename T>
__device__ void put_gradient(const View<T>& view, int64_t n, const T* grad_loss, T* grad_sums, T* grad_masses,
                             double& entry) {
  const Sample<T> sample = view.sample(n);
  Gradient<T> gradient = {view, sample, n, grad_sums, grad_masses};
  if (!sample.counts) {
    gradient.put_nothing();
  } else if (view.options.norm == Norm::kBatch) {
    if (grad_sums) gradient_over_batch(view, grad_loss, gradient);
    gradient.put_masses();
  } else {
    gradient_of_sample(view, grad_loss, gradient, entry);
    gradient.put_masses();
  }
}

} // namespace fdk::cuda
