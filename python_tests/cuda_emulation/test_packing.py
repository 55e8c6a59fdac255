"""The contract between fdkernels.op.packing and a compiled module."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest

import fdkernels
from cuda_emulation.build import copy_of
from fdkernels.conventions import MASK_RESIZES

TABLES = ("layer_fields", "region_layer_fields", "mask_size_fields")


@pytest.mark.parametrize("missing", ["every enum", "a name", "no name but one too many", *TABLES])
def test_a_compiled_module_of_another_version_is_refused(emulated, missing):
    names = ("RegionWeight", "Norm", "Exchange", "Reduction", "MaskResize", "DType")
    module = SimpleNamespace(**{name: getattr(emulated.module, name) for name in (*names, *TABLES)})
    if missing == "every enum":
        module = SimpleNamespace()
    elif missing == "a name":
        module.MaskResize = SimpleNamespace(__members__=dict.fromkeys(MASK_RESIZES[1:]))
    elif missing in TABLES:
        delattr(module, missing)
    else:
        module.MaskResize = SimpleNamespace(__members__=dict.fromkeys([*MASK_RESIZES, "linear"]))
    with (
        mock.patch.object(fdkernels, "_C", module, create=True),
        pytest.raises(ImportError, match=r"fdkernels\._C is of another version .* reinstall fdkernels"),
    ):
        copy_of("packing")


def test_the_fields_of_a_layer_fill_its_words(emulated):
    """Three words for sizes and strides of three dimensions, one for the others, in any order."""
    for fields, words in (
        (emulated.module.layer_fields, emulated.module.layer_words),
        (emulated.module.mask_size_fields, emulated.module.mask_size_words),
    ):
        offsets = sorted((offset, name) for name, offset in fields.items())
        ends = [offset for offset, _ in offsets[1:]] + [words]
        for (offset, name), end in zip(offsets, ends, strict=True):
            assert end - offset == (3 if name in ("size", "stride", "upstream_stride") else 1)
