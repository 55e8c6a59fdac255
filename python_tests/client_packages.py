"""Imports the packages of clients where they are installed, and skips a test with the reason where not."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

import pytest
import torch

_LIBRARIES: list[torch.library.Library] = []


def client(name: str) -> ModuleType:
    """Import a package, or skip the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except RuntimeError as error:
            # A torchvision for CUDA beside a torch for the CPU: its compiled operators do not load.
            if "torchvision::nms does not exist" not in str(error):
                raise
            _define_operators()
            return importlib.import_module(name)
        except ImportError as error:
            pytest.skip(f"{name} cannot be imported: {error}")


def _define_operators() -> None:
    """Declare, without kernels, what torchvision asks torch for when it is imported.

    Its networks for segmentation call neither.
    """
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _LIBRARIES.append(library)  # what is defined lives as long as this
