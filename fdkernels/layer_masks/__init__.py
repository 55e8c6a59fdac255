"""Stage layer_masks: one mask at the size of every layer, as foreground and background weights."""

from fdkernels.layer_masks.api import LayerMasks, layer_masks

__all__ = ["LayerMasks", "layer_masks"]
