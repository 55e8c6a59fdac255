"""Stages region_sums and log_norm as one piece of work: features to the loss of every layer."""

from fdkernels.layer_losses.api import fused_layer_losses, one_loss
from fdkernels.layer_losses.tapped import FusedTap, Place, tapped_layer_losses, tapped_region_sums

__all__ = ["FusedTap", "Place", "fused_layer_losses", "one_loss", "tapped_layer_losses", "tapped_region_sums"]
