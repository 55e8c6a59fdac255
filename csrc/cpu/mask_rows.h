// A mask as rows of pixels of its own dtype.
#pragma once

#include <vector>

#include "../op.h"
#include "half.h"

namespace fdk::cpu {

// Mask pixels that one item of work reads, roughly.
constexpr int64_t kPixelsPerItem = 1 << 14;

// Marks ignored pixels under `max`, where every valid value is larger, and in copies of masks.
constexpr double kNotValid = -1;

// Whether every pixel is 0, 1 or ignored. Writes their bytes [N, d0, d1, d2], with kIgnoredByte, unless `bytes` is
// null.
bool write_bytes(const Masks& mask, uint8_t* bytes, int num_threads);
// Copies the pixels [N, d0, d1, d2], with NaN for those that are no weights and kNotValid for the ignored ones.
std::vector<double> copy_with_nan(const Masks& mask);

namespace {

// Calls body(i, pixel) for each pixel of a row. Contiguous rows have their own loop, which vectorises.
template <class S, class Body>
void for_each_pixel(const S* row, int64_t stride, int64_t width, const Body& body) {
  if (stride == 1) {
    for (int64_t i = 0; i < width; ++i)
      body(i, row[i]);
  } else {
    for (int64_t i = 0; i < width; ++i)
      body(i, row[i * stride]);
  }
}

// Returns row `row` of sample n, counted over (d0, d1).
template <class S>
const S* row_of(const Masks& mask, int64_t n, int64_t row) {
  return static_cast<const S*>(mask.mask) + n * mask.stride_n + row / mask.size[1] * mask.stride[0] +
         row % mask.size[1] * mask.stride[1];
}

// Calls body with a value of the type of the elements of a floating-point mask.
template <class Body>
void with_floating_dtype(const Masks& mask, const Body& body) {
  switch (mask.dtype) {
    case DType::kFloat64:
      return body(double());
    case DType::kBFloat16:
      return body(BFloat16());
    case DType::kFloat16:
      return body(Float16());
    default:
      return body(float());
  }
}

// Calls body with a value of the type of the mask's elements.
template <class Body>
void with_dtype(const Masks& mask, const Body& body) {
  switch (mask.dtype) {
    case DType::kInt8:
      return body(int8_t());
    case DType::kInt16:
      return body(int16_t());
    case DType::kInt32:
      return body(int32_t());
    case DType::kInt64:
      return body(int64_t());
    case DType::kUInt8:
      return body(uint8_t());
    default:
      return with_floating_dtype(mask, body);
  }
}

} // namespace
} // namespace fdk::cpu
