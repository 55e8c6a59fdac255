"""A normalisation and its activation as one module, and networks whose pairs are replaced by it."""

from fdkernels.norms.fuse import fuse_norms, unfuse_norms
from fdkernels.norms.module import NormAct

__all__ = ["NormAct", "fuse_norms", "unfuse_norms"]
