// The region features (L1) of one layer.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "../layout.h"
#include "loss_rows.h"
#include "numbers.h"

namespace fdk::cpu {
namespace {

double total_of(const double* values, int64_t count) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t c = 0; c < count; ++c)
    total += values[c];
  return total;
}

struct RegionFeatures {
  const Pyramid& pyramid;
  const Losses& call;
  const Options& options;
  int64_t layer, first_channel, channels;
  std::unique_ptr<double[]> f, b;     // [N, C]
  std::vector<Divisors> divisors;     // [N]
  std::vector<double> fg_sum, bg_sum; // [N], sums of f and b over the channels, for the norms that need them
  std::vector<char> counts;           // [N], whether the sample counts; rows of the others are 0 and their divisors 1

  RegionFeatures(const Pyramid& pyramid, const Losses& call, int64_t layer, int64_t first_channel, const void* sums,
                 const void* masses)
      : pyramid(pyramid),
        call(call),
        options(call.options),
        layer(layer),
        first_channel(first_channel),
        channels(pyramid.layers[layer].channels) {
    const int64_t N = pyramid.batch;
    f.reset(new double[N * channels]);
    b.reset(new double[N * channels]);
    divisors.assign(N, {1, 1, options.masked_background, 0});
    fg_sum.assign(N, 0);
    bg_sum.assign(N, 0);
    counts.assign(N, 0);
    for (int64_t n = 0; n < N; ++n) {
      const double m_fg = read(masses, pyramid.accumulate, mass_index(0, n));
      const double m_bg = read(masses, pyramid.accumulate, mass_index(1, n));
      const bool by_region = options.region_weight == RegionWeight::kRegion;
      counts[n] = by_region ? m_fg != 0 && m_bg != 0 : m_fg + m_bg != 0;
      double *f_row = f.get() + n * channels, *b_row = b.get() + n * channels;
      if (!counts[n]) {
        std::fill_n(f_row, channels, 0.0);
        std::fill_n(b_row, channels, 0.0);
        continue;
      }
      Divisors& by = divisors[n];
      by.fg_mass = m_fg;
      switch (options.region_weight) {
        case RegionWeight::kValid:
          by.fg = by.bg = m_fg + m_bg;
          break;
        case RegionWeight::kNone:
          break;
        case RegionWeight::kRegion:
          by.fg = m_fg;
          by.bg = m_bg;
          break;
        case RegionWeight::kPixels:
          by.fg = by.bg = static_cast<double>(pixels_of(pyramid.layers[layer]));
          break;
      }
      const char* values = static_cast<const char*>(sums);
      loss_row_kernels().divide_sums(pyramid.accumulate, values + byte_of_row(0, n), values + byte_of_row(1, n), by,
                                     channels, f_row, b_row);
      if (options.norm == Norm::kVector || options.norm == Norm::kBatch) continue;
      fg_sum[n] = total_of(f_row, channels);
      bg_sum[n] = total_of(b_row, channels);
    }
  }

  // Where the sums, or slopes, of a sample begin among all.
  int64_t byte_of_row(int64_t region, int64_t n) const {
    const int64_t row = region * pyramid.batch + n;
    return (row * pyramid.total_channels + first_channel) * element_size(pyramid.accumulate);
  }
  int64_t mass_index(int64_t region, int64_t n) const {
    return (region * pyramid.batch + n) * pyramid.num_layers + layer;
  }
};

} // namespace
} // namespace fdk::cpu
