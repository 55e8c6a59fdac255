"""Backend `triton`: the five functions for CUDA tensors, or for CPU tensors under the interpreter."""

from fdkernels.op.triton.gradient import gradient, mask_gradient
from fdkernels.op.triton.losses import losses, sums
from fdkernels.op.triton.masks import masks

__all__ = ["gradient", "losses", "mask_gradient", "masks", "sums"]
