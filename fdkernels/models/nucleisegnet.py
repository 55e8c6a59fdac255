"""NucleiSegNet: robust residual blocks, a bottleneck and an attention decoder.

Widths 32, 64, 128, 256 and 512 in the bottleneck. The order is always convolution, ReLU, batch norm,
so the taps (the robust residual blocks before gating, the bottleneck, the decoder blocks) are batch
norm outputs and have both signs. The "residual" of a block is a concatenation, not a sum, and a gate
has all f channels at full resolution. Batch norm has eps 1e-3 and momentum 0.5; the initialisers
are those of the published Keras code. With one class it has 12,395,713 trainable parameters for 3
input channels and 12,394,561 for 1.

References:
    Lal, Das, Alabhya, Kanfade, Kumar, Kini: "NucleiSegNet: Robust deep learning architecture for
    the nuclei segmentation of liver cancer histopathology images", Computers in Biology and
    Medicine 128, 2021, doi:10.1016/j.compbiomed.2020.104075.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn

from fdkernels.models.blocks import SegmentationNetwork

CONV_BIAS = 0.1
RESIDUAL_BETA = 0.01

# Standard deviation of a unit normal truncated at +-2; Keras rescales its truncated normal by it.
TRUNCATED_STD = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))

_Conv = TypeVar("_Conv", nn.Conv2d, nn.ConvTranspose2d)


class RobustResidualBlock(nn.Module):
    """Convolution, separable convolution, convolution, then a fourth on the concatenated [input, result].

    Args:
        in_channels: a, channels of the input.
        out_channels: b, channels of the output.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_conv_relu_norm(in_channels, out_channels, beta=RESIDUAL_BETA),
            *_separable_relu_norm(out_channels, beta=RESIDUAL_BETA),
            *_conv_relu_norm(out_channels, out_channels, beta=RESIDUAL_BETA),
        )
        self.merge = nn.Sequential(
            *_conv_relu_norm(in_channels + out_channels, out_channels, beta=RESIDUAL_BETA)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the features [N, b, H, W] of `x` [N, a, H, W]."""
        joint = torch.cat([x, self.body(x)], dim=1)  # [N, a + b, H, W]
        features: Tensor = self.merge(joint)  # [N, b, H, W]
        return features


class AttentionDecoderBlock(nn.Module):
    """Concatenates the up-sampled map from below with the gated skip.

    Args:
        channels: f, channels of the skip; the map from below has 2f.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = channels // 2
        self.reduce = _glorot_normal(nn.Conv2d(2 * channels, channels, 1))
        self.theta = _glorot_normal(nn.Conv2d(channels, inner, 3, padding=1))
        self.phi = _glorot_normal(nn.Conv2d(channels, inner, 3, padding=1))
        self.weight = nn.Sequential(
            _glorot_uniform(nn.Conv2d(inner, channels, 1), bias=0.0),
            nn.ReLU(inplace=True),
            _batch_norm(channels, beta=0.0),
            nn.Sigmoid(),
        )
        self.up = _glorot_normal(nn.ConvTranspose2d(2 * channels, channels, 2, stride=2))

    def forward(self, below: Tensor, skip: Tensor) -> Tensor:
        """Return [up, gated] [N, 2f, 2H, 2W] of `below` [N, 2f, H, W] and `skip` [N, f, 2H, 2W]."""
        reduced = torch.relu(self.reduce(below))  # [N, f, H, W]
        theta = torch.relu(self.theta(skip))  # [N, f/2, 2H, 2W]
        phi = torch.relu(self.phi(reduced))  # [N, f/2, H, W]
        phi = nn.functional.interpolate(phi, scale_factor=2, mode="bilinear", align_corners=False)
        weight = self.weight(torch.relu(theta + phi))  # [N, f, 2H, 2W]
        up = torch.relu(self.up(below))  # [N, f, 2H, 2W]
        return torch.cat([up, weight * skip], dim=1)  # [N, 2f, 2H, 2W]


class NucleiSegNet(SegmentationNetwork):
    """NucleiSegNet; forward maps [N, in_channels, H, W] to logits [N, num_classes, H, W].

    Args:
        in_channels: channels of the image, at least 1.
        num_classes: channels of the logits, at least 1.
        base_channels: width of the first level, even, 32 as published.

    Raises:
        TypeError: a count is not an integer.
        ValueError: a count is below 1, or `base_channels` is odd.
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 1, base_channels: int = 32) -> None:
        super().__init__(in_channels, num_classes, base_channels, even_width=True)
        c1, c2, c3, c4, c5 = (base_channels * 2**level for level in range(5))
        self.pool = nn.MaxPool2d(2)
        self.enc1 = RobustResidualBlock(in_channels, c1)
        self.enc2 = RobustResidualBlock(c1, c2)
        self.enc3 = RobustResidualBlock(c2, c3)
        self.enc4 = RobustResidualBlock(c3, c4)
        self.bottleneck = _conv_stack(c4, c5, c5, c5)
        self.attention4 = AttentionDecoderBlock(c4)
        self.dec4 = _conv_stack(2 * c4, c4, c4)
        self.attention3 = AttentionDecoderBlock(c3)
        self.dec3 = _conv_stack(2 * c3, c3, c3)
        self.attention2 = AttentionDecoderBlock(c2)
        self.dec2 = _conv_stack(2 * c2, c2, c2)
        self.attention1 = AttentionDecoderBlock(c1)
        self.dec1 = _conv_stack(2 * c1, c1, c1)
        self.head = _glorot_uniform(nn.Conv2d(c1, num_classes, 1), bias=0.0)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits [N, num_classes, H, W] of `image` [N, in_channels, H, W], H and W multiples of 16.

        Raises TypeError or ValueError for any other image, see `check_image`. Shape comments are for 32
        base channels.
        """
        self.check_image(image)
        e1 = self.enc1(image)  # [N, 32, H, W]
        e2 = self.enc2(self.pool(e1))  # [N, 64, H/2, W/2]
        e3 = self.enc3(self.pool(e2))  # [N, 128, H/4, W/4]
        e4 = self.enc4(self.pool(e3))  # [N, 256, H/8, W/8]
        b = self.bottleneck(self.pool(e4))  # [N, 512, H/16, W/16]
        d4 = self.dec4(self.attention4(b, e4))  # [N, 256, H/8, W/8]
        d3 = self.dec3(self.attention3(d4, e3))  # [N, 128, H/4, W/4]
        d2 = self.dec2(self.attention2(d3, e2))  # [N, 64, H/2, W/2]
        d1 = self.dec1(self.attention1(d2, e1))  # [N, 32, H, W]
        logits: Tensor = self.head(d1)  # [N, num_classes, H, W]
        return logits


def _conv_stack(*widths: int) -> nn.Sequential:
    """Stack 3x3 convolution, ReLU, batch norm from each width to the next."""
    layers: list[nn.Module] = []
    for in_channels, out_channels in pairwise(widths):
        layers += _conv_relu_norm(in_channels, out_channels, beta=0.0)
    return nn.Sequential(*layers)


def _conv_relu_norm(in_channels: int, out_channels: int, *, beta: float) -> list[nn.Module]:
    return [
        _glorot_normal(nn.Conv2d(in_channels, out_channels, 3, padding=1)),
        nn.ReLU(inplace=True),
        _batch_norm(out_channels, beta=beta),
    ]


def _separable_relu_norm(channels: int, *, beta: float) -> list[nn.Module]:
    # The depthwise convolution has no bias: Keras has one bias for the pair, on the pointwise one.
    depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
    return [
        _glorot_uniform(depthwise, bias=CONV_BIAS),
        _glorot_uniform(nn.Conv2d(channels, channels, 1), bias=CONV_BIAS),
        nn.ReLU(inplace=True),
        _batch_norm(channels, beta=beta),
    ]


def _batch_norm(channels: int, *, beta: float) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.5)
    nn.init.constant_(norm.bias, beta)
    return norm


def _glorot_normal(conv: _Conv) -> _Conv:
    """Initialise `conv` with Keras's Glorot normal: widened by `TRUNCATED_STD`, truncated at 2 std."""
    fans = (conv.in_channels + conv.out_channels) * math.prod(conv.kernel_size)  # in + out
    std = math.sqrt(2 / fans) / TRUNCATED_STD
    nn.init.trunc_normal_(conv.weight, std=std, a=-2 * std, b=2 * std)
    if conv.bias is not None:
        nn.init.constant_(conv.bias, CONV_BIAS)
    return conv


def _glorot_uniform(conv: nn.Conv2d, *, bias: float) -> nn.Conv2d:
    """Initialise `conv` with Glorot uniform weights and a constant bias, if it has one."""
    nn.init.xavier_uniform_(conv.weight)
    if conv.bias is not None:
        nn.init.constant_(conv.bias, bias)
    return conv
