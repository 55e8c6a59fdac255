"""The made-up TNBC data set of `tiny_data`, under the name it had before."""

from tiny_data import IMAGES, SIZE, write_tiny_tnbc

__all__ = ["IMAGES", "SIZE", "write_tiny_tnbc"]
