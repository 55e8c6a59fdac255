"""Attention U-Net: the U-Net of `unet.py` with an additive attention gate on every skip.

The gate multiplies a skip by one map in (0, 1), computed from the skip and the up-convolved map of
the same level, which have the same size. Encoder taps are before the gates. With one class it has
34,878,573 trainable parameters for 3 input channels and 34,877,421 for 1.

References:
    Oktay et al.: "Attention U-Net: Learning Where to Look for the Pancreas", MIDL 2018,
    arXiv:1804.03999 (there in 3-D, with the gating signal one level coarser than the skip).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fdkernels.models.blocks import ConvBlock, SegmentationNetwork, UpConv


class AdditiveGate(nn.Module):
    """x * sigmoid(BN(C1(ReLU(BN(C1(g)) + BN(C1(x)))))) for skip x, gating map g and 1x1 convolutions C1.

    Args:
        channels: f, channels of the skip and of the gating map; the sum inside has f/2, the weight 1.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = channels // 2
        self.gating = nn.Sequential(nn.Conv2d(channels, inner, 1), nn.BatchNorm2d(inner))
        self.skip = nn.Sequential(nn.Conv2d(channels, inner, 1), nn.BatchNorm2d(inner))
        self.relu = nn.ReLU(inplace=True)
        self.weight = nn.Sequential(nn.Conv2d(inner, 1, 1), nn.BatchNorm2d(1), nn.Sigmoid())

    def forward(self, gating: Tensor, skip: Tensor) -> Tensor:
        """Return the gated skip [N, f, H, W] of `gating` [N, f, H, W] and `skip` [N, f, H, W]."""
        joint = self.relu(self.gating(gating) + self.skip(skip))  # [N, f/2, H, W]
        weight: Tensor = self.weight(joint)  # [N, 1, H, W]
        return weight * skip  # [N, f, H, W]


class AttentionUNet(SegmentationNetwork):
    """Attention U-Net; forward maps [N, in_channels, H, W] to logits [N, num_classes, H, W].

    Args:
        in_channels: channels of the image, at least 1.
        num_classes: channels of the logits, at least 1.
        base_channels: width of the first level, even, 64 as published.

    Raises:
        TypeError: a count is not an integer.
        ValueError: a count is below 1, or `base_channels` is odd.
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 1, base_channels: int = 64) -> None:
        super().__init__(in_channels, num_classes, base_channels, even_width=True)
        c1, c2, c3, c4, c5 = (base_channels * 2**level for level in range(5))
        self.pool = nn.MaxPool2d(2)
        self.enc1 = ConvBlock(in_channels, c1)
        self.enc2 = ConvBlock(c1, c2)
        self.enc3 = ConvBlock(c2, c3)
        self.enc4 = ConvBlock(c3, c4)
        self.bottleneck = ConvBlock(c4, c5)
        self.up4 = UpConv(c5, c4)
        self.gate4 = AdditiveGate(c4)
        self.dec4 = ConvBlock(2 * c4, c4)
        self.up3 = UpConv(c4, c3)
        self.gate3 = AdditiveGate(c3)
        self.dec3 = ConvBlock(2 * c3, c3)
        self.up2 = UpConv(c3, c2)
        self.gate2 = AdditiveGate(c2)
        self.dec2 = ConvBlock(2 * c2, c2)
        self.up1 = UpConv(c2, c1)
        self.gate1 = AdditiveGate(c1)
        self.dec1 = ConvBlock(2 * c1, c1)
        self.head = nn.Conv2d(c1, num_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits [N, num_classes, H, W] of `image` [N, in_channels, H, W], H and W multiples of 16.

        Raises TypeError or ValueError for any other image, see `check_image`. Shape comments are for 64
        base channels.
        """
        self.check_image(image)
        e1 = self.enc1(image)  # [N, 64, H, W]
        e2 = self.enc2(self.pool(e1))  # [N, 128, H/2, W/2]
        e3 = self.enc3(self.pool(e2))  # [N, 256, H/4, W/4]
        e4 = self.enc4(self.pool(e3))  # [N, 512, H/8, W/8]
        b = self.bottleneck(self.pool(e4))  # [N, 1024, H/16, W/16]
        u4 = self.up4(b)  # [N, 512, H/8, W/8]
        d4 = self.dec4(torch.cat([self.gate4(u4, e4), u4], dim=1))  # [N, 512, H/8, W/8]
        u3 = self.up3(d4)  # [N, 256, H/4, W/4]
        d3 = self.dec3(torch.cat([self.gate3(u3, e3), u3], dim=1))  # [N, 256, H/4, W/4]
        u2 = self.up2(d3)  # [N, 128, H/2, W/2]
        d2 = self.dec2(torch.cat([self.gate2(u2, e2), u2], dim=1))  # [N, 128, H/2, W/2]
        u1 = self.up1(d2)  # [N, 64, H, W]
        d1 = self.dec1(torch.cat([self.gate1(u1, e1), u1], dim=1))  # [N, 64, H, W]
        logits: Tensor = self.head(d1)  # [N, num_classes, H, W]
        return logits
