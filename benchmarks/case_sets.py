"""Which cases are measured together: `--set core,scaling`."""

from __future__ import annotations

import torch

from benchmarks.cases import Case, named_case

# The two that differ most first: a case that is measured in fewer variants is measured in these.
VARIANTS = (
    (torch.float32, "contiguous"),
    (torch.bfloat16, "channels_last"),
    (torch.float32, "channels_last"),
    (torch.bfloat16, "contiguous"),
)

# Names, and in how many of the variants. The most important first: a time limit cuts off the end.
_CORE = {
    "enc1-256": 4,
    "pyramid-256": 4,
    "pyramid-32": 4,
    "enc1-128": 2,
    "enc3-256": 2,
    "bottleneck-256": 2,
    "deep-256": 2,
    "bool-256": 1,
    "uint8-256": 1,
    "int64-256": 1,
    "soft-256": 1,
    "ignore-256": 1,
    "shuffle-256": 1,
    "pooled-256": 1,
    "released-256": 1,
    "volume-64": 2,
    "unet-256": 1,
}
_CUDA_CORE = {
    "unet-512": 4,
    "nucleisegnet-512": 2,
    "enc1-512": 4,
    **{name: count for name, count in _CORE.items() if name not in ("enc1-256", "enc1-128")},
}
_FULL = (
    *("unet-512", "unet-256", "nucleisegnet-512", "nucleisegnet-256"),
    *("enc1-512", "enc2-512", "enc1-256", "enc2-256", "enc3-256", "enc4-256", "bottleneck-256", "enc1-128"),
    *("pyramid-256", "deep-256", "pyramid-32"),
    *("bool-256", "uint8-256", "int64-256", "soft-256", "ignore-256"),
    *("shuffle-256", "pooled-256", "released-256", "volume-64", "volumes-64"),
)
# For a GPU that is lent for minutes.
_BRIEF = {
    "unet-512": 2,
    "pyramid-32": 2,
    "enc1-512": 2,
    "nucleisegnet-256": 1,
    "ignore-256": 1,
    "released-256": 1,
    "volume-64": 1,
}
# MiB of the largest map of the series; on a GPU those that do not fit are left out, with the reason.
_LARGEST = {"cpu": 512, "cuda": 2**15}
_BRIEF_SCALING = (1, 8, 64, 512, 4096)
# One case of each kind, in the dtype of which torch.compile is quickest.
_QUICK = {"enc1-128": 1, "pyramid-32": 1}

SETS = ("core", "scaling", "full", "brief", "quick")


def cases(device: str, sets: tuple[str, ...] = ("full",)) -> list[Case]:
    """The cases of some sets on a device, each once.

    Args:
        device: `"cpu"` or `"cuda"`.
        sets: `"core"`, what a user meets, in ten minutes on two cores; `"scaling"`, one map from 1 MiB to
            the largest that fits; `"full"`, every name in every dtype and layout; `"brief"`, a minute or two
            on a GPU; `"quick"`, two cases, to see that it runs.

    Raises:
        ValueError: no set has that name.
    """
    chosen: dict[str, Case] = {}
    for name in sets:
        if name not in SETS:
            raise ValueError(f"set must be one of {', '.join(SETS)}, got {name!r}")
        for case in _of_set(name, device):
            chosen.setdefault(case.id, case)
    return list(chosen.values())


def _of_set(name: str, device: str) -> list[Case]:
    if name == "scaling":
        sizes = [2**power for power in range(_LARGEST[device].bit_length())]
        return _scaling(sizes, device)
    counts = {
        "core": _CUDA_CORE if device == "cuda" else _CORE,
        "full": dict.fromkeys(_FULL, len(VARIANTS)),
        "brief": _BRIEF,
        "quick": _QUICK,
    }[name]
    found = [
        named_case(case, *variant, device)
        for index, variant in enumerate(VARIANTS)
        for case, count in counts.items()
        if index < count
    ]
    return found + (_scaling(_BRIEF_SCALING, device) if name == "brief" else [])


def _scaling(sizes: tuple[int, ...] | list[int], device: str) -> list[Case]:
    return [named_case(f"scaling-{size}", *VARIANTS[0], device) for size in sizes]
