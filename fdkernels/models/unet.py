"""U-Net with batch norm and up-convolutions, as the breast-ultrasound benchmarks use it.

Widths 64, 128, 256, 512 and 1024 in the bottleneck. Every convolution has a bias and is followed
by batch norm, then ReLU; up-sampling is nearest 2x, then a 3x3 convolution. With one class it has
34,527,041 trainable parameters for 3 input channels and 34,525,889 for 1.

References:
    Ronneberger, Fischer, Brox: "U-Net: Convolutional Networks for Biomedical Image
    Segmentation", MICCAI 2015, arXiv:1505.04597 (there without batch norm, with unpadded
    convolutions and transposed convolutions).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fdkernels.models.blocks import ConvBlock, SegmentationNetwork, UpConv


class UNet(SegmentationNetwork):
    """U-Net; forward maps images [N, in_channels, H, W] to logits [N, num_classes, H, W].

    Args:
        in_channels: channels of the image, at least 1.
        num_classes: channels of the logits, at least 1.
        base_channels: width of the first level, 64 as published.

    Raises:
        TypeError: a count is not an integer.
        ValueError: a count is below 1.
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 1, base_channels: int = 64) -> None:
        super().__init__(in_channels, num_classes, base_channels)
        c1, c2, c3, c4, c5 = (base_channels * 2**level for level in range(5))
        self.pool = nn.MaxPool2d(2)
        self.enc1 = ConvBlock(in_channels, c1)
        self.enc2 = ConvBlock(c1, c2)
        self.enc3 = ConvBlock(c2, c3)
        self.enc4 = ConvBlock(c3, c4)
        self.bottleneck = ConvBlock(c4, c5)
        self.up4 = UpConv(c5, c4)
        self.dec4 = ConvBlock(2 * c4, c4)
        self.up3 = UpConv(c4, c3)
        self.dec3 = ConvBlock(2 * c3, c3)
        self.up2 = UpConv(c3, c2)
        self.dec2 = ConvBlock(2 * c2, c2)
        self.up1 = UpConv(c2, c1)
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
        d4 = self.dec4(torch.cat([e4, self.up4(b)], dim=1))  # [N, 512, H/8, W/8]
        d3 = self.dec3(torch.cat([e3, self.up3(d4)], dim=1))  # [N, 256, H/4, W/4]
        d2 = self.dec2(torch.cat([e2, self.up2(d3)], dim=1))  # [N, 128, H/2, W/2]
        d1 = self.dec1(torch.cat([e1, self.up1(d2)], dim=1))  # [N, 64, H, W]
        logits: Tensor = self.head(d1)  # [N, num_classes, H, W]
        return logits
