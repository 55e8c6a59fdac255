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

from pathlib import Path

from fdkernels.segmentation.data.samples import FoundSamples, SegmentationSample
from fdkernels.segmentation.data.scan import (
    by_name,
    checked,
    data_folder,
    files,
    folders,
    inner_folder,
    layout_error,
    paired,
)

COLOURS = ("macenko", "patches", "vahadane")
_MASKS = "masks"


def _slides(root: Path) -> list[Path]:
    return [folder for folder in folders(root) if (folder / _MASKS).is_dir()]


def find(
    root: str | Path, on_problem: str = "refuse", *, side: int = 256, colours: str = "macenko"
) -> FoundSamples:
    """Find the patches of one size with their masks, slide by slide, and read each pair once.

    Args:
        root: the folder that contains the slides, or its parent.
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
    inner = inner_folder(root, outer, lambda folder: bool(_slides(folder)))
    if inner is None:
        raise layout_error(
            root,
            "AD plaques",
            f"{outer}/SLIDE/{colours}/patch_0000.png, {outer}/SLIDE/masks/mask_0000.png",
            "no slide with masks",
        )
    samples: list[SegmentationSample] = []
    problems: list[str] = []
    for slide in _slides(inner):
        images = by_name(files(slide / colours), problems, prefix="patch_")
        masks = by_name(files(slide / _MASKS), problems, prefix="mask_")
        if not images:
            there = [name for name in COLOURS if files(slide / name)]
            problems.append(
                f"{slide} contains no patches in the folder {colours}; "
                f"available colours: {' or '.join(there) if there else 'none'}"
            )
            continue
        samples += paired(images, masks, slide.name, problems)
    return checked(inner, samples, problems, on_problem, may_be_empty=lambda sample: True, size=(side, side))


__all__ = ["COLOURS", "find"]
