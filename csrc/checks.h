// Checks that protect memory. What a user can get wrong is checked in Python, in fdkernels/checks.py.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "layout.h"

namespace fdk {

inline void require(bool condition, const char* sentence) {
  if (!condition) throw std::invalid_argument(std::string("fdkernels._C: ") + sentence);
}

inline bool is_accumulate_dtype(DType dtype) { return dtype == DType::kFloat32 || dtype == DType::kFloat64; }

// Reads words as layers, in place: `words` must outlive the result.
inline Pyramid as_pyramid(const std::vector<int64_t>& words, int64_t batch, DType accumulate) {
  constexpr size_t kWords = sizeof(Layer) / sizeof(int64_t);
  require(!words.empty() && words.size() % kWords == 0, "layers must be described by 22 words each");
  require(batch >= 0, "the batch must not be negative");
  require(is_accumulate_dtype(accumulate), "sums must be float32 or float64");
  Pyramid pyramid{reinterpret_cast<const Layer*>(words.data()), static_cast<int64_t>(words.size() / kWords), batch, 0,
                  accumulate};
  for (int64_t l = 0; l < pyramid.num_layers; ++l) {
    const Layer& layer = pyramid.layers[l];
    require(layer.channels >= 0 && layer.size[0] >= 0 && layer.size[1] >= 0 && layer.size[2] >= 0,
            "sizes must not be negative");
    require(layer.dtype >= DType::kFloat32 && layer.dtype <= DType::kFloat16, "features must be floating point");
    require(layer.mask_dtype == DType::kUInt8 || is_accumulate_dtype(layer.mask_dtype),
            "weights must be uint8, float32 or float64");
    pyramid.total_channels += layer.channels;
  }
  return pyramid;
}

// Reads words as the one layer of a normalisation, whose pixels or channels follow each other.
inline Pyramid as_norm_layer(const std::vector<int64_t>& words, int64_t batch, DType accumulate, DType parameters) {
  const Pyramid pyramid = as_pyramid(words, batch, accumulate);
  require(pyramid.num_layers == 1, "a normalisation has one layer");
  const Layer& layer = pyramid.layers[0];
  const MergedPixels merged = merge_dimensions(layer.size, layer.stride, nullptr);
  require(merged.size[0] == 1 && merged.size[1] == 1, "the pixels must lie at one pitch");
  require(merged.stride[2] == 1 || merged.size[2] <= 1 || layer.stride_c == 1, "pixels or channels must be contiguous");
  require(accumulate == DType::kFloat64 || layer.dtype != DType::kFloat64, "float64 needs sums of float64");
  require(is_accumulate_dtype(parameters), "parameters must be float32 or float64");
  return pyramid;
}

// Checks that a normalisation has values, without gaps between them, as the CUDA kernels take them.
inline void check_dense(const Pyramid& pyramid) {
  const Layer& layer = pyramid.layers[0];
  const int64_t pixels = pixels_of(layer), channels = layer.channels;
  require(pyramid.batch > 0 && channels > 0 && pixels > 0, "a normalisation must have a value");
  const bool channels_inner = channels > 1 && pixels > 1 && layer.stride_c == 1;
  const int64_t pitch = merge_dimensions(layer.size, layer.stride, nullptr).stride[2];
  require((pixels == 1 || pitch == (channels_inner ? channels : 1)) &&
              (channels == 1 || layer.stride_c == (channels_inner ? 1 : pixels)) &&
              (pyramid.batch == 1 || layer.stride_n == channels * pixels),
          "the values of a normalisation must lie without gaps");
}

// Checks that the CPU kernels can read the weights; those on CUDA convert any of the dtypes.
inline void check_weights(const Pyramid& pyramid) {
  for (int64_t l = 0; l < pyramid.num_layers; ++l) {
    const DType dtype = pyramid.layers[l].mask_dtype;
    require(dtype == DType::kUInt8 || dtype == pyramid.accumulate,
            "weights must be uint8 or of the accumulation dtype");
  }
}

// Reads words as the layers of a call over several regions, in place: `words` must outlive the result.
inline Regions as_regions(const std::vector<int64_t>& words, int64_t batch, int64_t num_regions, bool selects,
                          const void* pivots, DType accumulate) {
  constexpr size_t kWords = sizeof(RegionLayer) / sizeof(int64_t);
  require(!words.empty() && words.size() % kWords == 0, "layers must be described by 26 words each");
  require(batch >= 0, "the batch must not be negative");
  require(num_regions > 0, "there must be a region");
  require(is_accumulate_dtype(accumulate), "sums must be float32 or float64");
  Regions regions{reinterpret_cast<const RegionLayer*>(words.data()),
                  static_cast<int64_t>(words.size() / kWords),
                  batch,
                  num_regions,
                  selects,
                  pivots,
                  0,
                  accumulate};
  for (int64_t l = 0; l < regions.num_layers; ++l) {
    const RegionLayer& layer = regions.layers[l];
    require(layer.channels >= 0 && layer.size[0] >= 0 && layer.size[1] >= 0 && layer.size[2] >= 0,
            "sizes must not be negative");
    require(layer.dtype >= DType::kFloat32 && layer.dtype <= DType::kFloat16, "features must be floating point");
    require(layer.weight_dtype == DType::kUInt8 || layer.weight_dtype == accumulate,
            "weights must be uint8 or of the accumulation dtype");
    regions.total_channels += layer.channels;
  }
  return regions;
}

// Checks a mask and its sizes.
inline void check_masks(const Masks& args) {
  require(args.batch >= 0, "the batch must not be negative");
  require(args.dtype >= DType::kFloat32 && args.dtype <= DType::kInt64, "the mask must be of a known dtype");
  require(args.size[0] > 0 && args.size[1] > 0 && args.size[2] > 0, "the mask must have a pixel");
  require(is_accumulate_dtype(args.accumulate), "weights must be float32 or float64 where they are not uint8");
  for (int64_t i = 0; i < args.num_sizes; ++i) {
    const MaskSize& size = args.sizes[i];
    require(size.size[0] >= 0 && size.size[1] >= 0 && size.size[2] >= 0, "sizes must not be negative");
    require(size.dtype == DType::kUInt8 || size.dtype == args.accumulate,
            "weights must be uint8 or of the accumulation dtype");
  }
}

// Checks that there is a pairing where the exchange needs one.
inline void check_losses(const Pyramid& pyramid, const Losses& losses) {
  const Exchange exchange = losses.options.exchange;
  require(losses.num_pairs >= 0, "the number of pairs must not be negative");
  require(exchange == Exchange::kNone || losses.num_pairs == 0 || losses.pairing != nullptr,
          "pairing must be given under an exchange");
  require(exchange != Exchange::kShuffle || losses.num_pairs == pyramid.batch,
          "pairing must hold one sample for each sample of the batch");
}

// Checks the entries of a pairing in host memory, which compiled graphs have not checked. Pairs with a negative entry
// do not count.
inline void check_pairing(const Pyramid& pyramid, const Losses& losses) {
  if (losses.options.exchange == Exchange::kNone) return;
  const bool pooled = losses.options.exchange == Exchange::kPooled;
  for (int64_t k = 0; k < losses.num_pairs * (pooled ? 2 : 1); ++k) {
    require(losses.pairing[k] < pyramid.batch && (pooled || losses.pairing[k] >= 0),
            "pairing must hold sample numbers from 0 to the batch size less 1");
  }
}

} // namespace fdk
