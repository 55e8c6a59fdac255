// What protects memory; everything that a user can get wrong is checked in Python, in fdkernels/checks.py.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "layer_masks.h"
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

// The options of log_norm are for the layers of the pyramid.
inline void check_layer_losses(const Pyramid& pyramid, const LogNorm& args) {
  require(args.batch == pyramid.batch && args.num_layers == pyramid.num_layers &&
              args.total_channels == pyramid.total_channels && args.accumulate == pyramid.accumulate,
          "the losses must be those of the layers");
  require(args.reduction != Reduction::kNone, "the losses of a layer must be reduced to one");
}

// The words of `size_words` in fdkernels/layer_masks/impl/native.py as sizes, in place.
inline void set_sizes(LayerMasks& args, const std::vector<int64_t>& words) {
  constexpr size_t kWords = sizeof(MaskSize) / sizeof(int64_t);
  require(words.size() % kWords == 0, "sizes of masks must be described by 6 words each");
  args.sizes = reinterpret_cast<const MaskSize*>(words.data());
  args.num_sizes = static_cast<int64_t>(words.size() / kWords);
  require(args.batch >= 0, "the batch must not be negative");
  require(args.accumulate == DType::kFloat32 || args.accumulate == DType::kFloat64,
          "weights must be float32 or float64 where they are not uint8");
  require(args.dtype >= DType::kFloat32 && args.dtype <= DType::kInt64, "the mask must be of a known dtype");
  require(args.size[0] > 0 && args.size[1] > 0 && args.size[2] > 0, "the mask must have a pixel");
  for (int64_t i = 0; i < args.num_sizes; ++i) {
    const MaskSize& size = args.sizes[i];
    require(size.size[0] >= 0 && size.size[1] >= 0 && size.size[2] >= 0, "sizes must not be negative");
    require(size.dtype == DType::kUInt8 || size.dtype == args.accumulate, "weights must be uint8 or as the sums are");
  }
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
