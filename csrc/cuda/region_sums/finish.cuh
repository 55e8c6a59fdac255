// The second pass of region_sums forward: partial sums are added up, always in the same order.
#pragma once

#include "access.cuh"

namespace fdk::cuda {

struct LayerFinish {
  int64_t channels, pixels;
  int64_t channel_start; // of the layer's channels in the sums
  int64_t partial_start; // of the layer's partial sums in the workspace
  uint32_t tiles;        // of which each output has a partial sum
  uint32_t lanes;        // that add those of one output
  uint32_t first_block, blocks;
};

// What a second pass has to know of the first one.
struct Finish {
  LayerFinish layers[kMaxLayers];
  int64_t batch, total_channels, num_layers;
  int64_t blocks;
  int32_t first_layer, count;
};

inline Finish make_finish(const Work& work) {
  Finish finish = {};
  finish.batch = work.batch;
  finish.total_channels = work.total_channels;
  finish.num_layers = work.num_layers;
  finish.first_layer = work.first_layer;
  finish.count = work.count;
  for (int32_t index = 0; index < work.count; ++index) {
    const LayerWork& from = work.layers[index];
    LayerFinish& layer = finish.layers[index];
    layer.channels = from.channels;
    layer.pixels = from.pixels;
    layer.channel_start = from.channel_start;
    layer.partial_start = from.partial_start;
    layer.tiles = from.tiles;
    layer.lanes = 1;
    while (layer.lanes < kWarp && layer.lanes * 4 < layer.tiles)
      layer.lanes *= 2;
    const int64_t outputs = 2 * work.batch * (layer.channels + 1);
    layer.first_block = static_cast<uint32_t>(finish.blocks);
    layer.blocks = from.tiles > 1 ? static_cast<uint32_t>(ceil_div<int64_t>(outputs * layer.lanes, kThreads)) : 0;
    finish.blocks += layer.blocks;
  }
  return finish;
}

// Writes the sums and masses that fall to a block of the layer.
template <typename Acc>
__device__ void finish_sums(const Finish& finish, int index, uint32_t block, const Outputs<Acc>& out) {
  const LayerFinish& layer = finish.layers[index];
  const int64_t output = (static_cast<int64_t>(block) * kThreads + threadIdx.x) / layer.lanes;
  const uint32_t lane = threadIdx.x % layer.lanes;
  const int64_t slots = layer.channels + 1;
  const bool valid = output < 2 * finish.batch * slots;
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
  put_total(finish, index, row / slots, static_cast<int>(row % slots), output % 2, static_cast<Acc>(total), out);
}

} // namespace fdk::cuda
