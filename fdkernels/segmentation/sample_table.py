"""The scores of samples as a table file."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fdkernels.segmentation.metrics import SCORES
from fdkernels.segmentation.scoring import SampleScores


def write_samples(path: Path, samples: Sequence[SampleScores]) -> None:
    """Write one row a sample: its image and patient, its scores, and L_fd of each layer.

    The columns "fold" and "symmetry" are written only if there are folds or other symmetries. An undefined
    score is an empty cell.
    """
    folds = any(row.fold is not None for row in samples)
    augmented = any(row.symmetry != "identity" for row in samples)
    table = []
    for row in samples:
        cells: dict[str, Any] = {"fold": row.fold} if folds else {}
        cells |= {"phase": row.phase, "image": row.image, "patient": row.patient}
        cells |= {"symmetry": row.symmetry} if augmented else {}
        cells |= {name: cell(row.scores[name]) for name in (*SCORES, "foreground_share")}
        cells |= {f"discrepancy_loss/{name}": cell(value) for name, value in row.layer_losses.items()}
        table.append(cells)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


def cell(value: float) -> str:
    """Write a score with nine digits; an undefined one is an empty cell."""
    return "" if math.isnan(value) else f"{value:.9g}"


__all__ = ["cell", "write_samples"]
