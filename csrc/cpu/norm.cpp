// Normalisation and activation on the CPU. With contiguous pixels a thread takes a group at a time, the planes that
// share statistics: what it reads a second time is in its cache. With contiguous channels it takes some pixels of a
// sample. Numbers are added up in an order that does not depend on the number of threads.
#include "norm.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "numbers.h"
#include "parallel.h"
#include "work.h"

namespace fdk::cpu {
namespace {

// Elements that a thread takes at a time, where groups are smaller.
constexpr int64_t kElementsPerItem = 1 << 12;

int threads_of(const NormAct& call, int num_threads) {
  constexpr int64_t kPasses = 4; // over the map, of a forward as of a backward
  const int64_t elements = call.batch * call.layer.channels * pixels_of(call.layer);
  return useful_threads(kPasses * elements, num_threads);
}

// Mean and sum of squared deviations of some values, and more of them.
struct Moments {
  double count = 0, mean = 0, square = 0;

  void add(double others, double other_mean, double other_square) {
    const double total = count + others, difference = other_mean - mean;
    mean += difference * (others / total);
    square += other_square + difference * difference * (count * others / total);
    count = total;
  }
};

// The parameters of the kernels, in the accumulation dtype: rows [kRows][C] of each sample, or of all.
class Parameters {
 public:
  static constexpr int64_t kRows = 6;

  explicit Parameters(const NormAct& call)
      : call_(call),
        channels_(call.layer.channels),
        values_((call.instance ? call.batch : 1) * kRows * channels_ * element_size(call.accumulate)) {}

  double mean(int64_t group) const { return call_.statistics[group]; }
  double variance(int64_t group) const { return call_.statistics[groups() + group]; }
  void set_statistics(int64_t group, const Moments& moments) {
    call_.statistics[group] = moments.mean;
    call_.statistics[groups() + group] = moments.square / moments.count;
  }
  int64_t groups() const { return call_.instance ? call_.batch * channels_ : channels_; }
  double inverse(int64_t group) const { return 1 / std::sqrt(variance(group) + call_.eps); }
  double scale(int64_t group) const {
    return inverse(group) * (call_.gamma == nullptr ? 1 : read(call_.gamma, call_.parameters, group % channels_));
  }

  // Writes scale, shift, mean and inverse deviation of a group.
  void set_affine(int64_t group) {
    const double beta = call_.beta == nullptr ? 0 : read(call_.beta, call_.parameters, group % channels_);
    put(group, 0, scale(group));
    put(group, 1, beta - mean(group) * scale(group));
    put(group, 2, mean(group));
    put(group, 3, inverse(group));
  }
  // Writes a, b and c of (N5) in place of the inverse deviation, for the sums (N4) of a group over so many values.
  void set_gradient(int64_t group, double of_beta, double of_gamma, double count) {
    put(group, 3, scale(group));
    put(group, 4, call_.given ? 0 : -scale(group) * inverse(group) * of_gamma / count);
    put(group, 5, call_.given ? 0 : -scale(group) * of_beta / count);
  }
  NormRows of_sample(int64_t n) const {
    const int64_t start = call_.instance ? n * kRows * channels_ * element_size(call_.accumulate) : 0;
    return {values_.data() + start, channels_};
  }

 private:
  void put(int64_t group, int64_t row, double value) {
    const int64_t n = group / channels_, c = group % channels_;
    write(values_.data(), call_.accumulate, (n * kRows + row) * channels_ + c, value);
  }

  const NormAct& call_;
  int64_t channels_;
  std::vector<char> values_;
};

// The slopes [2, N, C] of sample n; without values where there are none.
NormRows slopes_of(const NormAct& call, const void* slopes, int64_t n) {
  const int64_t channels = call.layer.channels;
  if (slopes == nullptr) return {nullptr, 0};
  return {static_cast<const char*>(slopes) + n * channels * element_size(call.accumulate), call.batch * channels};
}

NormTile plane(const NormAct& call, int64_t n, int64_t c) { return {call, {n, c, c + 1, 0, pixels_of(call.layer)}}; }

// The output as a layer, whose sums (R2) are those of the loss.
Layer output_of(const NormAct& call) {
  Layer output = call.layer;
  output.features = call.out;
  return output;
}

// Writes the region sums of a tile of the output, double [2][channels].
void sum_tile(const NormAct& call, Tile tile, double* sums) {
  const Layer output = output_of(call);
  const int64_t channels = tile.channel_end;
  for (int64_t c = 0; c < channels; c += kMaxTileChannels) {
    tile.channel_begin = c;
    tile.channel_end = std::min(c + kMaxTileChannels, channels);
    tile_kernels().sums(output, tile, call.accumulate, {sums + c, sums + channels + c});
  }
}

// Calls body with each sample of a group.
template <class Body>
void for_each_sample(const NormAct& call, int64_t group, const Body& body) {
  const int64_t first = call.instance ? group / call.layer.channels : 0;
  for (int64_t n = first; n < (call.instance ? first + 1 : call.batch); ++n)
    body(n);
}

double values_of_group(const NormAct& call) {
  return static_cast<double>(pixels_of(call.layer) * (call.instance ? 1 : call.batch));
}

// ---------------------------------------------------------------- contiguous pixels

// Calls body with each group. A thread takes several small ones in a row: taking one each costs as much as a plane of 8
// by 8, and threads that took neighbours by turns would write to the same cache lines of the parameters.
template <class Body>
void for_each_group(const NormAct& call, int64_t groups, int num_threads, const Body& body) {
  const int64_t elements = pixels_of(call.layer) * (call.instance ? 1 : call.batch);
  const int64_t in_a_row = std::max<int64_t>(kElementsPerItem / elements, 1);
  parallel_for(ceil_div(groups, in_a_row), threads_of(call, num_threads), [&](int64_t item) {
    const int64_t end = std::min((item + 1) * in_a_row, groups);
    for (int64_t group = item * in_a_row; group < end; ++group)
      body(group);
  });
}

void forward_of_planes(const NormAct& call, double* sums, int num_threads) {
  const int64_t channels = call.layer.channels, half = call.batch * channels;
  Parameters parameters(call);
  for_each_group(call, parameters.groups(), num_threads, [&](int64_t group) {
    const int64_t c = group % channels;
    if (!call.given) {
      Moments moments;
      for_each_sample(call, group, [&](int64_t n) {
        double of_plane[2];
        norm_kernels().moments(plane(call, n, c), of_plane);
        moments.add(static_cast<double>(pixels_of(call.layer)), of_plane[0], of_plane[1]);
      });
      parameters.set_statistics(group, moments);
    }
    parameters.set_affine(group);
    for_each_sample(call, group, [&](int64_t n) {
      const NormTile tile = plane(call, n, c);
      norm_kernels().forward(tile, parameters.of_sample(n));
      if (sums == nullptr) return;
      double of_plane[2];
      tile_kernels().sums(output_of(call), tile.tile, call.accumulate, {of_plane, of_plane + 1});
      for (int64_t k = 0; k < 2; ++k)
        sums[k * half + n * channels + c] = of_plane[k];
    });
  });
}

// `by_sample` has room for the sums (N4) of each channel of each sample, [2, N, C].
void backward_of_planes(const NormAct& call, const void* slopes, double* by_sample, int num_threads) {
  const int64_t channels = call.layer.channels, half = call.batch * channels;
  Parameters parameters(call);
  for_each_group(call, parameters.groups(), num_threads, [&](int64_t group) {
    const int64_t c = group % channels;
    parameters.set_affine(group);
    double total[2] = {0, 0};
    for_each_sample(call, group, [&](int64_t n) {
      if (by_sample == nullptr) return;
      double of_plane[2];
      norm_kernels().reduce(plane(call, n, c), parameters.of_sample(n), slopes_of(call, slopes, n), of_plane);
      for (int64_t k = 0; k < 2; ++k)
        total[k] += by_sample[k * half + n * channels + c] = of_plane[k];
    });
    if (call.out == nullptr) return;
    parameters.set_gradient(group, total[0], total[1], values_of_group(call));
    for_each_sample(call, group, [&](int64_t n) {
      norm_kernels().gradient(plane(call, n, c), parameters.of_sample(n), slopes_of(call, slopes, n));
    });
  });
}

// ---------------------------------------------------------------- contiguous channels

// The tiles of a map: runs of pixels of a sample with all channels.
struct Cut {
  int64_t pixels, tiles; // of a tile, and of a sample

  explicit Cut(const NormAct& call) {
    // Sums over a tile are taken in the accumulation dtype.
    pixels = std::min(pixels_of(call.layer), std::max<int64_t>(kTileElements / call.layer.channels, 64));
    tiles = ceil_div(pixels_of(call.layer), pixels);
  }
  NormTile tile(const NormAct& call, int64_t index) const {
    const int64_t begin = index % tiles * pixels;
    return {call, {index / tiles, 0, call.layer.channels, begin, std::min(begin + pixels, pixels_of(call.layer))}};
  }
};

// Runs body(tile, partial) for every tile, where `partial` has room for two numbers a channel, [2][channels], and then
// merge(n, pixels, c, first, second) with those of each channel of each in their order.
template <class Body, class Merge>
void for_each_tile(const NormAct& call, int num_threads, const Body& body, const Merge& merge) {
  const Cut cut(call);
  const int64_t channels = call.layer.channels, count = call.batch * cut.tiles;
  const std::unique_ptr<double[]> partial(new double[count * channels * 2]);
  parallel_for(count, threads_of(call, num_threads),
               [&](int64_t item) { body(cut.tile(call, item), partial.get() + item * channels * 2); });
  for (int64_t item = 0; item < count; ++item) {
    const Tile tile = cut.tile(call, item).tile;
    const double *first = partial.get() + item * channels * 2, *second = first + channels;
    for (int64_t c = 0; c < channels; ++c)
      merge(tile.n, tile.pixel_end - tile.pixel_begin, c, first[c], second[c]);
  }
}

void forward_of_pixels(const NormAct& call, double* sums, int num_threads) {
  const int64_t channels = call.layer.channels, half = call.batch * channels;
  Parameters parameters(call);
  if (!call.given) {
    std::vector<Moments> moments(parameters.groups());
    for_each_tile(
        call, num_threads, [](const NormTile& tile, double* partial) { norm_kernels().moments(tile, partial); },
        [&](int64_t n, int64_t pixels, int64_t c, double mean, double squares) {
          moments[call.instance ? n * channels + c : c].add(static_cast<double>(pixels), mean, squares);
        });
    for (int64_t group = 0; group < parameters.groups(); ++group)
      parameters.set_statistics(group, moments[group]);
  }
  for (int64_t group = 0; group < parameters.groups(); ++group)
    parameters.set_affine(group);
  if (sums != nullptr) std::fill_n(sums, 2 * half, 0.0);
  for_each_tile(
      call, num_threads,
      [&](const NormTile& tile, double* partial) {
        norm_kernels().forward(tile, parameters.of_sample(tile.tile.n));
        if (sums != nullptr) sum_tile(call, tile.tile, partial);
      },
      [&](int64_t n, int64_t, int64_t c, double fg, double bg) {
        if (sums == nullptr) return;
        sums[n * channels + c] += fg;
        sums[half + n * channels + c] += bg;
      });
}

void backward_of_pixels(const NormAct& call, const void* slopes, double* by_sample, int num_threads) {
  const int64_t channels = call.layer.channels, half = call.batch * channels;
  Parameters parameters(call);
  for (int64_t group = 0; group < parameters.groups(); ++group)
    parameters.set_affine(group);
  if (by_sample != nullptr) {
    std::fill_n(by_sample, 2 * half, 0.0);
    for_each_tile(
        call, num_threads,
        [&](const NormTile& tile, double* partial) {
          const int64_t n = tile.tile.n;
          norm_kernels().reduce(tile, parameters.of_sample(n), slopes_of(call, slopes, n), partial);
        },
        [&](int64_t n, int64_t, int64_t c, double of_beta, double of_gamma) {
          by_sample[n * channels + c] += of_beta;
          by_sample[half + n * channels + c] += of_gamma;
        });
  }
  if (call.out == nullptr) return;
  for (int64_t group = 0; group < parameters.groups(); ++group) {
    double total[2] = {0, 0};
    for_each_sample(call, group, [&](int64_t n) {
      for (int64_t k = 0; by_sample != nullptr && k < 2; ++k)
        total[k] += by_sample[k * half + n * channels + group % channels];
    });
    parameters.set_gradient(group, total[0], total[1], values_of_group(call));
  }
  const Cut cut(call);
  parallel_for(call.batch * cut.tiles, threads_of(call, num_threads), [&](int64_t item) {
    const NormTile tile = cut.tile(call, item);
    norm_kernels().gradient(tile, parameters.of_sample(tile.tile.n), slopes_of(call, slopes, tile.tile.n));
  });
}

// Moves the running statistics towards the new ones; those of samples count equally.
void move_running(const NormAct& call) {
  if (call.given || call.running_mean == nullptr) return;
  const int64_t channels = call.layer.channels, samples = call.instance ? call.batch : 1;
  const double count = values_of_group(call);
  for (int64_t c = 0; c < channels; ++c) {
    double mean = 0, variance = 0;
    for (int64_t n = 0; n < samples; ++n) {
      mean += call.statistics[n * channels + c] / static_cast<double>(samples);
      variance += call.statistics[(samples + n) * channels + c] / static_cast<double>(samples);
    }
    auto move = [&](void* running, double value) {
      const double before = read(running, call.parameters, c);
      write(running, call.parameters, c, (1 - call.momentum) * before + call.momentum * value);
    };
    move(call.running_mean, mean);
    move(call.running_variance, variance * (count / (count - 1)));
  }
}

void advise(const NormAct& call) {
  if (call.out == nullptr) return;
  const int64_t elements = call.batch * call.layer.channels * pixels_of(call.layer);
  advise_huge_pages(call.out, elements * element_size(call.layer.dtype));
}

} // namespace

void norm_forward(const NormAct& call, double* sums, int num_threads) {
  advise(call);
  channels_are_inner(call.layer) ? forward_of_pixels(call, sums, num_threads)
                                 : forward_of_planes(call, sums, num_threads);
  move_running(call);
}

void norm_backward(const NormAct& call, const void* slopes, void* grad_gamma, void* grad_beta, int num_threads) {
  const int64_t channels = call.layer.channels, half = call.batch * channels;
  advise(call);
  const bool reduces = !call.given || grad_gamma != nullptr || grad_beta != nullptr;
  std::vector<double> by_sample(reduces ? 2 * half : 0);
  double* room = reduces ? by_sample.data() : nullptr;
  channels_are_inner(call.layer) ? backward_of_pixels(call, slopes, room, num_threads)
                                 : backward_of_planes(call, slopes, room, num_threads);
  void* const gradients[2] = {grad_beta, grad_gamma}; // in the order of (N4)
  for (int64_t k = 0; k < 2; ++k) {
    for (int64_t c = 0; gradients[k] != nullptr && c < channels; ++c) {
      double total = 0;
      for (int64_t n = 0; n < call.batch; ++n)
        total += by_sample[k * half + n * channels + c];
      write(gradients[k], call.parameters, c, total);
    }
  }
}

} // namespace fdk::cpu
