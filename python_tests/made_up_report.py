"""Synthetic logs, results and experiments, and a reader of the pages that are made of them."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

from fdkernels.models.blocks import TAP_NAMES
from fdkernels.segmentation.config import PHASES, TrainingConfig
from fdkernels.segmentation.runfiles import write_json

VERSIONS = {"fdkernels": "0.1.0", "torch": "2.13.0"}


def write_logged_run(
    folder: Path,
    *,
    epochs: int = 4,
    phases: Sequence[str] = PHASES,
    finished: Sequence[str] = PHASES,
    alpha_end: float = 0.25,
    dice: float = 0.8,
    **changes,
) -> Path:
    """Write what `train` leaves of a run but its weights; alpha rises evenly to `alpha_end`.

    Args:
        folder: of the run.
        epochs: of each phase.
        phases: those with a log.
        finished: those with a result.
        alpha_end: of every layer.
        dice: of the test images after phase two; 0.1 lower after phase one.
        changes: fields of the configuration.
    """
    given = {"dataset": "tnbc", "data": "nowhere", "base_channels": 2, "size": 32, "lr": 1e-3, **changes}
    config = TrainingConfig(output=str(folder), epochs_warm=epochs, epochs_active=epochs, **given)
    write_json(folder / "config.json", {**config.as_json(), "versions": VERSIONS})
    write_json(folder / "split.json", {"seed": 0, "train": [], "validation": [], "test": []})
    for phase in phases:
        active = phase == "active"
        rows = []
        for epoch in range(epochs):
            alpha = alpha_end * (epoch + 1) / epochs if active else 0.0
            row = {"epoch": epoch, "step": 3 * epoch + 2, "train/loss": 2 - 0.1 * epoch, "val/iou": 0.5}
            row |= {"train/segmentation_loss": 1 - 0.1 * epoch, "val/dice": 0.6 + 0.01 * epoch}
            for depth, layer in enumerate(TAP_NAMES if config.fd_loss else ()):
                row |= {f"alpha/{layer}": alpha, f"discrepancy_loss/{layer}": depth - 0.5 * epoch}
            rows.append(row)
        log = folder / phase / "logs" / "version_0" / "metrics.csv"
        log.parent.mkdir(parents=True)
        with log.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        if phase in finished:
            score = dice if active else dice - 0.1
            result = {"epochs": epochs, "best_epoch": 2, "validation_dice": 0.61}
            result |= {"test": {"dice": score, "iou": score - 0.2, "images": 7}}
            if config.fd_loss:
                result["final_alpha"] = dict.fromkeys(TAP_NAMES, alpha_end if active else 0.0)
            write_json(folder / phase / "result.json", result)
    if set(finished) == set(PHASES):
        write_json(folder / "metrics.json", {})
    return folder


def write_scores(folder: Path, experiment: str, rows: Sequence[dict]) -> Path:
    """Write scores.csv of rows with arm, seed, fold, patient, sample, dice, iou and L_fd_LAYER."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "scores.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["experiment", *rows[0]])
        writer.writeheader()
        writer.writerows({"experiment": experiment, **row} for row in rows)
    return folder


def made_up_rows(
    arms: dict[str, float], *, patients: int = 4, images: int = 2, seeds: Sequence[int] = (0, 1)
) -> list[dict]:
    """Make rows of scores: an arm's Dice is its number plus one that depends on the image alone."""
    rows = []
    for arm, base in arms.items():
        for seed in seeds:
            for patient in range(patients):
                for image in range(images):
                    dice = base + 0.02 * patient + 0.01 * image
                    row = {"arm": arm, "seed": seed, "fold": patient % 2 + 1, "patient": f"p{patient}"}
                    row |= {"sample": f"p{patient}_{image}.png", "dice": dice, "iou": dice - 0.1}
                    losses = {layer: depth - 3 * dice for depth, layer in enumerate(TAP_NAMES)}
                    rows.append(row | {f"L_fd_{layer}": loss for layer, loss in losses.items()})
    return rows


def write_experiment(
    folder: Path, name: str, rows: Sequence[dict], *, results=None, runs: bool = True, **summary
) -> Path:
    """Write an experiment with its summary and, of every arm, seed and fold, a logged run."""
    write_scores(folder, name, rows)
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    places = sorted({(row["arm"], row["seed"], row["fold"]) for row in rows})
    keys = [f"{arm}/seed{seed}/fold{fold}" for arm, seed, fold in places]
    content = {
        "experiment": name,
        "settings": {"dataset": "tnbc", "model": "unet", "size": 32, "base_channels": 2},
        "seeds": sorted({row["seed"] for row in rows}),
        "folds": sorted({row["fold"] for row in rows}),
        "arms": arms,
        "versions": VERSIONS,
        "state": {"finished": len(keys), "total": len(keys)},
        "seconds": {key: {"training": 60.0, "scoring": 1.0} for key in keys},
        "results": results or {},
    }
    write_json(folder / "summary.json", {**content, **summary})
    for (arm, seed, fold), key in zip(places, keys, strict=True) if runs else ():
        changes = {"seed": seed, "fold": fold, "fd_loss": arm != "without"}
        write_logged_run(folder / "runs" / key, **changes)
    return folder


class PageReader(HTMLParser):
    """What a page holds: images, tables as lists of rows of cells, text, and all elements.

    It fails where an element is closed that is not open: a name that broke the page would do so.
    """

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[dict[str, str]] = []
        self.tables: list[list[list[str]]] = []
        self.captions: list[str] = []
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        if tag == "img":
            self.images.append(dict(attributes))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag == "caption":
            self.captions.append("")
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag, self.getpos()

    def handle_data(self, data):
        if "style" in self._open:
            return
        self.text += data
        if self._open and self._open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        if self._open and self._open[-1] == "caption":
            self.captions[-1] += data

    def table(self, beginning: str) -> list[list[str]]:
        """Find the table whose caption begins so."""
        found = [
            table
            for table, caption in zip(self.tables, self.captions, strict=True)
            if caption.startswith(beginning)
        ]
        assert len(found) == 1, self.captions
        return found[0]

    def pictures(self) -> list[Image.Image]:
        """Decode every image, each of which is a data URI of a PNG."""
        opened = []
        for image in self.images:
            kind, _, content = image["src"].partition(";base64,")
            assert kind == "data:image/png"
            picture = Image.open(io.BytesIO(base64.b64decode(content, validate=True)))
            picture.load()
            opened.append(picture.convert("RGB"))
        return opened
