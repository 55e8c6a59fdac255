"""The kernels of stage region_sums alone, without the autograd, checks and masks around them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs
from benchmarks.truth import Truth
from fdkernels import native
from fdkernels.backend import implementation, resolve
from fdkernels.conventions import get_convention
from fdkernels.layer_masks import layer_masks
from fdkernels.region_sums.geometry import DTYPE_CODES, accumulate_dtype, geometry_of


class Kernels:
    """Forward (R2) and backward (R3) of fdkernels/region_sums/README.md on the layers of a case.

    `backward` writes fresh memory, `warm` writes memory that is already there. On a GPU they would be the
    same, as its allocator keeps what it has, and there is no `warm`.
    """

    def __init__(self, case: Case, inputs: Inputs, truth: Truth) -> None:
        self.layers = [layer.detach() for layer in inputs.layers]
        dtype = accumulate_dtype(self.layers)
        sizes = [layer.shape[2:] for layer in self.layers]
        resize = get_convention(case.convention).mask_resize
        self.masks = layer_masks(inputs.mask, sizes, dtype, resize, case.ignore_index)
        self.backend = resolve("auto", self.layers[0].device)
        self.stage = implementation("region_sums", self.backend)
        coefficients = torch.cat(truth.coefficients, dim=1)  # [N, ΣC, 2]
        self.grad_sums = coefficients.permute(2, 0, 1).to(dtype).contiguous()  # [2, N, ΣC]
        self.geometry = [geometry_of(layer) for layer in self.layers]
        self.grads: list[Tensor] = []
        self.buffers: list[Tensor] = []
        if self.backend == "cpu":
            self.warm = self._warm_call()

    def forward(self) -> tuple[Tensor, Tensor]:
        """Sums [2, N, ΣC] and masses [2, N, L]."""
        sums: tuple[Tensor, Tensor] = self.stage.forward(self.layers, *self.masks)
        return sums

    def backward(self) -> None:
        """The gradient of every layer in fresh memory; the last ones are freed first."""
        self.grads = []
        self.grads = self.stage.backward(self.grad_sums, *self.masks, [], [], self.geometry)[0]

    def _warm_call(self) -> Callable[[], None]:
        from fdkernels import _C

        self.buffers = [torch.full_like(layer, torch.nan) for layer in self.layers]
        words = native.backward_words(self.buffers, *self.masks, [])
        batch, code = self.layers[0].shape[0], DTYPE_CODES[self.grad_sums.dtype]
        pointer, threads = self.grad_sums.data_ptr(), torch.get_num_threads()
        return lambda: _C.cpu_region_sums_backward(words, batch, code, pointer, threads)
