// The second pass of the sums: adds up partial sums, always in the same order.
#pragma once

#include "access.cuh"

namespace fdk::cuda {

struct SecondPassLayer {
  int64_t channels, pixels;
  int64_t channel_start; // of the layer's channels in the sums
  int64_t partial_start; // of the layer's partial sums in the workspace
  uint32_t tiles;        // partial sums of each output
  uint32_t lanes;        // that share an output
  uint32_t first_block, blocks;
};

// The layers of a launch; those of one tile, whose sums are final, have no blocks.
struct SecondPass {
  SecondPassLayer layers[kMaxLayers];
  int64_t batch, total_channels, num_layers;
  int64_t blocks;
  int32_t first_layer, count;
};

// Describes up to kMaxLayers layers from `first` on whose sums are final.
inline SecondPass describe_final_sums(const Pyramid& pyramid, int64_t first) {
  SecondPass pass = {};
  pass.batch = pyramid.batch;
  pass.total_channels = pyramid.total_channels;
  pass.num_layers = pyramid.num_layers;
  pass.first_layer = static_cast<int32_t>(first);
  pass.count = static_cast<int32_t>(std::min<int64_t>(kMaxLayers, pyramid.num_layers - first));
  int64_t channel_start = channels_before(pyramid, first);
  for (int32_t index = 0; index < pass.count; ++index) {
    const Layer& layer = pyramid.layers[first + index];
    pass.layers[index] = {layer.channels, pixels_of(layer), channel_start, 0, 1, 1, 0, 0};
    channel_start += layer.channels;
  }
  return pass;
}

// Describes the second pass after sums_kernel.
inline SecondPass describe_second_pass(const Pyramid& pyramid, const Work& work) {
  SecondPass pass = describe_final_sums(pyramid, work.first_layer);
  for (int32_t index = 0; index < pass.count; ++index) {
    const LayerWork& from = work.layers[index];
    SecondPassLayer& layer = pass.layers[index];
    layer.partial_start = from.partial_start;
    layer.tiles = from.tiles;
    while (layer.lanes < kWarp && layer.lanes * 4 < layer.tiles)
      layer.lanes *= 2;
    const int64_t outputs = 2 * pass.batch * (layer.channels + 1);
    layer.first_block = static_cast<uint32_t>(pass.blocks);
    layer.blocks = from.tiles > 1 ? static_cast<uint32_t>(ceil_div<int64_t>(outputs * layer.lanes, kThreads)) : 0;
    pass.blocks += layer.blocks;
  }
  return pass;
}

// Writes a block's part of the sums and masses of a layer.
template <typename Acc>
__device__ void second_pass(const SecondPass& pass, int index, uint32_t block, const Outputs<Acc>& out) {
  const SecondPassLayer& layer = pass.layers[index];
  const int64_t output = (static_cast<int64_t>(block) * kThreads + threadIdx.x) / layer.lanes;
  const uint32_t lane = threadIdx.x % layer.lanes;
  const int64_t slots = layer.channels + 1;
  const bool valid = output < 2 * pass.batch * slots;
  double total = 0;
  if (valid) {
    const Acc* partials = out.partials + layer.partial_start + output * layer.tiles;
#pragma unroll 16
    for (uint32_t tile = lane; tile < layer.tiles; tile += layer.lanes)
      total += partials[tile];
  }
  total = lane_sum(total, layer.lanes);
  if (!valid || lane != 0) return;
  const int64_t row = output / 2; // [N, C + 1]
  put_total(pass, index, row / slots, static_cast<int>(row % slots), output % 2, static_cast<Acc>(total), out);
}

} // namespace fdk::cuda
