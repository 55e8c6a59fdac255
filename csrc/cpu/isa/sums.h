// The sums of a tile and the masses of a sample (R2).
#pragma once

#include "runs.h"

namespace fdk::cpu {
namespace {

// Loads a vector of features stored as S and widens them to T in registers.
template <class S, class T>
inline Vector<T> load_features(const S* source, T) {
  T lanes[kLanes<T>];
  for (int64_t i = 0; i < kLanes<T>; ++i)
    lanes[i] = static_cast<T>(source[i]);
  return load_vector(lanes);
}
inline Vector<float> load_features(const float* source, float) { return load_vector(source); }
inline Vector<double> load_features(const double* source, double) { return load_vector(source); }
#if defined(FDK_ISA_AVX512)
inline Vector<float> load_features(const BFloat16* source, float) {
  constexpr __mmask16 kAll = 0xFFFF;
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  return (Vector<float>)_mm512_maskz_slli_epi32(kAll, _mm512_maskz_cvtepu16_epi32(kAll, bits), 16);
}
inline Vector<float> load_features(const Float16* source, float) {
  constexpr __mmask16 kAll = 0xFFFF;
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  return (Vector<float>)_mm512_maskz_cvtph_ps(kAll, bits);
}
#elif defined(FDK_ISA_AVX2)
inline Vector<float> load_features(const BFloat16* source, float) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
  return (Vector<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
}
inline Vector<float> load_features(const Float16* source, float) {
  return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
}
#endif

// Adds `count` pixels, from pixel p of the sample on, to the sums of kChannels channels, with pixels along the vector.
template <int kChannels, class T, class S, class M, bool kHasBg>
inline void add_rows(const S* const rows[kChannels], const RawWeights<T, M, kHasBg>& weights, int64_t p, int64_t count,
                     int64_t ahead, TileSums sums) {
  using V = Vector<T>;
  V f[kChannels], b[kChannels];
  for (int k = 0; k < kChannels; ++k) // with an initialiser the arrays would be stored to memory
    f[k] = b[k] = V{};
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) {
    const V w = weights.fg_vector(p + i), u = weights.bg_vector(p + i, w);
    for (int k = 0; k < kChannels; ++k) {
      prefetch(reinterpret_cast<const char*>(rows[k] + i) + ahead);
      const V x = select_valid<kHasBg>(w, u, load_features(rows[k] + i, T()));
      f[k] += w * x;
      b[k] += u * x;
    }
  }
  for (int k = 0; k < kChannels; ++k) {
    T sum_fg = total<T>(f[k]), sum_bg = total<T>(b[k]);
    for (int64_t j = i; j < count; ++j) {
      const T w = weights.fg_at(p + j), u = weights.bg_at(p + j);
      const T x = !kHasBg || is_valid(w, u) ? static_cast<T>(rows[k][j]) : T(0);
      sum_fg += w * x;
      sum_bg += u * x;
    }
    sums.fg[k] += sum_fg;
    sums.bg[k] += sum_bg;
  }
}

// Calls add_rows for the channels of a tile; their rows begin at `start` and are `step` elements apart.
template <class S, class T, class M, bool kHasBg>
inline void add_channels(const S* start, int64_t step, const Tile& tile, const RawWeights<T, M, kHasBg>& weights,
                         int64_t p, int64_t count, TileSums sums) {
  // After a short row the next group's row is read, so prefetch that.
  const int64_t next_group = kGroup * step * static_cast<int64_t>(sizeof(S));
  const int64_t ahead = count == step && count <= kShortRow ? next_group : kPrefetchBytes;
  int64_t c = tile.channel_begin;
  for (; c + kGroup <= tile.channel_end; c += kGroup) {
    const S* group[kGroup];
    for (int64_t k = 0; k < kGroup; ++k)
      group[k] = start + (c + k) * step;
    add_rows<kGroup>(group, weights, p, count, ahead, sums.from(c - tile.channel_begin));
  }
  for (; c < tile.channel_end; ++c) {
    const S* row = start + c * step;
    add_rows<1>(&row, weights, p, count, ahead, sums.from(c - tile.channel_begin));
  }
}

template <class T, class M, bool kHasBg>
void sums_by_pixels(const Layer& layer, const Tile& tile, const RawWeights<T, M, kHasBg>& weights, TileSums sums) {
  T buffer[kGroup][kRun];
  const Rows rows(layer.size, layer.stride);
  const int64_t element = element_size(layer.dtype);
  // Rows that need no conversion are read in longer runs.
  const int64_t run = layer.dtype == Is<T>::kDType && rows.stride == 1 ? 2 * kRun : kRun;
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
      const T* group[kGroup];
      for (int64_t k = 0; k < step; ++k) {
        group[k] = load(start + (c + k) * layer.stride_c * element, layer.dtype, rows.stride, count, buffer[k]);
      }
      const TileSums group_sums = sums.from(c - tile.channel_begin);
      step == kGroup ? add_rows<kGroup>(group, weights, p, count, kPrefetchBytes, group_sums)
                     : add_rows<1>(group, weights, p, count, kPrefetchBytes, group_sums);
    }
  }
}

// Loads two adjacent vectors of features.
template <class S, class T>
inline void load_pair(const S* source, T, Vector<T>& first, Vector<T>& second) {
  first = load_features(source, T());
  second = load_features(source + kLanes<T>, T());
}
// For bfloat16 they are split into even and odd elements: a bfloat16 is the upper half of a float, so a shift and a
// mask convert the two in each 32-bit word without shuffles.
inline void load_pair(const BFloat16* source, float, Vector<float>& even, Vector<float>& odd) {
  Vector<uint32_t> bits, low, high;
  std::memcpy(&bits, source, sizeof(bits));
  low = bits << 16;
  high = bits & 0xFFFF0000u;
  std::memcpy(&even, &low, sizeof(even));
  std::memcpy(&odd, &high, sizeof(odd));
}
// Returns the position of channel i among the sums of its two vectors.
template <class S>
inline int64_t place_in_pair(const S*, int64_t i, double) {
  return i;
}
template <class S>
inline int64_t place_in_pair(const S*, int64_t i, float) {
  return i;
}
inline int64_t place_in_pair(const BFloat16*, int64_t i, float) { return i % 2 * kLanes<float> + i / 2; }

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
      prefetch(reinterpret_cast<const char*>(pixels[0] + kPixels * c + k * kPair) + kPrefetchBytesByChannels);
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
  for (; c < channels; ++c) {
    for (int k = 0; k < kPixels; ++k) {
      const T x = static_cast<T>(pixels[k][c]);
      fg[c] += w[k] * x;
      bg[c] += u[k] * x;
    }
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

// Adds the sums of a run to `sums`, bringing channels back into their order.
template <class S, class T>
inline void add_sums(const T* fg, const T* bg, int64_t channels, TileSums sums) {
  constexpr int64_t kPair = 2 * kLanes<T>;
  for (int64_t c = 0; c < channels; ++c) {
    const int64_t pair = c / kPair * kPair;
    const int64_t at =
        pair + kPair <= channels ? pair + place_in_pair(static_cast<const S*>(nullptr), c - pair, T()) : c;
    sums.fg[c] += fg[at];
    sums.bg[c] += bg[at];
  }
}

template <class S, class T, bool kHasBg>
void sums_by_channels(const Layer& layer, const Tile& tile, TileSums sums) {
  Weights<T> weights;
  T fg[kMaxTileChannels], bg[kMaxTileChannels];
  const Rows rows(layer.size, layer.stride);
  const int64_t channels = tile.channel_end - tile.channel_begin;
  const S* sample =
      static_cast<const S*>(layer.features) + tile.n * layer.stride_n + tile.channel_begin * layer.stride_c;
  for (int64_t p = tile.pixel_begin, count; p < tile.pixel_end; p += count) {
    // One accumulator adds up every pixel of a run, so runs are shorter than along pixels.
    count = min(min(kRun / 4, tile.pixel_end - p), rows.rest_of_row(p));
    weights.load_run(layer, tile.n, p, count);
    for (int64_t c = 0; c < channels; ++c)
      fg[c] = bg[c] = T(0);
    const S* first = sample + rows.offset(p);
    add_run<kHasBg>(first, rows.stride, weights.fg, weights.bg, count, channels, fg, bg);
    add_sums<S>(fg, bg, channels, sums);
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

void masses_of_sample(const Layer& layer, int64_t n, double* mass) {
  Weights<double> weights;
  const int64_t pixels = pixels_of(layer);
  double fg = 0, bg = 0;
  for (int64_t p = 0, count; p < pixels; p += count) {
    count = min(kRun, pixels - p);
    weights.load_run(layer, n, p, count);
    const double *w = weights.fg, *u = weights.bg;
    double run_fg = 0, run_bg = 0;
#pragma omp simd reduction(+ : run_fg, run_bg)
    for (int64_t i = 0; i < count; ++i) {
      run_fg += w[i];
      run_bg += u[i];
    }
    fg += run_fg;
    bg += run_bg;
  }
  mass[0] = fg;
  mass[1] = bg;
}

} // namespace
} // namespace fdk::cpu
