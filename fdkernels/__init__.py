"""Fused kernels for the feature discrepancy loss of medical image segmentation.

::

    import fdkernels as fdk

    crit = fdk.FeatureDiscrepancyLoss(num_layers=9)
    with fdk.FeatureTaps(model, model.tap_names) as taps:
        loss = segmentation_loss(model(images), mask) + crit(taps.features, mask)
"""

from fdkernels import models
from fdkernels._version import __version__
from fdkernels.backend import backends, use_backend
from fdkernels.build_info import warn_if_not_built
from fdkernels.checks import debug
from fdkernels.conventions import CONVENTIONS, Convention
from fdkernels.criterion import FeatureDiscrepancyLoss
from fdkernels.loss import RegionSums, feature_discrepancy_loss, region_sums, tap
from fdkernels.norms import NormAct, fuse_norms, unfuse_norms
from fdkernels.taps import FeatureTaps
from fdkernels.taps.suggest import suggest_taps

__all__ = [
    "CONVENTIONS",
    "Convention",
    "FeatureDiscrepancyLoss",
    "FeatureTaps",
    "NormAct",
    "RegionSums",
    "__version__",
    "backends",
    "debug",
    "feature_discrepancy_loss",
    "fuse_norms",
    "models",
    "region_sums",
    "suggest_taps",
    "tap",
    "unfuse_norms",
    "use_backend",
]

warn_if_not_built()
