"""Pairs of ultrasound picture and mask in the US-TNBC form, made from DICOM files and drawn masks.

    OUTPUT/images/NAME.png   the ultrasound region, grey or RGB, pixels only
    OUTPUT/masks/NAME.png    255 in the lesion, 0 outside

References:
    Section A.5 and figure 10: pictures without annotation are selected, converted from DICOM,
    cropped, freed of identity; masks are drawn in Fiji and inverted to white on black.
"""

from __future__ import annotations

from fdkernels.segmentation.data.prepare.options import PrepareOptions, parse_crop
from fdkernels.segmentation.data.prepare.run import PrepareReport, prepare

__all__ = ["PrepareOptions", "PrepareReport", "parse_crop", "prepare"]
