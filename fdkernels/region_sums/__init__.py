"""Stage region_sums: masked foreground and background sums of feature maps; README.md derives it."""

from fdkernels.region_sums.api import RegionSums, region_sums

__all__ = ["RegionSums", "region_sums"]
