// Masks on CUDA: one launch for all sizes. A few lanes, or a block, take each cell of a size and read its pixels from
// the mask itself, which fits into the L2 cache. At the mask's own size a thread takes a few pixels.
#include <algorithm>

#include "common.cuh"

namespace fdk::cuda {
namespace {

constexpr int kMaxSizes = 32;        // of a launch
constexpr int kPixelsOfLane = 4;     // of a cell, before it gets more lanes
constexpr int kPixelsOfThread = 4;   // at the mask's own size
constexpr int64_t kWideCell = 16384; // pixels of a cell that takes a whole block

struct SizeWork {
  void* fg;
  void* bg;
  int64_t size[3], pixels;
  uint32_t factor[3]; // the mask's size over this one if that is an integer, else 0
  uint32_t first_block;
  int32_t lanes; // that share a cell: a power of two up to a warp, or kThreads
  bool binary;   // weights are stored as bytes
  bool same;     // cell i is element i of the mask
};

struct MaskWork {
  SizeWork sizes[kMaxSizes];
  Masks args; // without `sizes`, which is in host memory
  int64_t blocks;
  int32_t count;
};
static_assert(sizeof(MaskWork) <= 4096, "the descriptors fit into the kernel parameters");

// A run of pixels along one dimension.
struct Run {
  int64_t first;
  uint32_t count;
};

// Returns the pixels of a cell along one dimension: (M2), or the one of (M5).
__device__ Run cell_pixels(const Masks& args, const SizeWork& size, int dim, int64_t cell) {
  const int64_t from = args.size[dim], to = size.size[dim];
  if (args.resize == MaskResize::kNearest) return {(2 * cell + 1) * from / (2 * to), 1};
  if (size.factor[dim]) return {cell * size.factor[dim], size.factor[dim]};
  const int64_t first = cell * from / to;
  return {first, static_cast<uint32_t>(ceil_div((cell + 1) * from, to) - first)};
}

// The weights of one or more pixels: sums of v·y and v·(1-y). Under `max` fg is the largest y, or -1 if all are
// ignored.
template <typename Acc>
struct Weight {
  Acc fg, bg;
};

template <typename Acc>
__device__ Weight<Acc> merge(MaskResize resize, const Weight<Acc>& a, const Weight<Acc>& b) {
  if (resize != MaskResize::kMax) return {a.fg + b.fg, a.bg + b.bg};
  return b.fg > a.fg || b.fg != b.fg ? b : a; // NaN counts as the largest
}

template <typename M>
__device__ bool is_ignored(const Masks& args, M pixel) {
  if (!args.has_ignore) return false;
  if constexpr (std::is_integral_v<M>) {
    return pixel == static_cast<M>(args.ignore_number);
  } else if constexpr (std::is_same_v<M, double>) {
    return pixel == args.ignore_value;
  } else {
    return widen<float>(pixel) == static_cast<float>(args.ignore_value);
  }
}

// Whether a value is in [0, 1] to within the tolerance; the bounds are exact in float.
template <typename M>
__device__ bool is_weight(const Masks& args, M pixel) {
  if constexpr (std::is_integral_v<M>) {
    return pixel == 0 || pixel == 1;
  } else {
    using Wide = std::conditional_t<std::is_same_v<M, double>, double, float>;
    const auto y = widen<Wide>(pixel);
    const auto tolerance = static_cast<Wide>(args.tolerance);
    return y >= -tolerance && y <= 1 + tolerance;
  }
}

// The weights (M3) of one pixel.
template <typename Acc, typename M>
__device__ Weight<Acc> weight_of_pixel(const Masks& args, M pixel) {
  if (is_ignored(args, pixel)) return {0, 0};
  const Acc y = is_weight(args, pixel) ? widen<Acc>(pixel) : static_cast<Acc>(NAN);
  return {y, 1 - y};
}

// What a pixel adds to its cell.
template <typename Acc, typename M>
__device__ Weight<Acc> weight_of(const Masks& args, M pixel) {
  if (args.resize != MaskResize::kMax) return weight_of_pixel<Acc>(args, pixel);
  return {is_ignored(args, pixel) ? Acc(-1) : weight_of_pixel<Acc>(args, pixel).fg, 0};
}

// Merges the pixels `lane`, `lane` + `lanes`, ... of the cell that begins at `cell`.
template <typename Acc, typename M>
__device__ Weight<Acc> read_pixels(const Masks& args, const M* cell, const Run (&runs)[3], uint32_t lane,
                                   uint32_t lanes) {
  const uint32_t width = runs[2].count, height = runs[1].count;
  const uint32_t count = runs[0].count * height * width;
  Weight<Acc> sum = {args.resize == MaskResize::kMax ? -static_cast<Acc>(INFINITY) : 0, 0};
  if (count == 0) return sum;
  // Rows and columns from one pixel to the next, so that only the first one is divided.
  const uint32_t step_rows = lanes / width, step_columns = lanes - step_rows * width;
  uint32_t row = lane / width, column = lane - row * width;
#pragma unroll 4
  for (uint32_t i = lane; i < count; i += lanes) {
    const uint32_t slice = row < height ? 0 : row / height;
    const M pixel = cell[slice * args.stride[0] + (row - slice * height) * args.stride[1] + column * args.stride[2]];
    sum = merge(args.resize, sum, weight_of<Acc>(args, pixel));
    row += step_rows;
    column += step_columns;
    if (column >= width) {
      column -= width;
      ++row;
    }
  }
  return sum;
}

// Calls body with a value of the type of the mask's elements.
template <typename Body>
__device__ void with_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float());
    case DType::kFloat64:
      return body(double());
    case DType::kBFloat16:
      return body(__nv_bfloat16());
    case DType::kFloat16:
      return body(__half());
    case DType::kUInt8:
      return body(uint8_t());
    case DType::kInt8:
      return body(int8_t());
    case DType::kInt16:
      return body(int16_t());
    case DType::kInt32:
      return body(int32_t());
    default:
      return body(int64_t());
  }
}

// Merges over `lanes` adjacent lanes, or the whole block; the first lane returns the result.
template <typename Acc>
__device__ Weight<Acc> merge_lanes(MaskResize resize, Weight<Acc> sum, int32_t lanes) {
  for (int distance = min(lanes, kWarp) / 2; distance > 0; distance /= 2) {
    const Acc fg = __shfl_xor_sync(kAllLanes, sum.fg, distance);
    const Acc bg = __shfl_xor_sync(kAllLanes, sum.bg, distance);
    sum = merge(resize, sum, {fg, bg});
  }
  if (lanes <= kWarp) return sum;
  __shared__ Weight<Acc> of_warps[kThreads / kWarp];
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = sum;
  __syncthreads();
  sum = of_warps[0];
  for (int warp = 1; warp < kThreads / kWarp; ++warp)
    sum = merge(resize, sum, of_warps[warp]);
  return sum;
}

template <typename Acc>
__device__ void put(const SizeWork& size, void* weights, int64_t at, Acc weight) {
  if (size.binary) {
    static_cast<uint8_t*>(weights)[at] = weight != weight ? kNoWeight : static_cast<uint8_t>(weight);
  } else {
    static_cast<Acc*>(weights)[at] = weight;
  }
}

// Writes the weights of a block's run of pixels at the mask's own size.
template <typename Acc>
__device__ void weights_of_pixels(const Masks& args, const SizeWork& size, uint32_t block) {
  const int64_t first = static_cast<int64_t>(block) * kThreads * kPixelsOfThread + threadIdx.x;
  const int64_t count = args.batch * size.pixels - first;
  with_type(args.dtype, [&](auto element) {
    using M = decltype(element);
    const M* mask = static_cast<const M*>(args.mask) + first;
    M pixels[kPixelsOfThread];
#pragma unroll
    for (int i = 0; i < kPixelsOfThread; ++i)
      if (i * kThreads < count) pixels[i] = mask[i * kThreads];
#pragma unroll
    for (int i = 0; i < kPixelsOfThread; ++i) {
      if (i * kThreads >= count) break;
      const Weight<Acc> weight = weight_of_pixel<Acc>(args, pixels[i]);
      put(size, size.fg, first + i * kThreads, weight.fg);
      if (size.bg) put(size, size.bg, first + i * kThreads, weight.bg);
    }
  });
}

// Writes the weights of a block's cells. The number of the launch's threads fits into Index: 32 bits make the
// divisions, most of the work of a small cell, several times as fast.
template <typename Acc, typename Index>
__device__ void weights_of_cells(const Masks& args, const SizeWork& size, uint32_t block) {
  const Index thread = static_cast<Index>(block) * kThreads + threadIdx.x;
  const Index item = thread / static_cast<uint32_t>(size.lanes); // [N, P]
  const uint32_t lane = threadIdx.x % size.lanes;
  const bool valid = item < static_cast<Index>(args.batch * size.pixels);

  Run runs[3] = {};
  int64_t first = 0; // offset of the cell's first pixel, in elements of the mask
  if (valid) {
    const Index row = item / static_cast<Index>(size.size[2]), slice = row / static_cast<Index>(size.size[1]);
    const Index n = size.size[0] == 1 ? slice : slice / static_cast<Index>(size.size[0]);
    runs[0] = cell_pixels(args, size, 0, slice - n * static_cast<Index>(size.size[0]));
    runs[1] = cell_pixels(args, size, 1, row - slice * static_cast<Index>(size.size[1]));
    runs[2] = cell_pixels(args, size, 2, item - row * static_cast<Index>(size.size[2]));
    first = n * args.stride_n;
    for (int dim = 0; dim < 3; ++dim)
      first += runs[dim].first * args.stride[dim];
  }
  Weight<Acc> sum;
  with_type(args.dtype, [&](auto element) {
    using M = decltype(element);
    sum = read_pixels<Acc>(args, static_cast<const M*>(args.mask) + first, runs, lane, size.lanes);
  });
  sum = merge_lanes(args.resize, sum, size.lanes);
  if (!valid || lane > 0) return;

  if (args.resize == MaskResize::kArea) {
    const Acc count = static_cast<Acc>(runs[0].count * runs[1].count * runs[2].count);
    sum.fg /= count;
    if (size.bg) sum.bg /= count;
  } else if (args.resize == MaskResize::kMax && args.has_ignore) {
    const bool none = sum.fg == Acc(-1); // all pixels of the cell are ignored
    sum.bg = none ? 0 : 1 - sum.fg;
    if (none) sum.fg = 0;
  }
  put(size, size.fg, item, sum.fg);
  if (size.bg) put(size, size.bg, item, sum.bg);
}

template <typename Acc, typename Index>
__global__ void __launch_bounds__(kThreads) masks_kernel(const __grid_constant__ MaskWork work) {
  allow_next_launch();
  int index = work.count - 1;
  while (blockIdx.x < work.sizes[index].first_block)
    --index;
  const SizeWork& size = work.sizes[index];
  const uint32_t block = blockIdx.x - size.first_block;
  if (size.same) {
    weights_of_pixels<Acc>(work.args, size, block);
  } else {
    weights_of_cells<Acc, Index>(work.args, size, block);
  }
}

// Whether cell i of a size is element i of the mask.
bool is_same(const Masks& args, const MaskSize& wanted) {
  int64_t stride = 1;
  for (int dim = 2; dim >= 0; --dim) {
    if (wanted.size[dim] != args.size[dim] || (args.size[dim] > 1 && args.stride[dim] != stride)) return false;
    stride *= args.size[dim];
  }
  return args.batch == 1 || args.stride_n == stride;
}

SizeWork describe_size(const Masks& args, const MaskSize& wanted) {
  SizeWork size = {};
  size.fg = wanted.fg;
  size.bg = wanted.bg;
  size.pixels = pixels_of(wanted);
  size.same = is_same(args, wanted);
  size.binary = wanted.dtype == DType::kUInt8;
  int64_t cell = 1; // pixels of the largest cell
  for (int dim = 0; dim < 3; ++dim) {
    const int64_t from = args.size[dim], to = wanted.size[dim];
    size.size[dim] = to;
    if (to == 0 || args.resize == MaskResize::kNearest) continue;
    if (from % to == 0) size.factor[dim] = static_cast<uint32_t>(from / to);
    cell *= ceil_div(from, to) + (from % to != 0);
  }
  if (cell > INT32_MAX) {
    throw std::runtime_error("A mask must have fewer than 2^31 pixels for each cell of a layer, got " +
                             std::to_string(cell) + ".");
  }
  size.lanes = 1;
  while (size.lanes < kWarp && size.lanes * kPixelsOfLane < cell)
    size.lanes *= 2;
  if (cell >= kWideCell) size.lanes = kThreads;
  return size;
}

template <typename Acc>
void launch_masks(const MaskWork& work, void* stream) {
  const bool fits = work.blocks * kThreads <= INT32_MAX;
  const auto kernel = fits ? masks_kernel<Acc, uint32_t> : masks_kernel<Acc, int64_t>;
  launch("masks_kernel", kernel, work.blocks, kThreads, stream, work);
}

} // namespace

void masks(const Masks& args, int device, void* stream) {
  const DeviceGuard guard(device);
  for (int64_t first = 0; first < args.num_sizes; first += kMaxSizes) {
    MaskWork work = {};
    work.args = args;
    work.args.sizes = nullptr;
    work.count = static_cast<int32_t>(std::min<int64_t>(kMaxSizes, args.num_sizes - first));
    for (int32_t index = 0; index < work.count; ++index) {
      SizeWork& size = work.sizes[index] = describe_size(args, args.sizes[first + index]);
      size.first_block = static_cast<uint32_t>(work.blocks);
      const int64_t cells = args.batch * size.pixels;
      work.blocks += size.same ? ceil_div<int64_t>(cells, kThreads * kPixelsOfThread)
                               : ceil_div<int64_t>(cells * size.lanes, kThreads);
    }
    const auto run = args.accumulate == DType::kFloat64 ? launch_masks<double> : launch_masks<float>;
    run(work, stream);
  }
}

} // namespace fdk::cuda
