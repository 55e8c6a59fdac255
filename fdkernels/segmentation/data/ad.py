"""Alzheimer's disease plaques (Jimenez et al. 2022) in patches of stained slides.

    256x256/new_wsi_00/              (or 128x128/; one folder per slide)
        macenko/patch_0000.png       patch, stain-normalised with Macenko's method
        macenko/patch_0000_C1.png    the same plaque in a corner of the patch
        patches/patch_0000.png       patch in its original colours
        vahadane/patch_0000.png      stain-normalised with Vahadane's method, 128x128 only
        masks/mask_0000.png          mask of the same number

The slide counts as the patient. Patches with the plaque in a corner are treated like all others, and
patches without a plaque are kept.

References:
    Jimenez et al.: "Visual deep learning-based explanation for neuritic plaques segmentation in
    Alzheimer's Disease using weakly annotated whole slide histopathological images", MICCAI 2022,
    arXiv:2302.08511; the folders are described in github.com/aramis-lab/miccai2022-stratifiad.
"""

from __future__ import annotations

import re
from pathlib import Path

from fdkernels.segmentation.data.layout import child, layout_error, level
from fdkernels.segmentation.data.names import composed
from fdkernels.segmentation.data.pairs import listed, paired
from fdkernels.segmentation.data.samples import FoundSamples, SegmentationSample
from fdkernels.segmentation.data.scan import checked, data_folder, folders

COLOURS = ("macenko", "patches", "vahadane")
_MASKS = "masks"
_SIDE = re.compile(r"(\d+)x\1")


def _slides(root: Path) -> list[Path]:
    return [folder for folder in folders(root) if child(folder, _MASKS) is not None]


def _named(folder: Path | None, problems: list[str], prefix: str) -> dict[str, Path]:
    return {} if folder is None else listed(folder, problems, prefix=prefix)


def find(
    root: str | Path, on_problem: str = "refuse", *, side: int = 256, colours: str = "macenko"
) -> FoundSamples:
    """Find the patches of one size with their masks, slide by slide, and read each pair once.

    Args:
        root: the folder that contains the slides, or one around it.
        on_problem: "refuse" or "skip", see `Find`.
        side: side of a patch in pixels, 256 or 128.
        colours: the folder to take images from: "macenko" (used by the data's authors for training),
            "patches" or "vahadane".

    Raises:
        ValueError: `colours` or `on_problem` is unknown, `root` has another layout, no patch is
            usable, or there are problems and `on_problem` is "refuse".
    """
    root = data_folder(root, on_problem)
    if colours not in COLOURS:
        raise ValueError(f"colours must be one of {', '.join(COLOURS)}, got {colours!r}")
    outer = f"{side}x{side}"
    inner = level(root, lambda folder: bool(_slides(folder)), outer)
    missing = "no slide with masks"
    if inner is not None and inner != root and inner.name != outer and _SIDE.fullmatch(inner.name):
        # The only folder holds patches of the other size.
        missing = f"{inner.name}, the data set ad-{inner.name.split('x')[0]}, and no folder {outer}"
        inner = None
    if inner is None:
        layout = f"{outer}/SLIDE/{colours}/patch_0000.png, {outer}/SLIDE/masks/mask_0000.png"
        raise layout_error(
            root,
            "AD plaques",
            layout,
            missing,
            lambda folder: folder.name == outer and bool(_slides(folder)),
        )
    samples: list[SegmentationSample] = []
    problems: list[str] = []
    for slide in _slides(inner):
        images = _named(child(slide, colours), problems, "patch_")
        masks = _named(child(slide, _MASKS), problems, "mask_")
        if not images:
            there = [name for name in COLOURS if _named(child(slide, name), [], "")]
            problems.append(
                f"{slide} contains no patches in the folder {colours}; "
                f"available colours: {' or '.join(there) if there else 'none'}"
            )
            continue
        samples += paired(images, masks, composed(slide.name), problems)
    return checked(inner, samples, problems, on_problem, may_be_empty=lambda sample: True, size=(side, side))


__all__ = ["COLOURS", "find"]
