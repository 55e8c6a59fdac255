// Module fdkernels._C: raw pointers, sizes, strides and a stream. It knows nothing of torch, so one binary serves every
// release of it. fdkernels/native.py and fdkernels/log_norm/impl/native.py make the arguments.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <functional>

#include "checks.h"
#include "cpu/parallel.h"
#include "layer_losses.h"
#include "layer_masks.h"
#include "log_norm.h"
#include "region_sums.h"

#ifndef FDKERNELS_WITH_CUDA
#define FDKERNELS_WITH_CUDA 0
#endif

namespace py = pybind11;

namespace {

using Words = std::vector<int64_t>;
// batch, channels, pixels, pairing, num_pairs, region_weight, masked_background, norm, exchange, reduction, log_scale,
// eps, accumulate
using LogNormWords = std::tuple<int64_t, Words, Words, uintptr_t, int64_t, int64_t, bool, int64_t, int64_t, int64_t,
                                double, double, int64_t>;
// mask, dtype, batch, size, stride_n, stride, has_ignore, ignore_value, ignore_number, resize, accumulate
using LayerMasksWords = std::tuple<uintptr_t, int64_t, int64_t, std::array<int64_t, 3>, int64_t, std::array<int64_t, 3>,
                                   bool, double, int64_t, int64_t, int64_t>;

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

fdk::LogNorm as_log_norm(const LogNormWords& words) {
  const auto& [batch, channels, pixels, pairing, num_pairs, region_weight, masked_background, norm, exchange, reduction,
               log_scale, eps, accumulate] = words;
  fdk::require(batch >= 0, "the batch must not be negative");
  fdk::require(channels.size() == pixels.size(), "channels and pixels must have one entry for each layer");
  int64_t total = 0;
  for (const int64_t count : channels)
    total += count;
  return {batch,
          static_cast<int64_t>(channels.size()),
          total,
          channels.data(),
          pixels.data(),
          static_cast<const int64_t*>(pointer(pairing)),
          num_pairs,
          static_cast<fdk::RegionWeight>(region_weight),
          masked_background,
          static_cast<fdk::Norm>(norm),
          static_cast<fdk::Exchange>(exchange),
          static_cast<fdk::Reduction>(reduction),
          log_scale,
          eps,
          static_cast<fdk::DType>(accumulate)};
}

// `sizes` must outlive the result.
fdk::LayerMasks as_layer_masks(const LayerMasksWords& words, const Words& sizes) {
  const auto& [mask, dtype, batch, size, stride_n, stride, has_ignore, ignore_value, ignore_number, resize,
               accumulate] = words;
  fdk::LayerMasks args = {};
  args.mask = pointer(mask);
  args.dtype = static_cast<fdk::DType>(dtype);
  args.batch = batch;
  std::copy(size.begin(), size.end(), args.size);
  args.stride_n = stride_n;
  std::copy(stride.begin(), stride.end(), args.stride);
  args.has_ignore = has_ignore;
  args.ignore_value = ignore_value;
  args.ignore_number = ignore_number;
  args.resize = static_cast<fdk::MaskResize>(resize);
  args.accumulate = static_cast<fdk::DType>(accumulate);
  fdk::set_sizes(args, sizes);
  return args;
}

void bind_cpu(py::module_& m) {
  m.def("cpu_layer_masks", [](const LayerMasksWords& words, const Words& sizes, int num_threads) {
    const fdk::LayerMasks args = as_layer_masks(words, sizes);
    const py::gil_scoped_release release;
    fdk::cpu::layer_masks(args, num_threads);
  });
  m.def("cpu_layer_masks_is_valid", [](const LayerMasksWords& words, int num_threads) {
    const fdk::LayerMasks args = as_layer_masks(words, {});
    const py::gil_scoped_release release;
    return fdk::cpu::layer_masks_is_valid(args, num_threads);
  });
  // The whole forward of a call; `slopes` may be null. `share` of 0 keeps the layers' losses, else their sum times it
  // is the one loss.
  m.def("cpu_layer_losses_forward", [](const Words& words, const LogNormWords& log_norm, double share, uintptr_t sums,
                                       uintptr_t masses, uintptr_t loss, uintptr_t slopes, int num_threads) {
    const fdk::LogNorm args = as_log_norm(log_norm);
    const fdk::Pyramid pyramid = fdk::as_pyramid(words, args.batch, static_cast<int64_t>(args.accumulate));
    fdk::check_layer_losses(pyramid, args);
    fdk::check_pairing(args);
    const py::gil_scoped_release release;
    fdk::cpu::region_sums_forward(pyramid, pointer(sums), pointer(masses), num_threads);
    fdk::cpu::log_norm_forward_with_slopes(args, pointer(sums), pointer(masses), share, pointer(loss), pointer(slopes));
  });
  m.def("cpu_layer_losses_backward", [](const Words& words, int64_t batch, int64_t accumulate, uintptr_t grad_loss,
                                        int64_t grad_loss_stride, uintptr_t slopes, int num_threads) {
    const fdk::Pyramid pyramid = fdk::as_pyramid(words, batch, accumulate);
    const py::gil_scoped_release release;
    fdk::cpu::layer_losses_backward(pyramid, pointer(grad_loss), grad_loss_stride, pointer(slopes), num_threads);
  });
  m.def("cpu_region_sums_forward",
        [](const Words& words, int64_t batch, int64_t accumulate, uintptr_t sums, uintptr_t masses, int num_threads) {
          const fdk::Pyramid pyramid = fdk::as_pyramid(words, batch, accumulate);
          const py::gil_scoped_release release;
          fdk::cpu::region_sums_forward(pyramid, pointer(sums), pointer(masses), num_threads);
        });
  m.def("cpu_region_sums_backward",
        [](const Words& words, int64_t batch, int64_t accumulate, uintptr_t grad_sums, int num_threads) {
          const fdk::Pyramid pyramid = fdk::as_pyramid(words, batch, accumulate);
          const py::gil_scoped_release release;
          fdk::cpu::region_sums_backward(pyramid, pointer(grad_sums), num_threads);
        });
  m.def("cpu_region_sums_mask_backward",
        [](const Words& words, int64_t batch, int64_t accumulate, uintptr_t grad_sums, int num_threads) {
          const fdk::Pyramid pyramid = fdk::as_pyramid(words, batch, accumulate);
          const py::gil_scoped_release release;
          fdk::cpu::region_sums_mask_backward(pyramid, pointer(grad_sums), num_threads);
        });
  m.def("cpu_log_norm_forward", [](const LogNormWords& words, uintptr_t sums, uintptr_t masses, uintptr_t loss) {
    const fdk::LogNorm args = as_log_norm(words);
    fdk::check_pairing(args);
    const py::gil_scoped_release release;
    fdk::cpu::log_norm_forward(args, pointer(sums), pointer(masses), pointer(loss));
  });
  m.def("cpu_log_norm_backward", [](const LogNormWords& words, uintptr_t grad_loss, uintptr_t sums, uintptr_t masses,
                                    uintptr_t grad_sums, uintptr_t grad_masses) {
    const fdk::LogNorm args = as_log_norm(words);
    fdk::check_pairing(args);
    const py::gil_scoped_release release;
    fdk::cpu::log_norm_backward(args, pointer(grad_loss), pointer(sums), pointer(masses), pointer(grad_sums),
                                pointer(grad_masses));
  });
  m.attr("cpu_instruction_set") = fdk::cpu::instruction_set();
  // Asked for at call time: torch may be imported after this module.
  m.def("cpu_thread_runtime", &fdk::cpu::thread_runtime);
}

#if FDKERNELS_WITH_CUDA
void bind_cuda(py::module_& m) {
  m.def("cuda_region_sums_workspace", [](const Words& words, int64_t batch, int64_t accumulate) {
    return fdk::cuda::region_sums_workspace(fdk::as_pyramid(words, batch, accumulate));
  });
  m.def("cuda_region_sums_forward", [](const Words& words, int64_t batch, int64_t accumulate, uintptr_t sums,
                                       uintptr_t masses, uintptr_t workspace, int device, uintptr_t stream) {
    fdk::cuda::region_sums_forward(fdk::as_pyramid(words, batch, accumulate), pointer(sums), pointer(masses),
                                   pointer(workspace), device, pointer(stream));
  });
  m.def("cuda_region_sums_backward",
        [](const Words& words, int64_t batch, int64_t accumulate, uintptr_t grad_sums, int device, uintptr_t stream) {
          fdk::cuda::region_sums_backward(fdk::as_pyramid(words, batch, accumulate), pointer(grad_sums), device,
                                          pointer(stream));
        });
  m.def("cuda_region_sums_mask_backward",
        [](const Words& words, int64_t batch, int64_t accumulate, uintptr_t grad_sums, int device, uintptr_t stream) {
          fdk::cuda::region_sums_mask_backward(fdk::as_pyramid(words, batch, accumulate), pointer(grad_sums), device,
                                               pointer(stream));
        });
  // `allocate` is asked for scratch memory of so many bytes; it needs to live until this returns.
  m.def("cuda_layer_losses_forward",
        [](const Words& words, int64_t batch, int64_t accumulate, const LogNormWords& options, uintptr_t sums,
           uintptr_t masses, uintptr_t loss, uintptr_t slopes, const std::function<uintptr_t(int64_t)>& allocate,
           int device, uintptr_t stream) {
          const fdk::Pyramid pyramid = fdk::as_pyramid(words, batch, accumulate);
          const fdk::LogNorm args = as_log_norm(options);
          fdk::check_layer_losses(pyramid, args);
          void* workspace = pointer(allocate(fdk::cuda::layer_losses_workspace(pyramid)));
          fdk::cuda::layer_losses_forward(pyramid, args, pointer(sums), pointer(masses), pointer(loss), pointer(slopes),
                                          workspace, device, pointer(stream));
        });
  m.def("cuda_layer_losses_backward", [](const Words& words, int64_t batch, int64_t accumulate, uintptr_t grad_loss,
                                         int64_t grad_loss_stride, uintptr_t slopes, int device, uintptr_t stream) {
    fdk::cuda::layer_losses_backward(fdk::as_pyramid(words, batch, accumulate), pointer(grad_loss), grad_loss_stride,
                                     pointer(slopes), device, pointer(stream));
  });
  m.def("cuda_layer_masks", [](const LayerMasksWords& words, const Words& sizes, int device, uintptr_t stream) {
    fdk::cuda::layer_masks(as_layer_masks(words, sizes), device, pointer(stream));
  });
  m.def("cuda_log_norm_forward",
        [](const LogNormWords& words, uintptr_t sums, uintptr_t masses, uintptr_t loss, int device, uintptr_t stream) {
          fdk::cuda::log_norm_forward(as_log_norm(words), pointer(sums), pointer(masses), pointer(loss), device,
                                      pointer(stream));
        });
  m.def("cuda_log_norm_backward", [](const LogNormWords& words, uintptr_t grad_loss, uintptr_t sums, uintptr_t masses,
                                     uintptr_t grad_sums, uintptr_t grad_masses, int device, uintptr_t stream) {
    fdk::cuda::log_norm_backward(as_log_norm(words), pointer(grad_loss), pointer(sums), pointer(masses),
                                 pointer(grad_sums), pointer(grad_masses), device, pointer(stream));
  });
}
#endif

} // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of fdkernels over raw pointers; not a public interface.";
  m.attr("__version__") = FDKERNELS_VERSION;
  m.attr("with_cuda") = static_cast<bool>(FDKERNELS_WITH_CUDA);
  m.attr("cuda_version") = FDKERNELS_CUDA_VERSION;
  m.attr("cuda_archs") = FDKERNELS_CUDA_ARCHS_BUILT;
  bind_cpu(m);
#if FDKERNELS_WITH_CUDA
  bind_cuda(m);
#endif
}
