// Runs of elements of any dtype and stride, and the weights of a run of pixels.
#pragma once

#include "../tiles.h"
#include "half_runs.h"
#include "load_features.h"

namespace fdk::cpu {
namespace {

// Pixels that are added up in the accumulation dtype before the sum is added to a double.
constexpr int64_t kRun = 1024;
// Channels that share one read of the weights, with pixels along the vector.
constexpr int64_t kGroup = 4;

// Rows of up to so many pixels are short: the next channels are read soon.
constexpr int64_t kShortRow = 1024;

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a < b ? b : a; }

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

// Converts the bytes of a binary mask, which are 0 or 1; any other stands for NaN. Such are rare, and looked for apart.
template <class T>
inline void convert_bytes(const uint8_t* source, int64_t count, T* out) {
  convert(source, 1, count, out);
  uint8_t other_bits = 0;
#pragma omp simd reduction(| : other_bits)
  for (int64_t i = 0; i < count; ++i)
    other_bits |= source[i] & 0xFE;
  for (int64_t i = 0; other_bits != 0 && i < count; ++i) {
    if (source[i] > 1) out[i] = static_cast<T>(bfloat16_to_float(0x7FC0));
  }
}

// Prefetches the run after this one, of the same length.
inline void prefetch_after(const void* address, int64_t bytes) {
  const char* end = static_cast<const char*>(address) + bytes;
  for (int64_t i = 0; i < bytes; i += kCacheLine)
    prefetch(end + i);
}

// Returns `count` elements from `address` on, `stride` apart, as contiguous T: in place where they are, else converted
// into `buffer`.
template <class T>
inline const T* load(const void* address, DType dtype, int64_t stride, int64_t count, T* buffer) {
  if (dtype == Is<T>::kDType && stride == 1) return static_cast<const T*>(address);
  if (stride == 1) prefetch_after(address, count * element_size(dtype));
  switch (dtype) {
    case DType::kFloat32:
      convert(static_cast<const float*>(address), stride, count, buffer);
      break;
    case DType::kFloat64:
      convert(static_cast<const double*>(address), stride, count, buffer);
      break;
    case DType::kUInt8:
      convert_bytes(static_cast<const uint8_t*>(address), count, buffer); // weights, which are contiguous
      break;
    case DType::kBFloat16:
      convert(static_cast<const BFloat16*>(address), stride, count, buffer);
      break;
    case DType::kFloat16:
      if (stride == 1 && sizeof(T) == sizeof(float)) {
        load_float16(static_cast<const uint16_t*>(address), count, reinterpret_cast<float*>(buffer));
      } else {
        convert(static_cast<const Float16*>(address), stride, count, buffer);
      }
      break;
    default: // neither features nor weights have another dtype
      break;
  }
  return buffer;
}

template <class S, class T>
inline void scatter(const T* values, int64_t stride, int64_t count, S* out) {
  for (int64_t i = 0; i < count; ++i)
    out[i * stride] = static_cast<S>(values[i]);
}

// Returns where to compute a run of results: in place where the output is contiguous T, else in `buffer`.
template <class T>
inline T* target(void* address, DType dtype, int64_t stride, T* buffer) {
  return dtype == Is<T>::kDType && stride == 1 ? static_cast<T*>(address) : buffer;
}

// Converts a run of results from `values` to the output, unless it was computed in place.
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
    default: // features have no other dtype
      break;
  }
}

// The pixels of a layer as rows of equally spaced pixels, with its dimensions merged.
struct Rows {
  int64_t length, stride; // pixels of a row, and the step from one to the next
  int64_t size1, stride1, stride0;

  Rows(const int64_t (&size)[3], const int64_t (&strides)[3]) {
    const MergedPixels merged = merge_dimensions(size, strides, nullptr);
    length = merged.size[2];
    stride = merged.stride[2];
    size1 = merged.size[1];
    stride1 = merged.stride[1];
    stride0 = merged.stride[0];
  }

  // Most layers are one row, and divisions take longer than writing a short row.
  int64_t offset(int64_t pixel) const {
    if (pixel < length) return pixel * stride;
    const int64_t row = pixel / length, within = pixel - row * length;
    return (row / size1) * stride0 + (row % size1) * stride1 + within * stride;
  }
  int64_t rest_of_row(int64_t pixel) const { return pixel < length ? length - pixel : length - pixel % length; }
};

// The weights of a run of pixels, converted to T; `bg` is 1 - fg where the layer stores none.
template <class T>
struct Weights {
  T fg_buffer[kRun], bg_buffer[kRun];
  const T *fg, *bg;

  void load_run(const Layer& layer, int64_t n, int64_t pixel, int64_t count) {
    const int64_t start = (n * pixels_of(layer) + pixel) * element_size(layer.mask_dtype);
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

// The weights of a sample in the dtype M in which they are stored, T or uint8; kernels convert them in registers.
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
  // Of `count` pixels, less than a vector of them; the other lanes have no foreground.
  Vector<T> some_fg(int64_t i, int64_t count) const { return load_some_features(fg + i, count, T()); }
  Vector<T> some_bg(int64_t i, int64_t count, Vector<T> w) const {
    if constexpr (kHasBg) return load_some_features(bg + i, count, T());
    return T(1) - w;
  }
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

// Selects 0 for ignored pixels, whose weights are both 0, whatever their value. Without stored background weights there
// are none.
template <bool kHasBg, class V>
inline V select_valid(V w, V u, V x) {
  if constexpr (!kHasBg) return x;
  return ((w != V{}) | (u != V{})) ? x : V{};
}

template <class T>
inline bool is_valid(T fg, T bg) {
  return (fg != T(0)) | (bg != T(0));
}

} // namespace
} // namespace fdk::cpu
