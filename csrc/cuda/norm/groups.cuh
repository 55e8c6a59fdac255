// Statistics and parameters of the groups, in double: merges the partial results of the tiles, always in the same
// order. A block takes a channel.
#pragma once

#include "work.cuh"

namespace fdk::cuda {

// The groups of values that share statistics, G = C or N * C.
struct NormGroups {
  int64_t batch, channels, pixels;
  uint32_t tiles; // of a plane
  int32_t tile_pixels;
  bool by_sample, given;
  double eps;
  const void* gamma;  // [C], or null for 1
  const void* beta;   // [C], or null for 0
  DType parameters;   // of both and of the running statistics
  double* statistics; // [2, G]
  void* running_mean; // [C], or null
  void* running_variance;
  double momentum;

  NormGroups(const NormAct& call, const LayerWork& layer)
      : batch(call.batch),
        channels(layer.channels),
        pixels(layer.pixels),
        tiles(layer.tiles),
        tile_pixels(layer.tile_pixels),
        by_sample(call.instance),
        given(call.given),
        eps(call.eps),
        gamma(call.gamma),
        beta(call.beta),
        parameters(call.parameters),
        statistics(call.statistics),
        running_mean(call.running_mean),
        running_variance(call.running_variance),
        momentum(call.momentum) {}

  __host__ __device__ int64_t samples() const { return by_sample ? batch : 1; }
  __host__ __device__ int64_t count() const { return samples() * channels; }
  __device__ double values() const { return static_cast<double>(pixels * (by_sample ? 1 : batch)); } // of a group
  __device__ int64_t partials() const { return tiles * (by_sample ? 1 : batch); }                    // likewise

  __device__ double mean(int64_t group) const { return statistics[group]; }
  __device__ double variance(int64_t group) const { return statistics[count() + group]; }
  __device__ double inverse(int64_t group) const { return 1 / sqrt(variance(group) + eps); }
  __device__ double parameter(const void* values, int64_t channel, double otherwise) const {
    if (!values) return otherwise;
    return parameters == DType::kFloat64 ? static_cast<const double*>(values)[channel]
                                         : static_cast<const float*>(values)[channel];
  }
  __device__ void set_parameter(void* values, int64_t channel, double value) const {
    if (parameters == DType::kFloat64) {
      static_cast<double*>(values)[channel] = value;
    } else {
      static_cast<float*>(values)[channel] = static_cast<float>(value);
    }
  }
  __device__ double scale(int64_t group) const { return inverse(group) * parameter(gamma, group % channels, 1); }

  // The affine row of a channel under some statistics.
  template <typename Acc>
  __device__ Affine<Acc> affine(int64_t channel, double mean, double variance) const {
    const double by = parameter(gamma, channel, 1) / sqrt(variance + eps);
    const double shift = parameter(beta, channel, 0) - mean * by;
    return {static_cast<Acc>(by), static_cast<Acc>(shift), static_cast<Acc>(mean)};
  }

  __device__ void move(void* running, int64_t channel, double value) const {
    const double before = parameter(running, channel, 0);
    set_parameter(running, channel, (1 - momentum) * before + momentum * value);
  }
};

// The threads of a block that share a group: a warp under statistics of the samples, which take turns, else all.
class Team {
 public:
  __device__ Team(const NormGroups& groups, Partial* room) : by_sample_(groups.by_sample), room_(room) {}

  // Calls body with sample and group of each group of a channel that falls to this team.
  template <typename Body>
  __device__ void for_each_group(const NormGroups& groups, int64_t channel, Body body) const {
    const int64_t first = by_sample_ ? threadIdx.x / kWarp : 0;
    for (int64_t n = first; n < groups.samples(); n += kWarps)
      body(n * groups.channels + channel, (channel * groups.samples() + n) * groups.partials());
  }

  // Adds up both numbers of value(i) for i of [0, count); every thread returns the sums.
  template <typename Value>
  __device__ Partial sum(int64_t count, Value value) const {
    const int size = by_sample_ ? kWarp : kThreads;
    Partial total = {0, 0};
#pragma unroll 4
    for (int64_t i = threadIdx.x % size; i < count; i += size) {
      const Partial of_tile = value(i);
      total.first += of_tile.first;
      total.second += of_tile.second;
    }
    total = {lane_sum(total.first), lane_sum(total.second)};
    return by_sample_ ? total : over_warps(total);
  }

  // Adds up what the teams of a block found; every thread returns the sum.
  __device__ Partial over_teams(const Partial& of_team) const { return by_sample_ ? over_warps(of_team) : of_team; }

  // One thread of the team, and of the block.
  __device__ bool is_first() const { return threadIdx.x % (by_sample_ ? kWarp : kThreads) == 0; }

 private:
  __device__ Partial over_warps(const Partial& of_warp) const {
    __syncthreads(); // others may still read the last numbers
    if (threadIdx.x % kWarp == 0) room_[threadIdx.x / kWarp] = of_warp;
    __syncthreads();
    Partial total = {0, 0};
    for (int i = 0; i < kWarps; ++i) {
      total.first += room_[i].first;
      total.second += room_[i].second;
    }
    return total;
  }

  bool by_sample_;
  Partial* room_; // [kWarps], shared
};

// Writes statistics (N1) and affine rows of a channel from means and sums of squared deviations of the tiles, by Chan's
// formula for any number of parts; and moves the running statistics, for which samples count equally.
template <typename Acc>
__device__ void merge_moments(const NormGroups& groups, const Partial* partials, int64_t channel, Affine<Acc>* affine,
                              Partial* room) {
  const Team team(groups, room);
  const int64_t last = groups.pixels - static_cast<int64_t>(groups.tiles - 1) * groups.tile_pixels;
  auto pixels_of_tile = [&](int64_t i) {
    return static_cast<double>(static_cast<uint32_t>(i) % groups.tiles == groups.tiles - 1 ? last : groups.tile_pixels);
  };
  Partial running = {0, 0}; // mean and variance
  team.for_each_group(groups, channel, [&](int64_t group, int64_t start) {
    const Partial* of_group = partials + start;
    const double origin = of_group[0].first;
    const Partial sums = team.sum(groups.partials(), [&](int64_t i) -> Partial {
      const double off = of_group[i].first - origin, shifted = pixels_of_tile(i) * off;
      return {shifted, of_group[i].second + shifted * off};
    });
    const double off = sums.first / groups.values(), mean = origin + off;
    const double difference = sums.second / groups.values() - off * off;
    const double variance = difference < 0 ? 0 : difference; // NaN stays
    running.first += mean / groups.samples();
    running.second += variance / groups.samples();
    if (!team.is_first()) return;
    groups.statistics[group] = mean;
    groups.statistics[groups.count() + group] = variance;
    affine[group] = groups.affine<Acc>(channel, mean, variance);
  });
  if (!groups.running_mean) return;
  running = team.over_teams(running);
  if (threadIdx.x > 0) return;
  groups.move(groups.running_mean, channel, running.first);
  groups.move(groups.running_variance, channel, running.second * (groups.values() / (groups.values() - 1)));
}

// Writes the gradients (N4) of gamma and beta of a channel, unless null, and the terms of (N5), from the sums of h and
// of h (u - mean) over the tiles.
template <typename Acc>
__device__ void merge_gradients(const NormGroups& groups, const Partial* partials, int64_t channel, Terms<Acc>* terms,
                                void* grad_gamma, void* grad_beta, Partial* room) {
  const Team team(groups, room);
  Partial of_parameters = {0, 0}; // beta and gamma
  team.for_each_group(groups, channel, [&](int64_t group, int64_t start) {
    const double inverse = groups.inverse(group), by = -groups.scale(group) / groups.values();
    // By how much the mean that the deviations were taken from was rounded.
    const double rounded = static_cast<Acc>(groups.mean(group)) - groups.mean(group);
    const Partial sums = team.sum(groups.partials(), [&](int64_t i) { return partials[start + i]; });
    const double A = sums.first, B = (sums.second + rounded * A) * inverse;
    of_parameters.first += A;
    of_parameters.second += B;
    if (!team.is_first() || groups.given) return;
    const double linear = by * inverse * B;
    terms[group] = {static_cast<Acc>(linear), static_cast<Acc>(by * A + rounded * linear)};
  });
  of_parameters = team.over_teams(of_parameters);
  if (threadIdx.x > 0) return;
  if (grad_gamma) groups.set_parameter(grad_gamma, channel, of_parameters.second);
  if (grad_beta) groups.set_parameter(grad_beta, channel, of_parameters.first);
}

// Adds up the region sums of the tiles, a warp for each channel of a sample.
template <typename Acc>
__device__ void merge_region_sums(const NormWork<Acc>& work, int64_t plane) {
  const int64_t planes = work.layer.channels * work.batch;
  if (plane >= planes) return;
  const Partial* partials = work.partials + plane * work.layer.tiles;
  double fg = 0, bg = 0;
#pragma unroll 4
  for (uint32_t tile = threadIdx.x % kWarp; tile < work.layer.tiles; tile += kWarp) {
    fg += partials[tile].first;
    bg += partials[tile].second;
  }
  fg = lane_sum(fg);
  bg = lane_sum(bg);
  if (threadIdx.x % kWarp > 0) return;
  const int64_t channel = plane / work.batch, n = plane - channel * work.batch;
  work.sums[n * work.layer.channels + channel] = static_cast<Acc>(fg);
  work.sums[planes + n * work.layer.channels + channel] = static_cast<Acc>(bg);
}

} // namespace fdk::cuda
