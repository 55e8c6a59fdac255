// Stage log_norm on CUDA: (L1) to (L7) in double, one launch forward and one backward for all layers. Every distance is
// computed where it is needed, backward by both samples of a pair: so nothing is scattered and nothing stored.
#include <algorithm>

#include "log_norm/view.cuh"

namespace fdk::cuda {
namespace {

constexpr int kForwardThreads = 512;  // for a layer; a warp takes an entry at a time
constexpr int kBackwardThreads = 256; // for a sample of a layer
constexpr int kChannelsOfThread = 8;  // of backward, whose gradients a thread collects in registers

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

// The losses of channels (L6), summed over those that this thread takes, and their number.
template <typename T>
__device__ void losses_of_channels(const View<T>& view, T* loss, double (&result)[2]) {
  for (int64_t c = threadIdx.x; c < view.shape.channels; c += kForwardThreads) {
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

template <typename T>
__global__ void __launch_bounds__(kForwardThreads, 1)
    log_norm_forward_kernel(const __grid_constant__ Arguments arguments, const T* sums, const T* masses, T* loss) {
  const View<T> view(arguments, blockIdx.x, sums, masses);
  const LogNorm& options = arguments.options;
  double result[2] = {0, 0}; // the sum of the entries, and their number
  if (options.norm == Norm::kBatch) {
    losses_of_channels(view, loss, result);
  } else {
    losses_of_samples(view, loss, result);
  }
  if (options.reduction == Reduction::kNone) return;
  block_sums<kForwardThreads>(result);
  if (threadIdx.x > 0) return;
  if (options.reduction == Reduction::kMean) result[0] /= max(result[1], 1.0);
  loss[view.index] = static_cast<T>(result[0]);
}

// Hands the gradients of f and b of one sample through (L7).
template <typename T>
struct Gradient {
  const View<T>& view;
  const Sample<T>& sample;
  int64_t n;
  T* grad_sums;                 // [2, N, total_channels]
  T* grad_masses;               // [2, N, L]
  double totals[3] = {0, 0, 0}; // of this thread's channels: the gradients of w_fg, w_bg and, if masked, of M_fg

  __device__ void put_sums(int64_t c, double grad_f, double grad_b) {
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

  __device__ void put_masses() {
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

template <typename T>
__device__ void gradient_of_sample(const View<T>& view, const T* grad_loss, Gradient<T>& gradient) {
  const LogNorm& options = view.options;
  auto entry_gradient = [&](int64_t m) {
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
  for (int64_t start = 0; start < view.shape.channels; start += kChannelsOfThread * kBackwardThreads) {
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
    const double G = grad_loss[options.reduction == Reduction::kNone ? view.shape.channel_start + c : view.index];
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

template <typename T>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    log_norm_backward_kernel(const __grid_constant__ Arguments arguments, const T* grad_loss, const T* sums,
                             const T* masses, T* grad_sums, T* grad_masses) {
  const int64_t layer = blockIdx.x / arguments.options.batch;
  const int64_t n = blockIdx.x % arguments.options.batch;
  const View<T> view(arguments, layer, sums, masses);
  const Sample<T> sample = view.sample(n);
  if (!sample.counts) {
    for (int64_t c = threadIdx.x; c < view.shape.channels; c += kBackwardThreads) {
      grad_sums[view.sum_at(0, n) + c] = grad_sums[view.sum_at(1, n) + c] = 0;
    }
    if (threadIdx.x == 0) grad_masses[view.mass_at(0, n)] = grad_masses[view.mass_at(1, n)] = 0;
    return;
  }
  Gradient<T> gradient = {view, sample, n, grad_sums, grad_masses};
  if (arguments.options.norm == Norm::kBatch) {
    gradient_over_batch(view, grad_loss, gradient);
  } else {
    gradient_of_sample(view, grad_loss, gradient);
  }
  gradient.put_masses();
}

// Calls body(arguments, number of layers) for every launch that the layers need.
template <typename Body>
void for_each_launch(const LogNorm& args, Body body) {
  Arguments arguments = {};
  arguments.options = args;
  arguments.options.channels = arguments.options.pixels = nullptr;
  int64_t channel_start = 0;
  for (int64_t first = 0; first < args.num_layers; first += kMaxLayers) {
    const int64_t count = std::min<int64_t>(kMaxLayers, args.num_layers - first);
    arguments.first_layer = first;
    for (int64_t i = 0; i < count; ++i) {
      arguments.layers[i] = {args.channels[first + i], args.pixels[first + i], channel_start};
      channel_start += args.channels[first + i];
    }
    body(arguments, count);
  }
}

template <typename T>
void forward(const LogNorm& args, const void* sums, const void* masses, void* loss, void* stream) {
  for_each_launch(args, [&](const Arguments& arguments, int64_t layers) {
    launch("log_norm_forward_kernel", log_norm_forward_kernel<T>, layers, kForwardThreads, stream, arguments,
           static_cast<const T*>(sums), static_cast<const T*>(masses), static_cast<T*>(loss));
  });
}

template <typename T>
void backward(const LogNorm& args, const void* grad_loss, const void* sums, const void* masses, void* grad_sums,
              void* grad_masses, void* stream) {
  for_each_launch(args, [&](const Arguments& arguments, int64_t layers) {
    launch("log_norm_backward_kernel", log_norm_backward_kernel<T>, layers * args.batch, kBackwardThreads, stream,
           arguments, static_cast<const T*>(grad_loss), static_cast<const T*>(sums), static_cast<const T*>(masses),
           static_cast<T*>(grad_sums), static_cast<T*>(grad_masses));
  });
}

} // namespace

void log_norm_forward(const LogNorm& args, const void* sums, const void* masses, void* loss, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto run = args.accumulate == DType::kFloat64 ? forward<double> : forward<float>;
  run(args, sums, masses, loss, stream);
}

void log_norm_backward(const LogNorm& args, const void* grad_loss, const void* sums, const void* masses,
                       void* grad_sums, void* grad_masses, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto run = args.accumulate == DType::kFloat64 ? backward<double> : backward<float>;
  run(args, grad_loss, sums, masses, grad_sums, grad_masses, stream);
}

} // namespace fdk::cuda
