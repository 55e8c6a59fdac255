"""Backend `cuda` of layer_masks."""

from fdkernels.layer_masks.impl.reference import forward

__all__ = ["forward"]
