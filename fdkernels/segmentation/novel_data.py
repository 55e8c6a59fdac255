"""Images of a second data set, added to the training set (section 4 of the paper)."""

from __future__ import annotations

import random
from collections.abc import Sequence

from fdkernels.segmentation.data import FoundSamples, SegmentationSample


def draw_novel(found: FoundSamples, images: int | None, seed: int) -> tuple[SegmentationSample, ...]:
    """Draw `images` samples of the novel data set, or all, in an order that depends on the seed alone.

    A smaller number draws some of a larger one's samples, so that each run of a series adds images to
    the run before it.

    Args:
        found: the novel data set.
        images: how many to take; None for all.
        seed: of the order.

    Raises:
        ValueError: there are fewer.

    References:
        Section 4: samples are added in batches of 10 (MoNuSeg to TNBC) and 15 (UDIAT to US-TNBC).
    """
    samples = sorted(found.samples, key=lambda sample: (sample.patient, sample.image))
    if images is not None and images > len(samples):
        raise ValueError(
            f"novel_images must be at most the {len(samples)} images of the novel data set, got {images}"
        )
    random.Random(seed).shuffle(samples)
    return tuple(samples[:images])


def check_apart(base: Sequence[SegmentationSample], novel: Sequence[SegmentationSample]) -> None:
    """Refuse a novel data set that shares files with the base: it would put test images into training.

    Raises:
        ValueError: an image is in both.
    """
    known = {sample.image.resolve() for sample in base}
    for sample in novel:
        if sample.image.resolve() in known:
            raise ValueError(f"novel_data must hold other images than data, got {sample.image} in both")


__all__ = ["check_apart", "draw_novel"]
