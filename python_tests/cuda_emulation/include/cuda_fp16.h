// Stands in for CUDA's half precision; see cuda_runtime.h beside this.
#pragma once

struct __half {
#ifdef __aarch64__
  __fp16 value; // g++ knows _Float16 in C++ only from release 13 on there
#else
  _Float16 value;
#endif
};

inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half_rn(float x) { return {static_cast<decltype(__half::value)>(x)}; }
