"""Read a DICOM data set so that an empty element counts as one that is not there."""

from __future__ import annotations

from pathlib import Path

from pydicom import Dataset, dcmread
from pydicom.datadict import dictionary_has_tag, dictionary_VR
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.multival import MultiValue
from pydicom.tag import BaseTag

# Groups whose sequences are read as well: acquisition (ultrasound regions) and image (lookup tables).
_SEARCHED = (0x0018, 0x0028)

# Value representations of text, in which padding and the backslash between values say nothing.
_TEXT = frozenset(
    ("AE", "AS", "CS", "DA", "DS", "DT", "IS", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UR", "UT")
)

# What the other one means by itself: the identity in the place of the missing one.
_RESCALE = {"RescaleSlope": 1, "RescaleIntercept": 0}


def read_dataset(path: Path) -> Dataset:
    """Read the data set at `path` without its empty elements.

    An empty element says nothing, whatever its type (PS3.5, section 7.4): the file means what it would
    mean without it. So they are removed here, once, and all that reads the data set finds them absent.
    An incomplete pair or item says nothing either: half a window, a lookup table without entries. Of
    slope and intercept, one alone stands beside the identity of the other. Bits Stored is Bits Allocated
    where it is not given. Of several windows the first complete one is kept.

    Raises:
        InvalidDicomError, and other exceptions of pydicom: the file is corrupt or no DICOM file.
    """
    dataset = dcmread(path)
    _drop_empty(dataset)
    given = [name for name in _RESCALE if name in dataset]
    if len(given) == 1:
        for name in _RESCALE.keys() - set(given):
            setattr(dataset, name, _RESCALE[name])
    _keep_one_window(dataset)
    for name in ("VOILUTSequence", "ModalityLUTSequence"):
        if name in dataset and not all(key in dataset[name].value[0] for key in ("LUTDescriptor", "LUTData")):
            delattr(dataset, name)
    if "BitsStored" not in dataset and "BitsAllocated" in dataset:
        dataset.BitsStored = dataset.BitsAllocated
    return dataset


def _drop_empty(dataset: Dataset) -> None:
    for tag in list(dataset.keys()):
        if _is_empty(dataset.get_item(tag), tag):
            del dataset[tag]
        elif tag.group in _SEARCHED and dataset[tag].VR == "SQ":
            for item in dataset[tag].value:
                _drop_empty(item)


def _is_empty(element: DataElement | RawDataElement | None, tag: BaseTag) -> bool:
    """Tell whether an element has no value; does not parse it, which a corrupt one might not survive."""
    if not isinstance(element, RawDataElement):
        return element is None or bool(element.is_empty)
    if not element.value:
        return True
    kind = element.VR or (dictionary_VR(tag) if dictionary_has_tag(tag) else "")
    return kind in _TEXT and not element.value.strip(b" \0\\")


def _keep_one_window(dataset: Dataset) -> None:
    """Keep the first window that has both centre and width; without any, remove what there is."""
    names = ("WindowCenter", "WindowWidth")
    columns = [_values(dataset, name) for name in names]
    complete = [pair for pair in zip(*columns, strict=False) if None not in pair and "" not in pair]
    for place, name in enumerate(names):
        if complete:
            setattr(dataset, name, complete[0][place])
        elif name in dataset:
            delattr(dataset, name)


def _values(dataset: Dataset, name: str) -> list[object]:
    value = dataset.get(name)
    return list(value) if isinstance(value, MultiValue) else [value]


__all__ = ["read_dataset"]
