// Stage layer_masks on the CPU: every size from the whole mask, a row of cells at a time.
#include "../layer_masks.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "half.h"
#include "parallel.h"

namespace fdk::cpu {
namespace {

// Mask pixels that one item of work reads, about.
constexpr int64_t kPixelsPerItem = 1 << 14;

// Marks what is not valid under `max`, where every valid value is at least 0.
constexpr double kNotValid = -1;

struct BFloat16 {
  uint16_t bits;
  explicit operator double() const { return bfloat16_to_float(bits); }
};
struct Float16 {
  uint16_t bits;
  explicit operator double() const { return float16_to_float(bits); }
};

// The mask pixels of one cell along one dimension, (M2); under `nearest` the one of (M5).
struct Range {
  int64_t begin, end;
};

Range cell(int64_t place, int64_t out, int64_t total, MaskResize resize) {
  if (resize == MaskResize::kNearest) {
    const int64_t centre = (2 * place + 1) * total / (2 * out);
    return {centre, centre + 1};
  }
  return {place * total / out, ((place + 1) * total + out - 1) / out};
}

// What one thread collects of the rows of a row of cells: v y and v (1 - y), or the largest y, for each mask column.
struct Columns {
  std::vector<double> fg, bg;
};

template <class S, bool kIgnore>
void add_row(const S* row, int64_t stride, int64_t width, double ignore_index, double* fg, double* bg) {
  for (int64_t i = 0; i < width; ++i) {
    const double y = static_cast<double>(row[i * stride]);
    const bool valid = !kIgnore || y != ignore_index; // (M1)
    fg[i] += valid ? y : 0;
    if (kIgnore) bg[i] += valid ? 1 - y : 0;
  }
}

// A NaN stays and wins.
double larger(double best, double value) { return value > best || value != value ? value : best; }

template <class S, bool kIgnore>
void max_row(const S* row, int64_t stride, int64_t width, double ignore_index, double* best) {
  for (int64_t i = 0; i < width; ++i) {
    const double y = static_cast<double>(row[i * stride]);
    best[i] = larger(best[i], !kIgnore || y != ignore_index ? y : kNotValid);
  }
}

void write(void* out, DType dtype, int64_t index, double value) {
  switch (dtype) {
    case DType::kFloat64:
      static_cast<double*>(out)[index] = value;
      break;
    case DType::kFloat32:
      static_cast<float*>(out)[index] = static_cast<float>(value);
      break;
    default:
      static_cast<uint8_t*>(out)[index] = static_cast<uint8_t>(static_cast<int64_t>(value));
  }
}

// One row of cells of one sample: `row` counts (d0, d1) of the layer.
template <class S, bool kIgnore>
void write_cells(const LayerMasks& mask, double ignore_index, const MaskSize& layer, int64_t n, int64_t row,
                 Columns& columns) {
  const int64_t width = mask.size[2], out = layer.size[2];
  const Range planes = cell(row / layer.size[1], layer.size[0], mask.size[0], mask.resize);
  const Range lines = cell(row % layer.size[1], layer.size[1], mask.size[1], mask.resize);
  const bool is_max = mask.resize == MaskResize::kMax;
  const double start = !is_max ? 0 : kIgnore ? kNotValid : -std::numeric_limits<double>::infinity();
  columns.fg.assign(width, start);
  if (kIgnore && !is_max) columns.bg.assign(width, 0);
  double *fg = columns.fg.data(), *bg = columns.bg.data();
  const S* sample = static_cast<const S*>(mask.mask) + n * mask.stride_n;
  for (int64_t z = planes.begin; z < planes.end; ++z) {
    for (int64_t y = lines.begin; y < lines.end; ++y) {
      const S* line = sample + z * mask.stride[0] + y * mask.stride[1];
      is_max ? max_row<S, kIgnore>(line, mask.stride[2], width, ignore_index, fg)
             : add_row<S, kIgnore>(line, mask.stride[2], width, ignore_index, fg, bg);
    }
  }
  const int64_t num_rows = layer.size[0] * layer.size[1], at = (n * num_rows + row) * out;
  const int64_t height = (planes.end - planes.begin) * (lines.end - lines.begin);
  for (int64_t i = 0; i < out; ++i) {
    const Range across = cell(i, out, width, mask.resize);
    double w_fg = start, w_bg = 0;
    for (int64_t x = across.begin; x < across.end; ++x) {
      w_fg = is_max ? larger(w_fg, fg[x]) : w_fg + fg[x];
      if (kIgnore && !is_max) w_bg += bg[x];
    }
    if (!is_max) { // (M3)
      const double count = static_cast<double>(height * (across.end - across.begin));
      w_fg /= count;
      w_bg /= count;
    } else if (kIgnore) { // (M4)
      w_bg = w_fg >= 0 ? 1 - w_fg : 0;
      w_fg = w_fg < 0 ? 0 : w_fg;
    }
    write(layer.fg, layer.dtype, at + i, w_fg);
    if (kIgnore) write(layer.bg, layer.dtype, at + i, w_bg);
  }
}

using WriteCells = void (*)(const LayerMasks&, double, const MaskSize&, int64_t, int64_t, Columns&);

template <class S>
WriteCells choose(const LayerMasks& mask) {
  return mask.has_ignore ? write_cells<S, true> : write_cells<S, false>;
}

WriteCells choose(const LayerMasks& mask) {
  switch (mask.dtype) {
    case DType::kInt8:
      return choose<int8_t>(mask);
    case DType::kInt16:
      return choose<int16_t>(mask);
    case DType::kInt32:
      return choose<int32_t>(mask);
    case DType::kInt64:
      return choose<int64_t>(mask);
    case DType::kFloat32:
      return choose<float>(mask);
    case DType::kFloat64:
      return choose<double>(mask);
    case DType::kBFloat16:
      return choose<BFloat16>(mask);
    case DType::kFloat16:
      return choose<Float16>(mask);
    default:
      return choose<uint8_t>(mask);
  }
}

} // namespace

void layer_masks(const LayerMasks& mask, int num_threads) {
  const MaskSize* sizes = mask.sizes;
  const int64_t num_sizes = mask.num_sizes;
  const bool is_integer = mask.dtype >= DType::kUInt8;
  const double ignore_index = is_integer ? static_cast<double>(mask.ignore_number) : mask.ignore_value;
  // An item is some rows of cells of one sample at one size; `first` counts the items before each size.
  struct Cut {
    int64_t first, rows_per_item, items_per_sample;
  };
  const int64_t pixels = mask.size[0] * mask.size[1] * mask.size[2];
  std::vector<Cut> cuts;
  int64_t num_items = 0;
  for (int64_t s = 0; s < num_sizes; ++s) {
    const int64_t rows = sizes[s].size[0] * sizes[s].size[1];
    const int64_t per_row =
        std::max<int64_t>(std::max(pixels, rows * sizes[s].size[2]) / std::max<int64_t>(rows, 1), 1);
    const int64_t per_item = std::max<int64_t>(kPixelsPerItem / per_row, 1);
    const int64_t items = (rows + per_item - 1) / per_item;
    cuts.push_back({num_items, per_item, items});
    num_items += mask.batch * items;
  }
  const WriteCells write_row = choose(mask);
  parallel_for(num_items, num_threads, [&](int64_t item) {
    int64_t s = num_sizes - 1;
    while (cuts[s].first > item)
      --s;
    const int64_t index = item - cuts[s].first, n = index / cuts[s].items_per_sample;
    const int64_t begin = index % cuts[s].items_per_sample * cuts[s].rows_per_item;
    const int64_t end = std::min(begin + cuts[s].rows_per_item, sizes[s].size[0] * sizes[s].size[1]);
    Columns columns;
    for (int64_t row = begin; row < end; ++row)
      write_row(mask, ignore_index, sizes[s], n, row, columns);
  });
}

} // namespace fdk::cpu
