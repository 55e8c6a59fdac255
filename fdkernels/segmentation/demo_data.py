"""Patches of scikit-image's immunohistochemistry slide, with the brown stain as the truth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from skimage import color, data, filters, measure

from fdkernels.segmentation.data import SegmentationSample, Split

PATCH = 64
_LEAST_STAIN = 0.02  # share of a patch; below it, the Dice of the patch is mostly 0 or 1 by chance
_LEAST_OBJECT = 64  # pixels
# Rows of patches, from the top: which part of the data a row belongs to.
_REGIONS = {"train": range(5), "validation": range(5, 6), "test": range(6, 8)}


def stain_mask(slide: np.ndarray) -> np.ndarray:
    """Where the slide [H, W, 3] is stained brown (DAB), as bool [H, W].

    Colour deconvolution separates the stains; the DAB channel is smoothed with a Gaussian of one
    pixel, thresholded by Otsu's method, and freed of objects below 64 pixels.

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
    """Cuts slide and mask into patches of 64x64, writes them as PNG, and splits them by region.

    The slide of 512x512 comes with scikit-image. Its upper five rows of patches are for training,
    the next for validation, the last two for testing: no pixel is in two parts, and the test
    region is one that the network has not seen. Patches with less than 2 % stain are left out.
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
