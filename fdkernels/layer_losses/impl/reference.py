"""Backend `reference` of layer_losses: its two stages one after the other."""

from __future__ import annotations

from functools import partial

from fdkernels.layer_losses.impl import stages
from fdkernels.log_norm.impl import reference as log_norm
from fdkernels.region_sums.impl import reference as region_sums

__all__ = ["backward", "forward"]

forward = partial(stages.forward, region_sums, log_norm)
backward = partial(stages.backward, region_sums)
