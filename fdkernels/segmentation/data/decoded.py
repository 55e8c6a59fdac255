"""Images and masks kept in memory as they are once decoded and resized, so that later epochs read no file."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fdkernels.segmentation.data.reading import load_pair
from fdkernels.segmentation.data.resizing import resize_image, resize_mask
from fdkernels.segmentation.data.samples import SegmentationSample

_LIMIT = 256 << 20  # bytes a process: 1000 images of 256x256
_Stamps = tuple[tuple[int, int], ...]


class DecodedPairs:
    """The pairs of a process, read on first use; a file that has changed since is read again.

    What would exceed the limit is read anew each time. Nothing is dropped for it: an epoch takes each
    image once, so the one that was used longest ago is as likely to be next as any other.

    Args:
        limit: bytes to keep at most.
    """

    def __init__(self, limit: int = _LIMIT) -> None:
        self.limit = limit
        self.used = 0
        self._kept: dict[tuple[SegmentationSample, int | None], tuple[_Stamps, Tensor, Tensor]] = {}

    def pair(self, sample: SegmentationSample, size: int | None) -> tuple[Tensor, Tensor]:
        """Return image (uint8 [3, H, W]) and mask (bool [1, H, W]); neither may be changed in place.

        Args:
            sample: the files.
            size: H and W in pixels to resize to; None keeps those of the file.

        Raises:
            ValueError: as `load_pair`.
        """
        key, stamps = (sample, size), _stamps(sample)
        kept = self._kept.get(key)
        if kept is not None and kept[0] == stamps:
            return kept[1:]
        image, mask = _read(sample, size)
        before = 0 if kept is None else kept[1].nbytes + kept[2].nbytes
        used = self.used - before + image.nbytes + mask.nbytes
        if stamps and used <= self.limit:
            self._kept[key], self.used = (stamps, image, mask), used
        return image, mask


def _stamps(sample: SegmentationSample) -> _Stamps:
    """Return time of change and bytes of each file; none where one is not to be had, which reading names."""
    try:
        found = [path.stat() for path in (sample.image, *sample.masks)]
    except OSError:
        return ()
    return tuple((one.st_mtime_ns, one.st_size) for one in found)


def _read(sample: SegmentationSample, size: int | None) -> tuple[Tensor, Tensor]:
    image, mask = load_pair(sample)
    foreground = np.array(mask) > 0  # [H, W]
    if size is not None and image.size != (size, size):
        image, foreground = resize_image(image, size), resize_mask(foreground, size)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # [3, H, W]
    return pixels, torch.from_numpy(foreground).unsqueeze(0)


__all__ = ["DecodedPairs"]
