// How the elements of a layer are laid out in memory.
#pragma once

#include "op.h"

namespace fdk {

// Static, like everything that files of several instruction sets include: the linker must not merge their copies.
static inline int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
    case DType::kInt64:
      return 8;
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kUInt8:
    case DType::kInt8:
      return 1;
    default:
      return 2;
  }
}

static inline int64_t pixels_of(const Layer& layer) { return layer.size[0] * layer.size[1] * layer.size[2]; }
static inline int64_t pixels_of(const RegionLayer& layer) { return layer.size[0] * layer.size[1] * layer.size[2]; }
static inline int64_t pixels_of(const MaskSize& size) { return size.size[0] * size.size[1] * size.size[2]; }

// The pixels of a layer after merging dimensions; unused ones have size 1 and come first.
struct MergedPixels {
  int64_t size[3], stride[3], upstream_stride[3];
};

// Merges each spatial dimension into the next inner one where it continues that one: the rows of a contiguous map
// become one. With an upstream gradient (`upstream_stride` is not null) it must continue there as well.
static inline MergedPixels merge_dimensions(const int64_t (&size)[3], const int64_t (&stride)[3],
                                            const int64_t* upstream_stride) {
  MergedPixels merged = {{1, 1, 1}, {1, 1, 1}, {1, 1, 1}};
  int at = 3;
  for (int dim = 2; dim >= 0; --dim) {
    if (size[dim] == 1) continue;
    const bool continues =
        at < 3 && stride[dim] == merged.size[at] * merged.stride[at] &&
        (upstream_stride == nullptr || upstream_stride[dim] == merged.size[at] * merged.upstream_stride[at]);
    if (continues) {
      merged.size[at] *= size[dim];
      continue;
    }
    --at;
    merged.size[at] = size[dim];
    merged.stride[at] = stride[dim];
    if (upstream_stride != nullptr) merged.upstream_stride[at] = upstream_stride[dim];
  }
  return merged;
}

} // namespace fdk
