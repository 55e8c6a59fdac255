// Numbers of the accumulation dtype, float32 or float64.
#pragma once

#include "../op.h"

namespace fdk::cpu {

// Calls body with a value of the C++ type, so that a loop over such numbers is compiled for one type.
template <class Body>
void with_type(DType dtype, const Body& body) {
  dtype == DType::kFloat64 ? body(double()) : body(float());
}

inline double read(const void* values, DType dtype, int64_t index) {
  return dtype == DType::kFloat64 ? static_cast<const double*>(values)[index]
                                  : static_cast<double>(static_cast<const float*>(values)[index]);
}

inline void write(void* values, DType dtype, int64_t index, double value) {
  if (dtype == DType::kFloat64) {
    static_cast<double*>(values)[index] = value;
  } else {
    static_cast<float*>(values)[index] = static_cast<float>(value);
  }
}

} // namespace fdk::cpu
