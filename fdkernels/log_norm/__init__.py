"""Stage log_norm: region sums to the loss of every layer; README.md derives it."""

from fdkernels.log_norm.api import log_norm
from fdkernels.log_norm.options import Options

__all__ = ["Options", "log_norm"]
