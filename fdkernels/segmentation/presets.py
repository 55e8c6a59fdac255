"""Presets of the paper's experiments by name: a data set, a network, and what the paper sets for them."""

from __future__ import annotations

import difflib
from typing import Any

from fdkernels import models
from fdkernels.segmentation.data import DATASETS

# Table 2, its nine pairs in their order.
TABLE_2 = (
    ("udiat", "attention_unet"),
    ("tnbc", "attention_unet"),
    ("monuseg", "attention_unet"),
    ("ad-256", "attention_unet"),
    ("udiat", "cmunet"),
    ("us-tnbc", "cmunet"),
    ("tnbc", "nucleisegnet"),
    ("monuseg", "nucleisegnet"),
    ("ad-256", "nucleisegnet"),
)
# Images a step by the side that they are resized to. The paper states none; these keep the largest
# network within the 16 GB of the GPU that it names.
_BATCH_SIZES = {512: 4, 256: 8, 128: 16}

# Every network on every data set, the paper's pairs first.
PRESETS: dict[str, tuple[str, str]] = {
    f"{dataset}-{model}": (dataset, model)
    for dataset, model in (*TABLE_2, *((dataset, model) for dataset in DATASETS for model in models.names()))
}


def preset_fields(name: str) -> dict[str, Any]:
    """Give the fields of `TrainingConfig` that a preset sets: dataset, model, size, lr, batch_size.

    Args:
        name: DATASET-MODEL, such as "tnbc-nucleisegnet"; any network on any data set.

    Raises:
        ValueError: no preset has that name; the message names close ones.

    References:
        Sections 3.1 and A.4 for size and learning rate; the paper states no batch size.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name.lower(), PRESETS, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else f"there are {', '.join(PRESETS)}"
        raise ValueError(f"preset must be DATASET-MODEL, got {name}; {hint}")
    dataset, model = PRESETS[name]
    size = DATASETS[dataset].size
    return {
        "dataset": dataset,
        "model": model,
        "size": size,
        "lr": DATASETS[dataset].lr,
        "batch_size": _BATCH_SIZES[size],
    }


__all__ = ["PRESETS", "TABLE_2", "preset_fields"]
