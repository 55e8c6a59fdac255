// What the files of fdkernels._C share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

namespace fdk {

using Words = std::vector<int64_t>;

inline void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

void bind_norms(pybind11::module_& m);

} // namespace fdk
