// The values of a mask: which are weights, and NaN in place of the others.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../layout.h"
#include "mask_kernels.h"
#include "mask_rows.h"
#include "parallel.h"
#include "work.h"

namespace fdk::cpu {
namespace {

// The values that are weights: [0, 1] to within the tolerance. Exact in float, so that A makes no difference.
template <class A>
struct Bounds {
  A low, high;
  explicit Bounds(const Masks& mask) : low(static_cast<A>(-mask.tolerance)), high(static_cast<A>(1 + mask.tolerance)) {}
  bool hold(A y) const { return (y >= low) & (y <= high); }
};

// Some pixels of a sample that lie side by side in memory.
struct Run {
  int64_t sample, first; // the first pixel, among those of the sample
  int64_t place;         // of that pixel in memory, in elements
  int64_t stride, count;
};

// Whether `look(run)` holds for all pixels, looked at until it does not.
template <class Look>
bool holds_for_every_run(const Masks& mask, int num_threads, const Look& look) {
  const MergedPixels merged = merge_dimensions(mask.size, mask.stride, nullptr);
  const int64_t pixels = mask.size[0] * mask.size[1] * mask.size[2], width = merged.size[2];
  const int64_t items = (pixels + kPixelsPerItem - 1) / kPixelsPerItem;
  std::atomic<bool> holds{true};
  parallel_for(mask.batch * items, useful_threads(mask.batch * pixels, num_threads), [&](int64_t item) {
    const int64_t n = item / items, begin = item % items * kPixelsPerItem,
                  end = std::min(begin + kPixelsPerItem, pixels);
    for (int64_t pixel = begin, count; pixel < end && holds.load(std::memory_order_relaxed); pixel += count) {
      const int64_t row = pixel / width, within = pixel % width;
      count = std::min(end - pixel, width - within);
      const int64_t place = n * mask.stride_n + row / merged.size[1] * merged.stride[0] +
                            row % merged.size[1] * merged.stride[1] + within * merged.stride[2];
      if (!look(Run{n, pixel, place, merged.stride[2], count})) holds.store(false, std::memory_order_relaxed);
    }
  });
  return holds;
}

// Whether all pixels of a floating-point run are weights or ignored, to within the tolerance.
template <class S>
bool run_is_valid(const Masks& mask, const Run& run) {
  using A = typename std::conditional<std::is_same<S, double>::value, double, float>::type;
  using Flag = typename std::conditional<std::is_same<S, double>::value, int64_t, int32_t>::type;
  const Bounds<A> bounds(mask);
  const A ignored = static_cast<A>(mask.ignore_value);
  const bool has_ignore = mask.has_ignore;
  Flag bad = 0; // as wide as the pixels, so that the loop vectorises
  for_each_pixel(static_cast<const S*>(mask.mask) + run.place, run.stride, run.count, [&](int64_t, const S& value) {
    const A y = static_cast<A>(value);
    const bool outside = !bounds.hold(y), counts = !has_ignore | (y != ignored);
    bad |= static_cast<Flag>(outside & counts);
  });
  return bad == 0;
}

template <class S>
uint64_t bits_of(S value) {
  uint64_t bits = 0; // little-endian
  std::memcpy(&bits, &value, sizeof(value));
  return bits;
}

// The bits of a number of a floating-point mask, which is one of its dtype.
uint64_t bits_in_dtype(DType dtype, double value) {
  switch (dtype) {
    case DType::kFloat64:
      return bits_of(value);
    case DType::kBFloat16:
      return float_to_bfloat16(static_cast<float>(value));
    case DType::kFloat16:
      return float_to_float16(static_cast<float>(value));
    default:
      return bits_of(static_cast<float>(value));
  }
}

} // namespace

bool write_bytes(const Masks& mask, uint8_t* bytes, int num_threads) {
  const bool is_integer = mask.dtype >= DType::kUInt8;
  const int64_t element = element_size(mask.dtype), pixels = mask.size[0] * mask.size[1] * mask.size[2];
  const uint64_t one = is_integer ? 1 : bits_in_dtype(mask.dtype, 1);
  const uint64_t ignored = is_integer ? bits_of(mask.ignore_number) : bits_in_dtype(mask.dtype, mask.ignore_value);
  return holds_for_every_run(mask, num_threads, [&](const Run& run) {
    const void* first = static_cast<const char*>(mask.mask) + run.place * element;
    return mask_kernels().bytes({first, run.stride, run.count, element, one, ignored, mask.has_ignore},
                                bytes == nullptr ? nullptr : bytes + run.sample * pixels + run.first);
  });
}

bool mask_is_valid(const Masks& mask, int num_threads) {
  if (write_bytes(mask, nullptr, num_threads)) return true;
  bool is_valid = false; // an integer that is neither 0 nor 1 is no weight
  if (mask.dtype >= DType::kUInt8) return is_valid;
  with_floating_dtype(mask, [&](auto value) {
    using S = decltype(value);
    is_valid = holds_for_every_run(mask, num_threads, [&](const Run& run) { return run_is_valid<S>(mask, run); });
  });
  return is_valid;
}

std::vector<double> copy_with_nan(const Masks& mask) {
  const int64_t rows = mask.size[0] * mask.size[1], width = mask.size[2];
  std::vector<double> copy(mask.batch * rows * width);
  const Bounds<double> bounds(mask);
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  with_dtype(mask, [&](auto element) {
    using S = decltype(element);
    for (int64_t row = 0; row < mask.batch * rows; ++row) {
      double* out = copy.data() + row * width;
      for_each_pixel(row_of<S>(mask, row / rows, row % rows), mask.stride[2], width, [&](int64_t i, const S& value) {
        const double y = static_cast<double>(value);
        bool ignored = y == mask.ignore_value;
        if constexpr (std::is_integral<S>::value) ignored = value == static_cast<S>(mask.ignore_number);
        out[i] = mask.has_ignore && ignored ? kNotValid : bounds.hold(y) ? y : kNaN;
      });
    }
  });
  return copy;
}

} // namespace fdk::cpu
