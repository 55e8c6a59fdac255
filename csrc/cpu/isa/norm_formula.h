// An element of a normalisation with its activation: its output (N2), and its part of (N4) and (N5).
#pragma once

#include "../norm.h"
#include "runs.h"

namespace fdk::cpu {
namespace {

// The parameters of an element: rows of the channel, and what the loss's slopes add to the gradient that arrives.
constexpr int64_t kScale = 0, kShift = 1, kMean = 2, kInverse = 3, kA = 3, kB = 4, kC = 5;

// The activation and where it stands.
template <class T, Activation kActivation, bool kFirst>
struct Formula {
  T slope;

  // NaN passes, as in torch.
  T activated(T t) const {
    if constexpr (kActivation == Activation::kRelu) return t < T(0) ? T(0) : t;
    if constexpr (kActivation == Activation::kLeakyRelu) return t < T(0) ? slope * t : t;
    return t;
  }
  T gated(T t, T gradient) const {
    if constexpr (kActivation == Activation::kRelu) return t <= T(0) ? T(0) : gradient;
    if constexpr (kActivation == Activation::kLeakyRelu) return t > T(0) ? gradient : slope * gradient;
    return gradient;
  }

  // What is normalised.
  T normalised(T x) const { return kFirst ? activated(x) : x; }
  T output(T x, T scale, T shift) const { return kFirst ? activated(x) * scale + shift : activated(x * scale + shift); }
  // The gradient of the normalised value's affine map.
  T affine_gradient(T x, T scale, T shift, T gradient) const {
    return kFirst ? gradient : gated(x * scale + shift, gradient);
  }
  T input_gradient(T x, T h, T mean, T a, T b, T c) const {
    const T gradient = a * h + (b * (normalised(x) - mean) + c);
    return kFirst ? gated(x, gradient) : gradient;
  }
};

// Calls body with the formula of a call.
template <class T, class Body>
inline void with_formula(const NormAct& call, const Body& body) {
  const T slope = static_cast<T>(call.slope);
  switch (call.activation) {
    case Activation::kRelu:
      return call.activation_first ? body(Formula<T, Activation::kRelu, true>{slope})
                                   : body(Formula<T, Activation::kRelu, false>{slope});
    case Activation::kLeakyRelu:
      return call.activation_first ? body(Formula<T, Activation::kLeakyRelu, true>{slope})
                                   : body(Formula<T, Activation::kLeakyRelu, false>{slope});
    default:
      return body(Formula<T, Activation::kNone, false>{slope});
  }
}

template <class T>
inline const T* row(const NormRows& rows, int64_t index) {
  return static_cast<const T*>(rows.values) + index * rows.stride;
}

inline int64_t offset_of(const Layer& layer, int64_t n, int64_t channel, int64_t pixel, int64_t pitch) {
  return (n * layer.stride_n + channel * layer.stride_c + pixel * pitch) * element_size(layer.dtype);
}

inline const void* at(const void* address, int64_t bytes) { return static_cast<const char*>(address) + bytes; }
inline void* at(void* address, int64_t bytes) { return static_cast<char*>(address) + bytes; }

} // namespace
} // namespace fdk::cpu
