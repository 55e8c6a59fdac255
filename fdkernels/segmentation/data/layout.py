"""Folders of a data set: where it lies in the given folder, and where it lies if not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fdkernels.segmentation.data.names import folder_key, printable
from fdkernels.segmentation.data.scan import folders

# Names that folders of images and of masks have in copies of the data sets, the commonest first.
IMAGES = ("images", "image", "original", "imgs", "img", "tissue images", "tissue image")
MASKS = ("masks", "mask", "GT", "ground truth", "labels", "label")
DEEPEST = 6  # levels that are searched; also ends a circle of links
_MOST = 300  # folders that are searched for a hint


def child(folder: Path, *names: str) -> Path | None:
    """Return the subfolder with the first of the names that one has, whatever its case, spaces, "_" and "-".

    Raises:
        ValueError: several subfolders have that name.
    """
    inside: dict[str, list[Path]] = {}
    for each in folders(folder):
        inside.setdefault(folder_key(each.name), []).append(each)
    for name in names:
        found = inside.get(folder_key(name), [])
        if len(found) > 1:
            got = " and ".join(each.name for each in found)
            raise ValueError(printable(f"{folder} must have one folder {name}, got {got}"))
        if found:
            return found[0]
    return None


def roles(folder: Path, images: str = "images", masks: str = "masks") -> tuple[Path | None, Path | None]:
    """Return the subfolders of images and of masks, None where there is none.

    Args:
        folder: the folder to look in.
        images, masks: the names that go first, those of the official download.
    """
    return child(folder, images, *IMAGES), child(folder, masks, *MASKS)


def level(root: Path, holds: Callable[[Path], bool], *names: str) -> Path | None:
    """Return the folder that `holds` the data: `root`, or one further down; None if there is none.

    Goes down only where there is no choice: into a subfolder with one of the names, the download's own,
    or into the only subfolder, which unpacking often adds.
    """
    folder = root
    for _ in range(DEEPEST):
        if holds(folder):
            return folder
        inside = folders(folder)
        named = child(folder, *names)
        if named is None and len(inside) != 1:
            return None
        folder = inside[0] if named is None else named
    return None


def layout_error(
    root: Path, title: str, layout: str, missing: str, holds: Callable[[Path], bool] | None = None
) -> ValueError:
    """Return the error for a folder with another layout, with where the layout was found instead.

    Args:
        root: the folder.
        title: name of the data set.
        layout: files of the layout.
        missing: what was not found in the folder.
        holds: whether a folder has the layout.
    """
    elsewhere = "" if holds is None else _elsewhere(root, holds)
    got = f"got {root}, which contains {missing}{elsewhere}"
    return ValueError(printable(f"data must be a folder in the {title} layout ({layout}), {got}"))


def _elsewhere(root: Path, holds: Callable[[Path], bool]) -> str:
    """Say at which level below `root`, or above it, the layout lies; "" if at none."""
    inside, searched = _inside(root), 0
    above = bool(inside) or any(entry.is_file() for entry in root.iterdir())
    for depth in range(1, DEEPEST):
        searched += len(inside)
        if not inside or searched > _MOST:
            break
        if found := [folder for folder in inside if _safely(holds, folder)]:
            where = "one level" if depth == 1 else f"{depth} levels"
            if len(found) == 1:
                return f"; the layout lies {where} deeper: {found[0]}"
            listed = ", ".join(map(str, found[:4])) + (", ..." if len(found) > 4 else "")
            return f"; the layout lies {where} deeper, in {len(found)} folders ({listed}): name one of them"
        inside = [folder for each in inside for folder in _inside(each)]
    if above and _safely(holds, root.resolve().parent):
        return f"; the layout lies one level higher: {root.resolve().parent}"
    return ""


def _inside(folder: Path) -> list[Path]:
    try:
        return folders(folder)
    except ValueError:
        return []


def _safely(holds: Callable[[Path], bool], folder: Path) -> bool:
    try:
        return holds(folder)
    except (OSError, ValueError):  # only a hint is looked for
        return False


__all__ = ["DEEPEST", "IMAGES", "MASKS", "child", "layout_error", "level", "roles"]
