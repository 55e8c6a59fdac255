"""Backend `triton`: its functions for CUDA tensors, or for CPU tensors under the interpreter."""

from fdkernels.op.triton.gradient import gradient, mask_gradient
from fdkernels.op.triton.losses import losses, sums
from fdkernels.op.triton.masks import masks
from fdkernels.op.triton.norm_gradient import norm_backward
from fdkernels.op.triton.norms import norm_forward
from fdkernels.op.triton.region_gradient import region_gradient, region_weight_gradient
from fdkernels.op.triton.regions import region_sums

__all__ = [
    "gradient",
    "losses",
    "mask_gradient",
    "masks",
    "norm_backward",
    "norm_forward",
    "region_gradient",
    "region_sums",
    "region_weight_gradient",
    "sums",
]
