// The vector kernels of region_sums. This file is compiled once for each instruction set (FDK_ISA_*), so it must not
// instantiate anything that another file could share: no standard library beyond <cstdint> and <cstring>.
#include <cstdint>
#include <cstring>

#include "half.h"
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
// Channels that share one pass over the mask, where pixels are along the vector.
constexpr int64_t kGroup = 4;
// Elements of some pixels with all their channels, where channels are: a part of the L1 cache.
constexpr int64_t kWindow = 4096;
static_assert(kWindow >= kMaxTileChannels, "a window holds a pixel");

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t pixels_of(const Layer& layer) { return layer.size[0] * layer.size[1] * layer.size[2]; }

inline int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    case DType::kUInt8:
      return 1;
    default:
      return 2;
  }
}

// ---------------------------------------------------------------- vectors

#if defined(FDK_ISA_AVX512)
constexpr int64_t kVectorBytes = 64;
#elif defined(FDK_ISA_AVX2)
constexpr int64_t kVectorBytes = 32;
#else
constexpr int64_t kVectorBytes = 16;
#endif
constexpr int64_t kCacheLine = 64;
// How far ahead of its reads a kernel asks for memory, for each of several streams along the pixels, and for the one
// stream of channels_last.
constexpr int64_t kPrefetchBytes = 1024;
constexpr int64_t kPrefetchBytesByChannels = 4096;

#if defined(__GNUC__)
template <class T, int64_t kCount>
struct VectorOf {
  typedef T type __attribute__((vector_size(kCount * sizeof(T))));
};
template <class T>
using Vector = typename VectorOf<T, kVectorBytes / static_cast<int64_t>(sizeof(T))>::type;
inline void prefetch(const void* address) { __builtin_prefetch(address); }
#else
template <class T>
using Vector = T; // one lane: the loops below are then plain scalar code
inline void prefetch(const void*) {}
#endif

template <class T>
constexpr int64_t kLanes = static_cast<int64_t>(sizeof(Vector<T>) / sizeof(T));

template <class T>
inline Vector<T> load_vector(const T* source) {
  Vector<T> value;
  std::memcpy(&value, source, sizeof(value));
  return value;
}

// A vector of weights as T, from T or from the uint8 of a binary mask.
inline Vector<float> load_weights(const float* source, float) { return load_vector(source); }
inline Vector<double> load_weights(const double* source, double) { return load_vector(source); }
template <class T>
inline Vector<T> load_weights(const uint8_t* source, T) {
  T lanes[kLanes<T>];
  for (int64_t i = 0; i < kLanes<T>; ++i)
    lanes[i] = static_cast<T>(source[i]);
  return load_vector(lanes);
}
// The binary mask of float features is the common case, and compilers make poor code of it.
#if defined(FDK_ISA_AVX512)
inline Vector<float> load_weights(const uint8_t* source, float) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
  // Zero-masked with every lane on: the unmasked forms start from an undefined value, of which GCC 12 warns.
  constexpr __mmask16 kAll = 0xFFFF;
  return (Vector<float>)_mm512_maskz_cvtepi32_ps(kAll, _mm512_maskz_cvtepu8_epi32(kAll, bytes));
}
#elif defined(FDK_ISA_AVX2)
inline Vector<float> load_weights(const uint8_t* source, float) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(source));
  return (Vector<float>)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
}
#endif

template <class T>
inline void store_vector(T* out, Vector<T> value) {
  std::memcpy(out, &value, sizeof(value));
}

// The lanes added up, halves onto halves.
template <class T>
inline T total(Vector<T> value) {
  T lanes[kLanes<T>];
  std::memcpy(lanes, &value, sizeof(value));
  for (int64_t half = kLanes<T> / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i)
      lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// ---------------------------------------------------------------- numbers of 16 bits

inline void load_float16(const uint16_t* source, int64_t count, float* out) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(half));
  }
#endif
  for (; i < count; ++i)
    out[i] = float16_to_float(source[i]);
}

inline void store_float16(const float* source, int64_t count, uint16_t* out) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), half);
  }
#endif
  for (; i < count; ++i)
    out[i] = float_to_float16(source[i]);
}

// As float_to_bfloat16. Not by AVX512_BF16, which takes subnormal numbers for zero.
#if defined(FDK_ISA_AVX512)
inline __m256i to_bfloat16(const float* source) {
  constexpr __mmask16 kAll = 0xFFFF;
  const __m512i bits = _mm512_loadu_si512(source);
  const __m512i high = _mm512_maskz_srli_epi32(kAll, bits, 16);
  const __m512i even = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), even);
  const __m512 value = _mm512_castsi512_ps(bits);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i rounded = _mm512_maskz_srli_epi32(kAll, sum, 16);
  const __m512i quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
  return _mm512_maskz_cvtepi32_epi16(kAll, _mm512_mask_mov_epi32(rounded, nan, quiet));
}
#elif defined(FDK_ISA_AVX2)
inline __m256i eight_to_bfloat16(const float* source) {
  const __m256 value = _mm256_loadu_ps(source);
  const __m256i bits = _mm256_castps_si256(value), high = _mm256_srli_epi32(bits, 16);
  const __m256i even = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), even);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  return _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), quiet, nan);
}
inline __m256i to_bfloat16(const float* source) {
  const __m256i packed = _mm256_packus_epi32(eight_to_bfloat16(source), eight_to_bfloat16(source + 8));
  return _mm256_permute4x64_epi64(packed, 0xD8); // packing goes by halves of 128 bits
}
#endif

inline void store_bfloat16(const float* source, int64_t count, uint16_t* out) {
  int64_t i = 0;
#if defined(FDK_ISA_AVX512) || defined(FDK_ISA_AVX2)
  for (; i + 16 <= count; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), to_bfloat16(source + i));
#endif
  for (; i < count; ++i)
    out[i] = float_to_bfloat16(source[i]);
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
    for (int64_t i = 0; i < count; ++i)
      out[i] = static_cast<T>(source[i]);
  } else {
    for (int64_t i = 0; i < count; ++i)
      out[i] = static_cast<T>(source[i * stride]);
  }
}

// Asks for as many bytes as the run has, from its end on: the run that is likely to come next.
inline void prefetch_after(const void* address, int64_t bytes) {
  const char* end = static_cast<const char*>(address) + bytes;
  for (int64_t i = 0; i < bytes; i += kCacheLine)
    prefetch(end + i);
}

// `count` elements from `address` on, `stride` apart, as T: in place where they are just that, else in `buffer`.
template <class T>
inline const T* load(const void* address, DType dtype, int64_t stride, int64_t count, T* buffer) {
  if (dtype == Is<T>::kDType && stride == 1) return static_cast<const T*>(address);
  if (stride == 1) prefetch_after(address, count * size_of(dtype));
  const uint16_t* half = static_cast<const uint16_t*>(address);
  switch (dtype) {
    case DType::kFloat32:
      convert(static_cast<const float*>(address), stride, count, buffer);
      break;
    case DType::kFloat64:
      convert(static_cast<const double*>(address), stride, count, buffer);
      break;
    case DType::kUInt8:
      convert(static_cast<const uint8_t*>(address), stride, count, buffer);
      break;
    case DType::kBFloat16:
      if (stride == 1) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i)
          buffer[i] = static_cast<T>(bfloat16_to_float(half[i]));
      } else {
        for (int64_t i = 0; i < count; ++i)
          buffer[i] = static_cast<T>(bfloat16_to_float(half[i * stride]));
      }
      break;
    case DType::kFloat16:
      if (stride == 1 && sizeof(T) == sizeof(float)) {
        load_float16(half, count, reinterpret_cast<float*>(buffer));
      } else {
        for (int64_t i = 0; i < count; ++i)
          buffer[i] = static_cast<T>(float16_to_float(half[i * stride]));
      }
      break;
  }
  return buffer;
}

template <class S, class T>
inline void scatter(const T* values, int64_t stride, int64_t count, S* out) {
  for (int64_t i = 0; i < count; ++i)
    out[i * stride] = static_cast<S>(values[i]);
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
    case DType::kFloat32:
      scatter(values, stride, count, static_cast<float*>(address));
      break;
    case DType::kFloat64:
      scatter(values, stride, count, static_cast<double*>(address));
      break;
    case DType::kUInt8:
      break;
    case DType::kBFloat16:
      if (stride == 1 && sizeof(T) == sizeof(float)) {
        store_bfloat16(reinterpret_cast<const float*>(values), count, half);
      } else {
        for (int64_t i = 0; i < count; ++i)
          half[i * stride] = float_to_bfloat16(static_cast<float>(values[i]));
      }
      break;
    case DType::kFloat16:
      if (stride == 1 && sizeof(T) == sizeof(float)) {
        store_float16(reinterpret_cast<const float*>(values), count, half);
      } else {
        for (int64_t i = 0; i < count; ++i)
          half[i * stride] = float_to_float16(static_cast<float>(values[i]));
      }
      break;
  }
}

// The pixels of a view with dimensions merged as far as its strides allow: rows of equally spaced pixels.
struct Rows {
  int64_t length, stride; // pixels of a row, and the step from one to the next
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

// Weights of a run of pixels as T; `bg` is 1 - fg where the layer has none of its own.
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
      for (int64_t i = 0; i < count; ++i)
        bg_buffer[i] = T(1) - fg[i];
      bg = bg_buffer;
    }
  }
};

// Weights of a sample in the dtype M in which the mask has them, T or uint8: kernels convert them in registers.
template <class T, class M, bool kHasBg>
struct RawWeights {
  const M *fg, *bg;

  RawWeights(const Layer& layer, int64_t n)
      : fg(static_cast<const M*>(layer.fg) + n * pixels_of(layer)),
        bg(kHasBg ? static_cast<const M*>(layer.bg) + n * pixels_of(layer) : nullptr) {}

  Vector<T> fg_vector(int64_t i) const { return load_weights(fg + i, T()); }
  Vector<T> bg_vector(int64_t i, Vector<T> w) const {
    if constexpr (kHasBg) return load_weights(bg + i, T());
    return T(1) - w;
  }
  T fg_at(int64_t i) const { return static_cast<T>(fg[i]); }
  T bg_at(int64_t i) const { return kHasBg ? static_cast<T>(bg[i]) : T(1) - static_cast<T>(fg[i]); }
};

// Calls body with the RawWeights that fit the layer.
template <class T, class Body>
inline void with_weights(const Layer& layer, int64_t n, const Body& body) {
  const bool bytes = layer.mask_dtype == DType::kUInt8;
  if (layer.bg == nullptr) {
    bytes ? body(RawWeights<T, uint8_t, false>(layer, n)) : body(RawWeights<T, T, false>(layer, n));
  } else {
    bytes ? body(RawWeights<T, uint8_t, true>(layer, n)) : body(RawWeights<T, T, true>(layer, n));
  }
}

// Pixels whose weights are both 0 are left out whatever they hold; there are none where the background is implied.
template <bool kHasBg, class V>
inline V select_valid(V w, V u, V x) {
  if constexpr (!kHasBg) return x;
  return ((w != V{}) | (u != V{})) ? x : V{};
}

template <class T>
inline bool is_valid(T fg, T bg) {
  return (fg != T(0)) | (bg != T(0));
}

// ---------------------------------------------------------------- forward

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

// ---------------------------------------------------------------- backward

// One run of one channel; `added` may be null.
template <class T, class M, bool kHasBg>
inline void write_row(const RawWeights<T, M, kHasBg>& weights, int64_t p, int64_t count, T g_fg, T g_bg, const T* added,
                      T* out) {
  using V = Vector<T>;
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) {
    const V w = weights.fg_vector(p + i), u = weights.bg_vector(p + i, w);
    V value = select_valid<kHasBg>(w, u, g_fg * w + g_bg * u);
    if (added != nullptr) value += load_vector(added + i);
    store_vector(out + i, value);
  }
  for (; i < count; ++i) {
    const T w = weights.fg_at(p + i), u = weights.bg_at(p + i);
    const T value = !kHasBg || is_valid(w, u) ? g_fg * w + g_bg * u : T(0);
    out[i] = added != nullptr ? value + added[i] : value;
  }
}

// Under a mask of bytes the gradient of a channel has two values, and 0 where no weight is: their bits are chosen,
// which needs no arithmetic and no rounding. What they are is computed as elsewhere, so that NaN comes out the same.
template <class T>
inline T value_at(T g_fg, T g_bg, T w, T u) {
  return g_fg * w + g_bg * u;
}

template <class T>
inline uint16_t half_bits(T value, DType dtype) {
  uint16_t bits;
  store(&value, &bits, dtype, 1, 1);
  return bits;
}

template <bool kHasBg>
inline void choose_row(const uint8_t* fg, const uint8_t* bg, int64_t count, uint16_t in_fg, uint16_t in_bg,
                       uint16_t* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t w = static_cast<uint16_t>(-fg[i]);
    const uint16_t u = kHasBg ? static_cast<uint16_t>(-bg[i]) : static_cast<uint16_t>(~w);
    out[i] = static_cast<uint16_t>((w & in_fg) | (u & in_bg));
  }
}

template <class T, class M, bool kHasBg>
void backward_by_pixels(const Layer& layer, const Tile& tile, const RawWeights<T, M, kHasBg>& weights, const T* g_fg,
                        const T* g_bg) {
  T out_buffer[kRun], upstream_buffer[kRun];
  const Rows rows(layer.size, layer.stride), upstream_rows(layer.size, layer.upstream_stride);
  const int64_t element = size_of(layer.dtype);
  // Channel by channel, so that what is written is one stream.
  for (int64_t c = tile.channel_begin; c < tile.channel_end; ++c) {
    char* channel = static_cast<char*>(layer.features) + (tile.n * layer.stride_n + c * layer.stride_c) * element;
    const char* upstream = static_cast<const char*>(layer.upstream) +
                           (tile.n * layer.upstream_stride_n + c * layer.upstream_stride_c) * element;
    for (int64_t p = tile.pixel_begin, count; p < tile.pixel_end; p += count) {
      count = min(min(kRun, tile.pixel_end - p), rows.rest_of_row(p));
      const T* added = nullptr;
      if (layer.upstream != nullptr) {
        count = min(count, upstream_rows.rest_of_row(p));
        const char* source = upstream + upstream_rows.offset(p) * element;
        added = load(source, layer.dtype, upstream_rows.stride, count, upstream_buffer);
      }
      char* address = channel + rows.offset(p) * element;
      if constexpr (sizeof(M) == 1) {
        if (added == nullptr && element == 2 && rows.stride == 1) {
          const uint16_t in_fg = half_bits(value_at(g_fg[c], g_bg[c], T(1), T(0)), layer.dtype);
          const uint16_t in_bg = half_bits(value_at(g_fg[c], g_bg[c], T(0), T(1)), layer.dtype);
          choose_row<kHasBg>(weights.fg + p, kHasBg ? weights.bg + p : nullptr, count, in_fg, in_bg,
                             reinterpret_cast<uint16_t*>(address));
          continue;
        }
      }
      T* out = target(address, layer.dtype, rows.stride, out_buffer);
      write_row(weights, p, count, g_fg[c], g_bg[c], added, out);
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
        for (int64_t c = 0; c < channels; ++c)
          out[c] = g_fg[c] * w + g_bg[c] * u;
      } else {
        for (int64_t c = 0; c < channels; ++c)
          out[c] = T(0);
      }
      if (layer.upstream != nullptr) {
        const char* source = static_cast<const char*>(layer.upstream) +
                             (tile.n * layer.upstream_stride_n + tile.channel_begin * layer.upstream_stride_c +
                              upstream_rows.offset(p + i)) *
                                 element;
        const T* added = load(source, layer.dtype, layer.upstream_stride_c, channels, upstream_buffer);
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c)
          out[c] += added[c];
      }
      store(out, address, layer.dtype, 1, channels);
    }
  }
}

// Under a mask of bytes a pixel of channels_last is one of three rows.
template <class T>
void backward_by_chosen_rows(const Layer& layer, const Tile& tile, const T* g_fg, const T* g_bg) {
  T values[kMaxTileChannels] = {};
  alignas(kCacheLine) char in_fg[kMaxTileChannels * sizeof(T)], in_bg[kMaxTileChannels * sizeof(T)];
  alignas(kCacheLine) static const char nothing[kMaxTileChannels * sizeof(double)] = {};
  const Rows rows(layer.size, layer.stride);
  const int64_t element = size_of(layer.dtype), channels = tile.channel_end - tile.channel_begin;
  const int64_t bytes = channels * element;
  for (int64_t c = 0; c < channels; ++c)
    values[c] = value_at(g_fg[tile.channel_begin + c], g_bg[tile.channel_begin + c], T(1), T(0));
  store(values, in_fg, layer.dtype, 1, channels);
  for (int64_t c = 0; c < channels; ++c)
    values[c] = value_at(g_fg[tile.channel_begin + c], g_bg[tile.channel_begin + c], T(0), T(1));
  store(values, in_bg, layer.dtype, 1, channels);
  const uint8_t* fg = static_cast<const uint8_t*>(layer.fg) + tile.n * pixels_of(layer);
  const uint8_t* bg = layer.bg == nullptr ? fg : static_cast<const uint8_t*>(layer.bg) + tile.n * pixels_of(layer);
  for (int64_t p = tile.pixel_begin, count; p < tile.pixel_end; p += count) {
    count = min(tile.pixel_end - p, rows.rest_of_row(p));
    char* address = static_cast<char*>(layer.features) +
                    (tile.n * layer.stride_n + tile.channel_begin * layer.stride_c + rows.offset(p)) * element;
    for (int64_t i = 0; i < count; ++i) {
      const bool background = layer.bg == nullptr || bg[p + i] != 0;
      const char* row = fg[p + i] != 0 ? in_fg : background ? in_bg : nothing;
      std::memcpy(address + i * rows.stride * element, row, bytes);
    }
  }
}

template <class T>
void backward(const Layer& layer, const Tile& tile, const void* g_fg, const void* g_bg) {
  const T *fg = static_cast<const T*>(g_fg), *bg = static_cast<const T*>(g_bg);
  const bool choose = layer.mask_dtype == DType::kUInt8 && layer.upstream == nullptr;
  if (channels_are_inner(layer) && choose && size_of(layer.dtype) == 2) {
    backward_by_chosen_rows<T>(layer, tile, fg, bg);
  } else if (channels_are_inner(layer)) {
    backward_by_channels<T>(layer, tile, fg, bg);
  } else {
    with_weights<T>(layer, tile.n, [&](const auto& weights) { backward_by_pixels(layer, tile, weights, fg, bg); });
  }
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
    for (int64_t i = 0; i < count; ++i)
      fg[i] = bg[i] = 0;
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

} // namespace

TileKernels FDK_TILE_KERNELS() { return {forward_tile, backward_tile, mask_backward_tile, mass_of_sample}; }

} // namespace fdk::cpu
