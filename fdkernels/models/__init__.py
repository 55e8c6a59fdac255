"""Segmentation networks of the paper. They return logits and name the taps that the loss reads."""

from __future__ import annotations

from typing import Any

from fdkernels.models.attention_unet import AttentionUNet
from fdkernels.models.blocks import SegmentationNetwork
from fdkernels.models.cmunet import CMUNet
from fdkernels.models.nucleisegnet import NucleiSegNet
from fdkernels.models.unet import UNet

_NETWORKS: dict[str, type[SegmentationNetwork]] = {
    "unet": UNet,
    "attention_unet": AttentionUNet,
    "nucleisegnet": NucleiSegNet,
    "cmunet": CMUNet,
}


def names() -> list[str]:
    """Return the names that `create` accepts."""
    return list(_NETWORKS)


def create(
    name: str,
    in_channels: int = 3,
    num_classes: int = 1,
    base_channels: int | None = None,
    **kwargs: Any,
) -> SegmentationNetwork:
    """Create a network with random weights, in training mode.

    Its forward maps floating-point images [N, in_channels, H, W], H and W multiples of 16, to logits
    [N, num_classes, H, W] (no sigmoid). Its `tap_names` are the submodules whose outputs the loss
    reads, as `fdkernels.FeatureTaps` takes them.

    Args:
        name: one of `names()`: "unet", "attention_unet", "nucleisegnet", "cmunet".
        in_channels: channels of the image, at least 1.
        num_classes: channels of the logits, at least 1.
        base_channels: width of the first level, which scales all others; None for the published
            width (32 for "nucleisegnet", 64 for the others).
        **kwargs: further arguments of the network (`mixer_depth` and `mixer_kernel` of "cmunet").

    Raises:
        TypeError: a count is not an integer, or the network does not take one of `kwargs`.
        ValueError: the name is unknown, a count is below 1, or `base_channels` is odd and the
            network halves it.
    """
    if name not in _NETWORKS:
        known = ", ".join(f'"{known_name}"' for known_name in _NETWORKS)
        raise ValueError(f"name must be one of {known}, got {name!r}")
    if base_channels is not None:
        kwargs["base_channels"] = base_channels
    return _NETWORKS[name](in_channels=in_channels, num_classes=num_classes, **kwargs)


__all__ = [
    "AttentionUNet",
    "CMUNet",
    "NucleiSegNet",
    "SegmentationNetwork",
    "UNet",
    "create",
    "names",
]
