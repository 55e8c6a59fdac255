"""Repeat the study of ../study.md: `python docs/study/repeat.py --data FOLDER --output FOLDER`.

FOLDER of --data holds tnbc, busi, dsb2018 and monuseg in the layouts of their downloads. An experiment that
was broken off goes on where it was; finished ones are left as they are. `--only wide` is what needs a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from PIL import Image

HERE = Path(__file__).resolve().parent
_SMALL = (
    *("--size", "128", "--base-channels", "16", "--batch-size", "4", "--lr", "1e-3"),
    *("--precision", "bf16-mixed", "--channels-last", "--workers", "0", "--seeds", "3"),
)
SETTINGS = (*_SMALL, "--epochs-warm", "80", "--epochs-active", "40")
LONG_SETTINGS = (*_SMALL, "--epochs-warm", "200", "--epochs-active", "100")
# The paper's width, rate and epochs, at the size that six minutes of a GPU a data set allow.
WIDE_SETTINGS = (
    *("--size", "256", "--base-channels", "64", "--batch-size", "4"),
    *("--epochs-warm", "100", "--epochs-active", "75", "--lr", "1e-4"),
    *("--precision", "bf16-mixed", "--channels-last", "--workers", "0", "--seeds", "3"),
    *("--no-tensorboard", "--accelerator", "cuda", "--jobs", "14"),
)
# In this order, as each takes the runs of those before; `conventions` has all of their arms, and six more.
EXPERIMENTS = ("ablation", "alpha", "correlation", "shift", "conventions")
# Whose scores are put beside this file; those of a part's `conventions` hold all the others.
SCORED = ("ablation", "alpha", "conventions")
# Of `ablation` with the default convention and rule, beside what `conventions` has trained.
VARIANTS = {
    "alpha-0.1": ("--alpha-max", "0.1"),
    "alpha-0.01": ("--alpha-max", "0.01"),
    "shuffle": ("--exchange", "shuffle"),
}
TISSUE = (320, 256)  # size in pixels of the stained images among those of DSB2018


class Part(NamedTuple):
    """A data set with a network."""

    dataset: str
    model: str

    def name(self, experiment: str) -> str:
        """Of the folder of an experiment, and of its scores here."""
        return f"{self.dataset}-{self.model}-{experiment}"


PARTS = (
    Part("tnbc", "unet"),
    Part("busi", "unet"),
    Part("dsb2018", "unet"),
    Part("tnbc", "nucleisegnet"),
    Part("busi", "attention_unet"),
    Part("dsb2018", "nucleisegnet"),
)


class Apart(NamedTuple):
    """The ablation of a part at other settings."""

    part: Part
    name: str
    what: str
    settings: tuple[str, ...]


APART = (
    *(Apart(part, "wide", "of width 64 at 256²", WIDE_SETTINGS) for part in PARTS[:3]),
    Apart(Part("busi", "unet"), "long", "of 300 epochs", LONG_SETTINGS),
)


def link_data(data: Path, linked: Path) -> None:
    """Lay out BUSI without its normal images, and the stained images of DSB2018, as links."""
    for folder in ("tnbc", "monuseg"):
        _link(data / folder, linked / folder)
    for kind in ("benign", "malignant"):
        _link(data / "busi" / kind, linked / "busi" / kind)
    for folder in sorted((data / "dsb2018" / "stage1_train").iterdir()):
        image = next((folder / "images").glob("*.png"), None) if folder.is_dir() else None
        if image is not None and Image.open(image).size == TISSUE:
            _link(folder, linked / "dsb2018" / "stage1_train" / folder.name)


def _link(source: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if not place.is_symlink():
        place.symlink_to(source.resolve(), target_is_directory=True)


def is_finished(folder: Path) -> bool:
    """Whether an experiment has its results."""
    summary = folder / "summary.json"
    return summary.is_file() and bool(json.loads(summary.read_text("utf-8"))["results"])


def run(
    experiment: str,
    part: Part,
    data: Path,
    output: Path,
    more: tuple[str, ...] = (),
    variant: str = "",
    settings: tuple[str, ...] = SETTINGS,
) -> Path:
    """Run an experiment to its end; return its folder, named after the variant if there is one."""
    folder = output / part.name(variant or experiment)
    if is_finished(folder):
        return folder
    resume = ("--resume",) if (folder / "summary.json").is_file() else ()
    command = (
        *(sys.executable, "-m", "fdkernels", "experiment", experiment),
        *("--dataset", part.dataset, "--data", str(data / part.dataset), "--model", part.model),
        *("--output", str(folder), *settings, *resume, *more),
    )
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return folder


def main() -> None:
    """Run all experiments, and copy their scores beside this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the four data sets")
    parser.add_argument("--output", type=Path, required=True, help="folder of the experiments")
    parser.add_argument("--only", help="such as tnbc-unet, addition, long or wide; else all of the CPU")
    arguments = parser.parse_args()
    linked = arguments.output / "data"
    link_data(arguments.data, linked)
    for part in PARTS:
        if arguments.only not in (None, part.name("")[:-1]):
            continue
        reuse: tuple[str, ...] = ()
        for experiment in EXPERIMENTS:
            found = run(experiment, part, linked, arguments.output, reuse)
            reuse = (*reuse, "--reuse", str(found))
            if experiment in SCORED:
                shutil.copyfile(found / "scores.csv", HERE / f"{part.name(experiment)}.csv")
        for variant, options in VARIANTS.items():
            found = run("ablation", part, linked, arguments.output, (*reuse, *options), variant)
            shutil.copyfile(found / "scores.csv", HERE / f"{part.name(variant)}.csv")
    for part, name, _, settings in APART:
        if arguments.only == name or (arguments.only is None and "cuda" not in settings):
            found = run("ablation", part, linked, arguments.output, variant=name, settings=settings)
            shutil.copyfile(found / "scores.csv", HERE / f"{part.name(name)}.csv")
    if arguments.only in (None, "addition"):
        novel = ("--novel-dataset", "monuseg", "--novel-data", str(linked / "monuseg"))
        addition = run("addition", PARTS[0], linked, arguments.output, novel)
        shutil.copyfile(addition / "scores.csv", HERE / f"{PARTS[0].name('addition')}.csv")


if __name__ == "__main__":
    main()
