"""The functions that a backend consists of, and the modules that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fdkernels.conventions import Options
from fdkernels.op.norm_formula import Formula, NormInputs, Running
from fdkernels.op.pyramid import Pyramid, Regions, Sums, Weights

__all__ = ["Kernels", "NormKernels", "kernels_of", "norm_kernels_of"]


class Kernels(Protocol):
    """A backend of the op. README.md beside this file derives what each function computes.

    No function differentiates or checks its arguments; `fdkernels.op.registered` and `fdkernels.checks` do.
    """

    def masks(
        self,
        mask: Tensor,
        sizes: Sequence[torch.Size],
        dtype: torch.dtype,
        mask_resize: str,
        ignore_index: float | None,
    ) -> Weights:
        """Resize a mask [N, 1, *S0] to the weights (M3) to (M5) [N, P] of each size, in one launch.

        `dtype` is the accumulation dtype. The weights have no `bg` without `ignore_index`.
        """

    def sums(
        self,
        features: Sequence[Tensor],
        weights: Weights,
        pyramid: Pyramid,
        options: Options | None,
        pairing: Tensor | None,
        with_slopes: bool,
        adds_up: bool = False,
    ) -> Sums:
        """Sum the layers [N, C_l, *S_l] of a pyramid by (R2), and make losses (L1) to (L6) of the sums.

        Without `options` there are sums and masses alone. `options.reduction` is `"mean"` or `"sum"`;
        `adds_up` asks for the sum of the layers' losses. The pairing is int64, [N] for shuffle, [K, 2] for
        pooled (rows with a negative entry do not count), or None.
        """

    def losses(
        self, sums: Tensor, masses: Tensor, pyramid: Pyramid, options: Options, pairing: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Make losses [L] and slopes (F1) [2, N, ΣC] of given sums [2, N, ΣC] and masses [2, N, L].

        For sums gathered from several ranks, whose batch is not that of the pyramid.
        """

    def gradient(
        self,
        grad_sums: Tensor,
        factor: Tensor | None,
        weights: Weights,
        upstream: Sequence[Tensor | None],
        pyramid: Pyramid,
    ) -> list[Tensor]:
        """Write the gradient (R3) of each layer for g = grad_sums [2, N, ΣC] times its factor of [L].

        The gradient in `upstream`, where a layer has one, is added; it may have any strides. An empty list
        means that no layer has one.
        """

    def mask_gradient(self, grad_sums: Tensor, weights: Weights, features: Sequence[Tensor]) -> Weights:
        """Write the gradients (R4) of the weights, [N, P] in the dtype of `grad_sums` [2, N, ΣC]."""

    def region_sums(
        self, features: Sequence[Tensor], regions: Regions, pyramid: Pyramid
    ) -> tuple[Tensor, Tensor]:
        """Sum the layers [N, C_l, *S_l] over R regions in one read of them, (C1) and (C2).

        Returns:
            Sums [R, N, ΣC], with pivots followed by the second moments, [2R, N, ΣC]; masses [R, N, L].
        """

    def region_gradient(
        self,
        grad_sums: Tensor,
        regions: Regions,
        features: Sequence[Tensor],
        upstream: Sequence[Tensor | None],
        pyramid: Pyramid,
    ) -> list[Tensor]:
        """Write the gradient (C3) of each layer, plus the upstream one, as `gradient` does.

        `grad_sums` is [R, N, ΣC], with pivots [2R, N, ΣC]; `features` are read, and given, with pivots alone.
        """

    def region_weight_gradient(
        self, grad_sums: Tensor, regions: Regions, features: Sequence[Tensor]
    ) -> list[Tensor]:
        """Write the gradients (C4) of the weights, [N, R, P_l] in the dtype of `grad_sums`."""


class NormKernels(Protocol):
    """A backend of the normalisation with its activation, as README.md derives it."""

    def norm_forward(
        self, inputs: NormInputs, formula: Formula, running: Running | None, regions: Weights | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compute statistics (N1) and output (N2) of x [N, C, *S], and move the running statistics.

        Returns:
            The output [N, C, *S] laid out like x; the statistics, as `NormInputs` has them; and, where there
            are weights [N, P], the region sums [2, N, C] of the output, in the accumulation dtype or float64.
        """

    def norm_backward(
        self,
        inputs: NormInputs,
        formula: Formula,
        grad_y: Tensor,
        added: tuple[Tensor, Weights] | None,
        needs: tuple[bool, ...],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Compute the gradients (N5) of x [N, C, *S] and (N4) of γ and β [C], None for what is not needed.

        Args:
            inputs: of the forward, with its statistics.
            formula: likewise.
            grad_y: the gradient that arrives, [N, C, *S], laid out like x.
            added: slopes [2, N, C] and weights [N, P], whose gradient (R3) is added to it.
            needs: whether x, γ and β need a gradient.
        """


def norm_kernels_of(backend: str) -> NormKernels | None:
    """The kernels of a backend for normalisations; None where it has none, and torch's own stand for them."""
    if backend == "cpu":
        from fdkernels.op import cpu_norms

        return cpu_norms
    if backend == "triton":
        from fdkernels.op import triton

        return triton
    if backend == "cuda":
        from fdkernels.op import cuda_norms

        return cuda_norms
    return None


def kernels_of(backend: str) -> Kernels:
    """The module of a backend, imported at its first use: Triton decides then whether it interprets."""
    if backend not in _kernels:
        _kernels[backend] = _IMPORTS[backend]()
    return _kernels[backend]


def _import_reference() -> Kernels:
    from fdkernels.op import reference

    return reference


def _import_cpu() -> Kernels:
    from fdkernels.op import cpu

    return cpu


def _import_cuda() -> Kernels:
    from fdkernels.op import cuda

    return cuda


def _import_triton() -> Kernels:
    from fdkernels.op import triton

    return triton


_IMPORTS = {
    "reference": _import_reference,
    "cpu": _import_cpu,
    "cuda": _import_cuda,
    "triton": _import_triton,
}
_kernels: dict[str, Kernels] = {}
