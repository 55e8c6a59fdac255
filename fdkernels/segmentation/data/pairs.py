"""Pair images with their masks by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from fdkernels.segmentation.data.layout import DEEPEST
from fdkernels.segmentation.data.names import caseless, composed, natural
from fdkernels.segmentation.data.samples import SegmentationSample
from fdkernels.segmentation.data.scan import PICTURES, files, folders

# What follows the image's name in the name of a mask, with a number where an image has several.
MASK_ENDING = re.compile(
    r"(?P<image>.+)[ _-](?P<word>mask|gt|label|seg|segmentation)([ _-]?\d+)?", re.IGNORECASE
)


def by_name(
    paths: Iterable[Path], problems: list[str], prefix: str = "", root: Path | None = None
) -> dict[str, Path]:
    """Index the files by name without prefix and suffix; report duplicate names in `problems`.

    Names are composed (`names.composed`), so that both Unicode forms of a name are one.

    Args:
        paths: the files.
        problems: list to which one sentence is appended per file whose name another has.
        prefix: what names may begin with.
        root: folder that names are relative to; None for that of each file.
    """
    named: dict[str, Path] = {}
    for path in paths:
        parent = Path() if root is None else path.relative_to(root).parent
        name = composed((parent / path.stem.removeprefix(prefix)).as_posix())
        if name not in named:
            named[name] = path
            continue
        other, form = named[name].name, ""
        if path.name != other and composed(path.name) == composed(other):
            form = ", in another Unicode form, though both look alike"
        problems.append(f"{path} has the same name as {other}{form}")
    return named


def listed(
    folder: Path, problems: list[str], suffixes: Iterable[str] = PICTURES, prefix: str = ""
) -> dict[str, Path]:
    """Index all files of a folder and its subfolders by their name relative to it, as `by_name`.

    An only subfolder, such as masks/0, is taken for the folder itself if that holds no such file.
    """
    for _ in range(DEEPEST):
        inside = folders(folder)
        if len(inside) != 1 or files(folder, suffixes):
            break
        folder = inside[0]
    found, level = [], [folder]
    for _ in range(DEEPEST):
        found += [path for each in level for path in files(each, suffixes)]
        level = [inner for each in level for inner in folders(each)]
    return by_name(found, problems, prefix, folder)


def paired(
    images: Mapping[str, Path],
    masks: Mapping[str, Path],
    patient: str | Callable[[str], str],
    problems: list[str],
) -> list[SegmentationSample]:
    """Pair images with their masks; report those without a partner.

    A mask has its image's name, or that name and `_mask`; several of an image, `_mask_1` and so on, are
    all its masks. Case counts only where two images differ in nothing else.

    Args:
        images, masks: files by name.
        patient: the patient of all of them, or a function from name to patient.
        problems: list to which one sentence is appended per file without a partner.
    """
    alike: dict[str, list[str]] = {}
    for name in images:
        alike.setdefault(caseless(name), []).append(name)
    taken: dict[str, list[Path]] = {}
    words: dict[str, str] = {}
    for name, path in masks.items():
        ending = MASK_ENDING.fullmatch(name)
        word, image = "", _named(name, alike)
        if image is None and ending is not None:
            word, image = ending["word"].casefold(), _named(ending["image"], alike)
        if image is None:
            problems.append(f"{path} has no image")
        elif image in taken and (word == "" or word != words[image]):
            problems.append(f"{path} is a second mask of {images[image].name}, beside {taken[image][0].name}")
        else:
            words[image] = word
            taken.setdefault(image, []).append(path)
    problems += [f"{path} has no mask" for name, path in images.items() if name not in taken]
    return [
        SegmentationSample(
            images[name], tuple(taken[name]), patient if isinstance(patient, str) else patient(name)
        )
        for name in sorted(taken, key=natural)
    ]


def _named(name: str, alike: Mapping[str, list[str]]) -> str | None:
    """Return the image of that name, or the only one that differs from it in case alone."""
    found = alike.get(caseless(name), [])
    if name in found:
        return name
    return found[0] if len(found) == 1 else None


__all__ = ["MASK_ENDING", "by_name", "listed", "paired"]
