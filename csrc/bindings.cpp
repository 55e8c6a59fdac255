// Module fdkernels._C: raw pointers, sizes, strides and a stream. It knows nothing of torch, so one binary serves every
// release of it. fdkernels/op/{packing,cpu,cuda}.py make the arguments, whose codes and word offsets are read from
// here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstddef>

#include "bindings.h"
#include "checks.h"
#include "cpu/parallel.h"
#include "op.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using fdk::Allocate;
using fdk::pointer;
using fdk::Words;
using Extents = std::array<int64_t, 3>; // of d0, d1, d2

fdk::Losses as_losses(const fdk::Pyramid& pyramid, const fdk::Options& options, uintptr_t pairing, int64_t num_pairs,
                      uintptr_t losses, uintptr_t slopes) {
  const fdk::Losses made = {
      options, static_cast<const int64_t*>(pointer(pairing)), num_pairs, pointer(losses), pointer(slopes), nullptr};
  fdk::check_losses(pyramid, made);
  return made;
}

// `sizes` must outlive the result.
fdk::Masks as_masks(uintptr_t mask, fdk::DType dtype, int64_t batch, const Extents& size, int64_t stride_n,
                    const Extents& stride, bool has_ignore, double ignore_value, int64_t ignore_number,
                    double tolerance, fdk::MaskResize resize, fdk::DType accumulate, const Words& sizes) {
  constexpr size_t kWords = sizeof(fdk::MaskSize) / sizeof(int64_t);
  fdk::require(sizes.size() % kWords == 0, "sizes of masks must be described by 6 words each");
  fdk::Masks made = {};
  made.mask = pointer(mask);
  made.dtype = dtype;
  made.batch = batch;
  std::copy(size.begin(), size.end(), made.size);
  made.stride_n = stride_n;
  std::copy(stride.begin(), stride.end(), made.stride);
  made.resize = resize;
  made.has_ignore = has_ignore;
  made.ignore_value = ignore_value;
  made.ignore_number = ignore_number;
  made.tolerance = tolerance;
  made.accumulate = accumulate;
  made.sizes = reinterpret_cast<const fdk::MaskSize*>(sizes.data());
  made.num_sizes = static_cast<int64_t>(sizes.size() / kWords);
  fdk::check_masks(made);
  return made;
}

// The names are those of torch and of fdkernels/conventions.py. Types are local to the module, so that two builds of it
// can be loaded side by side.
void bind_enums(py::module_& m) {
  py::enum_<fdk::DType>(m, "DType", py::module_local())
      .value("float32", fdk::DType::kFloat32)
      .value("float64", fdk::DType::kFloat64)
      .value("bfloat16", fdk::DType::kBFloat16)
      .value("float16", fdk::DType::kFloat16)
      .value("uint8", fdk::DType::kUInt8)
      .value("int8", fdk::DType::kInt8)
      .value("int16", fdk::DType::kInt16)
      .value("int32", fdk::DType::kInt32)
      .value("int64", fdk::DType::kInt64);
  py::enum_<fdk::RegionWeight>(m, "RegionWeight", py::module_local())
      .value("valid", fdk::RegionWeight::kValid)
      .value("none", fdk::RegionWeight::kNone)
      .value("region", fdk::RegionWeight::kRegion)
      .value("pixels", fdk::RegionWeight::kPixels);
  py::enum_<fdk::Norm>(m, "Norm", py::module_local())
      .value("vector", fdk::Norm::kVector)
      .value("channel_sum", fdk::Norm::kChannelSum)
      .value("relative", fdk::Norm::kRelative)
      .value("batch", fdk::Norm::kBatch);
  py::enum_<fdk::Activation>(m, "Activation", py::module_local())
      .value("none", fdk::Activation::kNone)
      .value("relu", fdk::Activation::kRelu)
      .value("leaky_relu", fdk::Activation::kLeakyRelu);
  py::enum_<fdk::Exchange>(m, "Exchange", py::module_local())
      .value("none", fdk::Exchange::kNone)
      .value("shuffle", fdk::Exchange::kShuffle)
      .value("pooled", fdk::Exchange::kPooled);
  py::enum_<fdk::Reduction>(m, "Reduction", py::module_local())
      .value("mean", fdk::Reduction::kMean)
      .value("sum", fdk::Reduction::kSum);
  py::enum_<fdk::MaskResize>(m, "MaskResize", py::module_local())
      .value("area", fdk::MaskResize::kArea)
      .value("max", fdk::MaskResize::kMax)
      .value("nearest", fdk::MaskResize::kNearest);
}

#define FDK_WORD(Struct, field) py::arg(#field) = offsetof(fdk::Struct, field) / sizeof(int64_t)

// The structs that travel as words, and the options.
void bind_structs(py::module_& m) {
  m.attr("layer_words") = sizeof(fdk::Layer) / sizeof(int64_t);
  m.attr("layer_fields") =
      py::dict(FDK_WORD(Layer, features), FDK_WORD(Layer, dtype), FDK_WORD(Layer, channels), FDK_WORD(Layer, size),
               FDK_WORD(Layer, stride_n), FDK_WORD(Layer, stride_c), FDK_WORD(Layer, stride), FDK_WORD(Layer, fg),
               FDK_WORD(Layer, bg), FDK_WORD(Layer, mask_dtype), FDK_WORD(Layer, upstream),
               FDK_WORD(Layer, upstream_stride_n), FDK_WORD(Layer, upstream_stride_c), FDK_WORD(Layer, upstream_stride),
               FDK_WORD(Layer, grad_fg), FDK_WORD(Layer, grad_bg));
  m.attr("mask_size_words") = sizeof(fdk::MaskSize) / sizeof(int64_t);
  m.attr("mask_size_fields") =
      py::dict(FDK_WORD(MaskSize, fg), FDK_WORD(MaskSize, bg), FDK_WORD(MaskSize, size), FDK_WORD(MaskSize, dtype));
  // Of a map the word of its address, which its strides follow: n, c, d0, d1, d2.
  m.attr("region_layer_words") = sizeof(fdk::RegionLayer) / sizeof(int64_t);
  m.attr("region_layer_fields") = py::dict(
      FDK_WORD(RegionLayer, features), FDK_WORD(RegionLayer, gradient), FDK_WORD(RegionLayer, upstream),
      FDK_WORD(RegionLayer, dtype), FDK_WORD(RegionLayer, channels), FDK_WORD(RegionLayer, size),
      FDK_WORD(RegionLayer, weights), FDK_WORD(RegionLayer, weight_dtype), FDK_WORD(RegionLayer, grad_weights));
  py::class_<fdk::Options>(m, "Options", py::module_local())
      .def(py::init([](fdk::RegionWeight region_weight, bool masked_background, fdk::Norm norm, double log_scale,
                       double eps, fdk::Exchange exchange, fdk::Reduction reduction) {
             return fdk::Options{region_weight, masked_background, norm, log_scale, eps, exchange, reduction};
           }),
           py::kw_only(), "region_weight"_a, "masked_background"_a, "norm"_a, "log_scale"_a, "eps"_a, "exchange"_a,
           "reduction"_a);
}

void bind_cpu(py::module_& m) {
  m.def(
      "cpu_masks",
      [](uintptr_t mask, fdk::DType dtype, int64_t batch, const Extents& size, int64_t stride_n, const Extents& stride,
         bool has_ignore, double ignore_value, int64_t ignore_number, double tolerance, fdk::MaskResize resize,
         fdk::DType accumulate, const Words& sizes, int num_threads) {
        const fdk::Masks args = as_masks(mask, dtype, batch, size, stride_n, stride, has_ignore, ignore_value,
                                         ignore_number, tolerance, resize, accumulate, sizes);
        const py::gil_scoped_release release;
        fdk::cpu::masks(args, num_threads);
      },
      "mask"_a, "dtype"_a, "batch"_a, "size"_a, "stride_n"_a, "stride"_a, "has_ignore"_a, "ignore_value"_a,
      "ignore_number"_a, "tolerance"_a, "resize"_a, "accumulate"_a, "sizes"_a, "num_threads"_a);
  m.def(
      "cpu_mask_is_valid",
      [](uintptr_t mask, fdk::DType dtype, int64_t batch, const Extents& size, int64_t stride_n, const Extents& stride,
         bool has_ignore, double ignore_value, int64_t ignore_number, double tolerance, int num_threads) {
        const fdk::Masks args = as_masks(mask, dtype, batch, size, stride_n, stride, has_ignore, ignore_value,
                                         ignore_number, tolerance, fdk::MaskResize::kArea, fdk::DType::kFloat32, {});
        const py::gil_scoped_release release;
        return fdk::cpu::mask_is_valid(args, num_threads);
      },
      "mask"_a, "dtype"_a, "batch"_a, "size"_a, "stride_n"_a, "stride"_a, "has_ignore"_a, "ignore_value"_a,
      "ignore_number"_a, "tolerance"_a, "num_threads"_a);
  m.def(
      "cpu_sums",
      [](const Words& layers, int64_t batch, fdk::DType accumulate, uintptr_t sums, uintptr_t masses,
         const fdk::Options* options, uintptr_t pairing, int64_t num_pairs, uintptr_t losses, uintptr_t total,
         uintptr_t slopes, int num_threads) {
        const fdk::Pyramid pyramid = fdk::as_pyramid(layers, batch, accumulate);
        fdk::check_weights(pyramid);
        fdk::Losses args = {};
        if (options != nullptr) {
          args = as_losses(pyramid, *options, pairing, num_pairs, losses, slopes);
          args.total = pointer(total);
          fdk::check_pairing(pyramid, args);
        }
        const py::gil_scoped_release release;
        fdk::cpu::sums(pyramid, pointer(sums), pointer(masses), options != nullptr ? &args : nullptr, num_threads);
      },
      "layers"_a, "batch"_a, "accumulate"_a, "sums"_a, "masses"_a, "options"_a, "pairing"_a, "num_pairs"_a, "losses"_a,
      "total"_a, "slopes"_a, "num_threads"_a);
  m.def(
      "cpu_losses",
      [](const Words& layers, int64_t batch, fdk::DType accumulate, uintptr_t sums, uintptr_t masses,
         const fdk::Options& options, uintptr_t pairing, int64_t num_pairs, uintptr_t losses, uintptr_t slopes) {
        const fdk::Pyramid pyramid = fdk::as_pyramid(layers, batch, accumulate);
        const fdk::Losses args = as_losses(pyramid, options, pairing, num_pairs, losses, slopes);
        fdk::check_pairing(pyramid, args);
        const py::gil_scoped_release release;
        fdk::cpu::losses(pyramid, pointer(sums), pointer(masses), args);
      },
      "layers"_a, "batch"_a, "accumulate"_a, "sums"_a, "masses"_a, "options"_a, "pairing"_a, "num_pairs"_a, "losses"_a,
      "slopes"_a);
  m.def(
      "cpu_gradient",
      [](const Words& layers, int64_t batch, fdk::DType accumulate, uintptr_t grad_sums, uintptr_t factor,
         int64_t factor_stride, int num_threads) {
        const fdk::Pyramid pyramid = fdk::as_pyramid(layers, batch, accumulate);
        fdk::check_weights(pyramid);
        const py::gil_scoped_release release;
        fdk::cpu::gradient(pyramid, pointer(grad_sums), pointer(factor), factor_stride, num_threads);
      },
      "layers"_a, "batch"_a, "accumulate"_a, "grad_sums"_a, "factor"_a, "factor_stride"_a, "num_threads"_a);
  m.def(
      "cpu_mask_gradient",
      [](const Words& layers, int64_t batch, fdk::DType accumulate, uintptr_t grad_sums, int num_threads) {
        const fdk::Pyramid pyramid = fdk::as_pyramid(layers, batch, accumulate);
        fdk::check_weights(pyramid);
        const py::gil_scoped_release release;
        fdk::cpu::mask_gradient(pyramid, pointer(grad_sums), num_threads);
      },
      "layers"_a, "batch"_a, "accumulate"_a, "grad_sums"_a, "num_threads"_a);
  m.def(
      "cpu_region_sums",
      [](const Words& layers, int64_t batch, int64_t num_regions, bool selects, uintptr_t pivots, fdk::DType accumulate,
         uintptr_t sums, uintptr_t masses, int num_threads) {
        const fdk::Regions regions = fdk::as_regions(layers, batch, num_regions, selects, pointer(pivots), accumulate);
        const py::gil_scoped_release release;
        fdk::cpu::region_sums(regions, pointer(sums), pointer(masses), num_threads);
      },
      "layers"_a, "batch"_a, "num_regions"_a, "selects"_a, "pivots"_a, "accumulate"_a, "sums"_a, "masses"_a,
      "num_threads"_a);
  m.def(
      "cpu_region_gradient",
      [](const Words& layers, int64_t batch, int64_t num_regions, bool selects, uintptr_t pivots, fdk::DType accumulate,
         uintptr_t grad_sums, int num_threads) {
        const fdk::Regions regions = fdk::as_regions(layers, batch, num_regions, selects, pointer(pivots), accumulate);
        const py::gil_scoped_release release;
        fdk::cpu::region_gradient(regions, pointer(grad_sums), num_threads);
      },
      "layers"_a, "batch"_a, "num_regions"_a, "selects"_a, "pivots"_a, "accumulate"_a, "grad_sums"_a, "num_threads"_a);
  m.def(
      "cpu_region_weight_gradient",
      [](const Words& layers, int64_t batch, int64_t num_regions, bool selects, uintptr_t pivots, fdk::DType accumulate,
         uintptr_t grad_sums, int num_threads) {
        const fdk::Regions regions = fdk::as_regions(layers, batch, num_regions, selects, pointer(pivots), accumulate);
        const py::gil_scoped_release release;
        fdk::cpu::region_weight_gradient(regions, pointer(grad_sums), num_threads);
      },
      "layers"_a, "batch"_a, "num_regions"_a, "selects"_a, "pivots"_a, "accumulate"_a, "grad_sums"_a, "num_threads"_a);
  // Looked up when called: torch may be imported after this module.
  m.def("cpu_thread_runtime", &fdk::cpu::thread_runtime);
}

#if FDKERNELS_WITH_CUDA
void bind_cuda(py::module_& m) {
  m.def(
      "cuda_masks",
      [](uintptr_t mask, fdk::DType dtype, int64_t batch, const Extents& size, int64_t stride_n, const Extents& stride,
         bool has_ignore, double ignore_value, int64_t ignore_number, double tolerance, fdk::MaskResize resize,
         fdk::DType accumulate, const Words& sizes, int device, uintptr_t stream) {
        const fdk::Masks args = as_masks(mask, dtype, batch, size, stride_n, stride, has_ignore, ignore_value,
                                         ignore_number, tolerance, resize, accumulate, sizes);
        fdk::cuda::masks(args, device, pointer(stream));
      },
      "mask"_a, "dtype"_a, "batch"_a, "size"_a, "stride_n"_a, "stride"_a, "has_ignore"_a, "ignore_value"_a,
      "ignore_number"_a, "tolerance"_a, "resize"_a, "accumulate"_a, "sizes"_a, "device"_a, "stream"_a);
  m.def(
      "cuda_sums",
      [](const Words& layers, int64_t batch, fdk::DType accumulate, uintptr_t sums, uintptr_t masses,
         const fdk::Options* options, uintptr_t pairing, int64_t num_pairs, uintptr_t losses, uintptr_t slopes,
         const Allocate& allocate, int device, uintptr_t stream) {
        const fdk::Pyramid pyramid = fdk::as_pyramid(layers, batch, accumulate);
        const bool with_losses = options != nullptr;
        fdk::Losses args = {};
        if (with_losses) args = as_losses(pyramid, *options, pairing, num_pairs, losses, slopes);
        void* workspace = pointer(allocate(fdk::cuda::sums_workspace(pyramid, with_losses)));
        fdk::cuda::sums(pyramid, pointer(sums), pointer(masses), with_losses ? &args : nullptr, workspace, device,
                        pointer(stream));
      },
      "layers"_a, "batch"_a, "accumulate"_a, "sums"_a, "masses"_a, "options"_a, "pairing"_a, "num_pairs"_a, "losses"_a,
      "slopes"_a, "allocate"_a, "device"_a, "stream"_a);
  m.def(
      "cuda_losses",
      [](const Words& layers, int64_t batch, fdk::DType accumulate, uintptr_t sums, uintptr_t masses,
         const fdk::Options& options, uintptr_t pairing, int64_t num_pairs, uintptr_t losses, uintptr_t slopes,
         const Allocate& allocate, int device, uintptr_t stream) {
        const fdk::Pyramid pyramid = fdk::as_pyramid(layers, batch, accumulate);
        const fdk::Losses args = as_losses(pyramid, options, pairing, num_pairs, losses, slopes);
        void* workspace = pointer(allocate(fdk::cuda::losses_workspace(pyramid)));
        fdk::cuda::losses(pyramid, pointer(sums), pointer(masses), args, workspace, device, pointer(stream));
      },
      "layers"_a, "batch"_a, "accumulate"_a, "sums"_a, "masses"_a, "options"_a, "pairing"_a, "num_pairs"_a, "losses"_a,
      "slopes"_a, "allocate"_a, "device"_a, "stream"_a);
  m.def(
      "cuda_gradient",
      [](const Words& layers, int64_t batch, fdk::DType accumulate, uintptr_t grad_sums, uintptr_t factor,
         int64_t factor_stride, int device, uintptr_t stream) {
        fdk::cuda::gradient(fdk::as_pyramid(layers, batch, accumulate), pointer(grad_sums), pointer(factor),
                            factor_stride, device, pointer(stream));
      },
      "layers"_a, "batch"_a, "accumulate"_a, "grad_sums"_a, "factor"_a, "factor_stride"_a, "device"_a, "stream"_a);
  m.def(
      "cuda_mask_gradient",
      [](const Words& layers, int64_t batch, fdk::DType accumulate, uintptr_t grad_sums, int device, uintptr_t stream) {
        fdk::cuda::mask_gradient(fdk::as_pyramid(layers, batch, accumulate), pointer(grad_sums), device,
                                 pointer(stream));
      },
      "layers"_a, "batch"_a, "accumulate"_a, "grad_sums"_a, "device"_a, "stream"_a);
  m.def(
      "cuda_region_sums",
      [](const Words& layers, int64_t batch, int64_t num_regions, bool selects, uintptr_t pivots, fdk::DType accumulate,
         uintptr_t sums, uintptr_t masses, const Allocate& allocate, int device, uintptr_t stream) {
        const fdk::Regions regions = fdk::as_regions(layers, batch, num_regions, selects, pointer(pivots), accumulate);
        void* workspace = pointer(allocate(fdk::cuda::region_sums_workspace(regions)));
        fdk::cuda::region_sums(regions, pointer(sums), pointer(masses), workspace, device, pointer(stream));
      },
      "layers"_a, "batch"_a, "num_regions"_a, "selects"_a, "pivots"_a, "accumulate"_a, "sums"_a, "masses"_a,
      "allocate"_a, "device"_a, "stream"_a);
  m.def(
      "cuda_region_gradient",
      [](const Words& layers, int64_t batch, int64_t num_regions, bool selects, uintptr_t pivots, fdk::DType accumulate,
         uintptr_t grad_sums, int device, uintptr_t stream) {
        fdk::cuda::region_gradient(fdk::as_regions(layers, batch, num_regions, selects, pointer(pivots), accumulate),
                                   pointer(grad_sums), device, pointer(stream));
      },
      "layers"_a, "batch"_a, "num_regions"_a, "selects"_a, "pivots"_a, "accumulate"_a, "grad_sums"_a, "device"_a,
      "stream"_a);
  m.def(
      "cuda_region_weight_gradient",
      [](const Words& layers, int64_t batch, int64_t num_regions, bool selects, uintptr_t pivots, fdk::DType accumulate,
         uintptr_t grad_sums, int device, uintptr_t stream) {
        fdk::cuda::region_weight_gradient(
            fdk::as_regions(layers, batch, num_regions, selects, pointer(pivots), accumulate), pointer(grad_sums),
            device, pointer(stream));
      },
      "layers"_a, "batch"_a, "num_regions"_a, "selects"_a, "pivots"_a, "accumulate"_a, "grad_sums"_a, "device"_a,
      "stream"_a);
}
#endif

} // namespace

PYBIND11_MODULE(_C, m) {
  // First, since it may throw: Python would import the module anew and find its types registered.
  m.attr("cpu_instruction_set") = fdk::cpu::instruction_set();
  m.doc() = "Compiled kernels of fdkernels over raw pointers; not a public interface.";
  m.attr("__version__") = FDKERNELS_VERSION;
  m.attr("with_cuda") = static_cast<bool>(FDKERNELS_WITH_CUDA);
  m.attr("cuda_version") = FDKERNELS_CUDA_VERSION;
  m.attr("cuda_archs") = FDKERNELS_CUDA_ARCHS_BUILT;
  bind_enums(m);
  bind_structs(m);
  bind_cpu(m);
  fdk::bind_norms(m);
#if FDKERNELS_WITH_CUDA
  bind_cuda(m);
#endif
}
