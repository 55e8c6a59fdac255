"""CMU-Net: a U-Net with a ConvMixer on the bottleneck and multi-scale gates on the skips.

Encoder and decoder blocks are those of `unet.py`. The ConvMixer has 7 layers of a 7x7 depthwise
and a 1x1 convolution, each followed by exact (erf) GELU, then batch norm; the residual spans only
the depthwise part. Encoder taps are before the gates, the bottleneck tap is after the ConvMixer.
With one class it has 49,932,353 trainable parameters for 3 input channels and 49,931,201 for 1.

References:
    Tang, Wang, Ning, Xian, Ding: "CMU-Net: A Strong ConvMixer-based Medical Ultrasound Image
    Segmentation Network", ISBI 2023, arXiv:2210.13012.
    Trockman, Kolter: "Patches Are All You Need?", TMLR 2023, arXiv:2201.09792 (ConvMixer).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fdkernels.models.blocks import ConvBlock, SegmentationNetwork, UpConv, check_count


class MixerLayer(nn.Module):
    """Depthwise mixing with a residual, then channel mixing without one.

    Args:
        channels: C, channels of input and output.
        kernel: side of the depthwise kernel, odd.
    """

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.depthwise = nn.Sequential(
            nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels),
            nn.GELU(),
            nn.BatchNorm2d(channels),
        )
        self.pointwise = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.GELU(), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the mixed map [N, C, H, W] of `x` [N, C, H, W]."""
        mixed: Tensor = self.pointwise(x + self.depthwise(x))  # [N, C, H, W]
        return mixed


class MultiScaleGate(nn.Module):
    """x + x * a, where a in (0, 1) is computed from three receptive fields of x.

    Args:
        channels: c, channels of the skip x and of a.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.point = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels))
        self.near = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels))
        self.wide = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=2, dilation=2), nn.BatchNorm2d(channels)
        )
        self.weight = nn.Sequential(
            nn.ReLU(inplace=True),
            nn.Conv2d(3 * channels, channels, 1),
            nn.BatchNorm2d(channels),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the gated skip [N, c, H, W] of `x` [N, c, H, W]."""
        scales = torch.cat([self.point(x), self.near(x), self.wide(x)], dim=1)  # [N, 3c, H, W]
        weight: Tensor = self.weight(scales)  # [N, c, H, W]
        return x + x * weight


class CMUNet(SegmentationNetwork):
    """CMU-Net; forward maps images [N, in_channels, H, W] to logits [N, num_classes, H, W].

    Args:
        in_channels: channels of the image, at least 1.
        num_classes: channels of the logits, at least 1.
        base_channels: width of the first level, 64 as published.
        mixer_depth: layers of the ConvMixer, 7 as published.
        mixer_kernel: side of its depthwise kernel, odd, 7 as published.

    Raises:
        TypeError: a count is not an integer.
        ValueError: a count is below 1, or `mixer_kernel` is even.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 1,
        base_channels: int = 64,
        mixer_depth: int = 7,
        mixer_kernel: int = 7,
    ) -> None:
        super().__init__(in_channels, num_classes, base_channels)
        check_count("mixer_depth", mixer_depth)
        check_count("mixer_kernel", mixer_kernel)
        if mixer_kernel % 2 == 0:
            raise ValueError(f"mixer_kernel must be odd to keep the size, got {mixer_kernel}")
        c1, c2, c3, c4, c5 = (base_channels * 2**level for level in range(5))
        self.pool = nn.MaxPool2d(2)
        self.enc1 = ConvBlock(in_channels, c1)
        self.enc2 = ConvBlock(c1, c2)
        self.enc3 = ConvBlock(c2, c3)
        self.enc4 = ConvBlock(c3, c4)
        self.bottleneck = nn.Sequential(
            ConvBlock(c4, c5), *(MixerLayer(c5, mixer_kernel) for _ in range(mixer_depth))
        )
        self.up4 = UpConv(c5, c4)
        self.gate4 = MultiScaleGate(c4)
        self.dec4 = ConvBlock(2 * c4, c4)
        self.up3 = UpConv(c4, c3)
        self.gate3 = MultiScaleGate(c3)
        self.dec3 = ConvBlock(2 * c3, c3)
        self.up2 = UpConv(c3, c2)
        self.gate2 = MultiScaleGate(c2)
        self.dec2 = ConvBlock(2 * c2, c2)
        self.up1 = UpConv(c2, c1)
        self.gate1 = MultiScaleGate(c1)
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
        d4 = self.dec4(torch.cat([self.gate4(e4), self.up4(b)], dim=1))  # [N, 512, H/8, W/8]
        d3 = self.dec3(torch.cat([self.gate3(e3), self.up3(d4)], dim=1))  # [N, 256, H/4, W/4]
        d2 = self.dec2(torch.cat([self.gate2(e2), self.up2(d3)], dim=1))  # [N, 128, H/2, W/2]
        d1 = self.dec1(torch.cat([self.gate1(e1), self.up1(d2)], dim=1))  # [N, 64, H, W]
        logits: Tensor = self.head(d1)  # [N, num_classes, H, W]
        return logits
