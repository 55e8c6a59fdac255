// The interface of the kernel that reads masks, which isa/kernels.cpp compiles once for each instruction set.
#pragma once

#include <cstdint>

namespace fdk::cpu {

// The byte of an ignored pixel, beside those of the weights 0 and 1.
constexpr uint8_t kIgnoredByte = 2;

// A row of pixels of 1, 2, 4 or 8 bytes, whose bits are compared.
struct MaskRow {
  const void* pixels;
  int64_t stride, count, bytes_of_pixel;
  uint64_t one, ignored; // the bits of the weight 1, and of an ignored pixel if there are any
  bool has_ignored;
};

struct MaskKernels {
  // Writes the byte of each pixel, unless `bytes` is null, and returns whether each is 0, 1 or ignored.
  bool (*bytes)(const MaskRow& row, uint8_t* bytes);
};

MaskKernels mask_kernels_baseline();
MaskKernels mask_kernels_avx2();
MaskKernels mask_kernels_avx512();
const MaskKernels& mask_kernels();

} // namespace fdk::cpu
