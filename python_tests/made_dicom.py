"""Synthetic DICOM files like those of an ultrasound machine, with a known identity, and studies of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, UltrasoundImageStorage, generate_uid

from fdkernels.segmentation.data.prepare import PrepareOptions, PrepareReport, prepare

PATIENT_NAME = "Mustermann^Erika"
PATIENT_ID = "ID-4711-XY"
IDENTITY = (b"Mustermann", b"Erika", b"4711", b"19670301", b"Charite")

# The ultrasound image on the screen of `screen`: columns 24 to 88, rows 16 to 64.
REGION = (24, 16, 88, 64)
LESION = (40, 30, 60, 44)


def tissue(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return soft speckle between 40 and 160, uint8 [H, W]."""
    coarse = np.random.default_rng(seed).integers(40, 160, (height // 4 + 2, width // 4 + 2))
    fine = np.kron(coarse, np.ones((4, 4)))
    soft = (fine[:-3, :-3] + fine[1:-2, 1:-2] + fine[2:-1, 2:-1] + fine[3:, 3:]) / 4
    return soft[:height, :width].astype(np.uint8)


def screen(height: int = 80, width: int = 120, seed: int = 0) -> np.ndarray:
    """Return a black screen with tissue in REGION and a line of text above it, uint8 [H, W]."""
    picture = np.zeros((height, width), np.uint8)
    x0, y0, x1, y1 = REGION
    picture[y0:y1, x0:x1] = tissue(y1 - y0, x1 - x0, seed)
    picture[4:9, 10:110:4] = 230
    return picture


def drawn_mask(height: int = 80, width: int = 120, light: bool = False) -> np.ndarray:
    """Return a mask of LESION, black on white as in Fiji, or white on black if `light`; uint8 [H, W]."""
    mask = np.full((height, width), 0 if light else 255, np.uint8)
    x0, y0, x1, y1 = LESION
    mask[y0:y1, x0:x1] = 255 if light else 0
    return mask


def region(box: tuple[int, int, int, int], spatial_format: int = 1, data_type: int = 1) -> Dataset:
    """Return an item of Sequence of Ultrasound Regions; the ends of `box` are exclusive."""
    item = Dataset()
    item.RegionSpatialFormat, item.RegionDataType, item.RegionFlags = spatial_format, data_type, 0
    item.RegionLocationMinX0, item.RegionLocationMinY0 = box[0], box[1]
    item.RegionLocationMaxX1, item.RegionLocationMaxY1 = box[2] - 1, box[3] - 1
    return item


def write_dicom(
    path: Path,
    pixels: np.ndarray,
    photometric: str = "MONOCHROME2",
    regions: list[Dataset] | None = None,
    frames: int | None = None,
    syntax: str = ExplicitVRLittleEndian,
    **tags: object,
) -> Path:
    """Write stored values [H, W] or [H, W, 3], with a leading frame axis if `frames` is given."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UltrasoundImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = syntax
    data = Dataset()
    data.file_meta = meta
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.Modality = "US"
    data.PatientName, data.PatientID, data.PatientBirthDate = PATIENT_NAME, PATIENT_ID, "19670301"
    data.InstitutionName = "Charite"
    shape = pixels.shape if frames is None else pixels.shape[1:]
    data.Rows, data.Columns = shape[:2]
    data.SamplesPerPixel = 3 if len(shape) == 3 else 1
    if len(shape) == 3:
        data.PlanarConfiguration = 0
    data.PhotometricInterpretation = photometric
    data.BitsAllocated = data.BitsStored = 8 * pixels.itemsize
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    if frames is not None:
        data.NumberOfFrames = frames
    if regions is not None:
        data.SequenceOfUltrasoundRegions = Sequence(regions)
    for keyword, value in tags.items():
        setattr(data, keyword, value)
    stored = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    data.add_new("PixelData", "OW" if pixels.itemsize > 1 else "OB", stored)
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path


class Study:
    """A folder of DICOM files, a folder of masks, and the output folder of `prepare`."""

    def __init__(self, root: Path) -> None:
        self.root, self.dicom, self.masks, self.output = root, root / "dicom", root / "masks", root / "made"
        self.dicom.mkdir()
        self.masks.mkdir()

    def add(self, name="US1.dcm", pixels=None, mask="fiji", photometric="MONOCHROME2", **tags):
        """Add a DICOM file and a mask of the same name: the default mask, an array, or None for no mask.

        Without `pixels`, the first file shows screen(), the others other tissue.
        """
        pixels = screen(seed=len(list(self.dicom.rglob("*.dcm")))) if pixels is None else pixels
        tags.setdefault("regions", [region(REGION)])
        path = write_dicom(self.dicom / name, pixels, photometric, **tags)
        if mask is not None:
            self.draw(f"{Path(name).stem}.png", None if isinstance(mask, str) else mask)
        return path

    def draw(self, name, mask=None):
        path = self.masks / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn_mask() if mask is None else mask).save(path)
        return path

    def prepare(self, mapping=None, to=None, **options) -> PrepareReport:
        self.output = to or self.output
        return prepare(self.dicom, self.masks, self.output, PrepareOptions(**options), mapping)

    def read(self, name="patient001_1"):
        """Read the image and the mask of a pair from disk."""
        return tuple(np.array(Image.open(self.output / part / f"{name}.png")) for part in ("images", "masks"))

    def names(self):
        images, masks = (
            sorted(f.name for f in (self.output / part).iterdir()) for part in ("images", "masks")
        )
        assert images == masks
        return [name.removesuffix(".png") for name in images]
