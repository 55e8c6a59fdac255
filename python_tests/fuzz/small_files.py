"""Small whole files of every kind that the loaders read, as bytes; what the fuzzer changes."""

from __future__ import annotations

import io
import json
import tempfile
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile
import torch
from PIL import Image, features
from pydicom import dcmread
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit, RLELossless

from fdkernels import models
from fdkernels.segmentation.config import TrainingConfig
from fdkernels.segmentation.runfiles import write_weights
from made_dicom import region, write_dicom

SIZE = (24, 20)  # width and height
BASE_CHANNELS = 1
KINDS = ("image", "xml", "dicom", "weights", "checkpoint", "run")


class SmallFile(NamedTuple):
    """A file by its name, which says how it was made, and its ending."""

    name: str
    ending: str
    content: bytes


def _tissue(channels: int = 0, dtype: type = np.uint8) -> np.ndarray:
    """Random values [H, W] or [H, W, channels]."""
    shape = (*reversed(SIZE), channels) if channels else tuple(reversed(SIZE))
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype)


def _drawn() -> np.ndarray:
    """A mask [H, W] of 0 and 255."""
    mask = np.zeros(tuple(reversed(SIZE)), np.uint8)
    mask[5:12, 6:18] = 255
    return mask


def _images() -> list[SmallFile]:
    grey, colours, mask = Image.fromarray(_tissue()), Image.fromarray(_tissue(3)), Image.fromarray(_drawn())
    deep = Image.fromarray(_tissue(dtype=np.uint16))
    pictures = [
        ("grey", grey, ("png", "jpg", "tif", "bmp", "gif", "webp")),
        ("rgb", colours, ("png", "jpg", "tif", "bmp", "webp", "jp2")),
        ("mask", mask, ("png", "tif", "bmp", "gif")),
        ("bits", mask.convert("1"), ("png", "tif", "bmp")),
        ("palette", colours.quantize(16), ("png", "tif", "gif", "bmp")),
        ("alpha", colours.convert("RGBA"), ("png", "tif", "webp")),
        ("grey-alpha", grey.convert("LA"), ("png", "tif")),
        ("deep", deep, ("png", "tif")),
        ("cmyk", colours.convert("CMYK"), ("jpg", "tif")),
    ]
    found = []
    for name, picture, endings in pictures:
        for ending in endings:
            if ending == "jp2" and not features.check("jpg_2000"):
                continue
            kind = {"jpg": "JPEG", "tif": "TIFF", "jp2": "JPEG2000"}.get(ending, ending.upper())
            packings = ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits") if ending == "tif" else (None,)
            for packing in packings:
                out = io.BytesIO()
                picture.save(out, kind, **({"compression": packing} if packing else {}))
                found.append(SmallFile(f"{name}-{packing or 'plain'}", ending, out.getvalue()))
    stacks = {
        "deep-rgb": {"data": _tissue(3, np.uint16), "photometric": "rgb"},
        "planar": {
            "data": np.moveaxis(_tissue(3, np.uint16), 2, 0),
            "photometric": "rgb",
            "planarconfig": "separate",
        },
        "white-is-zero": {"data": _tissue(dtype=np.uint16), "photometric": "miniswhite"},
        "float": {"data": _tissue().astype(np.float32), "photometric": "minisblack"},
        "tiled": {"data": _tissue(), "photometric": "minisblack", "tile": (16, 16)},
    }
    for name, written in stacks.items():
        out = io.BytesIO()
        tifffile.imwrite(out, **written)
        found.append(SmallFile(name, "tif", out.getvalue()))
    return found


def _annotations() -> list[SmallFile]:
    corners = [(3.5, 2), (15, 4.25), (12, 14), (4, 11)]
    vertices = "".join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in corners)
    regions = "".join(
        f'<Region Id="{number}" Type="{kind}" NegativeROA="{negative}"><Vertices>{vertices}</Vertices>'
        "</Region>"
        for number, (kind, negative) in enumerate([(0, 0), (0, 1), (2, 0), (1, 0)], 1)
    )
    polygon = f'<Region Id="1" Type="0" NegativeROA="0"><Vertices>{vertices}</Vertices></Region>'
    page = (
        '<?xml version="1.0" encoding="UTF-8"?>\n<Annotations MicronsPerPixel="0.25"><Annotation Id="1">'
        "{}{}</Annotation></Annotations>"
    )
    attributes = "<Attributes><Attribute Name='Description'/></Attributes>"
    return [
        SmallFile("polygon", "xml", page.format(attributes, f"<Regions>{polygon}</Regions>").encode()),
        SmallFile("types", "xml", page.format("", f"<Regions>{regions}</Regions>").encode()),
        SmallFile(
            "utf-16",
            "xml",
            page.replace("UTF-8", "UTF-16").format("", f"<Regions>{polygon}</Regions>").encode("utf-16"),
        ),
    ]


def _dicoms(folder: Path) -> list[SmallFile]:
    colours, grey = _tissue(3), _tissue()
    deep = _tissue(dtype=np.uint16) // 16
    box = [region((4, 3, 20, 17))]
    made = {
        "grey": write_dicom(folder / "grey.dcm", grey, regions=box),
        "rgb": write_dicom(folder / "rgb.dcm", colours, "RGB"),
        "deep": write_dicom(
            folder / "deep.dcm", deep, "MONOCHROME1", WindowCenter="2000", WindowWidth="3000"
        ),
        "rescaled": write_dicom(folder / "rescaled.dcm", deep, RescaleSlope="2", RescaleIntercept="-100"),
        "frames": write_dicom(folder / "frames.dcm", np.stack([grey, grey]), frames=2),
        "rle": write_dicom(folder / "rle.dcm", colours, "RGB"),
        "jpeg": write_dicom(folder / "jpeg.dcm", colours, "RGB"),
        "palette": write_dicom(
            folder / "palette.dcm",
            grey,
            "PALETTE COLOR",
            **{
                f"{colour}PaletteColorLookupTable{part}": value
                for colour in ("Red", "Green", "Blue")
                for part, value in (("Descriptor", [256, 0, 16]), ("Data", bytes(range(256)) * 2))
            },
        ),
    }
    packed = dcmread(made["rle"])
    packed.compress(RLELossless)
    packed.save_as(made["rle"])
    out = io.BytesIO()
    Image.fromarray(colours).save(out, "JPEG", quality=90)
    packed = dcmread(made["jpeg"])
    packed.PixelData = encapsulate([out.getvalue()])
    packed["PixelData"].is_undefined_length = True
    packed.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    packed.PhotometricInterpretation = "YBR_FULL_422"
    packed.save_as(made["jpeg"])
    return [SmallFile(name, "dcm", path.read_bytes()) for name, path in made.items()]


def _network() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(models.create("unet", base_channels=BASE_CHANNELS).state_dict())


def _weights(folder: Path) -> list[SmallFile]:
    write_weights(folder / "best.safetensors", _network(), {"phase": "warm"})
    return [SmallFile("unet", "safetensors", (folder / "best.safetensors").read_bytes())]


def _checkpoints(folder: Path) -> list[SmallFile]:
    path = folder / "last.ckpt"
    state = dict(list(_network().items())[:12])
    torch.save(
        {
            "epoch": 3,
            "global_step": 120,
            "pytorch-lightning_version": "2.6.6",
            "state_dict": state,
            "loops": {"fit_loop": {"epoch_progress": {"current": {"completed": 3}}}},
            "callbacks": {"SaveBestAndLast": {"score": 0.5}},
            "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-3}]}],
        },
        path,
    )
    whole = path.read_bytes()
    torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=False)
    return [SmallFile("zip", "ckpt", whole), SmallFile("legacy", "ckpt", path.read_bytes())]


def _runs() -> list[SmallFile]:
    config = TrainingConfig(dataset="tnbc", data="data", output="run", base_channels=2, size=32)
    entry = {"image": "Slide_01/01_1.png", "masks": ["GT_01/01_1.png"], "patient": "1"}
    split = {"seed": 0, "train": [entry], "validation": [entry], "test": [entry], "skipped": []}
    return [
        SmallFile("config", "json", json.dumps(asdict(config), indent=2).encode()),
        SmallFile("split", "json", json.dumps(split, indent=2).encode()),
    ]


@cache
def small_files(kind: str) -> list[SmallFile]:
    """All files of a kind."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return {
            "image": _images,
            "xml": _annotations,
            "dicom": lambda: _dicoms(folder),
            "weights": lambda: _weights(folder),
            "checkpoint": lambda: _checkpoints(folder),
            "run": _runs,
        }[kind]()
