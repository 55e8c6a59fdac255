// What the files of fdkernels._C share.
#pragma once

#include <pybind11/functional.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <functional>
#include <vector>

#ifndef FDKERNELS_WITH_CUDA
#define FDKERNELS_WITH_CUDA 0
#endif

namespace fdk {

using Words = std::vector<int64_t>;

inline void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

// Is asked for scratch memory of so many bytes, which must live until the function returns.
using Allocate = std::function<uintptr_t(int64_t)>;

void bind_norms(pybind11::module_& m);

} // namespace fdk
