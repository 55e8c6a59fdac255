// What protects memory; everything that a user can get wrong is checked in Python, in fdkernels/checks.py.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "log_norm.h"
#include "region_sums.h"

namespace fdk {

inline void require(bool condition, const char* sentence) {
  if (!condition) throw std::invalid_argument(std::string("fdkernels._C: ") + sentence);
}

// The words of fdkernels/native.py as layers, in place.
inline Pyramid as_pyramid(const std::vector<int64_t>& words, int64_t batch, int64_t accumulate) {
  constexpr size_t kWords = sizeof(Layer) / sizeof(int64_t);
  require(!words.empty() && words.size() % kWords == 0, "layers must be described by 22 words each");
  require(batch >= 0, "the batch must not be negative");
  const auto dtype = static_cast<DType>(accumulate);
  require(dtype == DType::kFloat32 || dtype == DType::kFloat64, "sums must be float32 or float64");
  Pyramid pyramid{reinterpret_cast<const Layer*>(words.data()), static_cast<int64_t>(words.size() / kWords), batch, 0,
                  dtype};
  for (int64_t l = 0; l < pyramid.num_layers; ++l) {
    const Layer& layer = pyramid.layers[l];
    require(layer.channels >= 0 && layer.size[0] >= 0 && layer.size[1] >= 0 && layer.size[2] >= 0,
            "sizes must not be negative");
    require(layer.dtype >= DType::kFloat32 && layer.dtype <= DType::kFloat16, "features must be floating point");
    const DType mask = layer.mask_dtype;
    require(mask == DType::kUInt8 || mask == DType::kFloat32 || mask == DType::kFloat64,
            "masks must be uint8, float32 or float64");
    pyramid.total_channels += layer.channels;
  }
  return pyramid;
}

// For a pairing in host memory; a compiled graph has not checked it. Negative entries of pairs mean "does not count".
inline void check_pairing(const LogNorm& args) {
  const bool pairs = args.exchange == Exchange::kPooled;
  const int64_t entries = args.pairing == nullptr ? 0 : args.num_pairs * (pairs ? 2 : 1);
  for (int64_t k = 0; k < entries; ++k) {
    require(args.pairing[k] < args.batch && (pairs || args.pairing[k] >= 0),
            "pairing must hold sample numbers from 0 to the batch size less 1");
  }
}

} // namespace fdk
