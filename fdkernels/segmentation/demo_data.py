"""Data of the demo: patches of scikit-image's immunohistochemistry slide, labelled by the brown stain."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from skimage import color, data, filters, measure

from fdkernels.segmentation.data import SegmentationSample, Split

PATCH = 64
_LEAST_STAIN = 0.02  # minimum stained fraction; below it, Dice is mostly 0 or 1 by chance
_LEAST_OBJECT = 64  # minimum object size in pixels
# Rows of patches of each part, counted from the top.
_REGIONS = {"train": range(5), "validation": range(5, 6), "test": range(6, 8)}


def stain_mask(slide: np.ndarray) -> np.ndarray:
    """Segment the brown (DAB) stain of a slide.

    Separates the stains by colour deconvolution, smooths the DAB channel with a Gaussian of sigma 1
    pixel, thresholds it by Otsu's method, and removes objects smaller than 64 pixels.

    Args:
        slide: uint8 [H, W, 3], RGB.

    Returns:
        bool [H, W], True where the slide is stained.

    References:
        Ruifrok, Johnston: "Quantification of histochemical staining by color deconvolution",
        2001, for `skimage.color.rgb2hed`.
    """
    stain = filters.gaussian(color.rgb2hed(slide)[..., 2], sigma=1)  # [H, W]
    objects = measure.label(stain > filters.threshold_otsu(stain))  # [H, W]
    sizes = np.bincount(objects.ravel())
    kept = sizes >= _LEAST_OBJECT
    kept[0] = False
    mask: np.ndarray = kept[objects]
    return mask


def write_patches(folder: Path) -> Split:
    """Cut slide and mask into patches of 64x64, write them to `folder` as PNG, and split them by region.

    The 512x512 slide comes with scikit-image. The upper five rows of patches are for training, the
    next for validation, the last two for testing: no pixel is in two parts, and the network has not
    seen the test region. Patches with less than 2 % stain are skipped.
    """
    slide = data.immunohistochemistry()  # [512, 512, 3]
    mask = stain_mask(slide)  # [512, 512]
    parts: dict[str, list[SegmentationSample]] = {name: [] for name in _REGIONS}
    for part, rows in _REGIONS.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        for row in rows:
            for column in range(slide.shape[1] // PATCH):
                window = np.s_[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
                if mask[window].mean() < _LEAST_STAIN:
                    continue
                image_file = folder / part / f"{row}_{column}.png"
                mask_file = folder / part / f"{row}_{column}_mask.png"
                Image.fromarray(slide[window]).save(image_file)
                Image.fromarray(mask[window].astype(np.uint8) * 255).save(mask_file)
                parts[part].append(SegmentationSample(image_file, (mask_file,), part))
    return Split(**{name: tuple(samples) for name, samples in parts.items()})


__all__ = ["PATCH", "stain_mask", "write_patches"]
