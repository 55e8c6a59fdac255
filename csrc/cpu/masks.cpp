// Masks on the CPU: computes every size from the whole mask, one row of cells at a time.
#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "../layout.h"
#include "mask_rows.h"
#include "parallel.h"

namespace fdk::cpu {
namespace {

// The mask pixels of a cell along one dimension: (M2), or the one pixel of (M5).
struct Range {
  int64_t begin, end;
};

Range cell_range(int64_t cell, int64_t to, int64_t from, MaskResize resize) {
  if (resize == MaskResize::kNearest) {
    const int64_t centre = (2 * cell + 1) * from / (2 * to);
    return {centre, centre + 1};
  }
  return {cell * from / to, ((cell + 1) * from + to - 1) / to};
}

// The mask columns of each cell in a row, and their number.
struct RowCells {
  std::vector<Range> columns;
  std::vector<double> width;
};

RowCells cells_of_row(const Masks& mask, const MaskSize& layer) {
  RowCells cells;
  for (int64_t i = 0; i < layer.size[2]; ++i) {
    cells.columns.push_back(cell_range(i, layer.size[2], mask.size[2], mask.resize));
    cells.width.push_back(static_cast<double>(cells.columns.back().end - cells.columns.back().begin));
  }
  return cells;
}

// The type in which the mask rows of a row of cells are added up: double, or float where that is exact.
template <class S>
struct ColumnSum {
  using type = double;
};
template <>
struct ColumnSum<uint8_t> {
  using type = float;
};

// Sums of v·y and v·(1-y), or the largest y, over the mask rows of a row of cells: for each mask column, then for each
// cell.
struct Accumulators {
  std::vector<double> fg, bg;
  std::vector<float> fg_floats, bg_floats;
  std::vector<double> fg_cells, bg_cells;

  std::vector<double>& fg_of(double) { return fg; }
  std::vector<double>& bg_of(double) { return bg; }
  std::vector<float>& fg_of(float) { return fg_floats; }
  std::vector<float>& bg_of(float) { return bg_floats; }
};

template <class S, bool kIgnore, class A>
void add_row(const S* row, int64_t stride, int64_t width, double ignore_index, A* fg, A* bg) {
  for_each_pixel(row, stride, width, [&](int64_t i, const S& value) {
    const A y = static_cast<A>(static_cast<double>(value));
    const A valid = !kIgnore || y != static_cast<A>(ignore_index); // (M1)
    fg[i] += kIgnore ? y * valid : y;
    if (kIgnore) bg[i] += (1 - y) * valid;
  });
}

// Returns the larger value; NaN counts as the largest.
template <class A>
A larger(A best, A value) {
  return value > best || value != value ? value : best;
}

template <class S, bool kIgnore, class A>
void max_row(const S* row, int64_t stride, int64_t width, double ignore_index, A* best) {
  for (int64_t i = 0; i < width; ++i) {
    const A y = static_cast<A>(static_cast<double>(row[i * stride]));
    best[i] = larger(best[i], !kIgnore || y != static_cast<A>(ignore_index) ? y : static_cast<A>(kNotValid));
  }
}

template <class T>
void write_row(const double* values, int64_t count, T* out) {
  for (int64_t i = 0; i < count; ++i)
    out[i] = static_cast<T>(values[i]);
}
void write_row(const double* values, int64_t count, uint8_t* out) {
  for (int64_t i = 0; i < count; ++i)
    out[i] = values[i] != values[i] ? kNoWeight : static_cast<uint8_t>(static_cast<int64_t>(values[i]));
}

void write_row(const double* values, int64_t count, void* out, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::kFloat64:
      return write_row(values, count, static_cast<double*>(out) + at);
    case DType::kFloat32:
      return write_row(values, count, static_cast<float*>(out) + at);
    default:
      return write_row(values, count, static_cast<uint8_t*>(out) + at);
  }
}

// Writes a row of cells of sample n; `row` counts over (d0, d1) of the layer.
template <class S, bool kIgnore>
void write_cells(const Masks& mask, double ignore_index, const MaskSize& layer, const RowCells& cells, int64_t n,
                 int64_t row, Accumulators& sums) {
  using A = typename ColumnSum<S>::type;
  const int64_t width = mask.size[2], out = layer.size[2];
  const Range planes = cell_range(row / layer.size[1], layer.size[0], mask.size[0], mask.resize);
  const Range lines = cell_range(row % layer.size[1], layer.size[1], mask.size[1], mask.resize);
  const bool is_max = mask.resize == MaskResize::kMax;
  const double start = !is_max ? 0 : kIgnore ? kNotValid : -std::numeric_limits<double>::infinity();
  sums.fg_of(A()).assign(width, static_cast<A>(start));
  if (kIgnore && !is_max) sums.bg_of(A()).assign(width, 0);
  A *fg = sums.fg_of(A()).data(), *bg = sums.bg_of(A()).data();
  const S* sample = static_cast<const S*>(mask.mask) + n * mask.stride_n;
  for (int64_t z = planes.begin; z < planes.end; ++z) {
    for (int64_t y = lines.begin; y < lines.end; ++y) {
      const S* line = sample + z * mask.stride[0] + y * mask.stride[1];
      is_max ? max_row<S, kIgnore>(line, mask.stride[2], width, ignore_index, fg)
             : add_row<S, kIgnore>(line, mask.stride[2], width, ignore_index, fg, bg);
    }
  }
  sums.fg_cells.resize(out);
  sums.bg_cells.resize(out);
  double *fg_cells = sums.fg_cells.data(), *bg_cells = sums.bg_cells.data();
  for (int64_t i = 0; i < out; ++i) {
    double w_fg = start, w_bg = 0;
    for (int64_t x = cells.columns[i].begin; x < cells.columns[i].end; ++x) {
      w_fg = is_max ? larger<double>(w_fg, fg[x]) : w_fg + fg[x];
      if (kIgnore && !is_max) w_bg += bg[x];
    }
    fg_cells[i] = w_fg;
    bg_cells[i] = w_bg;
  }
  if (!is_max) { // (M3)
    const double height = static_cast<double>((planes.end - planes.begin) * (lines.end - lines.begin));
    for (int64_t i = 0; i < out; ++i)
      fg_cells[i] /= height * cells.width[i];
    for (int64_t i = 0; kIgnore && i < out; ++i)
      bg_cells[i] /= height * cells.width[i];
  } else if (kIgnore) { // (M4)
    for (int64_t i = 0; i < out; ++i) {
      const bool valid = fg_cells[i] != kNotValid;
      bg_cells[i] = valid ? 1 - fg_cells[i] : 0;
      fg_cells[i] = valid ? fg_cells[i] : 0;
    }
  }
  const int64_t at = (n * layer.size[0] * layer.size[1] + row) * out;
  write_row(fg_cells, out, layer.fg, layer.dtype, at);
  if (kIgnore) write_row(bg_cells, out, layer.bg, layer.dtype, at);
}

template <class T, class A>
T stored(A weight) {
  if (std::is_same<T, uint8_t>::value && weight != weight) return static_cast<T>(kNoWeight);
  return static_cast<T>(weight);
}

// Writes the weights of a pixel of a layer of the mask's own size, where every resize copies. Ignored pixels are
// multiplied by 0, as they are finite: a branch would be mispredicted at every border of a region.
template <class S, class T, bool kIgnore>
void copy_pixel(const S& value, const Masks& mask, double ignore_index, T& fg, T& bg) {
  if constexpr (std::is_integral<S>::value) {
    const T valid = !kIgnore || value != static_cast<S>(mask.ignore_number); // (M1)
    fg = static_cast<T>(static_cast<T>(value) * valid);
    if (kIgnore) bg = static_cast<T>(static_cast<T>(1 - value) * valid);
  } else {
    constexpr bool kWide = std::is_same<S, double>::value || std::is_same<T, double>::value;
    using A = typename std::conditional<kWide, double, float>::type;
    const A y = static_cast<A>(value), valid = !kIgnore || y != static_cast<A>(ignore_index); // (M1)
    fg = stored<T>(y * valid);
    if (kIgnore) bg = stored<T>((1 - y) * valid);
  }
}

template <class S, class T, bool kIgnore>
void copy_pixels(const Masks& mask, double ignore_index, const MaskSize& layer, int64_t n, int64_t row) {
  const int64_t width = mask.size[2], stride = mask.stride[2];
  const int64_t at = (n * layer.size[0] * layer.size[1] + row) * width;
  T *fg = static_cast<T*>(layer.fg) + at, *bg = kIgnore ? static_cast<T*>(layer.bg) + at : fg, unused;
  for_each_pixel(row_of<S>(mask, n, row), stride, width, [&](int64_t i, const S& value) {
    copy_pixel<S, T, kIgnore>(value, mask, ignore_index, fg[i], kIgnore ? bg[i] : unused);
  });
}

bool has_size_of_mask(const Masks& mask, const MaskSize& layer) {
  return std::equal(mask.size, mask.size + 3, layer.size);
}

// Writes a row of cells, or of pixels if the layer has the mask's size.
template <class S, bool kIgnore>
void write_any_row(const Masks& mask, double ignore_index, const MaskSize& layer, const RowCells& cells, int64_t n,
                   int64_t row, Accumulators& sums) {
  if (!has_size_of_mask(mask, layer)) {
    write_cells<S, kIgnore>(mask, ignore_index, layer, cells, n, row, sums);
  } else if (layer.dtype == DType::kFloat64) {
    copy_pixels<S, double, kIgnore>(mask, ignore_index, layer, n, row);
  } else if (layer.dtype == DType::kFloat32) {
    copy_pixels<S, float, kIgnore>(mask, ignore_index, layer, n, row);
  } else {
    copy_pixels<S, uint8_t, kIgnore>(mask, ignore_index, layer, n, row);
  }
}

using WriteRow = void (*)(const Masks&, double, const MaskSize&, const RowCells&, int64_t, int64_t, Accumulators&);

WriteRow row_writer(const Masks& mask) {
  WriteRow chosen = nullptr;
  with_dtype(mask, [&](auto value) {
    using S = decltype(value);
    chosen = mask.has_ignore ? write_any_row<S, true> : write_any_row<S, false>;
  });
  return chosen;
}

// Writes the weights of every size of a mask whose values are weights, ignored or NaN.
void resize(const Masks& mask, int num_threads) {
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
  std::vector<RowCells> cells;
  int64_t num_items = 0;
  for (int64_t s = 0; s < num_sizes; ++s) {
    const int64_t rows = sizes[s].size[0] * sizes[s].size[1];
    const int64_t per_row =
        std::max<int64_t>(std::max(pixels, rows * sizes[s].size[2]) / std::max<int64_t>(rows, 1), 1);
    const int64_t per_item = std::max<int64_t>(kPixelsPerItem / per_row, 1);
    const int64_t items = (rows + per_item - 1) / per_item;
    cuts.push_back({num_items, per_item, items});
    cells.push_back(has_size_of_mask(mask, sizes[s]) ? RowCells() : cells_of_row(mask, sizes[s]));
    num_items += mask.batch * items;
  }
  const WriteRow write_row = row_writer(mask);
  parallel_for(num_items, num_threads, [&](int64_t item) {
    int64_t s = num_sizes - 1;
    while (cuts[s].first > item)
      --s;
    const int64_t index = item - cuts[s].first, n = index / cuts[s].items_per_sample;
    const int64_t begin = index % cuts[s].items_per_sample * cuts[s].rows_per_item;
    const int64_t end = std::min(begin + cuts[s].rows_per_item, sizes[s].size[0] * sizes[s].size[1]);
    Accumulators sums;
    for (int64_t row = begin; row < end; ++row)
      write_row(mask, ignore_index, sizes[s], cells[s], n, row, sums);
  });
}

} // namespace

void masks(const Masks& mask, int num_threads) {
  if (mask_is_valid(mask, num_threads)) return resize(mask, num_threads);
  const std::vector<double> copy = copy_with_nan(mask);
  Masks copied = mask;
  copied.mask = copy.data();
  copied.dtype = DType::kFloat64;
  copied.ignore_value = kNotValid;
  copied.stride[2] = 1;
  copied.stride[1] = mask.size[2];
  copied.stride[0] = mask.size[1] * copied.stride[1];
  copied.stride_n = mask.size[0] * copied.stride[0];
  resize(copied, num_threads);
}

} // namespace fdk::cpu
