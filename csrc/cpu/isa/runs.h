// Runs of elements of any dtype and stride, and the weights of a run of pixels.
#pragma once

#include "../region_sums_tiles.h"
#include "half_runs.h"

namespace fdk::cpu {
namespace {

// Pixels that are added in the accumulation dtype before they go into a double.
constexpr int64_t kRun = 1024;
// Channels that share one pass over the mask, where pixels are along the vector.
constexpr int64_t kGroup = 4;

// Pixels of a row after which other channels are read before long.
constexpr int64_t kShortRow = 1024;

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
    default: // of masks that only layer_masks reads
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
    default: // features have none of the others
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

  // Most views are one row, and divisions take longer than writing a short one.
  int64_t offset(int64_t pixel) const {
    if (pixel < length) return pixel * stride;
    const int64_t row = pixel / length, within = pixel - row * length;
    return (row / size1) * stride0 + (row % size1) * stride1 + within * stride;
  }
  int64_t rest_of_row(int64_t pixel) const { return pixel < length ? length - pixel : length - pixel % length; }
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

} // namespace
} // namespace fdk::cpu
