// The sums of a tile and the masses of a sample (R2).
#pragma once

#include "load_features.h"
#include "runs.h"
#include "sums_by_channels.h"

namespace fdk::cpu {
namespace {

// Adds `count` pixels, from pixel p of the sample on, to the sums of kChannels channels, with pixels along the vector.
// Their rows begin at `first` and are `step` elements apart.
template <int kChannels, class T, class S, class M, bool kHasBg>
inline void add_rows(const S* first, int64_t step, const RawWeights<T, M, kHasBg>& weights, int64_t p, int64_t count,
                     int64_t ahead, TileSums sums) {
  using V = Vector<T>;
  V f[kChannels], b[kChannels];
  for (int k = 0; k < kChannels; ++k) // with an initialiser the arrays would be stored to memory
    f[k] = b[k] = V{};
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) {
    const V w = weights.fg_vector(p + i), u = weights.bg_vector(p + i, w);
    for (int k = 0; k < kChannels; ++k) {
      const S* source = first + k * step + i;
      prefetch(reinterpret_cast<const char*>(source) + ahead);
      const V x = select_valid<kHasBg>(w, u, load_features(source, T()));
      f[k] += w * x;
      b[k] += u * x;
    }
  }
  if (i < count) { // lanes beyond the last pixel add 0
    const V w = weights.some_fg(p + i, count - i), u = weights.some_bg(p + i, count - i, w);
    for (int k = 0; k < kChannels; ++k) {
      const V x = select_valid<kHasBg>(w, u, load_some_features(first + k * step + i, count - i, T()));
      f[k] += w * x;
      b[k] += u * x;
    }
  }
  add_totals<kChannels, T>(f, sums.fg);
  add_totals<kChannels, T>(b, sums.bg);
}

// Calls add_rows for the channels of a tile; their rows begin at `start` and are `step` elements apart.
template <class S, class T, class M, bool kHasBg>
inline void add_channels(const S* start, int64_t step, const Tile& tile, const RawWeights<T, M, kHasBg>& weights,
                         int64_t p, int64_t count, TileSums sums) {
  // After a short row the next group's row is read, so prefetch that.
  const int64_t next_group = kGroup * step * static_cast<int64_t>(sizeof(S));
  const int64_t ahead = count == step && count <= kShortRow ? next_group : kPrefetchBytes;
  int64_t c = tile.channel_begin;
  for (; c + kGroup <= tile.channel_end; c += kGroup)
    add_rows<kGroup>(start + c * step, step, weights, p, count, ahead, sums.from(c - tile.channel_begin));
  for (; c < tile.channel_end; ++c)
    add_rows<1>(start + c * step, step, weights, p, count, ahead, sums.from(c - tile.channel_begin));
}

template <class T, class M, bool kHasBg>
void sums_by_pixels(const Layer& layer, const Tile& tile, const RawWeights<T, M, kHasBg>& weights, TileSums sums) {
  T buffer[kGroup][kRun];
  const Rows rows(layer.size, layer.stride);
  const int64_t element = element_size(layer.dtype);
  // Rows that are read in place are read in longer runs: a lane adds up 256 pixels, or with short vectors 512.
  const int64_t run = rows.stride == 1 ? max(2 * kRun, 256 * kLanes<T>) : kRun;
  const char* sample = static_cast<const char*>(layer.features) + tile.n * layer.stride_n * element;
  for (int64_t p = tile.pixel_begin, count; p < tile.pixel_end; p += count) {
    count = min(min(run, tile.pixel_end - p), rows.rest_of_row(p));
    const char* start = sample + rows.offset(p) * element;
    if (rows.stride == 1 && layer.dtype == Is<T>::kDType) {
      add_channels(reinterpret_cast<const T*>(start), layer.stride_c, tile, weights, p, count, sums);
      continue;
    }
    if constexpr (sizeof(T) == sizeof(float)) {
      if (rows.stride == 1 && layer.dtype == DType::kBFloat16) {
        add_channels(reinterpret_cast<const BFloat16*>(start), layer.stride_c, tile, weights, p, count, sums);
        continue;
      }
      if (rows.stride == 1 && layer.dtype == DType::kFloat16) {
        add_channels(reinterpret_cast<const Float16*>(start), layer.stride_c, tile, weights, p, count, sums);
        continue;
      }
    }
    for (int64_t c = tile.channel_begin, step; c < tile.channel_end; c += step) {
      step = c + kGroup <= tile.channel_end ? kGroup : 1;
      for (int64_t k = 0; k < step; ++k)
        load(start + (c + k) * layer.stride_c * element, layer.dtype, rows.stride, count, buffer[k]);
      const TileSums group_sums = sums.from(c - tile.channel_begin);
      step == kGroup ? add_rows<kGroup>(buffer[0], kRun, weights, p, count, kPrefetchBytes, group_sums)
                     : add_rows<1>(buffer[0], kRun, weights, p, count, kPrefetchBytes, group_sums);
    }
  }
}

template <class T>
void sums_of_tile(const Layer& layer, const Tile& tile, TileSums sums) {
  const size_t bytes = sizeof(double) * (tile.channel_end - tile.channel_begin);
  std::memset(sums.fg, 0, bytes);
  std::memset(sums.bg, 0, bytes);
  if (channels_are_inner(layer)) {
    sums_by_channels<T>(layer, tile, sums);
  } else {
    with_weights<T>(layer, tile.n, [&](const auto& weights) { sums_by_pixels(layer, tile, weights, sums); });
  }
}

void sums_of_tile(const Layer& layer, const Tile& tile, DType accumulate, TileSums sums) {
  accumulate == DType::kFloat64 ? sums_of_tile<double>(layer, tile, sums) : sums_of_tile<float>(layer, tile, sums);
}

// Adds `count` weights to a mass.
template <class M>
inline double mass_of(const M* weights, int64_t count) {
  double mass = 0;
#pragma omp simd reduction(+ : mass)
  for (int64_t i = 0; i < count; ++i)
    mass += static_cast<double>(weights[i]);
  return mass;
}
// Of the bytes of a binary mask, which are 0 or 1; any other stands for NaN.
inline double mass_of(const uint8_t* weights, int64_t count) {
  double mass = 0;
  uint8_t other_bits = 0;
  for (int64_t begin = 0; begin < count; begin += kRun) {
    uint32_t ones = 0;
    const int64_t end = min(begin + kRun, count);
#pragma omp simd reduction(+ : ones) reduction(| : other_bits)
    for (int64_t i = begin; i < end; ++i) {
      ones += weights[i];
      other_bits |= weights[i] & 0xFE;
    }
    mass += ones;
  }
  return other_bits == 0 ? mass : static_cast<double>(bfloat16_to_float(0x7FC0));
}

inline double mass_of(const void* weights, DType dtype, int64_t count) {
  switch (dtype) {
    case DType::kUInt8:
      return mass_of(static_cast<const uint8_t*>(weights), count);
    case DType::kFloat32:
      return mass_of(static_cast<const float*>(weights), count);
    default:
      return mass_of(static_cast<const double*>(weights), count);
  }
}

void masses_of_sample(const Layer& layer, int64_t n, double* mass) {
  const int64_t pixels = pixels_of(layer), start = n * pixels * element_size(layer.mask_dtype);
  mass[0] = mass_of(static_cast<const char*>(layer.fg) + start, layer.mask_dtype, pixels);
  mass[1] = layer.bg == nullptr ? static_cast<double>(pixels) - mass[0]
                                : mass_of(static_cast<const char*>(layer.bg) + start, layer.mask_dtype, pixels);
}

} // namespace
} // namespace fdk::cpu
