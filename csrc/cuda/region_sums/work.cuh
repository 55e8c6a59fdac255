// How the kernels of region_sums see a pyramid: a descriptor for each layer, which a launch carries by value, and the
// cut of the layer into work items. The cut depends on shapes, strides, alignment and dtypes alone, never on the
// device.
#pragma once

#include <algorithm>

#include "../common.cuh"

namespace fdk::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kMaxLayers = 16; // of a launch: their descriptors fill the 4 KB that kernel parameters can have

// Pixels adjacent in memory: a warp takes a tile of pixels for a group of channels.
constexpr int kSlots = 4;                // channels that a lane loads at a time: they share the pixels' weights
constexpr int kScalarBytes = 8;          // of a channel that a lane loads at a time where elements move alone
constexpr int kGradientChannels = kWarp; // of backward: every lane brings the coefficients of one

// Channels adjacent in memory: a block takes a tile of pixels, its threads a few adjacent channels each.
constexpr int kVectorLanes = 8; // threads side by side along the channels: 128 bytes of a pixel
constexpr int kScalarLanes = 64;
constexpr int kPixelLoads = 4; // loads of a thread at a time, from as many pixels

// A tile of forward is long, so that its partial sums are few, but short enough for float32 to add it up; and shorter
// where there are so few of them that multiprocessors would wait for each other.
constexpr int kMaxTilePixels = 4096, kMinTilePixels = 512;  // of a warp, pixels adjacent
constexpr int kMaxThreadPixels = 32, kMinThreadPixels = 16; // of a thread, channels adjacent
constexpr int64_t kManyWarps = 8192;

template <typename Acc>
struct alignas(2 * sizeof(Acc)) Weights {
  Acc fg, bg;
};
template <typename Acc>
constexpr int kStagedPixels = 16384 / sizeof(Weights<Acc>); // weights that a block holds in shared memory

template <typename Acc>
struct Outputs {
  Acc* sums;          // [2, N, total_channels]
  Acc* masses;        // [2, N, L]
  Acc* partials;      // layer by layer [N, C + 1, 2, tiles]
  uint32_t* counters; // to be set to 0 for the launch that follows, or null
  uint32_t num_counters;
};

// The gradients of the sums: those of each layer times one number, or as they are where `factors` is null.
template <typename Acc>
struct SumGradients {
  const Acc* values;  // [2, N, total_channels]
  const Acc* factors; // [L]
  int64_t factor_stride;
};

enum class Stage { kForward, kBackward, kMaskBackward };

struct LayerWork {
  void* features;
  const void* upstream;
  const void* fg;
  const void* bg;
  void* grad_fg;
  void* grad_bg;
  int64_t stride_n, stride_c, stride[3]; // after merging the spatial dimensions that lie one in the other
  int64_t upstream_stride_n, upstream_stride_c, upstream_stride[3];
  int64_t size1, size2, pixels;
  int64_t channel_start; // of the layer's channels in the sums
  int64_t partial_start; // of the layer's partial sums in the workspace
  DType dtype, mask_dtype;
  uint32_t first_block;
  uint32_t tiles, groups; // of pixels and of channels
  int32_t channels;
  int32_t tile_pixels;
  int32_t lanes, rows;  // threads along the channels and along the pixels, where channels are adjacent
  bool along_channels;  // channels are adjacent in memory, not pixels
  bool vector;          // 16 bytes of the features move together
  bool upstream_vector; // and of the upstream gradient as well
};

struct Work {
  LayerWork layers[kMaxLayers];
  int64_t batch, total_channels, num_layers;
  int64_t partials; // of these layers
  int64_t blocks;
  int32_t first_layer, count;
};
static_assert(sizeof(Work) + 5 * sizeof(void*) <= 4096, "the descriptors fit the kernel parameters");

// Merges the spatial dimensions of which one continues the other, in the features and in the upstream gradient alike.
inline void merge_dimensions(const Layer& layer, LayerWork& work) {
  int64_t size[3] = {1, 1, 1};
  std::fill_n(work.stride, 3, 1);
  std::fill_n(work.upstream_stride, 3, 1);
  int at = 3;
  for (int dim = 2; dim >= 0; --dim) {
    if (layer.size[dim] == 1) continue;
    const bool continues = at < 3 && layer.stride[dim] == size[at] * work.stride[at] &&
                           (!layer.upstream || layer.upstream_stride[dim] == size[at] * work.upstream_stride[at]);
    if (continues) {
      size[at] *= layer.size[dim];
      continue;
    }
    --at;
    size[at] = layer.size[dim];
    work.stride[at] = layer.stride[dim];
    work.upstream_stride[at] = layer.upstream_stride[dim];
  }
  work.size1 = size[1];
  work.size2 = size[2];
}

inline int64_t element_size(DType dtype) {
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

inline bool is_multiple(const void* address, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

// Whether accesses of 16 bytes at multiples of their size reach every element of a tensor of the layer's shape.
inline bool allows_vectors(const LayerWork& work, int64_t batch, const void* data, int64_t stride_n, int64_t stride_c,
                           const int64_t (&stride)[3]) {
  const int64_t vector = 16 / element_size(work.dtype);
  const int64_t adjacent = work.along_channels ? work.channels : work.size2;
  if (!is_multiple(data, 16) || adjacent % vector != 0 || (work.along_channels ? stride_c : stride[2]) != 1)
    return false;
  auto fits = [&](int64_t size, int64_t step) { return size == 1 || step % vector == 0; };
  const int64_t size0 = work.pixels / std::max<int64_t>(1, work.size1 * work.size2);
  return fits(batch, stride_n) && fits(size0, stride[0]) && fits(work.size1, stride[1]) &&
         (work.along_channels ? fits(work.size2, stride[2]) : fits(work.channels, stride_c));
}

// Halves `length`, down to `shortest`, while the layer has few warps(length).
template <typename Warps>
int shorten(int length, int shortest, Warps warps) {
  while (length > shortest && warps(length) < kManyWarps)
    length /= 2;
  return length;
}

// Cuts a layer whose channels are adjacent into tiles of pixels and groups of channels.
inline void cut_along_channels(LayerWork& work, Stage stage, int64_t batch, int64_t vector, int staged_pixels) {
  const int chunks = work.channels / static_cast<int>(vector);
  if (stage == Stage::kMaskBackward) { // a warp takes all channels of a few pixels
    work.lanes = 1;
    while (work.lanes < kWarp && work.lanes < chunks)
      work.lanes *= 2;
    work.rows = kWarp / work.lanes;
    work.tile_pixels = work.rows * kPixelLoads;
    work.groups = 1;
    return;
  }
  work.groups = ceil_div(chunks, vector > 1 ? kVectorLanes : kScalarLanes);
  work.lanes = ceil_div(chunks, static_cast<int>(work.groups));
  work.rows = kThreads / work.lanes;
  const int pixels = shorten(kMaxThreadPixels, kMinThreadPixels, [&](int length) {
    return batch * work.groups * ceil_div<int64_t>(work.pixels, work.rows * length) * kWarps;
  });
  work.tile_pixels = work.rows * std::min(pixels, staged_pixels / work.rows);
}

// Cuts a layer whose pixels are adjacent, or nothing is.
inline void cut_along_pixels(LayerWork& work, Stage stage, int64_t batch, int64_t vector) {
  if (stage == Stage::kForward) {
    work.groups = ceil_div(work.channels + 1, kSlots); // one slot more, for the masses
    work.tile_pixels = shorten(kMaxTilePixels, kMinTilePixels, [&](int length) {
      return batch * work.groups * ceil_div<int64_t>(work.pixels, length);
    });
  } else { // what a lane holds at a time
    work.groups = stage == Stage::kBackward ? ceil_div(work.channels, kGradientChannels) : 1;
    work.tile_pixels = kWarp * static_cast<int>(vector > 1 ? vector : kScalarBytes / element_size(work.dtype));
  }
}

// What a layer is, and how its elements are reached.
inline LayerWork describe(const Layer& layer, int64_t batch, bool wide) {
  LayerWork work = {};
  work.features = layer.features;
  work.upstream = layer.upstream;
  work.fg = layer.fg;
  work.bg = layer.bg;
  work.grad_fg = layer.grad_fg;
  work.grad_bg = layer.grad_bg;
  work.stride_n = layer.stride_n;
  work.stride_c = layer.stride_c;
  work.upstream_stride_n = layer.upstream_stride_n;
  work.upstream_stride_c = layer.upstream_stride_c;
  merge_dimensions(layer, work);
  work.pixels = layer.pixels();
  work.channels = static_cast<int32_t>(layer.channels);
  work.dtype = layer.dtype;
  work.mask_dtype = layer.mask_dtype;

  const bool pixels_adjacent = work.size2 > 1 && work.stride[2] == 1;
  work.along_channels = work.channels > 1 && work.stride_c == 1 && !pixels_adjacent;
  if (wide) return work; // float64 sums are the rare case, in which elements move alone
  work.vector = allows_vectors(work, batch, work.features, work.stride_n, work.stride_c, work.stride);
  work.upstream_vector =
      allows_vectors(work, batch, work.upstream, work.upstream_stride_n, work.upstream_stride_c, work.upstream_stride);
  if (!work.along_channels) { // the weights of the pixels move together, too
    const int64_t bytes = std::min<int64_t>(16, 16 / element_size(work.dtype) * element_size(work.mask_dtype));
    work.vector = work.vector && is_multiple(work.fg, bytes) && is_multiple(work.bg, bytes);
  }
  return work;
}

// The work of up to kMaxLayers layers from `first` on. The size of the workspace, every kernel and the second pass of
// forward follow from what this returns.
inline Work make_work(const Pyramid& pyramid, int64_t first, Stage stage) {
  Work result = {};
  result.batch = pyramid.batch;
  result.total_channels = pyramid.total_channels;
  result.num_layers = pyramid.num_layers;
  result.first_layer = static_cast<int32_t>(first);
  result.count = static_cast<int32_t>(std::min<int64_t>(kMaxLayers, pyramid.num_layers - first));
  int64_t channel_start = 0;
  for (int64_t index = 0; index < first; ++index)
    channel_start += pyramid.layers[index].channels;

  const bool wide = pyramid.accumulate == DType::kFloat64;
  for (int32_t index = 0; index < result.count; ++index) {
    const Layer& layer = pyramid.layers[first + index];
    if (layer.dtype == DType::kFloat64 && !wide) {
      throw std::runtime_error("float64 features need sums of float64, got sums of float32.");
    }
    LayerWork& work = result.layers[index];
    work = describe(layer, pyramid.batch, wide);
    work.channel_start = channel_start;
    channel_start += layer.channels;
    const int64_t vector = work.vector ? 16 / element_size(layer.dtype) : 1;
    if (work.along_channels) {
      cut_along_channels(work, stage, pyramid.batch, vector, wide ? kStagedPixels<double> : kStagedPixels<float>);
    } else {
      cut_along_pixels(work, stage, pyramid.batch, vector);
    }
    // Forward writes the sums of a layer without pixels, too: they are 0.
    const int64_t least = stage == Stage::kForward ? 1 : 0;
    work.tiles = static_cast<uint32_t>(std::max(least, ceil_div<int64_t>(work.pixels, work.tile_pixels)));

    const bool item_is_warp = work.along_channels == (stage == Stage::kMaskBackward);
    const int64_t items = pyramid.batch * work.tiles * work.groups;
    work.first_block = static_cast<uint32_t>(result.blocks);
    result.blocks += item_is_warp ? ceil_div<int64_t>(items, kWarps) : items;

    work.partial_start = result.partials;
    if (stage == Stage::kForward && work.tiles > 1) {
      result.partials += 2 * pyramid.batch * (work.channels + 1) * work.tiles;
    }
  }
  // So that the index of a warp fits 32 bits.
  if (result.blocks > UINT32_MAX / kWarps) {
    throw std::runtime_error("region_sums would need " + std::to_string(result.blocks) +
                             " blocks, more than a launch can have; split the batch.");
  }
  return result;
}

} // namespace fdk::cuda
