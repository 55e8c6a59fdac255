"""Stages region_sums and log_norm as one piece of work: features to the loss of every layer."""

from fdkernels.layer_losses.api import fused_layer_losses

__all__ = ["fused_layer_losses"]
