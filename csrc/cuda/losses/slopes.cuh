// The slopes (F1) of one sample of a layer, by (L7). Each distance is computed by both samples of its pair, so nothing
// is scattered and nothing stored.
#pragma once

#include "view.cuh"

namespace fdk::cuda {

constexpr int kChannelsOfThread = 8; // whose gradients a thread collects in registers

// Writes the slopes of one sample.
template <typename T>
struct SlopeWriter {
  const View<T>& view;
  const Sample<T>& sample;
  int64_t n;
  T* slopes; // [2, N, total_channels], or null

  // From the gradients of f and b of a channel.
  __device__ void put(int64_t c, double grad_f, double grad_b) const {
    if (!slopes) return;
    double grad_fg = grad_f * sample.scale_fg;
    double grad_bg = grad_b * sample.scale_bg;
    if (sample.masked_background) {
      grad_fg -= grad_bg;
      grad_bg = 0;
    }
    slopes[view.sum_at(0, n) + c] = static_cast<T>(grad_fg);
    slopes[view.sum_at(1, n) + c] = static_cast<T>(grad_bg);
  }

  // Of a sample that does not count.
  __device__ void put_zeros() const {
    for (int64_t c = threadIdx.x; slopes && c < view.layer.channels; c += kThreads) {
      slopes[view.sum_at(0, n) + c] = slopes[view.sum_at(1, n) + c] = 0;
    }
  }
};

// The gradients of q times the distance of a pair (i, j): `f` and `b` times along(f_i - b_j) of a channel.
struct PairSlopes {
  bool vector;
  double f, b;

  __device__ PairSlopes(const Options& options, const Moments& moments, double q)
      : vector(options.norm == Norm::kVector), f(2 * q), b(-2 * q) {
    if (vector) return;
    const double x = moments.sums[0], z = moments.sums[1];
    const bool relative = options.norm == Norm::kRelative;
    const double d = relative ? z * z + options.eps : 1;
    const double ratio = relative ? x * z / d : 0;
    f *= x / d * (1 - ratio);
    b *= x / d * (1 + ratio);
  }
  __device__ double along(double difference) const { return vector ? difference : 1; }
};

// The gradients of f and b that a thread collects for its channels of sample n.
template <typename T>
struct Collected {
  const View<T>& view;
  int64_t n, first; // the first channel of the thread
  double f[kChannelsOfThread] = {}, b[kChannelsOfThread] = {};

  // Adds those of q times the distance of a pair, one of whose samples is n.
  __device__ void add(const Pair& pair, const Moments& moments, double q) {
    const PairSlopes slopes(view.options, moments, q);
    const Sample<T> i = view.sample(pair.i), j = view.sample(pair.j);
#pragma unroll
    for (int t = 0; t < kChannelsOfThread; ++t) {
      const int64_t c = first + t * kThreads;
      if (c >= view.layer.channels) continue;
      const double along = slopes.along(i.f(c) - j.b(c));
      if (pair.i == n) f[t] += slopes.f * along;
      if (pair.j == n) b[t] += slopes.b * along;
    }
  }
};

// The gradient of an entry of a loss, of which so many count.
__device__ inline double gradient_of_entry(const Options& options, double count) {
  return options.reduction == Reduction::kMean ? 1 / max(count, 1.0) : 1;
}

// Writes the slopes of a sample that counts, and returns its loss (L3), where its own pair is its only term.
template <typename T>
__device__ double slopes_of_own_pair(const SlopeWriter<T>& writer) {
  const View<T>& view = writer.view;
  const Sample<T>& sample = writer.sample;
  double sums[3] = {0, 0, 0}; // the moments, and how many entries count
  Moments::add_channels(view, writer.n, writer.n, sums);
  for (int64_t m = threadIdx.x; m < view.pass.batch; m += kThreads)
    sums[2] += view.counts(m);
  block_sums(sums);
  const Moments moments(sums[0], sums[1]);
  const double D = moments.distance(view.options);
  const double q = -view.options.log_scale * gradient_of_entry(view.options, sums[2]) / (D + view.options.eps);
  const PairSlopes slopes(view.options, moments, q);
  for (int64_t c = threadIdx.x; c < view.layer.channels; c += kThreads) {
    const double along = slopes.along(sample.f(c) - sample.b(c));
    writer.put(c, slopes.f * along, slopes.b * along);
  }
  return view.loss(D);
}

// Writes the slopes of one sample and sets `entry` to its loss without the pooled term, (L3) and (L4).
template <typename T>
__device__ void slopes_of_sample(const SlopeWriter<T>& writer, double& entry) {
  const View<T>& view = writer.view;
  const Options& options = view.options;
  double totals[2] = {0, 0}; // the entries that count, and the valid pooled pairs
  for (int64_t m = threadIdx.x; m < view.pass.batch; m += kThreads)
    totals[0] += view.counts(m);
  if (options.exchange == Exchange::kPooled) {
    for (int64_t k = threadIdx.x; k < view.call.num_pairs; k += kThreads)
      totals[1] += view.pair(true, k).valid;
  }
  block_sums(totals);
  const double of_entry = gradient_of_entry(options, totals[0]);
  const double of_pooled = totals[0] / max(totals[1], 1.0); // of a pair, times of_entry

  for (int64_t start = 0; start == 0 || start < view.layer.channels; start += kChannelsOfThread * kThreads) {
    Collected<T> collected = {view, writer.n, start + threadIdx.x};
    for (int exchanged = 0; exchanged < view.kinds(); ++exchanged) {
      const bool pooled = view.is_pooled(exchanged);
      const int64_t first = exchanged ? 0 : writer.n;
      const int64_t end = exchanged ? view.call.num_pairs : writer.n + 1;
      for (int64_t k = first; k < end; ++k) {
        const Pair pair = view.pair(exchanged, k);
        if (!pair.valid || (pair.i != writer.n && pair.j != writer.n)) continue;
        const Moments moments(view, pair.i, pair.j);
        const Moments others = pooled ? Moments(view, pair.j, pair.i) : moments;
        const double D = moments.distance(options) + (pooled ? others.distance(options) : 0);
        if (k == writer.n && !pooled && start == 0) entry += view.loss(D);
        const double q = -options.log_scale * of_entry * (pooled ? of_pooled : 1.0) / (D + options.eps);
        collected.add(pair, moments, q);
        if (pooled) collected.add({pair.j, pair.i, true}, others, q);
      }
    }
#pragma unroll
    for (int t = 0; t < kChannelsOfThread; ++t) {
      const int64_t c = collected.first + t * kThreads;
      if (c < view.layer.channels) writer.put(c, collected.f[t], collected.b[t]);
    }
  }
}

// Writes the slopes of one sample under the norm over the batch, where all pairs of a channel share a logarithm (L6).
template <typename T>
__device__ void slopes_over_batch(const SlopeWriter<T>& writer) {
  const View<T>& view = writer.view;
  const Options& options = view.options;
  const int64_t n = writer.n;
  const double of_entry = options.reduction == Reduction::kMean ? 1.0 / view.layer.channels : 1;
  for (int64_t c = threadIdx.x; c < view.layer.channels; c += kThreads) {
    double grad_f = 0, grad_b = 0;
    for (int exchanged = 0; exchanged < view.kinds(); ++exchanged) {
      double D = 0, along_f = 0, along_b = 0;
      auto add = [&](int64_t i, int64_t j) {
        const double difference = view.sample(i).f(c) - view.sample(j).b(c);
        D += difference * difference;
        if (i == n) along_f += difference;
        if (j == n) along_b -= difference;
      };
      for (int64_t k = 0; k < view.pairs(exchanged); ++k) {
        const Pair pair = view.pair(exchanged, k);
        if (!pair.valid) continue;
        add(pair.i, pair.j);
        if (view.is_pooled(exchanged)) add(pair.j, pair.i);
      }
      const double q = -options.log_scale * of_entry / (D + options.eps);
      grad_f += 2 * q * along_f;
      grad_b += 2 * q * along_b;
    }
    writer.put(c, grad_f, grad_b);
  }
}

// Writes the slopes of sample n; called by the whole block. Sets `entry` as slopes_of_sample does, but over the batch.
template <bool kOwnPairs, typename T>
__device__ void write_slopes(const View<T>& view, int64_t n, T* slopes, double& entry) {
  const Sample<T> sample = view.sample(n);
  const SlopeWriter<T> writer = {view, sample, n, slopes};
  if (!sample.counts) {
    writer.put_zeros();
  } else if constexpr (kOwnPairs) {
    entry = slopes_of_own_pair(writer);
  } else if (view.options.norm != Norm::kBatch) {
    slopes_of_sample(writer, entry);
  } else if (slopes) {
    slopes_over_batch(writer);
  }
}

} // namespace fdk::cuda
