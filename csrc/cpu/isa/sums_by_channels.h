// The sums of a tile whose channels are contiguous, as in channels_last (R2).
#pragma once

#include <type_traits>

#include "load_features.h"
#include "runs.h"

namespace fdk::cpu {
namespace {

// Adds kPixels pixels to the sums of the channels from c on, which fill no pair of vectors. The sums have room for
// whole vectors.
template <int kPixels, class S, class T>
FDK_NOINLINE void add_last_channels(const S* const pixels[kPixels], const T* w, const T* u, int64_t c, int64_t channels,
                                    T* fg, T* bg) {
  for (; c < channels; c += kLanes<T>) {
    Vector<T> f = load_vector(fg + c), b = load_vector(bg + c);
    for (int k = 0; k < kPixels; ++k) {
      const Vector<T> x = c + kLanes<T> <= channels ? load_features(pixels[k] + c, T())
                                                    : load_some_features(pixels[k] + c, channels - c, T());
      f += w[k] * x;
      b += u[k] * x;
    }
    store_vector(fg + c, f);
    store_vector(bg + c, b);
  }
}

// Adds kPixels pixels to the sums of all channels, with channels along the vector. The sums stay in the L1 cache; each
// pair of vectors is loaded and stored once for kPixels pixels.
template <int kPixels, class S, class T>
inline void add_pixels(const S* const pixels[kPixels], const T* w, const T* u, int64_t channels, T* fg, T* bg) {
  using V = Vector<T>;
  constexpr int64_t kPair = 2 * kLanes<T>;
  V ws[kPixels], us[kPixels];
  for (int k = 0; k < kPixels; ++k) {
    ws[k] = w[k] - V{};
    us[k] = u[k] - V{};
  }
  int64_t c = 0;
  for (; c + kPair <= channels; c += kPair) {
    V f0 = load_vector(fg + c), f1 = load_vector(fg + c + kLanes<T>);
    V b0 = load_vector(bg + c), b1 = load_vector(bg + c + kLanes<T>);
    for (int k = 0; k < kPixels; ++k) {
      // The prefetches of all k together walk through memory in order.
      const char* walk = reinterpret_cast<const char*>(pixels[0] + kPixels * c + k * kPair);
      for (int64_t line = 0; line < kPair * static_cast<int64_t>(sizeof(S)); line += kCacheLine)
        prefetch(walk + line + kPrefetchBytesByChannels);
      V x0, x1;
      load_pair(pixels[k] + c, T(), x0, x1);
      f0 += ws[k] * x0;
      f1 += ws[k] * x1;
      b0 += us[k] * x0;
      b1 += us[k] * x1;
    }
    store_vector(fg + c, f0);
    store_vector(fg + c + kLanes<T>, f1);
    store_vector(bg + c, b0);
    store_vector(bg + c + kLanes<T>, b1);
  }
  if (c == channels) return;
  const S* last[kPixels]; // a copy, or `pixels` would be kept in memory for the loop above
  for (int k = 0; k < kPixels; ++k)
    last[k] = pixels[k];
  add_last_channels<kPixels>(last, w, u, c, channels, fg, bg);
}

// Adds a run of pixels to the sums of so few channels that all of these stay in registers, those of neighbouring
// pixels apart, as an addition waits for the one before. kWhole is whether the channels fill their vectors.
template <int kVectors, bool kWhole, class S, class T>
void add_few_channels(const S* first, int64_t stride, const T* w, const T* u, int64_t count, int64_t channels, T* fg,
                      T* bg) {
  using V = Vector<T>;
  constexpr int kPixels = kVectors < 3 ? 4 / kVectors : 1;
  V f[kPixels][kVectors], b[kPixels][kVectors];
  for (int k = 0; k < kPixels; ++k) {
    for (int v = 0; v < kVectors; ++v)
      f[k][v] = b[k][v] = V{};
  }
  const auto add = [&](int64_t i, int k) {
    for (int v = 0; v < kVectors; ++v) {
      const S* source = first + i * stride + v * kLanes<T>;
      prefetch(reinterpret_cast<const char*>(source) + kPrefetchBytesByChannels);
      const V x = kWhole || v + 1 < kVectors ? load_features(source, T())
                                             : load_some_features(source, channels - v * kLanes<T>, T());
      f[k][v] += w[i] * x;
      b[k][v] += u[i] * x;
    }
  };
  int64_t i = 0;
  for (; i + kPixels <= count; i += kPixels) {
    for (int k = 0; k < kPixels; ++k)
      add(i + k, k);
  }
  for (; i < count; ++i)
    add(i, 0);
  for (int v = 0; v < kVectors; ++v) {
    for (int k = 1; k < kPixels; ++k) {
      f[0][v] += f[k][v];
      b[0][v] += b[k][v];
    }
    store_vector(fg + v * kLanes<T>, f[0][v]);
    store_vector(bg + v * kLanes<T>, b[0][v]);
  }
}

// Up to so many channels, add_few_channels takes all pixels of a run, of which none is ignored.
template <class T>
constexpr int64_t kFewChannels = 4 * kLanes<T>;

template <class S, class T>
inline void add_few_channels(const S* first, int64_t stride, const T* w, const T* u, int64_t count, int64_t channels,
                             T* fg, T* bg) {
  const bool whole = channels % kLanes<T> == 0;
  const auto add = [&](auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    whole ? add_few_channels<kVectors, true>(first, stride, w, u, count, channels, fg, bg)
          : add_few_channels<kVectors, false>(first, stride, w, u, count, channels, fg, bg);
  };
  switch ((channels + kLanes<T> - 1) / kLanes<T>) {
    case 1:
      return add(std::integral_constant<int, 1>());
    case 2:
      return add(std::integral_constant<int, 2>());
    case 3:
      return add(std::integral_constant<int, 3>());
    default:
      return add(std::integral_constant<int, 4>());
  }
}

// Adds a run of pixels that are `stride` apart. With background weights, ignored pixels are skipped and not read.
template <bool kHasBg, class S, class T>
inline void add_run(const S* first, int64_t stride, const T* w, const T* u, int64_t count, int64_t channels, T* fg,
                    T* bg) {
  constexpr int kPixels = 4;
  const S* pixels[kPixels];
  int64_t i = 0;
  if constexpr (!kHasBg) {
    if (channels <= kFewChannels<T>) return add_few_channels(first, stride, w, u, count, channels, fg, bg);
    for (; i + kPixels <= count; i += kPixels) {
      for (int k = 0; k < kPixels; ++k)
        pixels[k] = first + (i + k) * stride;
      add_pixels<kPixels>(pixels, w + i, u + i, channels, fg, bg);
    }
    for (; i < count; ++i) {
      pixels[0] = first + i * stride;
      add_pixels<1>(pixels, w + i, u + i, channels, fg, bg);
    }
    return;
  }
  T fg_weights[kPixels], bg_weights[kPixels];
  int taken = 0;
  for (; i < count; ++i) {
    if (!is_valid(w[i], u[i])) continue;
    pixels[taken] = first + i * stride;
    fg_weights[taken] = w[i];
    bg_weights[taken] = u[i];
    if (++taken < kPixels) continue;
    add_pixels<kPixels>(pixels, fg_weights, bg_weights, channels, fg, bg);
    taken = 0;
  }
  for (int k = 0; k < taken; ++k)
    add_pixels<1>(pixels + k, fg_weights + k, bg_weights + k, channels, fg, bg);
}

template <class T>
constexpr int64_t kLanesOfLine = kCacheLine / static_cast<int64_t>(sizeof(T));

// Adds the sums of a run to those of a tile.
template <class T>
inline void add_sums(const T* run, int64_t channels, double* tile) {
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c)
    tile[c] += run[c];
}

// Brings the sums of channels that load_pair has split into even and odd ones back into their order.
template <class T>
inline void join_pairs(double* sums, int64_t channels) {
  constexpr int64_t kPair = 2 * kLanes<T>;
  for (int64_t c = 0; c + kPair <= channels; c += kPair) {
    double joined[kPair];
#pragma omp simd
    for (int64_t i = 0; i < kLanes<T>; ++i) {
      joined[2 * i] = sums[c + i];
      joined[2 * i + 1] = sums[c + kLanes<T> + i];
    }
    std::memcpy(sums + c, joined, sizeof(joined));
  }
}

// Adds to the sums of a tile, which are 0.
template <class S, class T, bool kHasBg>
void sums_by_channels(const Layer& layer, const Tile& tile, TileSums sums) {
  Weights<T> weights;
  alignas(kCacheLine) T of_run[2 * (kMaxTileChannels + kLanesOfLine<T>)];
  const Rows rows(layer.size, layer.stride);
  const int64_t channels = tile.channel_end - tile.channel_begin;
  // A cache line more than the channels need: addresses a power of two apart would wait for each other.
  const int64_t room = (channels / kLanesOfLine<T> + 1) * kLanesOfLine<T>;
  T *const fg = of_run, *const bg = of_run + room;
  const S* sample =
      static_cast<const S*>(layer.features) + tile.n * layer.stride_n + tile.channel_begin * layer.stride_c;
  for (int64_t p = tile.pixel_begin, count; p < tile.pixel_end; p += count) {
    // One accumulator adds up every pixel of a run, so runs are shorter than along pixels.
    count = min(min(kRun / 4, tile.pixel_end - p), rows.rest_of_row(p));
    weights.load_run(layer, tile.n, p, count);
    for (int64_t i = 0; i < 2 * room; ++i)
      of_run[i] = T(0);
    const S* first = sample + rows.offset(p);
    add_run<kHasBg>(first, rows.stride, weights.fg, weights.bg, count, channels, fg, bg);
    add_sums(fg, channels, sums.fg);
    add_sums(bg, channels, sums.bg);
  }
  if (kSplitsPairs<S, T> && (kHasBg || channels > kFewChannels<T>)) {
    join_pairs<T>(sums.fg, channels);
    join_pairs<T>(sums.bg, channels);
  }
}

template <class S, class T>
void sums_by_channels(const Layer& layer, const Tile& tile, TileSums sums) {
  layer.bg == nullptr ? sums_by_channels<S, T, false>(layer, tile, sums)
                      : sums_by_channels<S, T, true>(layer, tile, sums);
}

template <class T>
void sums_by_channels(const Layer& layer, const Tile& tile, TileSums sums) {
  if (layer.dtype == Is<T>::kDType) return sums_by_channels<T, T>(layer, tile, sums);
  if (layer.dtype == DType::kBFloat16) return sums_by_channels<BFloat16, T>(layer, tile, sums);
  if (layer.dtype == DType::kFloat16) return sums_by_channels<Float16, T>(layer, tile, sums);
  if constexpr (sizeof(T) == 8) sums_by_channels<float, T>(layer, tile, sums);
}

} // namespace
} // namespace fdk::cpu
