"""Base class, input checks and U-Net blocks shared by the four networks."""

from __future__ import annotations

from torch import Tensor, nn

# Every network has a submodule of each name; its output is the tap.
TAP_NAMES = ("enc1", "enc2", "enc3", "enc4", "bottleneck", "dec4", "dec3", "dec2", "dec1")

# Four 2x2 poolings: for other sizes, skip and up-sampled map would differ by one pixel.
SIZE_DIVISOR = 16


class SegmentationNetwork(nn.Module):
    """Base of the networks: four encoder levels, a bottleneck, four decoder levels, logits.

    Args:
        in_channels: channels of the image, at least 1.
        num_classes: channels of the logits, at least 1 (1 for binary segmentation).
        base_channels: width of the first level; level l has `base_channels * 2**(l - 1)`.
        even_width: whether `base_channels` must be even because the network halves it.

    Attributes:
        tap_names: submodule names whose outputs the feature discrepancy loss reads, in the
            order enc1..enc4, bottleneck, dec4..dec1.

    Raises:
        TypeError: a count is not an integer.
        ValueError: a count is below 1, or `base_channels` is odd but must be even.
    """

    def __init__(
        self, in_channels: int, num_classes: int, base_channels: int, *, even_width: bool = False
    ) -> None:
        super().__init__()
        check_count("in_channels", in_channels)
        check_count("num_classes", num_classes)
        check_count("base_channels", base_channels)
        if even_width and base_channels % 2:
            raise ValueError(
                f"base_channels must be even for {type(self).__name__}, whose gates halve it, "
                f"got {base_channels}"
            )
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.base_channels = base_channels
        self.tap_names = list(TAP_NAMES)

    def check_image(self, image: Tensor) -> None:
        """Validate the shape and dtype of an input image.

        Raises:
            TypeError: `image` is not a floating-point tensor.
            ValueError: `image` is not [N, in_channels, H, W] with H and W positive multiples
                of 16.
        """
        if not isinstance(image, Tensor):
            raise TypeError(f"image must be a torch.Tensor, got {type(image).__name__}")
        if not image.is_floating_point():
            raise TypeError(f"image must be a floating-point tensor, got {image.dtype}")
        shape = list(image.shape)
        if len(shape) != 4 or shape[1] != self.in_channels:
            raise ValueError(f"image must have shape [N, {self.in_channels}, H, W], got {shape}")
        height, width = shape[2:]
        if height < 1 or width < 1 or height % SIZE_DIVISOR or width % SIZE_DIVISOR:
            raise ValueError(
                f"image height and width must be positive multiples of {SIZE_DIVISOR}, "
                f"got {height}x{width}; pad or crop the image (and its mask) first"
            )


class ConvBlock(nn.Sequential):
    """Twice 3x3 convolution, batch norm, ReLU: [N, in, H, W] to [N, out, H, W]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class UpConv(nn.Sequential):
    """Nearest 2x up-sampling, 3x3 convolution, batch norm, ReLU: [N, in, H, W] to [N, out, 2H, 2W]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Upsample(scale_factor=2, mode="nearest"),
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


def check_count(name: str, value: int) -> None:
    """Validate that `value`, the argument `name`, is an integer of at least 1.

    Raises:
        TypeError: `value` is not an integer.
        ValueError: `value` is below 1.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
