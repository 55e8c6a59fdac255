// The vector kernels of region_sums. This file is compiled once for each instruction set (FDK_ISA_*), so it must not
// instantiate anything that another file could share: no standard library beyond <cstdint> and <cstring>.
#include <cstdint>
#include <cstring>

#include "region_sums_tiles.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

#if defined(FDK_ISA_AVX512)
#define FDK_TILE_KERNELS tile_kernels_avx512
#elif defined(FDK_ISA_AVX2)
#define FDK_TILE_KERNELS tile_kernels_avx2
#else
#define FDK_TILE_KERNELS tile_kernels_baseline
#endif

namespace fdk::cpu {
namespace {

// Pixels that are added in the accumulation dtype before they go into a double.
constexpr int64_t kRun = 1024;
// Channels that share one pass over the mask, and pixels that share one pass over the accumulators.
constexpr int64_t kGroup = 4;

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t pixels_of(const Layer& layer) { return layer.size[0] * layer.size[1] * layer.size[2]; }

inline int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return 8;
    case DType::kFloat32: return 4;
    case DType::kUInt8: return 1;
    default: return 2;
  }
}

// ---------------------------------------------------------------- numbers of 16 bits

inline float bfloat16_to_float(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Rounds to nearest even; a NaN stays one.
inline uint16_t float_to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? quiet : rounded);
}

inline float float16_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7FFFu;
  uint32_t bits;
  if (magnitude >= 0x7C00u) {  // Inf and NaN
    bits = 0x7F800000u | ((magnitude & 0x3FFu) << 13);
  } else if (magnitude >= 0x0400u) {  // normal
    bits = (magnitude << 13) + 0x38000000u;
  } else {  // subnormal: an integer times 2^-24
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    std::memcpy(&bits, &value, 4);
  }
  bits |= sign;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t float_to_float16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7FFFFFFFu;
  if (bits > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
  if (bits >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // rounds beyond 65504
  if (bits < 0x38800000u) {  // below 2^-14: adding 0.5 rounds to a multiple of 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3F000000u));
  }
  const uint32_t rounded = bits + 0xFFFu + ((bits >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

inline void load_float16(const uint16_t* source, int64_t count, float* out) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(half));
  }
#endif
  for (; i < count; ++i) out[i] = float16_to_float(source[i]);
}

inline void store_float16(const float* source, int64_t count, uint16_t* out) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), half);
  }
#endif
  for (; i < count; ++i) out[i] = float_to_float16(source[i]);
}

// ---------------------------------------------------------------- runs of elements

template <class T>
struct Is;
template <>
struct Is<float> {
  static constexpr DType kDType = DType::kFloat32;
};
template <>
struct Is<double> {
  static constexpr DType kDType = DType::kFloat64;
};

template <class S, class T>
inline void convert(const S* source, int64_t stride, int64_t count, T* out) {
  if (stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(source[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(source[i * stride]);
  }
}

// `count` elements from `address` on, `stride` apart, as T: in place where they are just that, else in `buffer`.
template <class T>
inline const T* load(const void* address, DType dtype, int64_t stride, int64_t count, T* buffer) {
  if (dtype == Is<T>::kDType && stride == 1) return static_cast<const T*>(address);
  const uint16_t* half = static_cast<const uint16_t*>(address);
  switch (dtype) {
    case DType::kFloat32: convert(static_cast<const float*>(address), stride, count, buffer); break;
    case DType::kFloat64: convert(static_cast<const double*>(address), stride, count, buffer); break;
    case DType::kUInt8: convert(static_cast<const uint8_t*>(address), stride, count, buffer); break;
    case DType::kBFloat16:
      if (stride == 1) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<T>(bfloat16_to_float(half[i]));
      } else {
        for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<T>(bfloat16_to_float(half[i * stride]));
      }
      break;
    case DType::kFloat16:
      if (stride == 1 && sizeof(T) == sizeof(float)) {
        load_float16(half, count, reinterpret_cast<float*>(buffer));
      } else {
        for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<T>(float16_to_float(half[i * stride]));
      }
      break;
  }
  return buffer;
}

template <class S, class T>
inline void scatter(const T* values, int64_t stride, int64_t count, S* out) {
  for (int64_t i = 0; i < count; ++i) out[i * stride] = static_cast<S>(values[i]);
}

// Where a run of results is to be computed: in place where the output is T and contiguous, else in `buffer`.
template <class T>
inline T* target(void* address, DType dtype, int64_t stride, T* buffer) {
  return dtype == Is<T>::kDType && stride == 1 ? static_cast<T*>(address) : buffer;
}

// Brings a run computed in `values` to the output, if it is not there already.
template <class T>
inline void store(const T* values, void* address, DType dtype, int64_t stride, int64_t count) {
  if (values == address) return;
  uint16_t* half = static_cast<uint16_t*>(address);
  switch (dtype) {
    case DType::kFloat32: scatter(values, stride, count, static_cast<float*>(address)); break;
    case DType::kFloat64: scatter(values, stride, count, static_cast<double*>(address)); break;
    case DType::kUInt8: break;
    case DType::kBFloat16:
      if (stride == 1) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) half[i] = float_to_bfloat16(static_cast<float>(values[i]));
      } else {
        for (int64_t i = 0; i < count; ++i) half[i * stride] = float_to_bfloat16(static_cast<float>(values[i]));
      }
      break;
    case DType::kFloat16:
      if (stride == 1 && sizeof(T) == sizeof(float)) {
        store_float16(reinterpret_cast<const float*>(values), count, half);
      } else {
        for (int64_t i = 0; i < count; ++i) half[i * stride] = float_to_float16(static_cast<float>(values[i]));
      }
      break;
  }
}

// The pixels of a view with dimensions merged as far as its strides allow: rows of equally spaced pixels.
struct Rows {
  int64_t length, stride;  // pixels of a row, and the step from one to the next
  int64_t size1, stride1, stride0;

  Rows(const int64_t size[3], const int64_t strides[3]) {
    int64_t count = 0, sizes[3], steps[3];
    for (int d = 0; d < 3; ++d) {
      if (size[d] == 1) continue;
      if (count > 0 && steps[count - 1] == strides[d] * size[d]) {
        sizes[count - 1] *= size[d];
        steps[count - 1] = strides[d];
      } else {
        sizes[count] = size[d];
        steps[count++] = strides[d];
      }
    }
    length = count > 0 ? sizes[count - 1] : 1;
    stride = count > 0 ? steps[count - 1] : 1;
    size1 = count > 1 ? sizes[count - 2] : 1;
    stride1 = count > 1 ? steps[count - 2] : 0;
    stride0 = count > 2 ? steps[0] : 0;
  }

  int64_t offset(int64_t pixel) const {
    const int64_t row = pixel / length, within = pixel - row * length;
    return (row / size1) * stride0 + (row % size1) * stride1 + within * stride;
  }
  int64_t rest_of_row(int64_t pixel) const { return length - pixel % length; }
};

// Weights of a run of pixels; `bg` is 1 - fg where the layer has none of its own.
template <class T>
struct Weights {
  T fg_buffer[kRun], bg_buffer[kRun];
  const T *fg, *bg;

  void load_run(const Layer& layer, int64_t n, int64_t pixel, int64_t count) {
    const int64_t start = (n * pixels_of(layer) + pixel) * size_of(layer.mask_dtype);
    fg = load(static_cast<const char*>(layer.fg) + start, layer.mask_dtype, 1, count, fg_buffer);
    if (layer.bg != nullptr) {
      bg = load(static_cast<const char*>(layer.bg) + start, layer.mask_dtype, 1, count, bg_buffer);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) bg_buffer[i] = T(1) - fg[i];
      bg = bg_buffer;
    }
  }
};

template <class T>
inline bool is_valid(T fg, T bg) {
  return (fg != T(0)) | (bg != T(0));
}

// ---------------------------------------------------------------- forward

// Pixels along the vector, four channels at a time.
template <class T, bool kSelect>
inline void add_group(const T* r0, const T* r1, const T* r2, const T* r3, const T* fg, const T* bg, int64_t count,
                      double* partial) {
  T f0 = 0, f1 = 0, f2 = 0, f3 = 0, b0 = 0, b1 = 0, b2 = 0, b3 = 0;
#pragma omp simd reduction(+ : f0, f1, f2, f3, b0, b1, b2, b3)
  for (int64_t i = 0; i < count; ++i) {
    const T w = fg[i], u = bg[i];
    const bool keep = !kSelect || is_valid(w, u);
    const T x0 = keep ? r0[i] : T(0), x1 = keep ? r1[i] : T(0), x2 = keep ? r2[i] : T(0), x3 = keep ? r3[i] : T(0);
    f0 += w * x0;
    f1 += w * x1;
    f2 += w * x2;
    f3 += w * x3;
    b0 += u * x0;
    b1 += u * x1;
    b2 += u * x2;
    b3 += u * x3;
  }
  partial[0] += f0;
  partial[1] += b0;
  partial[2] += f1;
  partial[3] += b1;
  partial[4] += f2;
  partial[5] += b2;
  partial[6] += f3;
  partial[7] += b3;
}

template <class T, bool kSelect>
inline void add_channel(const T* row, const T* fg, const T* bg, int64_t count, double* partial) {
  T f = 0, b = 0;
#pragma omp simd reduction(+ : f, b)
  for (int64_t i = 0; i < count; ++i) {
    const T x = !kSelect || is_valid(fg[i], bg[i]) ? row[i] : T(0);
    f += fg[i] * x;
    b += bg[i] * x;
  }
  partial[0] += f;
  partial[1] += b;
}

template <class T, bool kSelect>
void forward_by_pixels(const Layer& layer, const Tile& tile, double* partial) {
  Weights<T> weights;
  T buffer[kGroup][kRun];
  const Rows rows(layer.size, layer.stride);
  const int64_t element = size_of(layer.dtype);
  const char* sample = static_cast<const char*>(layer.features) + tile.n * layer.stride_n * element;
  for (int64_t p = tile.pixel_begin, count; p < tile.pixel_end; p += count) {
    count = min(min(kRun, tile.pixel_end - p), rows.rest_of_row(p));
    weights.load_run(layer, tile.n, p, count);
    const char* start = sample + rows.offset(p) * element;
    const auto channel = [&](int64_t c, T* room) {
      return load(start + c * layer.stride_c * element, layer.dtype, rows.stride, count, room);
    };
    int64_t c = tile.channel_begin;
    for (; c + kGroup <= tile.channel_end; c += kGroup) {
      const T *r0 = channel(c, buffer[0]), *r1 = channel(c + 1, buffer[1]), *r2 = channel(c + 2, buffer[2]),
              *r3 = channel(c + 3, buffer[3]);
      add_group<T, kSelect>(r0, r1, r2, r3, weights.fg, weights.bg, count, partial + 2 * (c - tile.channel_begin));
    }
    for (; c < tile.channel_end; ++c) {
      const T* row = channel(c, buffer[0]);
      add_channel<T, kSelect>(row, weights.fg, weights.bg, count, partial + 2 * (c - tile.channel_begin));
    }
  }
}

// Channels along the vector, four pixels at a time.
template <class T>
inline void add_pixels(const T* const r[kGroup], const T w[kGroup], const T u[kGroup], int64_t channels, T* fg, T* bg) {
  const T *r0 = r[0], *r1 = r[1], *r2 = r[2], *r3 = r[3];
  const T w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3], u0 = u[0], u1 = u[1], u2 = u[2], u3 = u[3];
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    const T x0 = r0[c], x1 = r1[c], x2 = r2[c], x3 = r3[c];
    fg[c] += (w0 * x0 + w1 * x1) + (w2 * x2 + w3 * x3);
    bg[c] += (u0 * x0 + u1 * x1) + (u2 * x2 + u3 * x3);
  }
}

template <class T, bool kSelect>
void forward_by_channels(const Layer& layer, const Tile& tile, double* partial) {
  Weights<T> weights;
  T buffer[kGroup][kMaxTileChannels], fg[kMaxTileChannels], bg[kMaxTileChannels];
  static const T zeros[kMaxTileChannels] = {};
  const Rows rows(layer.size, layer.stride);
  const int64_t element = size_of(layer.dtype), channels = tile.channel_end - tile.channel_begin;
  const char* sample = static_cast<const char*>(layer.features) +
                       (tile.n * layer.stride_n + tile.channel_begin * layer.stride_c) * element;
  for (int64_t p = tile.pixel_begin, count; p < tile.pixel_end; p += count) {
    count = min(min(kRun, tile.pixel_end - p), rows.rest_of_row(p));
    weights.load_run(layer, tile.n, p, count);
    for (int64_t c = 0; c < channels; ++c) fg[c] = bg[c] = T(0);
    const char* start = sample + rows.offset(p) * element;
    for (int64_t i = 0; i < count; i += kGroup) {
      const T* r[kGroup];
      T w[kGroup], u[kGroup];
      for (int64_t k = 0; k < kGroup; ++k) {
        const bool there = i + k < count && (!kSelect || is_valid(weights.fg[i + k], weights.bg[i + k]));
        w[k] = there ? weights.fg[i + k] : T(0);
        u[k] = there ? weights.bg[i + k] : T(0);
        r[k] = there ? load(start + (i + k) * rows.stride * element, layer.dtype, 1, channels, buffer[k]) : zeros;
      }
      add_pixels(r, w, u, channels, fg, bg);
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
  const bool select = layer.bg != nullptr;
  if (channels_are_inner(layer)) {
    select ? forward_by_channels<T, true>(layer, tile, partial) : forward_by_channels<T, false>(layer, tile, partial);
  } else {
    select ? forward_by_pixels<T, true>(layer, tile, partial) : forward_by_pixels<T, false>(layer, tile, partial);
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

// ---------------------------------------------------------------- backward

template <class T>
void backward_by_pixels(const Layer& layer, const Tile& tile, const T* g_fg, const T* g_bg) {
  Weights<T> weights;
  T out_buffer[kRun], upstream_buffer[kRun];
  const Rows rows(layer.size, layer.stride), upstream_rows(layer.size, layer.upstream_stride);
  const int64_t element = size_of(layer.dtype);
  const bool select = layer.bg != nullptr;
  for (int64_t p = tile.pixel_begin, count; p < tile.pixel_end; p += count) {
    count = min(min(kRun, tile.pixel_end - p), rows.rest_of_row(p));
    if (layer.upstream != nullptr) count = min(count, upstream_rows.rest_of_row(p));
    weights.load_run(layer, tile.n, p, count);
    const T *w = weights.fg, *u = weights.bg;
    for (int64_t c = tile.channel_begin; c < tile.channel_end; ++c) {
      char* address = static_cast<char*>(layer.features) +
                      (tile.n * layer.stride_n + c * layer.stride_c + rows.offset(p)) * element;
      T* out = target(address, layer.dtype, rows.stride, out_buffer);
      const T gw = g_fg[c], gu = g_bg[c];
      if (select) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) out[i] = is_valid(w[i], u[i]) ? gw * w[i] + gu * u[i] : T(0);
      } else {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) out[i] = gw * w[i] + gu * u[i];
      }
      if (layer.upstream != nullptr) {
        const char* source = static_cast<const char*>(layer.upstream) +
                             (tile.n * layer.upstream_stride_n + c * layer.upstream_stride_c + upstream_rows.offset(p)) *
                                 element;
        const T* added = load(source, layer.dtype, upstream_rows.stride, count, upstream_buffer);
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) out[i] += added[i];
      }
      store(out, address, layer.dtype, rows.stride, count);
    }
  }
}

template <class T>
void backward_by_channels(const Layer& layer, const Tile& tile, const T* g_fg, const T* g_bg) {
  Weights<T> weights;
  T out_buffer[kMaxTileChannels], upstream_buffer[kMaxTileChannels];
  const Rows rows(layer.size, layer.stride), upstream_rows(layer.size, layer.upstream_stride);
  const int64_t element = size_of(layer.dtype), channels = tile.channel_end - tile.channel_begin;
  g_fg += tile.channel_begin;
  g_bg += tile.channel_begin;
  for (int64_t p = tile.pixel_begin, count; p < tile.pixel_end; p += count) {
    count = min(min(kRun, tile.pixel_end - p), rows.rest_of_row(p));
    weights.load_run(layer, tile.n, p, count);
    char* start = static_cast<char*>(layer.features) +
                  (tile.n * layer.stride_n + tile.channel_begin * layer.stride_c + rows.offset(p)) * element;
    for (int64_t i = 0; i < count; ++i) {
      char* address = start + i * rows.stride * element;
      T* out = target(address, layer.dtype, 1, out_buffer);
      const bool there = layer.bg == nullptr || is_valid(weights.fg[i], weights.bg[i]);
      const T w = weights.fg[i], u = weights.bg[i];
      if (there) {
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) out[c] = g_fg[c] * w + g_bg[c] * u;
      } else {
        for (int64_t c = 0; c < channels; ++c) out[c] = T(0);
      }
      if (layer.upstream != nullptr) {
        const char* source = static_cast<const char*>(layer.upstream) +
                             (tile.n * layer.upstream_stride_n + tile.channel_begin * layer.upstream_stride_c +
                              upstream_rows.offset(p + i)) *
                                 element;
        const T* added = load(source, layer.dtype, layer.upstream_stride_c, channels, upstream_buffer);
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) out[c] += added[c];
      }
      store(out, address, layer.dtype, 1, channels);
    }
  }
}

template <class T>
void backward(const Layer& layer, const Tile& tile, const void* g_fg, const void* g_bg) {
  const T *fg = static_cast<const T*>(g_fg), *bg = static_cast<const T*>(g_bg);
  channels_are_inner(layer) ? backward_by_channels<T>(layer, tile, fg, bg)
                            : backward_by_pixels<T>(layer, tile, fg, bg);
}

void backward_tile(const Layer& layer, const Tile& tile, DType accumulate, const void* g_fg, const void* g_bg) {
  accumulate == DType::kFloat64 ? backward<double>(layer, tile, g_fg, g_bg) : backward<float>(layer, tile, g_fg, g_bg);
}

// ---------------------------------------------------------------- backward with respect to the mask

// Rare (soft or predicted masks), so one form for all layouts: channel by channel, added up in double.
template <class T>
void mask_backward(const Layer& layer, const Tile& tile, const T* g_fg, const T* g_bg) {
  Weights<T> weights;
  T buffer[kRun];
  double fg[kRun], bg[kRun];
  const Rows rows(layer.size, layer.stride);
  const int64_t element = size_of(layer.dtype);
  const bool two = layer.bg != nullptr;
  for (int64_t p = tile.pixel_begin, count; p < tile.pixel_end; p += count) {
    count = min(min(kRun, tile.pixel_end - p), rows.rest_of_row(p));
    weights.load_run(layer, tile.n, p, count);
    for (int64_t i = 0; i < count; ++i) fg[i] = bg[i] = 0;
    for (int64_t c = tile.channel_begin; c < tile.channel_end; ++c) {
      const char* address = static_cast<const char*>(layer.features) +
                            (tile.n * layer.stride_n + c * layer.stride_c + rows.offset(p)) * element;
      const T* x = load(address, layer.dtype, rows.stride, count, buffer);
      const double gw = two ? g_fg[c] : static_cast<double>(g_fg[c]) - g_bg[c], gu = g_bg[c];
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        fg[i] += gw * x[i];
        bg[i] += gu * x[i];
      }
    }
    T* grad_fg = static_cast<T*>(layer.grad_fg) + tile.n * pixels_of(layer) + p;
    T* grad_bg = two ? static_cast<T*>(layer.grad_bg) + tile.n * pixels_of(layer) + p : nullptr;
    for (int64_t i = 0; i < count; ++i) {
      const bool keep = !two || is_valid(weights.fg[i], weights.bg[i]);
      grad_fg[i] = keep ? static_cast<T>(fg[i]) : T(0);
      if (two) grad_bg[i] = keep ? static_cast<T>(bg[i]) : T(0);
    }
  }
}

void mask_backward_tile(const Layer& layer, const Tile& tile, DType accumulate, const void* g_fg, const void* g_bg) {
  if (accumulate == DType::kFloat64) {
    mask_backward(layer, tile, static_cast<const double*>(g_fg), static_cast<const double*>(g_bg));
  } else {
    mask_backward(layer, tile, static_cast<const float*>(g_fg), static_cast<const float*>(g_bg));
  }
}

}  // namespace

TileKernels FDK_TILE_KERNELS() { return {forward_tile, backward_tile, mask_backward_tile, mass_of_sample}; }

}  // namespace fdk::cpu
