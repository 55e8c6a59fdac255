"""Convert DICOM files and drawn masks to image and mask pairs in the US-TNBC layout.

    OUTPUT/images/NAME.png   the ultrasound region, grey or RGB, without metadata
    OUTPUT/masks/NAME.png    255 in the lesion, 0 outside

References:
    Section A.5 and figure 10: select images without annotation, convert them from DICOM, crop and
    anonymise them; draw masks in Fiji and invert them to white on black.
"""

from __future__ import annotations

from fdkernels.segmentation.data.prepare.options import PrepareOptions, parse_crop
from fdkernels.segmentation.data.prepare.patients import read_patients
from fdkernels.segmentation.data.prepare.run import PrepareReport, prepare

__all__ = ["PrepareOptions", "PrepareReport", "parse_crop", "prepare", "read_patients"]
