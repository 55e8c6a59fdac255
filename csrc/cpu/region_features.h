// The region features (L1) of one layer.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "../layout.h"
#include "numbers.h"

namespace fdk::cpu {
namespace {

// Divides the sums of one sample (L1). Unless `fg_mass` is null, the background is masked: M_fg - S_fg replaces S_bg.
template <class T>
void divide_sums(const T* fg, const T* bg, const double* fg_mass, double w_fg, double w_bg, int64_t count, double* f,
                 double* b) {
  const double by_fg = 1 / w_fg, by_bg = 1 / w_bg;
#pragma omp simd
  for (int64_t c = 0; c < count; ++c)
    f[c] = static_cast<double>(fg[c]) * by_fg;
  if (fg_mass == nullptr) {
#pragma omp simd
    for (int64_t c = 0; c < count; ++c)
      b[c] = static_cast<double>(bg[c]) * by_bg;
  } else {
#pragma omp simd
    for (int64_t c = 0; c < count; ++c)
      b[c] = (*fg_mass - static_cast<double>(fg[c])) * by_bg;
  }
}

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
  std::vector<double> w_fg, w_bg;     // [N], the divisors
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
    w_fg.assign(N, 1);
    w_bg.assign(N, 1);
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
      switch (options.region_weight) {
        case RegionWeight::kValid:
          w_fg[n] = w_bg[n] = m_fg + m_bg;
          break;
        case RegionWeight::kNone:
          break;
        case RegionWeight::kRegion:
          w_fg[n] = m_fg;
          w_bg[n] = m_bg;
          break;
        case RegionWeight::kPixels:
          w_fg[n] = w_bg[n] = static_cast<double>(pixels_of(pyramid.layers[layer]));
          break;
      }
      with_type(pyramid.accumulate, [&](auto zero) {
        using T = decltype(zero);
        const T *fg = static_cast<const T*>(sums) + sum_index(0, n, 0),
                *bg = static_cast<const T*>(sums) + sum_index(1, n, 0);
        divide_sums(fg, bg, options.masked_background ? &m_fg : nullptr, w_fg[n], w_bg[n], channels, f_row, b_row);
      });
      if (options.norm == Norm::kVector || options.norm == Norm::kBatch) continue;
      fg_sum[n] = total_of(f_row, channels);
      bg_sum[n] = total_of(b_row, channels);
    }
  }

  int64_t sum_index(int64_t region, int64_t n, int64_t c) const {
    return (region * pyramid.batch + n) * pyramid.total_channels + first_channel + c;
  }
  int64_t mass_index(int64_t region, int64_t n) const {
    return (region * pyramid.batch + n) * pyramid.num_layers + layer;
  }
};

} // namespace
} // namespace fdk::cpu
