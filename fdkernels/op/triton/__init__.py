"""Backend `triton`: its functions for CUDA tensors, or for CPU tensors under the interpreter."""

from fdkernels.op.triton.gradient import gradient, mask_gradient
from fdkernels.op.triton.losses import losses, sums
from fdkernels.op.triton.masks import masks
from fdkernels.op.triton.region_gradient import region_gradient, region_weight_gradient
from fdkernels.op.triton.regions import region_sums

__all__ = [
    "gradient",
    "losses",
    "mask_gradient",
    "masks",
    "region_gradient",
    "region_sums",
    "region_weight_gradient",
    "sums",
]
