// Masks on the CPU: computes every size from the whole mask, one row of cells at a time.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "../layout.h"
#include "mask_kernels.h"
#include "mask_rows.h"
#include "parallel.h"
#include "work.h"

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
  int halvings = -1; // that make the cells of the columns, if all have 2^halvings
};

RowCells cells_of_row(const Masks& mask, const MaskSize& layer) {
  RowCells cells;
  const int64_t from = mask.size[2], to = layer.size[2];
  for (int64_t i = 0; i < to; ++i) {
    cells.columns.push_back(cell_range(i, to, from, mask.resize));
    cells.width.push_back(static_cast<double>(cells.columns.back().end - cells.columns.back().begin));
  }
  for (int k = 0; mask.resize != MaskResize::kNearest && to > 0 && to << k <= from; ++k)
    if (to << k == from) cells.halvings = k;
  return cells;
}

// The most mask pixels that a cell of the layer has.
int64_t largest_cell(const Masks& mask, const MaskSize& layer) {
  int64_t pixels = 1;
  for (int dim = 0; dim < 3; ++dim)
    pixels *= mask.size[dim] / std::max<int64_t>(layer.size[dim], 1) + 2;
  return pixels;
}

// Sums of v·y and v·(1-y), or the largest y, over the mask rows of a row of cells, in A: for each mask column, then for
// each cell.
template <class A>
struct Accumulators {
  std::vector<A> fg, bg, halved;
  std::vector<double> fg_cells, bg_cells;
};

// A pixel as A: a byte of an integer mask as it is.
template <class A, class S>
A number(const S& value) {
  if constexpr (std::is_integral<A>::value) return static_cast<A>(value);
  return static_cast<A>(static_cast<double>(value));
}

// for_each_pixel for bodies that have nothing to do with one another, as those that write to element i alone.
template <class S, class Body>
void for_each_pixel_apart(const S* row, int64_t stride, int64_t width, const Body& body) {
  if (stride != 1) return for_each_pixel(row, stride, width, body);
#pragma omp simd
  for (int64_t i = 0; i < width; ++i)
    body(i, row[i]);
}

template <class S, bool kIgnore, class A>
void add_row(const S* row, int64_t stride, int64_t width, double ignore_index, A* fg, A* bg) {
  const A ignored = static_cast<A>(ignore_index);
  for_each_pixel_apart(row, stride, width, [=](int64_t i, const S& value) {
    const A y = number<A>(value), valid = static_cast<A>(!kIgnore || y != ignored); // (M1)
    fg[i] = static_cast<A>(fg[i] + (kIgnore ? y * valid : y));
    if (kIgnore) bg[i] = static_cast<A>(bg[i] + (1 - y) * valid);
  });
}

// Returns the larger value; NaN counts as the largest.
template <class A>
A larger(A best, A value) {
  return value > best || value != value ? value : best;
}

template <class S, bool kIgnore, class A>
void max_row(const S* row, int64_t stride, int64_t width, double ignore_index, A* best) {
  const A ignored = static_cast<A>(ignore_index);
  for_each_pixel_apart(row, stride, width, [=](int64_t i, const S& value) {
    const A y = number<A>(value);
    best[i] = larger(best[i], !kIgnore || y != ignored ? y : static_cast<A>(kNotValid));
  });
}

// Adds up, or takes the largest of, each two neighbours.
template <class A>
void halve(const A* values, int64_t count, bool is_max, A* out) {
  if (is_max) {
    for (int64_t i = 0; i < count; ++i)
      out[i] = larger(values[2 * i], values[2 * i + 1]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i)
      out[i] = static_cast<A>(values[2 * i] + values[2 * i + 1]);
  }
}

// Adds up, or takes the largest of, the mask columns of each cell; `columns` and `room` are overwritten.
template <class A>
void add_columns(std::vector<A>& columns, std::vector<A>& room, const RowCells& cells, bool is_max, double* out) {
  const int64_t count = static_cast<int64_t>(cells.columns.size());
  if (cells.halvings >= 0) {
    room.resize(columns.size());
    A *values = columns.data(), *halved = room.data();
    for (int k = cells.halvings - 1; k >= 0; --k) {
      halve(values, count << k, is_max, halved);
      std::swap(values, halved);
    }
    for (int64_t i = 0; i < count; ++i)
      out[i] = static_cast<double>(values[i]);
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const Range range = cells.columns[i];
    double total = columns[range.begin];
    for (int64_t x = range.begin + 1; x < range.end; ++x)
      total = is_max ? larger<double>(total, columns[x]) : total + columns[x];
    out[i] = total;
  }
}

// Divides the sums of a row of cells by their pixels, `height` mask rows of the width of each (M3).
void divide(const RowCells& cells, double height, double* sums) {
  const int64_t count = static_cast<int64_t>(cells.width.size());
  int exponent = 0;
  if (cells.halvings >= 0 && count > 0 && std::frexp(height * cells.width[0], &exponent) == 0.5) {
    const double reciprocal = 1 / (height * cells.width[0]); // exact, and a product takes less time
    for (int64_t i = 0; i < count; ++i)
      sums[i] *= reciprocal;
    return;
  }
  for (int64_t i = 0; i < count; ++i)
    sums[i] /= height * cells.width[i];
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
template <class S, bool kIgnore, class A>
void write_cells(const Masks& mask, double ignore_index, const MaskSize& layer, const RowCells& cells, int64_t n,
                 int64_t row, Accumulators<A>& sums) {
  const int64_t width = mask.size[2], out = layer.size[2];
  const Range planes = cell_range(row / layer.size[1], layer.size[0], mask.size[0], mask.resize);
  const Range lines = cell_range(row % layer.size[1], layer.size[1], mask.size[1], mask.resize);
  const bool is_max = mask.resize == MaskResize::kMax;
  // `max` begins below every weight, which may lie below 0 by rounding.
  const double start = !is_max || std::is_integral<A>::value ? 0 : -std::numeric_limits<double>::infinity();
  sums.fg.assign(width, static_cast<A>(is_max && kIgnore ? kNotValid : start));
  if (kIgnore && !is_max) sums.bg.assign(width, 0);
  const S* sample = static_cast<const S*>(mask.mask) + n * mask.stride_n;
  for (int64_t z = planes.begin; z < planes.end; ++z) {
    for (int64_t y = lines.begin; y < lines.end; ++y) {
      const S* line = sample + z * mask.stride[0] + y * mask.stride[1];
      is_max ? max_row<S, kIgnore>(line, mask.stride[2], width, ignore_index, sums.fg.data())
             : add_row<S, kIgnore>(line, mask.stride[2], width, ignore_index, sums.fg.data(), sums.bg.data());
    }
  }
  sums.fg_cells.resize(out);
  sums.bg_cells.resize(out);
  double *fg_cells = sums.fg_cells.data(), *bg_cells = sums.bg_cells.data();
  add_columns(sums.fg, sums.halved, cells, is_max, fg_cells);
  if (!is_max) {
    const double height = static_cast<double>((planes.end - planes.begin) * (lines.end - lines.begin));
    divide(cells, height, fg_cells);
    if (kIgnore) {
      add_columns(sums.bg, sums.halved, cells, is_max, bg_cells);
      divide(cells, height, bg_cells);
    }
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
  for_each_pixel_apart(row_of<S>(mask, n, row), stride, width, [&](int64_t i, const S& value) {
    copy_pixel<S, T, kIgnore>(value, mask, ignore_index, fg[i], kIgnore ? bg[i] : unused);
  });
}

bool has_size_of_mask(const Masks& mask, const MaskSize& layer) {
  return std::equal(mask.size, mask.size + 3, layer.size);
}

// Rows [begin, end) of sample n, counted over (d0, d1) of a layer.
struct LayerRows {
  int64_t n, begin, end;
};

template <class S, bool kIgnore, class A>
void write_rows_of_cells(const Masks& mask, double ignore_index, const MaskSize& layer, const RowCells& cells,
                         const LayerRows& rows) {
  Accumulators<A> sums;
  for (int64_t row = rows.begin; row < rows.end; ++row)
    write_cells<S, kIgnore>(mask, ignore_index, layer, cells, rows.n, row, sums);
}

template <class S, bool kIgnore, class T>
void copy_rows(const Masks& mask, double ignore_index, const MaskSize& layer, const LayerRows& rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row)
    copy_pixels<S, T, kIgnore>(mask, ignore_index, layer, rows.n, row);
}

// Writes rows of cells, or of pixels if the layer has the mask's size.
template <class S, bool kIgnore>
void write_rows(const Masks& mask, double ignore_index, const MaskSize& layer, const RowCells& cells,
                const LayerRows& rows) {
  if (has_size_of_mask(mask, layer)) {
    if (layer.dtype == DType::kFloat64) return copy_rows<S, kIgnore, double>(mask, ignore_index, layer, rows);
    if (layer.dtype == DType::kFloat32) return copy_rows<S, kIgnore, float>(mask, ignore_index, layer, rows);
    return copy_rows<S, kIgnore, uint8_t>(mask, ignore_index, layer, rows);
  }
  if constexpr (std::is_same<S, uint8_t>::value) { // as narrow as a sum may be
    const int64_t pixels = largest_cell(mask, layer);
    if (pixels <= std::numeric_limits<int16_t>::max())
      return write_rows_of_cells<S, kIgnore, int16_t>(mask, ignore_index, layer, cells, rows);
    if (pixels <= std::numeric_limits<int32_t>::max())
      return write_rows_of_cells<S, kIgnore, int32_t>(mask, ignore_index, layer, cells, rows);
  }
  write_rows_of_cells<S, kIgnore, double>(mask, ignore_index, layer, cells, rows);
}

using WriteRows = void (*)(const Masks&, double, const MaskSize&, const RowCells&, const LayerRows&);

// Of a mask of bytes or of floating point.
WriteRows rows_writer(const Masks& mask) {
  WriteRows chosen = mask.has_ignore ? write_rows<uint8_t, true> : write_rows<uint8_t, false>;
  if (mask.dtype == DType::kUInt8) return chosen;
  with_floating_dtype(mask, [&](auto value) {
    using S = decltype(value);
    chosen = mask.has_ignore ? write_rows<S, true> : write_rows<S, false>;
  });
  return chosen;
}

// Writes the weights of every size of a mask of bytes, 0, 1 or ignored, or of one of floating point whose values are
// weights, ignored or NaN.
void resize(const Masks& mask, int num_threads) {
  const MaskSize* sizes = mask.sizes;
  const int64_t num_sizes = mask.num_sizes;
  const bool is_bytes = mask.dtype == DType::kUInt8;
  const double ignore_index = is_bytes ? static_cast<double>(mask.ignore_number) : mask.ignore_value;
  // An item is some rows of cells of one sample at one size; `first` counts the items of a sample before each size.
  struct Cut {
    int64_t first, rows_per_item;
  };
  const int64_t pixels = mask.size[0] * mask.size[1] * mask.size[2];
  std::vector<Cut> cuts;
  std::vector<RowCells> cells;
  int64_t items_of_sample = 0;
  for (int64_t s = 0; s < num_sizes; ++s) {
    const int64_t rows = sizes[s].size[0] * sizes[s].size[1];
    const int64_t per_row =
        std::max<int64_t>(std::max(pixels, rows * sizes[s].size[2]) / std::max<int64_t>(rows, 1), 1);
    const int64_t per_item = std::max<int64_t>(kPixelsPerItem / per_row, 1);
    cuts.push_back({items_of_sample, per_item});
    cells.push_back(has_size_of_mask(mask, sizes[s]) ? RowCells() : cells_of_row(mask, sizes[s]));
    items_of_sample += ceil_div(rows, per_item);
  }
  const WriteRows write_rows = rows_writer(mask);
  constexpr int64_t kWork = 4; // of adding up a pixel, beside that of reading it
  const int threads = useful_threads(kWork * mask.batch * pixels * num_sizes, num_threads);
  // Sample after sample, as each thread has written the bytes of some of them.
  parallel_for(mask.batch * items_of_sample, threads, [&](int64_t item) {
    const int64_t n = item / items_of_sample, index = item % items_of_sample;
    int64_t s = num_sizes - 1;
    while (cuts[s].first > index)
      --s;
    const int64_t begin = (index - cuts[s].first) * cuts[s].rows_per_item;
    const int64_t end = std::min(begin + cuts[s].rows_per_item, sizes[s].size[0] * sizes[s].size[1]);
    write_rows(mask, ignore_index, sizes[s], cells[s], {n, begin, end});
  });
}

// The mask with the pixels of a copy, [N, d0, d1, d2] contiguous.
Masks with_copy(Masks mask, const void* pixels, DType dtype) {
  mask.mask = pixels;
  mask.dtype = dtype;
  mask.stride[2] = 1;
  mask.stride[1] = mask.size[2];
  mask.stride[0] = mask.size[1] * mask.stride[1];
  mask.stride_n = mask.size[0] * mask.stride[0];
  return mask;
}

} // namespace

void masks(const Masks& mask, int num_threads) {
  if (mask.dtype == DType::kUInt8 && write_bytes(mask, nullptr, num_threads)) return resize(mask, num_threads);
  if (mask.dtype != DType::kUInt8) {
    const int64_t pixels = mask.batch * mask.size[0] * mask.size[1] * mask.size[2];
    const std::unique_ptr<uint8_t[]> bytes(new uint8_t[pixels]);
    if (write_bytes(mask, bytes.get(), num_threads)) {
      Masks copied = with_copy(mask, bytes.get(), DType::kUInt8);
      copied.ignore_number = kIgnoredByte;
      return resize(copied, num_threads);
    }
    if (mask.dtype < DType::kUInt8 && mask_is_valid(mask, num_threads)) return resize(mask, num_threads);
  }
  const std::vector<double> copy = copy_with_nan(mask);
  Masks copied = with_copy(mask, copy.data(), DType::kFloat64);
  copied.ignore_value = kNotValid;
  resize(copied, num_threads);
}

} // namespace fdk::cpu
