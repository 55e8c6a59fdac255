// Forward of region_sums: the sums of a tile (R2), and the masses of a sample.
#pragma once

#include "runs.h"

namespace fdk::cpu {
namespace {

// A row of features as it lies in memory, read as T: from T itself, or from 16 bits widened in registers.
template <class T>
inline Vector<T> load_features(const T* source, T) {
  return load_vector(source);
}
template <class T>
inline T feature_at(const T* source, T) {
  return *source;
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
inline float feature_at(const BFloat16* source, float) { return bfloat16_to_float(source->bits); }
inline float feature_at(const Float16* source, float) { return float16_to_float(source->bits); }
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
#else
template <class H>
inline Vector<float> widened(const H* source) {
  float lanes[kLanes<float>];
  for (int64_t i = 0; i < kLanes<float>; ++i)
    lanes[i] = feature_at(source + i, 0.0f);
  return load_vector(lanes);
}
inline Vector<float> load_features(const BFloat16* source, float) { return widened(source); }
inline Vector<float> load_features(const Float16* source, float) { return widened(source); }
#endif

// Pixels along the vector, kChannels rows at a time; weights from pixel p of the sample on.
template <int kChannels, class T, class S, class M, bool kHasBg>
inline void add_rows(const S* const rows[kChannels], const RawWeights<T, M, kHasBg>& weights, int64_t p, int64_t count,
                     double* partial) {
  using V = Vector<T>;
  V f[kChannels] = {}, b[kChannels] = {};
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) {
    const V w = weights.fg_vector(p + i), u = weights.bg_vector(p + i, w);
    for (int k = 0; k < kChannels; ++k) {
      prefetch(reinterpret_cast<const char*>(rows[k] + i) + kPrefetchBytes);
      const V x = select_valid<kHasBg>(w, u, load_features(rows[k] + i, T()));
      f[k] += w * x;
      b[k] += u * x;
    }
  }
  for (int k = 0; k < kChannels; ++k) {
    T sum_fg = total<T>(f[k]), sum_bg = total<T>(b[k]);
    for (int64_t j = i; j < count; ++j) {
      const T w = weights.fg_at(p + j), u = weights.bg_at(p + j);
      const T x = !kHasBg || is_valid(w, u) ? feature_at(rows[k] + j, T()) : T(0);
      sum_fg += w * x;
      sum_bg += u * x;
    }
    partial[2 * k] += sum_fg;
    partial[2 * k + 1] += sum_bg;
  }
}

// Calls add_rows for the channels of a tile, whose rows of S begin at `start` and lie `step` elements apart.
template <class S, class T, class M, bool kHasBg>
inline void add_channels(const S* start, int64_t step, const Tile& tile, const RawWeights<T, M, kHasBg>& weights,
                         int64_t p, int64_t count, double* partial) {
  int64_t c = tile.channel_begin;
  for (; c + kGroup <= tile.channel_end; c += kGroup) {
    const S* group[kGroup];
    for (int64_t k = 0; k < kGroup; ++k)
      group[k] = start + (c + k) * step;
    add_rows<kGroup>(group, weights, p, count, partial + 2 * (c - tile.channel_begin));
  }
  for (; c < tile.channel_end; ++c) {
    const S* row = start + c * step;
    add_rows<1>(&row, weights, p, count, partial + 2 * (c - tile.channel_begin));
  }
}

template <class T, class M, bool kHasBg>
void forward_by_pixels(const Layer& layer, const Tile& tile, const RawWeights<T, M, kHasBg>& weights, double* partial) {
  T buffer[kGroup][kRun];
  const Rows rows(layer.size, layer.stride);
  const int64_t element = size_of(layer.dtype);
  // What needs no buffer can run on for longer.
  const int64_t run = layer.dtype == Is<T>::kDType && rows.stride == 1 ? 2 * kRun : kRun;
  const char* sample = static_cast<const char*>(layer.features) + tile.n * layer.stride_n * element;
  for (int64_t p = tile.pixel_begin, count; p < tile.pixel_end; p += count) {
    count = min(min(run, tile.pixel_end - p), rows.rest_of_row(p));
    const char* start = sample + rows.offset(p) * element;
    if (rows.stride == 1 && layer.dtype == Is<T>::kDType) {
      add_channels(reinterpret_cast<const T*>(start), layer.stride_c, tile, weights, p, count, partial);
      continue;
    }
    if constexpr (sizeof(T) == sizeof(float)) {
      if (rows.stride == 1 && layer.dtype == DType::kBFloat16) {
        add_channels(reinterpret_cast<const BFloat16*>(start), layer.stride_c, tile, weights, p, count, partial);
        continue;
      }
      if (rows.stride == 1 && layer.dtype == DType::kFloat16) {
        add_channels(reinterpret_cast<const Float16*>(start), layer.stride_c, tile, weights, p, count, partial);
        continue;
      }
    }
    for (int64_t c = tile.channel_begin, step; c < tile.channel_end; c += step) {
      step = c + kGroup <= tile.channel_end ? kGroup : 1;
      const T* group[kGroup];
      for (int64_t k = 0; k < step; ++k) {
        group[k] = load(start + (c + k) * layer.stride_c * element, layer.dtype, rows.stride, count, buffer[k]);
      }
      double* sums = partial + 2 * (c - tile.channel_begin);
      step == kGroup ? add_rows<kGroup>(group, weights, p, count, sums) : add_rows<1>(group, weights, p, count, sums);
    }
  }
}

// Channels along the vector: kVectors of them in registers while the pixels of a window pass by.
template <class T, int kVectors>
inline void add_pixels(const T* first, int64_t stride, const T* w, const T* u, bool select, int64_t count, T* fg,
                       T* bg) {
  using V = Vector<T>;
  V f[kVectors], b[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    f[v] = load_vector(fg + v * kLanes<T>);
    b[v] = load_vector(bg + v * kLanes<T>);
  }
  for (int64_t i = 0; i < count; ++i) {
    if (select && !is_valid(w[i], u[i])) continue;
    const T* pixel = first + i * stride;
    for (int v = 0; v < kVectors; ++v) {
      prefetch(reinterpret_cast<const char*>(pixel + v * kLanes<T>) + kPrefetchBytesByChannels);
      const V x = load_vector(pixel + v * kLanes<T>);
      f[v] += w[i] * x;
      b[v] += u[i] * x;
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    store_vector(fg + v * kLanes<T>, f[v]);
    store_vector(bg + v * kLanes<T>, b[v]);
  }
}

template <class T>
inline void add_window(const T* first, int64_t stride, const T* w, const T* u, bool select, int64_t count,
                       int64_t channels, T* fg, T* bg) {
  constexpr int64_t kBlock = 4 * kLanes<T>;
  int64_t c = 0;
  for (; c + kBlock <= channels; c += kBlock) {
    add_pixels<T, 4>(first + c, stride, w, u, select, count, fg + c, bg + c);
  }
  for (; c + kLanes<T> <= channels; c += kLanes<T>) {
    add_pixels<T, 1>(first + c, stride, w, u, select, count, fg + c, bg + c);
  }
  for (; c < channels; ++c) {
    for (int64_t i = 0; i < count; ++i) {
      if (select && !is_valid(w[i], u[i])) continue;
      fg[c] += w[i] * first[i * stride + c];
      bg[c] += u[i] * first[i * stride + c];
    }
  }
}

template <class T>
void forward_by_channels(const Layer& layer, const Tile& tile, double* partial) {
  Weights<T> weights;
  T buffer[kWindow], fg[kMaxTileChannels], bg[kMaxTileChannels];
  const bool select = layer.bg != nullptr, in_place = layer.dtype == Is<T>::kDType;
  const Rows rows(layer.size, layer.stride);
  const int64_t element = size_of(layer.dtype), channels = tile.channel_end - tile.channel_begin;
  const int64_t window = min(kRun, kWindow / channels);
  const char* sample = static_cast<const char*>(layer.features) +
                       (tile.n * layer.stride_n + tile.channel_begin * layer.stride_c) * element;
  for (int64_t p = tile.pixel_begin, count; p < tile.pixel_end; p += count) {
    // Here one accumulator takes every pixel of a run, so runs are shorter.
    count = min(min(kRun / 4, tile.pixel_end - p), rows.rest_of_row(p));
    weights.load_run(layer, tile.n, p, count);
    for (int64_t c = 0; c < channels; ++c)
      fg[c] = bg[c] = T(0);
    const char* start = sample + rows.offset(p) * element;
    for (int64_t i = 0, pixels; i < count; i += pixels) {
      pixels = min(window, count - i);
      const char* address = start + i * rows.stride * element;
      const T *first = reinterpret_cast<const T*>(address), *w = weights.fg + i, *u = weights.bg + i;
      if (in_place) {
        add_window(first, rows.stride, w, u, select, pixels, channels, fg, bg);
        continue;
      }
      if (rows.stride == channels) {
        load(address, layer.dtype, 1, pixels * channels, buffer);
      } else {
        for (int64_t k = 0; k < pixels; ++k) {
          load(address + k * rows.stride * element, layer.dtype, 1, channels, buffer + k * channels);
        }
      }
      add_window<T>(buffer, channels, w, u, select, pixels, channels, fg, bg);
    }
    for (int64_t c = 0; c < channels; ++c) {
      partial[2 * c] += fg[c];
      partial[2 * c + 1] += bg[c];
    }
  }
}

template <class T>
void forward(const Layer& layer, const Tile& tile, double* partial) {
  std::memset(partial, 0, sizeof(double) * 2 * (tile.channel_end - tile.channel_begin));
  if (channels_are_inner(layer)) {
    forward_by_channels<T>(layer, tile, partial);
  } else {
    with_weights<T>(layer, tile.n, [&](const auto& weights) { forward_by_pixels(layer, tile, weights, partial); });
  }
}

void forward_tile(const Layer& layer, const Tile& tile, DType accumulate, double* partial) {
  accumulate == DType::kFloat64 ? forward<double>(layer, tile, partial) : forward<float>(layer, tile, partial);
}

void mass_of_sample(const Layer& layer, int64_t n, double* mass) {
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
