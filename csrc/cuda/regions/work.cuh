// The arguments of the kernels over several regions: a descriptor of each layer, passed by value, with its cut into
// blocks. The cut depends on shapes, strides, alignment and dtypes alone, not on the device.
#pragma once

#include "../sums/work.cuh"

namespace fdk::cuda {

// A thread takes a few regions of a tile of channels by adjacent pixels, which it holds in registers. Its neighbours
// lie along the pixels or, where channels are contiguous, also along the channels; a weight then serves all channels of
// the tile, and a value all regions.
constexpr int kTileChannels = 4;
template <typename Acc>
constexpr int kTilePixels = 16 / sizeof(Acc);
constexpr int kThreadRegions = 8;
constexpr int kMaxChannelLanes = 8;

// A block keeps in shared memory the weights of some pixels for all of its regions.
constexpr int kBlockRegions = 32; // at most; the features are read again for further ones
constexpr int kMaxStagedPixels = 1024;
template <typename Acc>
constexpr int kStagedWeights = 16384 / sizeof(Acc);
constexpr int kStagedPivots = kThreads / kWarp * kThreadRegions * kMaxChannelLanes * kTileChannels;
constexpr int kStagedCoefficients = 3 * kBlockRegions * kMaxChannelLanes * kTileChannels;

// Steps of a thread from tile to tile of pixels: many, to keep partial sums few, but few enough to add up in float32;
// and fewer, down to kMinTilePixels of a block, where there would be too few blocks to occupy the multiprocessors.
constexpr int kMaxSteps = 64;
constexpr int64_t kManyBlocks = kManyWarps / kWarps;

enum class RegionKernel { kSums, kGradient, kWeightGradient };

struct RegionLayerWork {
  Map features, gradient, upstream; // with merged dimensions
  const void* weights;              // [N, R, P]
  void* grad_weights;               // [N, R, P]
  int64_t size1, size2, pixels;
  int64_t channel_start; // of the layer's channels in the sums
  int64_t partial_start; // of the layer's partial sums in the workspace
  uint32_t first_block;
  uint32_t tiles, groups; // of pixels and of channels
  int32_t channels;
  int32_t tile_pixels;                // of a block
  int32_t staged_pixels;              // of them, those whose weights the block stages at a time
  int32_t step_pixels;                // of them, those that its threads take at a time
  uint8_t lanes;                      // of a warp along the channels; a power of two
  uint8_t channel_warps, pixel_warps; // of a block; powers of two
  uint8_t feature_dtype, weight_dtype;
  bool along_channels;                                                    // channels are contiguous, not pixels
  bool features_vector, gradient_vector, upstream_vector, weights_vector; // accessed four elements at a time

  constexpr __host__ __device__ int pixel_lanes() const { return kWarp / lanes; }
  constexpr __host__ __device__ int block_channels() const { return channel_warps * lanes * kTileChannels; }
};

struct RegionWork {
  RegionLayerWork layers[kMaxLayers];
  const void* pivots; // [R, N, total_channels], or null
  int64_t batch, total_channels, num_layers, num_regions;
  int64_t partials; // of these layers
  int64_t blocks;
  int32_t first_layer, count;
  int32_t block_regions, chunks; // regions of a block, and of how many blocks the regions are
  int32_t thread_regions, parts; // regions of a warp, and among how many the block's regions are divided
  bool selects;
};
static_assert(sizeof(RegionWork) + 4 * sizeof(void*) <= 4096, "the descriptors fit into the kernel parameters");

// Sums and masses of a sample in a layer: [R, C], with pivots [2R, C], and then [R].
constexpr __host__ __device__ int64_t outputs_of(int64_t num_regions, bool moments, int64_t channels) {
  return num_regions * ((moments ? 2 : 1) * channels + 1);
}

// Copies the maps of a layer and merges each spatial dimension into the next inner one where it continues that one in
// all of them.
inline void put_maps(const RegionLayer& layer, RegionLayerWork& work) {
  const Map* from[] = {&layer.features, &layer.gradient, &layer.upstream};
  Map* to[] = {&work.features, &work.gradient, &work.upstream};
  int64_t size[3] = {1, 1, 1};
  for (int i = 0; i < 3; ++i)
    *to[i] = {from[i]->values, from[i]->stride_n, from[i]->stride_c, {1, 1, 1}};
  int at = 3;
  for (int dim = 2; dim >= 0; --dim) {
    if (layer.size[dim] == 1) continue;
    bool continues = at < 3;
    for (int i = 0; i < 3; ++i)
      continues = continues && (!from[i]->values || from[i]->stride[dim] == size[at] * to[i]->stride[at]);
    if (!continues) {
      --at;
      for (int i = 0; i < 3; ++i)
        to[i]->stride[at] = from[i]->stride[dim];
    }
    size[at] *= layer.size[dim];
  }
  work.size1 = size[1];
  work.size2 = size[2];
  work.pixels = pixels_of(layer);
}

// Whether aligned accesses of four elements cover a map.
inline bool allows_four(const RegionLayerWork& work, int64_t batch, DType dtype, const Map& map) {
  const int64_t adjacent = work.along_channels ? work.channels : work.size2;
  const int64_t stride = work.along_channels ? map.stride_c : map.stride[2];
  if (stride != 1 || adjacent % 4 != 0 || !is_multiple(map.values, 4 * element_size(dtype))) return false;
  auto fits = [](int64_t size, int64_t step) { return size == 1 || step % 4 == 0; };
  const int64_t size0 = work.pixels / std::max<int64_t>(1, work.size1 * work.size2);
  return fits(batch, map.stride_n) && fits(size0, map.stride[0]) && fits(work.size1, map.stride[1]) &&
         (work.along_channels ? fits(work.size2, map.stride[2]) : fits(work.channels, map.stride_c));
}

// Describes a layer and how to access its elements.
inline RegionLayerWork describe_layer(const RegionLayer& layer, int64_t batch, bool wide, RegionKernel kernel) {
  RegionLayerWork work = {};
  put_maps(layer, work);
  work.weights = layer.weights;
  work.grad_weights = layer.grad_weights;
  work.channels = static_cast<int32_t>(layer.channels);
  work.feature_dtype = static_cast<uint8_t>(layer.dtype);
  work.weight_dtype = static_cast<uint8_t>(layer.weight_dtype);
  const Map& map = kernel == RegionKernel::kGradient ? work.gradient : work.features;
  const bool pixels_adjacent = work.size2 > 1 && map.stride[2] == 1;
  work.along_channels = work.channels > 1 && map.stride_c == 1 && !pixels_adjacent;
  if (wide) return work; // no vector accesses for float64 sums, which are rare
  work.features_vector = allows_four(work, batch, layer.dtype, work.features);
  work.gradient_vector = allows_four(work, batch, layer.dtype, work.gradient);
  work.upstream_vector = allows_four(work, batch, layer.dtype, work.upstream);
  work.weights_vector = work.pixels % 4 == 0 && is_multiple(work.weights, 4 * element_size(layer.weight_dtype));
  return work;
}

constexpr int power_of_two_from(int64_t least, int most) {
  int power = 1;
  while (power < least && power < most)
    power *= 2;
  return power;
}

// Cuts a layer into tiles of pixels and groups of channels, a block each.
template <typename Acc>
void cut_layer(RegionLayerWork& work, const RegionWork& call, RegionKernel kernel) {
  const bool is_gradient = kernel == RegionKernel::kGradient;
  const int parts = is_gradient ? 1 : call.parts;
  work.lanes = static_cast<uint8_t>(
      work.along_channels ? power_of_two_from(ceil_div(work.channels, kTileChannels), kMaxChannelLanes) : 1);
  const int warp_groups = std::max(1, ceil_div(work.channels, work.lanes * kTileChannels));
  work.channel_warps = static_cast<uint8_t>(power_of_two_from(warp_groups, kWarps / parts));
  if (is_gradient) {
    const int kinds = call.pivots ? 3 : 1;
    while (kinds * call.block_regions * work.block_channels() > kStagedCoefficients)
      work.channel_warps /= 2;
  }
  work.groups = kernel == RegionKernel::kWeightGradient ? 1 : ceil_div<int>(warp_groups, work.channel_warps);

  const int warp_pixels = work.pixel_lanes() * kTilePixels<Acc>;
  work.pixel_warps = static_cast<uint8_t>(kWarps / parts / work.channel_warps);
  while (work.pixel_warps > 1 && work.pixel_warps * warp_pixels * call.block_regions > kStagedWeights<Acc>)
    work.pixel_warps /= 2;
  work.step_pixels = work.pixel_warps * warp_pixels;
  const int staged = std::min(kStagedWeights<Acc> / call.block_regions, kMaxStagedPixels) / work.step_pixels;

  int steps = 1, least_steps = 1;
  if (kernel == RegionKernel::kSums) {
    steps = kMaxSteps;
    least_steps = std::max(1, kMinTilePixels / work.step_pixels);
  } else if (is_gradient && call.chunks == 1) { // else each step goes through all regions
    steps = staged;
  }
  while (steps > least_steps &&
         call.batch * work.groups * call.chunks * ceil_div<int64_t>(work.pixels, steps * work.step_pixels) <
             kManyBlocks)
    steps /= 2;
  work.tile_pixels = steps * work.step_pixels;
  work.staged_pixels = std::min(steps, staged) * work.step_pixels;
}

// Describes up to kMaxLayers layers from `first` on. The size of the workspace, the kernels and the second pass all
// follow from it.
template <typename Acc>
RegionWork make_work(const Regions& regions, int64_t first, RegionKernel kernel) {
  RegionWork result = {};
  result.pivots = regions.pivots;
  result.batch = regions.batch;
  result.total_channels = regions.total_channels;
  result.num_layers = regions.num_layers;
  result.num_regions = regions.num_regions;
  result.selects = regions.selects;
  result.first_layer = static_cast<int32_t>(first);
  result.count = static_cast<int32_t>(std::min<int64_t>(kMaxLayers, regions.num_layers - first));
  result.chunks = static_cast<int32_t>(ceil_div<int64_t>(regions.num_regions, kBlockRegions));
  result.block_regions = static_cast<int32_t>(ceil_div<int64_t>(regions.num_regions, result.chunks));
  result.parts = power_of_two_from(ceil_div(result.block_regions, kThreadRegions), kBlockRegions / kThreadRegions);
  result.thread_regions = ceil_div(result.block_regions, result.parts);
  int64_t channel_start = 0;
  for (int64_t index = 0; index < first; ++index)
    channel_start += regions.layers[index].channels;
  for (int32_t index = 0; index < result.count; ++index) {
    const RegionLayer& layer = regions.layers[first + index];
    if (layer.dtype == DType::kFloat64 && std::is_same_v<Acc, float>) {
      throw std::runtime_error("float64 features need sums of float64, got sums of float32.");
    }
    RegionLayerWork& work = result.layers[index];
    work = describe_layer(layer, regions.batch, std::is_same_v<Acc, double>, kernel);
    cut_layer<Acc>(work, result, kernel);
    work.channel_start = channel_start;
    channel_start += layer.channels;
    // Sums of a layer without pixels are written as well: they are 0.
    const int64_t least = kernel == RegionKernel::kSums ? 1 : 0;
    work.tiles = static_cast<uint32_t>(std::max(least, ceil_div<int64_t>(work.pixels, work.tile_pixels)));
    work.first_block = static_cast<uint32_t>(result.blocks);
    const int64_t chunks = kernel == RegionKernel::kGradient ? 1 : result.chunks;
    result.blocks += regions.batch * work.tiles * work.groups * chunks;
    work.partial_start = result.partials;
    if (work.tiles > 1) {
      result.partials += regions.batch * outputs_of(regions.num_regions, regions.pivots, work.channels) * work.tiles;
    }
  }
  return result;
}

} // namespace fdk::cuda
