// The pixels of a mask as bytes.
#pragma once

#include "../mask_kernels.h"

namespace fdk::cpu {
namespace {

template <class U, bool kWrites, bool kHasIgnored>
inline bool bytes_of_pixels(const U* pixels, int64_t stride, int64_t count, U one, U ignored, uint8_t* bytes) {
  U others = 0; // the bits that are of no weight and no ignored pixel
#pragma omp simd reduction(| : others)
  for (int64_t i = 0; i < count; ++i) {
    const U bits = pixels[i * stride];
    const U is_ignored = kHasIgnored && bits == ignored, is_one = (bits == one) & !is_ignored;
    const U wanted = static_cast<U>((U(0) - is_one) & one) | static_cast<U>((U(0) - is_ignored) & ignored);
    others |= bits ^ wanted;
    if (kWrites) bytes[i] = static_cast<uint8_t>(is_one + is_ignored * kIgnoredByte);
  }
  return others == 0;
}

template <class U, bool kWrites, bool kHasIgnored>
inline bool bytes_of_row(const MaskRow& row, uint8_t* bytes) {
  const U *pixels = static_cast<const U*>(row.pixels), one = static_cast<U>(row.one);
  const U ignored = static_cast<U>(row.ignored);
  return row.stride == 1 ? bytes_of_pixels<U, kWrites, kHasIgnored>(pixels, 1, row.count, one, ignored, bytes)
                         : bytes_of_pixels<U, kWrites, kHasIgnored>(pixels, row.stride, row.count, one, ignored, bytes);
}

template <class U, bool kWrites>
inline bool bytes_of_row(const MaskRow& row, uint8_t* bytes) {
  return row.has_ignored ? bytes_of_row<U, kWrites, true>(row, bytes) : bytes_of_row<U, kWrites, false>(row, bytes);
}

template <class U>
inline bool bytes_of_row(const MaskRow& row, uint8_t* bytes) {
  return bytes == nullptr ? bytes_of_row<U, false>(row, bytes) : bytes_of_row<U, true>(row, bytes);
}

bool bytes_of_row(const MaskRow& row, uint8_t* bytes) {
  switch (row.bytes_of_pixel) {
    case 1:
      return bytes_of_row<uint8_t>(row, bytes);
    case 2:
      return bytes_of_row<uint16_t>(row, bytes);
    case 4:
      return bytes_of_row<uint32_t>(row, bytes);
    default:
      return bytes_of_row<uint64_t>(row, bytes);
  }
}

} // namespace
} // namespace fdk::cpu
