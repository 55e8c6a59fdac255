// A layer as losses_kernel sees it: the samples that count, their region features (L1), pairs and distances (L2).
#pragma once

#include "../sums/second_pass.cuh"

namespace fdk::cuda {

// One sample of a layer and its region features (L1).
template <typename T>
struct Sample {
  const T* S_fg;                   // [C]
  const T* S_bg;                   // [C]
  double M_fg, scale_fg, scale_bg; // scale = 1 / w
  bool masked_background, counts;

  __device__ double f(int64_t c) const { return S_fg[c] * scale_fg; }
  __device__ double b(int64_t c) const { return (masked_background ? M_fg - S_fg[c] : double(S_bg[c])) * scale_bg; }
};

// The foreground of sample i against the background of sample j; valid if both count.
struct Pair {
  int64_t i, j;
  bool valid;
};

// One layer. Its loss has one term a sample for the samples' own pairs and, under an exchange, a second kind of terms
// for the exchanged ones.
template <typename T>
struct View {
  const Losses& call;
  const Options& options;
  const SecondPass& pass;
  const SecondPassLayer& layer;
  const T* sums;   // [2, N, total_channels]
  const T* masses; // [2, N, L]
  int64_t index;   // among all layers

  __device__ int64_t sum_at(int region, int64_t n) const {
    return (region * pass.batch + n) * pass.total_channels + layer.channel_start;
  }
  __device__ int64_t mass_at(int region, int64_t n) const {
    return (region * pass.batch + n) * pass.num_layers + index;
  }

  // A sample out of range counts and is NaN, so that a wrong pairing shows.
  __device__ bool exists(int64_t n) const { return 0 <= n && n < pass.batch; }
  __device__ bool counts(int64_t n) const {
    if (!exists(n)) return true;
    const double M_fg = masses[mass_at(0, n)], M_bg = masses[mass_at(1, n)];
    return options.region_weight == RegionWeight::kRegion ? M_fg != 0 && M_bg != 0 : M_fg + M_bg != 0;
  }

  __device__ Sample<T> sample(int64_t n) const {
    const int64_t row = exists(n) ? n : 0;
    const double M_fg = masses[mass_at(0, row)], M_bg = masses[mass_at(1, row)];
    double w_fg = 1, w_bg = 1;
    if (options.region_weight == RegionWeight::kValid) w_fg = w_bg = M_fg + M_bg;
    if (options.region_weight == RegionWeight::kPixels) w_fg = w_bg = static_cast<double>(layer.pixels);
    if (options.region_weight == RegionWeight::kRegion) w_fg = M_fg, w_bg = M_bg;
    if (!exists(n)) w_fg = w_bg = nan("");
    return {
        sums + sum_at(0, row), sums + sum_at(1, row), M_fg, 1 / w_fg, 1 / w_bg, options.masked_background, counts(n)};
  }

  __device__ int kinds() const { return options.exchange == Exchange::kNone ? 1 : 2; }
  __device__ int64_t pairs(bool exchanged) const { return exchanged ? call.num_pairs : pass.batch; }

  // Whether the terms are (L5): D_ij + D_ji under the logarithm, and the mean over the pairs instead of the batch.
  __device__ bool is_pooled(bool exchanged) const { return exchanged && options.exchange == Exchange::kPooled; }

  __device__ Pair pair(bool exchanged, int64_t k) const {
    Pair pair = {k, k, true};
    if (is_pooled(exchanged)) {
      pair = {call.pairing[2 * k], call.pairing[2 * k + 1], true};
      pair.valid = pair.i >= 0 && pair.j >= 0;
    } else if (exchanged) {
      pair.i = call.pairing[k];
    }
    pair.valid = pair.valid && counts(pair.i) && counts(pair.j);
    return pair;
  }

  __device__ double loss(double D) const { return -options.log_scale * log(D + options.eps); }
};

// Sums each value over the block, always in the same order; every thread returns the sums.
template <int kCount>
__device__ void block_sums(double (&values)[kCount]) {
  __shared__ double parts[kCount][kWarps];
  for (double& value : values)
    value = lane_sum(value);
  __syncthreads(); // the previous sums have been read
  if (threadIdx.x % kWarp == 0) {
    for (int i = 0; i < kCount; ++i)
      parts[i][threadIdx.x / kWarp] = values[i];
  }
  __syncthreads();
  for (int i = 0; i < kCount; ++i) {
    values[i] = 0;
    for (int warp = 0; warp < kWarps; ++warp)
      values[i] += parts[i][warp];
  }
}

// The sums over channels from which a distance (L2) follows: Σ (f-b)² for the vector norm, else x = Σ (f-b) and
// z = Σ (f+b).
struct Moments {
  double sums[2] = {0, 0};

  __device__ Moments(double first, double second) : sums{first, second} {}

  // Of the whole block, in each of its threads.
  template <typename T>
  __device__ Moments(const View<T>& view, int64_t i, int64_t j) {
    add_channels(view, i, j, sums);
    block_sums(sums);
  }

  // Adds the channels of a thread.
  template <typename T>
  static __device__ void add_channels(const View<T>& view, int64_t i, int64_t j, double* sums) {
    const Sample<T> fg = view.sample(i), bg = view.sample(j);
    const bool vector = view.options.norm == Norm::kVector;
#pragma unroll 4
    for (int64_t c = threadIdx.x; c < view.layer.channels; c += kThreads) {
      const double f = fg.f(c), b = bg.b(c);
      sums[0] += vector ? (f - b) * (f - b) : f - b;
      sums[1] += f + b;
    }
  }

  __device__ double distance(const Options& options) const {
    if (options.norm == Norm::kVector) return sums[0];
    const double square = sums[0] * sums[0];
    return options.norm == Norm::kRelative ? square / (sums[1] * sums[1] + options.eps) : square;
  }
};

} // namespace fdk::cuda
