"""Write the output folder atomically, and the mapping file beside it."""

from __future__ import annotations

import csv
import io
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from fdkernels.segmentation.data.prepare.options import Box
from fdkernels.segmentation.runfiles import replacing

_PARTS = ("images", "masks")


class MappingRow(NamedTuple):
    """Source files, frame and crop of a pair."""

    name: str
    dicom: Path
    frame: int
    mask: Path
    box: Box


class OutputFolder:
    """The validated output folder of the pairs.

    Args:
        path: the folder to create.
        mapping: CSV file that maps pairs to their sources, or None.
        inputs: the input folders.

    Raises:
        ValueError: `path` is a file, is one of the input folders or inside one, or contains other
            files than pairs; or `mapping` is a folder or inside `path`.
    """

    def __init__(self, path: Path, mapping: Path | None, inputs: tuple[Path, ...]) -> None:
        self.path = path
        self.place = resolved = path.resolve()
        self.mapping = mapping
        for folder in inputs:
            if resolved.is_relative_to(folder.resolve()):
                raise ValueError(f"output must be outside the input folders, got {path} in {folder}")
        if path.exists() and not path.is_dir():
            raise ValueError(f"output must be a folder, got the file {path}")
        foreign = [file for file in _tree(path) if not _may_be_a_pair(file)]
        if foreign:
            raise ValueError(f"output must be new or empty, got {path}, which contains {foreign[0]}")
        if mapping is not None and mapping.resolve().is_relative_to(resolved):
            raise ValueError(f"mapping must be outside the output folder {path}, got {mapping}")
        if mapping is not None and mapping.is_dir():
            raise ValueError(f"mapping must be a file, got the folder {mapping}")

    @contextmanager
    def writing(self) -> Iterator[PairWriter]:
        """Yield a writer to a hidden folder beside the output; removes that folder on exit."""
        self.place.parent.mkdir(parents=True, exist_ok=True)
        hidden = Path(tempfile.mkdtemp(dir=self.place.parent, prefix=f".{self.place.name}."))
        try:
            yield PairWriter(self, hidden)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)


class PairWriter:
    """Writes pairs to `hidden` and finally moves them to the output folder."""

    def __init__(self, folder: OutputFolder, hidden: Path) -> None:
        self._folder = folder
        self._built = hidden / "built"
        self._rows: list[MappingRow] = []
        for part in _PARTS:
            (self._built / part).mkdir(parents=True)

    def add(self, row: MappingRow, picture: np.ndarray, lesion: np.ndarray) -> None:
        """Write picture (uint8 [H, W] or [H, W, 3]) and lesion (bool [H, W]) under `row.name`."""
        for part, values in zip(_PARTS, (picture, lesion.astype(np.uint8) * 255), strict=True):
            # An image created from an array has no metadata that could leak to the file.
            Image.fromarray(np.ascontiguousarray(values)).save(self._built / part / f"{row.name}.png")
        self._rows.append(row)

    def finish(self) -> bool:
        """Move the pairs to the output folder; return whether it already contained these very pairs.

        Raises:
            ValueError: the output folder contains other pairs, or the mapping file other rows.
        """
        output, mapping = self._folder.path, self._folder.mapping
        unchanged = bool(_tree(output))
        if unchanged and _contents(output) != _contents(self._built):
            raise ValueError(f"output must be new or empty, got {output}, which contains other pairs")
        if mapping is None:
            self._move(unchanged)
            return unchanged
        text = self._mapping_text()
        if mapping.exists() and mapping.read_bytes() != text:
            raise ValueError(f"mapping must be a new file, got {mapping}, which has other content")
        with replacing(mapping) as temporary:
            temporary.write_bytes(text)
            self._move(unchanged)
        mapping.chmod(0o600)  # it identifies the patients
        return unchanged

    def _move(self, unchanged: bool) -> None:
        if unchanged:
            return
        _remove_empty(self._folder.place)
        self._built.rename(self._folder.place)

    def _mapping_text(self) -> bytes:
        lines = [["name", "dicom", "frame", "mask", "x0", "y0", "x1", "y1"]]
        lines += [
            [row.name, str(row.dicom), str(row.frame), str(row.mask), *map(str, row.box)]
            for row in self._rows
        ]
        text = io.StringIO(newline="")
        csv.writer(text).writerows(lines)
        return text.getvalue().encode()


def _remove_empty(folder: Path) -> None:
    """Remove a folder that contains only empty folders; raises OSError if it contains a file."""
    if folder.exists():
        for inner in sorted(folder.rglob("*"), reverse=True):
            inner.rmdir()
        folder.rmdir()


def _may_be_a_pair(file: Path) -> bool:
    return len(file.parts) == 2 and file.parts[0] in _PARTS and file.suffix == ".png"


def _tree(folder: Path) -> list[Path]:
    """List all files under a folder, relative to it; empty if the folder does not exist."""
    return sorted(file.relative_to(folder) for file in folder.rglob("*") if not file.is_dir())


def _contents(folder: Path) -> dict[Path, bytes]:
    return {file: (folder / file).read_bytes() for file in _tree(folder)}


__all__ = ["MappingRow", "OutputFolder", "PairWriter"]
