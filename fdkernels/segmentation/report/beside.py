"""The published numbers beside the user's own, each under its conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from fdkernels.segmentation.data import DATASETS
from fdkernels.segmentation.report.experiment import SETS, Experiment
from fdkernels.segmentation.report.page import EMPTY, Block, Table, Text, number
from fdkernels.segmentation.report.published import (
    CONDITIONS,
    SOURCE,
    TABLE_2,
    TABLE_3,
    TABLE_4,
    Ablation,
    Pair,
    Score,
)
from fdkernels.segmentation.report.runs import RunGroup
from fdkernels.segmentation.report.words import counted

_NETWORKS = {"attention_unet": "AttnUNet", "cmunet": "CMUNet", "nucleisegnet": "NuSegNet", "unet": "UNet"}


@dataclass(frozen=True)
class Own:
    """Scores of the user's own, in percent.

    Attributes:
        dataset, model: as the command line calls them.
        title: the arm or the training.
        scores: mean Dice and IoU by set; "all" alone where nothing else is known.
        conditions: under which they came about.
    """

    dataset: str
    model: str
    title: str
    scores: Mapping[str, tuple[float, float]]
    conditions: str


def of_experiment(experiment: Experiment) -> list[Own]:
    """Give the mean scores of each arm of an experiment."""
    settings = experiment.settings
    sets = {name: experiment.samples_of(name) for name in SETS}
    found = []
    for arm in experiment.arms:
        rows = experiment.of_arm(arm)
        scores = {}
        for name, samples in sets.items():
            if kept := [row for row in rows if row.sample in samples]:
                scores[name] = (100 * fmean(row.dice for row in kept), 100 * fmean(row.iou for row in kept))
        counts = [
            counted(len({getattr(row, name) for row in rows}), noun)
            for name, noun in (("seed", "seed"), ("fold", "fold"), ("sample", "image"))
        ]
        # An arm may differ from the settings that all share; its runs say what held.
        own = next((one.run.saved.config.as_json() for one in experiment.runs if one.arm == arm), settings)
        found.append(
            Own(
                dataset=str(own.get("dataset", EMPTY)),
                model=str(own.get("model", EMPTY)),
                title=f"{experiment.name}: {arm}",
                scores=scores,
                conditions=", ".join([_conditions(own), *counts]),
            )
        )
    return found


def of_group(group: RunGroup) -> list[Own]:
    """Give the mean test scores of a training, over its folds."""
    tested = [run for run in group.runs if run.last is not None]
    if not tested:
        return []
    tests = [run.results[str(run.last)]["test"] for run in tested]
    config = tested[0].saved.config
    dice, iou = (100 * fmean(test[score] for test in tests) for score in ("dice", "iou"))
    images = counted(int(sum(test["images"] for test in tests)), "image")
    with_loss = "with the loss" if config.fd_loss else "without the loss"
    spread = (
        f"{with_loss}, 1 seed, {counted(len(tested), 'fold') if len(tested) > 1 else 'one split'}, {images}"
    )
    conditions = f"{_conditions(config.as_json())}, {spread}"
    return [Own(config.dataset, config.model, group.title, {"all": (dice, iou)}, conditions)]


def _conditions(settings: Mapping[str, Any]) -> str:
    size, width = settings.get("size"), settings.get("base_channels")
    preset = DATASETS.get(str(settings.get("dataset")))
    size = preset.size if size is None and preset is not None else size
    parts = [
        "size unknown" if size is None else f"{size}×{size}",
        "width as published" if width is None else f"width {width}",
    ]
    if "epochs_warm" in settings and "epochs_active" in settings:
        parts.append(f"{settings['epochs_warm']} + {settings['epochs_active']} epochs")
    return ", ".join(parts)


def published_blocks(experiments: Sequence[Experiment], groups: Sequence[RunGroup]) -> list[Block]:
    """Tabulate Tables 2, 3 and 4 with the user's own numbers among them."""
    own = [row for experiment in experiments for row in of_experiment(experiment)]
    own += [row for group in groups for row in of_group(group)]
    blocks: list[Block] = [
        Text(
            f"Tables 2, 3 and 4 are those of: {SOURCE}. Its conditions: {CONDITIONS}. Numbers that came "
            "about under other conditions (another size, width, number of epochs, other images in the "
            "test part) are beside each other here and not comparable: a difference between a published row "
            "and an own one says nothing about the loss."
        )
    ]
    blocks.append(_table_2(own))
    if odd := _odd_rows():
        blocks.append(
            Text(
                "In Table 2 as printed, the IoU of a set exceeds its Dice, which no set of masks can have, "
                f"as IoU ≤ Dice holds for every image: {'; '.join(odd)}."
            )
        )
    for title, tables in (("Table 3", TABLE_3), ("Table 4", TABLE_4)):
        for dataset, scores in tables.items():
            blocks.append(_scores_table(title, dataset, scores, own))
    elsewhere = {*(row.dataset for row in TABLE_2), *TABLE_3, *TABLE_4}
    if others := [row for row in own if row.dataset not in elsewhere]:
        blocks.append(_others_table(others))
    return blocks


def _table_2(own: Sequence[Own]) -> Table:
    rows: list[tuple[str, ...]] = []
    marked = set()
    for published in TABLE_2:
        rows += _published_rows(published)
        for one in own:
            if (one.dataset, one.model) == (published.dataset, published.model):
                marked.add(len(rows))
                rows.append(_own_row(one))
    pairs = {(row.dataset, row.model) for row in TABLE_2}
    for one in own:
        if (one.dataset, one.model) not in pairs and one.dataset in {row.dataset for row in TABLE_2}:
            marked.add(len(rows))
            rows.append(_own_row(one))
    headings = [f"{name} {score}" for name in SETS.values() for score in ("Dice", "IoU")]
    return Table(
        "Table 2, Dice and IoU in percent without and with the loss, and the difference of the printed "
        "numbers; own rows are set off.",
        ("network", "data set", "loss or own arm", "conditions", *headings),
        tuple(rows),
        texts=4,
        own=frozenset(marked),
    )


def _published_rows(row: Ablation) -> list[tuple[str, ...]]:
    pairs: list[Pair] = [row.worst_off, row.best_off, row.all]
    names = (_NETWORKS[row.model], DATASETS[row.dataset].title)
    lines = []
    for place, title in enumerate(("without", "with")):
        cells = [number(score[place], 2) for pair in pairs for score in (pair.dice, pair.iou)]
        lines.append((*names, title, "published", *cells))
    changes = [
        number(score[1] - score[0], 2, signed=True) for pair in pairs for score in (pair.dice, pair.iou)
    ]
    return [*lines, (*names, "difference", "published", *changes)]


def _own_row(own: Own) -> tuple[str, ...]:
    cells = [
        number(own.scores[name][place], 2) if name in own.scores else EMPTY
        for name in SETS
        for place in (0, 1)
    ]
    return (*_names(own), own.title, own.conditions, *cells)


def _names(own: Own) -> tuple[str, str]:
    preset = DATASETS.get(own.dataset)
    return _NETWORKS.get(own.model, own.model), own.dataset if preset is None else preset.title


def _odd_rows() -> list[str]:
    found = []
    for row in TABLE_2:
        for name, pair in (("worst-off", row.worst_off), ("best-off", row.best_off), ("all", row.all)):
            for place, title in enumerate(("without", "with")):
                if pair.iou[place] > pair.dice[place]:
                    found.append(
                        f"{_NETWORKS[row.model]} on {DATASETS[row.dataset].title}, {name}, {title} the loss: "
                        f"Dice {number(pair.dice[place], 2)} and IoU {number(pair.iou[place], 2)}"
                    )
    return found


def _scores_table(title: str, dataset: str, scores: Sequence[Score], own: Sequence[Own]) -> Table:
    rows = [(one.network, "published", number(one.dice, 2), number(one.iou, 2)) for one in scores]
    marked = frozenset(range(len(rows), len(rows) + sum(one.dataset == dataset for one in own)))
    rows += [
        (f"{_names(one)[0]}, {one.title}", one.conditions, *_all_scores(one))
        for one in own
        if one.dataset == dataset
    ]
    return Table(
        f"{title}, {DATASETS[dataset].title}: Dice and IoU in percent over all samples; own rows set off.",
        ("network", "conditions", "Dice", "IoU"),
        tuple(rows),
        texts=2,
        own=marked,
    )


def _all_scores(own: Own) -> tuple[str, str]:
    dice, iou = own.scores.get("all", (None, None))
    return number(dice, 2), number(iou, 2)


def _others_table(own: Sequence[Own]) -> Table:
    rows = [(*_names(one), one.title, one.conditions, *_all_scores(one)) for one in own]
    return Table(
        "Own numbers on data sets of which the paper prints none, in percent over all samples.",
        ("network", "data set", "arm or training", "conditions", "Dice", "IoU"),
        tuple(rows),
        texts=4,
    )


__all__ = ["Own", "of_experiment", "of_group", "published_blocks"]
