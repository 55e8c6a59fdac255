"""Small synthetic data sets in the layouts of the real ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

# Image numbers of TNBC by patient, with gaps on purpose.
IMAGES = {"01": [1, 2], "02": [1, 3], "04": [2], "07": [1, 10, 2], "11": [1]}
SIZE = (40, 36)  # width, height


def _scene(
    generator: np.random.Generator, size: tuple[int, int], discs: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return noise with bright discs, uint8 [H, W, 3], and the masks of the discs, bool [discs, H, W]."""
    width, height = size
    rows, columns = np.mgrid[:height, :width]
    radius = min(size) / (4 if discs == 1 else 6)
    masks = []
    for _ in range(discs):
        x, y = generator.uniform(radius + 1, np.array(size) - radius - 1)
        masks.append((columns - x) ** 2 + (rows - y) ** 2 < radius**2)
    bright = np.any(masks, axis=0)  # [H, W]
    pixels = generator.integers(0, 90, (height, width, 3)) + 150 * bright[..., None]
    return pixels.astype(np.uint8), np.array(masks)


def _save(path: Path, pixels: np.ndarray, mode: str | None = None) -> None:
    """Save 8-bit pixels, or a bool mask as 0 and 255, in the given Pillow mode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = pixels.astype(np.uint8) * 255 if pixels.dtype == bool else pixels
    image = Image.fromarray(values)
    (image if mode is None else image.convert(mode)).save(path)


def _varied(generator: np.random.Generator) -> tuple[int, int]:
    """Draw a width and a height, usually different."""
    width, height = generator.integers(40, 57, 2)
    return int(width), int(height)


def write_tiny_tnbc(root: Path, images: dict[str, list[int]] | None = None) -> Path:
    """Write Slide_XX/XX_N.png and GT_XX/XX_N.png, bright discs on dark noise; return `root`.

    The first image of each patient is RGB, the others RGBA: the download contains both.
    """
    generator = np.random.default_rng(0)
    for patient, numbers in (IMAGES if images is None else images).items():
        for place, number in enumerate(numbers):
            pixels, (disc,) = _scene(generator, SIZE, 1)
            name = f"{patient}_{number}.png"
            _save(root / f"Slide_{patient}" / name, pixels, "RGB" if place == 0 else "RGBA")
            _save(root / f"GT_{patient}" / name, disc)
    return root


def _tnbc(root: Path, images: int, generator: np.random.Generator) -> None:
    patients = max(5, images // 3)
    numbers: dict[str, list[int]] = {}
    for index in range(images):
        numbers.setdefault(f"{index % patients + 1:02}", []).append(index // patients + 1)
    write_tiny_tnbc(root, numbers)


def imagescope(polygons: list[np.ndarray]) -> str:
    """Return ImageScope XML with one region per polygon [vertices, 2] of X and Y."""
    regions = "".join(
        "<Region><Vertices>"
        + "".join(f'<Vertex X="{x:.4f}" Y="{y:.4f}"/>' for x, y in polygon)
        + "</Vertices></Region>"
        for polygon in polygons
    )
    return f"<Annotations><Annotation><Regions>{regions}</Regions></Annotation></Annotations>"


def _monuseg(root: Path, images: int, generator: np.random.Generator) -> None:
    """Write two of three images to the training folders, one to the test folder; one or two per patient."""
    training, test = root / "MoNuSeg 2018 Training Data", root / "MoNuSegTestData"
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    circle = np.stack((np.cos(angles), np.sin(angles)), axis=1)  # [24, 2]
    for index in range(images):
        # The last discs extend beyond the image, like real annotations.
        centres = np.concatenate((generator.uniform(8, 40, (4, 2)), generator.uniform(-2, 50, (1, 2))))
        polygons = [centre + 6 * circle for centre in centres]
        rows, columns = np.mgrid[:48, :48]
        bright = sum((columns - x) ** 2 + (rows - y) ** 2 < 36 for x, y in centres) > 0
        pixels = generator.integers(0, 90, (48, 48, 3)) + 150 * bright[..., None]
        patient = index if index < 6 else index // 2
        name = f"TCGA-{'AB'[index % 2]}{index % 7}-{patient:04}-01Z-00-DX{index}"
        if index % 3 == 2:
            image, outlines = test / f"{name}.tif", test / f"{name}.xml"
        else:
            image, outlines = (
                training / "Tissue Images" / f"{name}.tif",
                training / "Annotations" / f"{name}.xml",
            )
        for path in (image, outlines):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(
            image, compression="packbits" if index % 3 == 2 else "tiff_lzw"
        )
        # A region with two vertices encloses no area; the real files contain a few.
        outlines.write_text(imagescope([*polygons, polygons[0][:2]]), "utf-8")


def _udiat(root: Path, images: int, generator: np.random.Generator) -> None:
    for index in range(images):
        pixels, (disc,) = _scene(generator, _varied(generator), 1)
        _save(root / "original" / f"{index + 1:06}.png", pixels, "L")
        _save(root / "GT" / f"{index + 1:06}.png", disc)


def _us_tnbc(root: Path, images: int, generator: np.random.Generator) -> None:
    """Use names of `fdkernels prepare`; some patients have two images if there are enough."""
    patients = max(5, images - 2)
    for index in range(images):
        name = f"patient{index % patients + 1:03}_{index // patients + 1}.png"
        pixels, (disc,) = _scene(generator, _varied(generator), 1)
        _save(root / "images" / name, pixels, "L")
        _save(root / "masks" / name, disc)


def _ad(side: int) -> Callable[[Path, int, np.random.Generator], None]:
    """Use the real patch size, which the loader checks; at least five slides, every fourth patch empty."""

    def write(root: Path, images: int, generator: np.random.Generator) -> None:
        slides = max(5, images // 4)
        for index in range(images):
            place = index % slides
            slide = root / f"{side}x{side}" / f"{('new', 'old')[place % 2]}_wsi_{place // 2:02}"
            number = f"{index // slides:04}" + ("_C1" if index % 3 == 1 else "")
            pixels, (disc,) = _scene(generator, (side, side), 1)
            if index % 4 == 3:
                pixels, disc = pixels // 3, disc & False
            for colours in ("patches", "macenko"):
                tint = 1.0 if colours == "patches" else 0.9
                _save(slide / colours / f"patch_{number}.png", (pixels * tint).astype(np.uint8))
            _save(slide / "masks" / f"mask_{number}.png", disc)

    return write


def _busi(root: Path, images: int, generator: np.random.Generator) -> None:
    """Alternate benign and malignant, every fourth image with two lesions; add two normal images."""
    for index in range(images):
        name, number = ("benign", "malignant")[index % 2], index // 2 + 1
        lesions = 2 if index % 4 == 0 else 1
        pixels, discs = _scene(generator, _varied(generator), lesions)
        grey = Image.fromarray(pixels).convert("L")
        _save(root / name / f"{name} ({number}).png", np.array(grey), "RGB")
        for lesion, disc in enumerate(discs):
            ending, mode = ("_mask", "1") if lesion == 0 else (f"_mask_{lesion}", "RGBA")
            _save(root / name / f"{name} ({number}){ending}.png", disc, mode)
    for number in (1, 2):
        pixels, _ = _scene(generator, (44, 40), 1)
        _save(root / "normal" / f"normal ({number}).png", pixels // 3)
        _save(root / "normal" / f"normal ({number})_mask.png", np.zeros((40, 44, 3), np.uint8))


def _dsb2018(root: Path, images: int, generator: np.random.Generator) -> None:
    """Draw bright nuclei on a dark background, inverted in every second image."""
    for index in range(images):
        pixels, discs = _scene(generator, _varied(generator), 4)
        name = f"{generator.integers(2**62):016x}" * 4
        folder = root / "stage1_train" / name
        _save(folder / "images" / f"{name}.png", 255 - pixels if index % 2 else pixels, "RGBA")
        taken = np.zeros(discs.shape[1:], bool)
        for disc in discs:
            if (disc & ~taken).any():  # the masks of an image do not overlap
                _save(folder / "masks" / f"{generator.integers(2**62):016x}.png", disc & ~taken)
            taken |= disc


_WRITERS: dict[str, Callable[[Path, int, np.random.Generator], None]] = {
    "tnbc": _tnbc,
    "monuseg": _monuseg,
    "udiat": _udiat,
    "ad-256": _ad(256),
    "ad-128": _ad(128),
    "us-tnbc": _us_tnbc,
    "folder": _us_tnbc,
    "busi": _busi,
    "dsb2018": _dsb2018,
}


def make_tiny(name: str, root: Path, images: int = 10) -> Path:
    """Write a small data set in the layout of `name`, the same on every call; return `root`.

    The images show bright discs on dark noise. They come from at least five patients if the data set
    has patients and there are enough images. `busi` gets two additional images of class normal.
    """
    _WRITERS[name](root, images, np.random.default_rng(0))
    return root
