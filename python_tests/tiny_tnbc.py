"""A made-up data set in the TNBC layout, small enough for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

# Patients with their images; the numbers have gaps on purpose.
IMAGES = {"01": [1, 2], "02": [1, 3], "04": [2], "07": [1, 10, 2], "11": [1]}
SIZE = (40, 36)  # width, height


def write_tiny_tnbc(root: Path, images: dict[str, list[int]] | None = None) -> Path:
    """Writes Slide_XX/XX_N.png and GT_XX/XX_N.png: bright discs on dark noise; returns `root`.

    The first image of each patient is RGB, the others RGBA, as both occur in the download.
    """
    generator = np.random.default_rng(0)
    width, height = SIZE
    rows, columns = np.mgrid[:height, :width]
    for patient, numbers in (IMAGES if images is None else images).items():
        for folder in (f"Slide_{patient}", f"GT_{patient}"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        for place, number in enumerate(numbers):
            x, y = generator.uniform(12, 24, 2)
            disc = (columns - x) ** 2 + (rows - y) ** 2 < 81  # [H, W]
            pixels = generator.integers(0, 90, (height, width, 3)) + 150 * disc[..., None]
            image = Image.fromarray(pixels.astype(np.uint8))
            name = f"{patient}_{number}.png"
            image.convert("RGB" if place == 0 else "RGBA").save(root / f"Slide_{patient}" / name)
            Image.fromarray(disc.astype(np.uint8) * 255).save(root / f"GT_{patient}" / name)
    return root
