// The region features (L1) of fdkernels/log_norm/README.md, and how the numbers of a dtype are read and written.
#pragma once

#include "../log_norm.h"

#include <vector>

namespace fdk::cpu {
namespace {

double read(const void* values, DType dtype, int64_t index) {
  return dtype == DType::kFloat64 ? static_cast<const double*>(values)[index]
                                  : static_cast<double>(static_cast<const float*>(values)[index]);
}

void write(void* values, DType dtype, int64_t index, double value) {
  if (dtype == DType::kFloat64) {
    static_cast<double*>(values)[index] = value;
  } else {
    static_cast<float*>(values)[index] = static_cast<float>(value);
  }
}

// Where the numbers of a dtype begin, so that a loop over them has one type.
template <class Body>
void with_type(DType dtype, const Body& body) {
  dtype == DType::kFloat64 ? body(double()) : body(float());
}

// (L1) of one sample: s / w, the background's sum taken from m_fg - s_fg where `from_mass` says so.
template <class T>
void divide_sums(const T* fg, const T* bg, const double* from_mass, double w_fg, double w_bg, int64_t count, double* f,
                 double* b) {
  const double by_fg = 1 / w_fg, by_bg = 1 / w_bg;
#pragma omp simd
  for (int64_t c = 0; c < count; ++c)
    f[c] = static_cast<double>(fg[c]) * by_fg;
  if (from_mass == nullptr) {
#pragma omp simd
    for (int64_t c = 0; c < count; ++c)
      b[c] = static_cast<double>(bg[c]) * by_bg;
  } else {
#pragma omp simd
    for (int64_t c = 0; c < count; ++c)
      b[c] = (*from_mass - static_cast<double>(fg[c])) * by_bg;
  }
}

double total_of(const double* values, int64_t count) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t c = 0; c < count; ++c)
    total += values[c];
  return total;
}

// The region features (L1) of one layer, and where its numbers lie in sums and masses.
struct LayerFeatures {
  const LogNorm& args;
  int64_t layer, first_channel, channels;
  std::vector<double> f, b;           // [N, C]
  std::vector<double> w_fg, w_bg;     // [N]
  std::vector<double> fg_sum, bg_sum; // [N], sums over the channels of f and b, for the norms that ask for them
  std::vector<char> counts;           // [N]

  LayerFeatures(const LogNorm& args, int64_t layer, int64_t first_channel, const void* sums, const void* masses)
      : args(args), layer(layer), first_channel(first_channel), channels(args.channels[layer]) {
    const int64_t N = args.batch;
    f.assign(N * channels, 0);
    b.assign(N * channels, 0);
    w_fg.assign(N, 1);
    w_bg.assign(N, 1);
    fg_sum.assign(N, 0);
    bg_sum.assign(N, 0);
    counts.assign(N, 0);
    for (int64_t n = 0; n < N; ++n) {
      const double m_fg = read(masses, args.accumulate, mass_index(0, n));
      const double m_bg = read(masses, args.accumulate, mass_index(1, n));
      const bool by_region = args.region_weight == RegionWeight::kRegion;
      counts[n] = by_region ? m_fg != 0 && m_bg != 0 : m_fg + m_bg != 0;
      if (!counts[n]) continue;
      switch (args.region_weight) {
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
          w_fg[n] = w_bg[n] = static_cast<double>(args.pixels[layer]);
          break;
      }
      double *f_row = f.data() + n * channels, *b_row = b.data() + n * channels;
      with_type(args.accumulate, [&](auto zero) {
        using T = decltype(zero);
        const T *fg = static_cast<const T*>(sums) + sum_index(0, n, 0),
                *bg = static_cast<const T*>(sums) + sum_index(1, n, 0);
        divide_sums(fg, bg, args.masked_background ? &m_fg : nullptr, w_fg[n], w_bg[n], channels, f_row, b_row);
      });
      if (args.norm == Norm::kVector || args.norm == Norm::kBatch) continue;
      fg_sum[n] = total_of(f_row, channels);
      bg_sum[n] = total_of(b_row, channels);
    }
  }

  int64_t sum_index(int64_t region, int64_t n, int64_t c) const {
    return (region * args.batch + n) * args.total_channels + first_channel + c;
  }
  int64_t mass_index(int64_t region, int64_t n) const { return (region * args.batch + n) * args.num_layers + layer; }
};

} // namespace
} // namespace fdk::cpu
