"""Random flips and quarter turns of an image and its mask."""

from __future__ import annotations

import torch
from torch import Tensor


def random_symmetry(
    image: Tensor, mask: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Apply one random symmetry of the square to both image and mask.

    Three fair coins decide on a horizontal flip, a vertical flip and a quarter turn to the left.
    Both flips together are a half turn, so each of the eight symmetries is equally likely, the
    quarter turn to the right included. Pixels are moved, never interpolated. An image that is
    not square is only flipped, because a quarter turn would swap its sides.

    Args:
        image: [C, H, W], any dtype.
        mask: [1, H, W], any dtype.
        generator: random generator on the CPU; None for torch's global one.

    Returns:
        Image and mask in the same shapes and dtypes, not necessarily contiguous.

    Raises:
        ValueError: image and mask differ in height or width.

    References:
        Section A.4: flips and rotations by 90 degrees to the left and right.
    """
    if image.shape[-2:] != mask.shape[-2:]:
        raise ValueError(
            f"mask must have the height and width of image, {tuple(image.shape[-2:])}, "
            f"got {tuple(mask.shape[-2:])}"
        )
    across, down, turn = torch.randint(2, (3,), generator=generator, device="cpu").tolist()
    axes = [axis for axis, drawn in ((-1, across), (-2, down)) if drawn]
    if axes:
        image, mask = image.flip(axes), mask.flip(axes)
    if turn and image.shape[-1] == image.shape[-2]:
        image, mask = image.rot90(1, (-2, -1)), mask.rot90(1, (-2, -1))
    return image, mask


__all__ = ["random_symmetry"]
