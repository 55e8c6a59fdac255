// Normalisations with their activations, as functions of fdkernels._C.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "checks.h"
#include "op.h"

namespace py = pybind11;
using namespace py::literals;

namespace fdk {
namespace {

// How a normalisation computes, the same from call to call.
struct NormFormula {
  Activation activation;
  double slope;
  bool activation_first, instance;
  double eps;
};

// The tensors of a call of a normalisation.
struct NormArguments {
  Pyramid pyramid;
  NormAct call;

  NormArguments(const Words& layer, int64_t batch, DType accumulate, const NormFormula& formula, bool given,
                uintptr_t gamma, uintptr_t beta, DType parameters, uintptr_t statistics, uintptr_t running_mean,
                uintptr_t running_variance, double momentum, uintptr_t out)
      : pyramid(as_norm_layer(layer, batch, accumulate, parameters)),
        call{pyramid.layers[0],
             batch,
             accumulate,
             formula.activation,
             formula.slope,
             formula.activation_first,
             formula.instance,
             given,
             formula.eps,
             pointer(gamma),
             pointer(beta),
             parameters,
             static_cast<double*>(pointer(statistics)),
             pointer(running_mean),
             pointer(running_variance),
             momentum,
             pointer(out)} {}
};

} // namespace

void bind_norms(py::module_& m) {
  py::class_<NormFormula>(m, "NormFormula", py::module_local())
      .def(py::init([](Activation activation, double slope, bool activation_first, bool instance, double eps) {
             return NormFormula{activation, slope, activation_first, instance, eps};
           }),
           py::kw_only(), "activation"_a, "slope"_a, "activation_first"_a, "instance"_a, "eps"_a);
  m.def(
      "cpu_norm_forward",
      [](const Words& layer, int64_t batch, DType accumulate, const NormFormula& formula, bool given, uintptr_t gamma,
         uintptr_t beta, DType parameters, uintptr_t statistics, uintptr_t running_mean, uintptr_t running_variance,
         double momentum, uintptr_t out, uintptr_t sums, int num_threads) {
        const NormArguments args(layer, batch, accumulate, formula, given, gamma, beta, parameters, statistics,
                                 running_mean, running_variance, momentum, out);
        const py::gil_scoped_release release;
        cpu::norm_forward(args.call, static_cast<double*>(pointer(sums)), num_threads);
      },
      "layer"_a, "batch"_a, "accumulate"_a, "formula"_a, "given"_a, "gamma"_a, "beta"_a, "parameters"_a, "statistics"_a,
      "running_mean"_a, "running_variance"_a, "momentum"_a, "out"_a, "sums"_a, "num_threads"_a);
  m.def(
      "cpu_norm_backward",
      [](const Words& layer, int64_t batch, DType accumulate, const NormFormula& formula, bool given, uintptr_t gamma,
         uintptr_t beta, DType parameters, uintptr_t statistics, uintptr_t out, uintptr_t slopes, uintptr_t grad_gamma,
         uintptr_t grad_beta, int num_threads) {
        const NormArguments args(layer, batch, accumulate, formula, given, gamma, beta, parameters, statistics, 0, 0, 0,
                                 out);
        const py::gil_scoped_release release;
        cpu::norm_backward(args.call, pointer(slopes), pointer(grad_gamma), pointer(grad_beta), num_threads);
      },
      "layer"_a, "batch"_a, "accumulate"_a, "formula"_a, "given"_a, "gamma"_a, "beta"_a, "parameters"_a, "statistics"_a,
      "out"_a, "slopes"_a, "grad_gamma"_a, "grad_beta"_a, "num_threads"_a);
#if FDKERNELS_WITH_CUDA
  m.def(
      "cuda_norm_forward",
      [](const Words& layer, int64_t batch, DType accumulate, const NormFormula& formula, bool given, uintptr_t gamma,
         uintptr_t beta, DType parameters, uintptr_t statistics, uintptr_t running_mean, uintptr_t running_variance,
         double momentum, uintptr_t out, uintptr_t sums, const Allocate& allocate, int device, uintptr_t stream) {
        const NormArguments args(layer, batch, accumulate, formula, given, gamma, beta, parameters, statistics,
                                 running_mean, running_variance, momentum, out);
        check_dense(args.pyramid);
        void* workspace = pointer(allocate(cuda::norm_workspace(args.call)));
        cuda::norm_forward(args.call, pointer(sums), workspace, device, pointer(stream));
      },
      "layer"_a, "batch"_a, "accumulate"_a, "formula"_a, "given"_a, "gamma"_a, "beta"_a, "parameters"_a, "statistics"_a,
      "running_mean"_a, "running_variance"_a, "momentum"_a, "out"_a, "sums"_a, "allocate"_a, "device"_a, "stream"_a);
  m.def(
      "cuda_norm_backward",
      [](const Words& layer, int64_t batch, DType accumulate, const NormFormula& formula, bool given, uintptr_t gamma,
         uintptr_t beta, DType parameters, uintptr_t statistics, uintptr_t out, uintptr_t slopes, uintptr_t grad_gamma,
         uintptr_t grad_beta, const Allocate& allocate, int device, uintptr_t stream) {
        const NormArguments args(layer, batch, accumulate, formula, given, gamma, beta, parameters, statistics, 0, 0, 0,
                                 out);
        check_dense(args.pyramid);
        void* workspace = pointer(allocate(cuda::norm_workspace(args.call)));
        cuda::norm_backward(args.call, pointer(slopes), pointer(grad_gamma), pointer(grad_beta), workspace, device,
                            pointer(stream));
      },
      "layer"_a, "batch"_a, "accumulate"_a, "formula"_a, "given"_a, "gamma"_a, "beta"_a, "parameters"_a, "statistics"_a,
      "out"_a, "slopes"_a, "grad_gamma"_a, "grad_beta"_a, "allocate"_a, "device"_a, "stream"_a);
#endif
}

} // namespace fdk
