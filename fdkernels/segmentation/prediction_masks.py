"""Predictions as files: masks at the size of their images, and pictures of their errors."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

FALSE_POSITIVE = (1.0, 0.16, 0.16)
FALSE_NEGATIVE = (0.55, 0.0, 0.10)
CORRECT = (0.55, 0.70, 0.86)
OPACITY = 0.55


def predicted_mask(logits: Tensor, height: int, width: int) -> np.ndarray:
    """Compute the predicted foreground at the size of the image, bool [height, width].

    Foreground is where a logit is above 0; where the network saw the image at another size, its
    logits are interpolated bilinearly first.

    Args:
        logits: [1, H, W].
        height, width: of the image.

    Raises:
        ValueError: a logit is NaN, which is neither foreground nor background.
    """
    if logits.isnan().any():
        raise ValueError("logits must not be NaN, got NaN, which is neither foreground nor background")
    if logits.shape[-2:] != (height, width):
        logits = F.interpolate(logits[None], (height, width), mode="bilinear", align_corners=False)[0]
    mask: np.ndarray = (logits[0] > 0).numpy()
    return mask


def error_picture(image: np.ndarray, predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Draw the image in pale grey, correct foreground in blue, errors in two reds; it shows through.

    Args:
        image: [H, W, 3], from 0 to 1.
        predicted, truth: bool [H, W].

    Returns:
        [H, W, 3], from 0 to 1: (1 - 0.55) of the image and 0.55 of the colour where there is one.
    """
    picture: np.ndarray = 0.45 + 0.55 * image.mean(axis=-1, keepdims=True).repeat(3, axis=-1)  # [H, W, 3]
    for where, colour in (
        (predicted & truth, CORRECT),
        (predicted & ~truth, FALSE_POSITIVE),
        (~predicted & truth, FALSE_NEGATIVE),
    ):
        picture[where] = (1 - OPACITY) * picture[where] + OPACITY * np.array(colour)
    return picture


def png_names(images: Sequence[str]) -> list[str]:
    """Name a PNG for each image: its path with the ending .png, no two alike.

    The folders are kept, so that images of one name in different folders stay apart. Images that
    differ in their ending or in capital letters alone are numbered from the second: 1.png, 1-2.png.

    Args:
        images: paths relative to the folder of the data, with forward slashes.
    """
    names: list[str] = []
    taken: set[str] = set()
    for image in images:
        path = PurePosixPath(image)
        inside = PurePosixPath(*(part for part in path.parts if part not in ("..", path.anchor)))
        name, number = inside.with_suffix(".png"), 1
        while name.as_posix().casefold() in taken:
            number += 1
            name = inside.with_name(f"{inside.stem}-{number}.png")
        taken.add(name.as_posix().casefold())
        names.append(name.as_posix())
    return names


def write_mask(path: Path, mask: np.ndarray) -> None:
    """Write a bool mask [H, W] as an 8-bit PNG of 0 and 255."""
    _save(path, mask.astype(np.uint8) * 255)


def write_errors(path: Path, image: np.ndarray, predicted: np.ndarray, truth: np.ndarray) -> None:
    """Write `error_picture` as a PNG."""
    _save(path, (error_picture(image, predicted, truth) * 255).round().astype(np.uint8))


def keep_pictures(old: Path, new: Path) -> None:
    """Copy the PNG files under `old` that `new` lacks, so that none is lost when it replaces `old`."""
    for file in old.rglob("*.png"):
        kept = new / file.relative_to(old)
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, kept)


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, format="PNG")


__all__ = [
    "CORRECT",
    "FALSE_NEGATIVE",
    "FALSE_POSITIVE",
    "error_picture",
    "keep_pictures",
    "png_names",
    "predicted_mask",
    "write_errors",
    "write_mask",
]
