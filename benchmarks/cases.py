"""What is measured, and the record of where: cases of the loss, their inputs, and the JSON files.

| case | layers | size of the mask |
| --- | --- | --- |
| `enc1-256` | the output of one tap of the UNet, 4 images of 256² | the layer's |
| `unet-512`, `nucleisegnet-256` | the nine taps of a network: 4 images of 512², 16 of 256² | the image's |
| `pyramid-256`, `deep-256` | all nine taps of the UNet, the three smallest alone; 4 images | the image's |
| `bool-256` and others | `enc1-256` | bool, uint8, int64, soft, or with pixels to ignore |
| `shuffle-256`, `pooled-256` | `deep-256` with an exchange | the image's |
| `released-256` | `enc1-256` under the convention of the authors' code | the layer's |
| `volume-64`, `volumes-64` | a map of 2 volumes of 64³; three levels of them | the volume's |
| `scaling-32` | one map of 32 MiB | the layer's |
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
# `python -m` puts the working directory first, but `import fdkernels` must be the installed package and not
# this source tree, which has no compiled module. A tree that PYTHONPATH names stays where it is.
if sys.path[0] in ("", str(ROOT)):
    sys.path.append(sys.path.pop(0) or str(ROOT))

import fdkernels
from fdkernels import FeatureTaps, models
from fdkernels.backend import auto_backend
from fdkernels.build_info import build_info

BATCH = 4
NETWORK_BATCH = {512: 4, 256: 16}
LEVELS = ("enc1", "enc2", "enc3", "enc4", "bottleneck")
PYRAMIDS = {"pyramid": (*LEVELS, "dec4", "dec3", "dec2", "dec1"), "deep": ("enc4", "bottleneck", "dec4")}
MASK_KINDS = ("bool", "uint8", "int64", "soft", "ignore")
EXCHANGES = ("shuffle", "pooled")
IGNORED = 255

_BEGIN = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One call of the loss.

    Args:
        name: as above.
        layers: [N, C, *S] of each layer.
        mask_size: the spatial size of the mask.
        dtype: of the features.
        layout: `"contiguous"` or `"channels_last"`.
        device: `"cpu"` or `"cuda"`.
        mask_kind: `"binary"` is float32 of 0 and 1; else one of `MASK_KINDS`.
        convention: `"paper"` or `"released"`.
        exchange: `"none"`, `"shuffle"` or `"pooled"`.
    """

    name: str
    layers: tuple[Shape, ...]
    mask_size: Shape
    dtype: torch.dtype
    layout: str
    device: str
    mask_kind: str = "binary"
    convention: str = "paper"
    exchange: str = "none"

    @property
    def id(self) -> str:
        """Such as `enc1-256-float32-contiguous-cpu`."""
        return f"{self.name}-{dtype_name(self.dtype)}-{self.layout}-{self.device}"

    @property
    def feature_bytes(self) -> int:
        """The bytes of all layers: what forward has to read, and backward to write."""
        return self.dtype.itemsize * sum(math.prod(shape) for shape in self.layers)

    @property
    def ignore_index(self) -> int | None:
        """The value of the mask's pixels that do not count."""
        return IGNORED if self.mask_kind == "ignore" else None

    @property
    def is_plain(self) -> bool:
        """Whether the kernels are timed alone too: a binary mask, the paper's loss, no step of the series."""
        usual = (self.mask_kind, self.convention, self.exchange) == ("binary", "paper", "none")
        return usual and not self.name.startswith("scaling")

    def shrunk(self) -> Case:
        """The same case with few channels and pixels, for fast checks."""
        layers = tuple(
            (2, max(2, channels // 32), *(max(2, size // 16) for size in spatial))
            for _, channels, *spatial in self.layers
        )
        return replace(self, layers=layers, mask_size=tuple(max(2, size // 16) for size in self.mask_size))


class Inputs(NamedTuple):
    """The tensors of a case.

    Attributes:
        layers: [N, C, *S] of each layer, in the layout of the case, asking for gradients.
        mask: [N, 1, *S0], of the case's kind.
        pairing: the sample pairs of an exchange: [N], or [K, 2] for `"pooled"`.
    """

    layers: list[Tensor]
    mask: Tensor
    pairing: Tensor | None = None


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def named_case(name: str, dtype: torch.dtype, layout: str, device: str) -> Case:
    """The case of that name.

    Raises:
        ValueError: no case has that name.
    """
    stem, _, number = name.rpartition("-")
    size = int(number)
    options: dict[str, Any] = {}
    if stem in models.names():
        layers = tuple(tap_shapes(stem, size, NETWORK_BATCH[size]).values())
    elif stem == "scaling":
        layers = (_shape_of(size, dtype),)
    elif stem in ("volume", "volumes"):
        levels = range(3 if stem == "volumes" else 1)
        layers = tuple((2, 32 * 2**level, *[size // 2**level] * 3) for level in levels)
    else:
        taps = PYRAMIDS.get(stem, (stem,))
        if stem in MASK_KINDS:
            taps, options["mask_kind"] = ("enc1",), stem
        elif stem in EXCHANGES:
            taps, options["exchange"] = PYRAMIDS["deep"], stem
        elif stem == "released":
            taps, options["convention"] = ("enc1",), stem
        shapes = tap_shapes("unet", size, BATCH)
        if set(taps) - shapes.keys():
            raise ValueError(f"name must be that of a case, got {name!r}")
        layers = tuple(shapes[tap] for tap in taps)
    mask_size = (size, size) if len(layers) > 1 and stem != "volumes" else layers[0][2:]
    return Case(name, layers, mask_size, dtype, layout, device, **options)


@functools.cache
def tap_shapes(network: str, side: int, batch: int) -> dict[str, Shape]:
    """The output shape of each tap of a network for images of side², by its name; nothing is computed."""
    with torch.device("meta"):
        model = models.create(network)
        images = torch.empty(batch, 3, side, side)
    with torch.no_grad(), FeatureTaps(model, model.tap_names) as taps:
        model(images)
        return {name: tuple(layer.shape) for name, layer in zip(model.tap_names, taps.features, strict=True)}


def _shape_of(mib: int, dtype: torch.dtype) -> Shape:
    """A map of so many MiB, a power of two: 64 or 128 channels, 4 samples."""
    pixels = mib * 2**20 // dtype.itemsize // (BATCH * 64)
    doubled = pixels.bit_length() % 2 == 0
    side = math.isqrt(pixels // 2 if doubled else pixels)
    return BATCH, 128 if doubled else 64, side, side


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Random features in [0.5, 1.5) and a random mask.

    Under `"released"` features with a mean of one half would cancel to nothing but rounding.
    """
    generator = torch.Generator(case.device).manual_seed(seed)
    layers = []
    for shape in case.layers:
        memory_format = torch.contiguous_format
        if case.layout == "channels_last" and len(shape) > 3:
            memory_format = (torch.channels_last, torch.channels_last_3d)[len(shape) - 4]
        features = torch.empty(shape, dtype=case.dtype, device=case.device, memory_format=memory_format)
        layers.append(features.uniform_(0.5, 1.5, generator=generator).requires_grad_())
    batch = case.layers[0][0]
    noise = torch.rand((batch, 1, *case.mask_size), generator=generator, device=case.device)
    samples = torch.arange(batch, device=case.device)
    pairings = {
        "none": None,
        "shuffle": samples.roll(1),
        # The first half of the batch is one data set, the second the other.
        "pooled": torch.stack([samples[: batch // 2], samples[batch - batch // 2 :]], dim=1),
    }
    return Inputs(layers, _mask(case.mask_kind, noise), pairings[case.exchange])


def _mask(kind: str, noise: Tensor) -> Tensor:
    foreground = noise > 0.6
    if kind == "soft":
        return noise.square()
    if kind == "ignore":
        return foreground.to(torch.uint8).masked_fill(noise < 0.1, IGNORED)
    return foreground.to({"binary": torch.float32}.get(kind) or getattr(torch, kind))


class Kernels(NamedTuple):
    """The kernels of a case alone: region sums [2, N, ΣC], and the gradient of every layer in fresh memory.

    `warm` writes the gradient into given memory; None where the allocator keeps its memory warm anyway.
    """

    forward: Callable[[], Tensor]
    backward: Callable[[], list[Tensor]]
    warm: Callable[[], object] | None


def kernels_of(case: Case, inputs: Inputs, coefficients: Tensor, buffers: Sequence[Tensor]) -> Kernels:
    """The kernels that `backend="auto"` takes for a case.

    With `instruction_set` the one place of this folder that calls what lies under the public interface.

    Args:
        case, inputs: the case.
        coefficients: the gradient of the sums, [2, N, ΣC], which backward spreads over the pixels.
        buffers: what `warm` writes, like the layers.
    """
    from fdkernels.conventions import get_convention
    from fdkernels.op import kernels
    from fdkernels.op.pyramid import describe
    from fdkernels.op.weights import weights_of

    layers = [layer.detach() for layer in inputs.layers]
    pyramid, sizes = describe(layers), [layer.shape[2:] for layer in layers]
    resize = get_convention(case.convention).mask_resize
    weights = weights_of(inputs.mask, sizes, pyramid.dtype, resize, case.ignore_index)
    op = kernels.kernels_of(auto_backend(case.device))
    grad_sums = coefficients.to(pyramid.dtype).contiguous()
    warm: Callable[[], None] | None = None
    if auto_backend(case.device) == "cpu":
        from fdkernels import _C
        from fdkernels.op import packing

        words = packing.gradient_words(buffers, weights, [], pyramid)
        dtype, pointer, threads = packing.DTYPES[pyramid.dtype], grad_sums.data_ptr(), torch.get_num_threads()

        def warm(_alive: object = (weights, grad_sums, buffers)) -> None:  # the words are their addresses
            _C.cpu_gradient(words, case.layers[0][0], dtype, pointer, 0, 0, threads)

    return Kernels(
        forward=lambda: op.sums(layers, weights, pyramid, None, None, False).sums,
        backward=lambda: op.gradient(grad_sums, None, weights, [], pyramid),
        warm=warm,
    )


def instruction_set() -> str | None:
    """The instruction set that the CPU kernels use here, such as `avx2`; None where they were not built."""
    try:
        from fdkernels import _C
    except ImportError:
        return None
    return str(_C.cpu_instruction_set)


def header(arguments: Sequence[str], device: str, quick: bool = False) -> dict[str, Any]:
    """The head of a file of results: machine, commit, time and command."""
    # As somebody else would type it: paths from the checkout, elsewhere the name alone.
    inside = (str(argument).replace(f"{ROOT}/", "") for argument in arguments)
    command = " ".join(re.sub(r"(^|=)/.*/", r"\1", argument) for argument in inside)
    known = {"machine": machine(device), "commit": commit(), "when": _BEGIN}
    return known | {"command": command, "quick": quick}


@functools.cache
def machine(device: str) -> dict[str, Any]:
    """Processor, GPU and versions; `copy_bytes_per_second` counts bytes read and bytes written."""
    built = build_info()
    versions = {"fdkernels": fdkernels.__version__, "python": platform.python_version()}
    versions |= {"torch": torch.__version__, "cuda": torch.version.cuda}
    for package in ("numpy", "triton", "pytest-benchmark"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    record: dict[str, Any] = {
        "cpu_model": _cpu_model(),
        "cpu_cores": os.cpu_count(),
        "cpu_cache_bytes": _cpu_cache_bytes(),
        "instruction_set": instruction_set(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "build": {key: built[key] for key in ("cpp_compiler", "cuda_version", "cuda_archs", "isa")},
    }
    devices = [device] if device != "all" else ["cpu", *(["cuda"] * torch.cuda.is_available())]
    record["copy_bytes_per_second"] = {name: _copy_rate(name) for name in devices}
    if "cuda" in devices:
        properties = torch.cuda.get_device_properties(0)
        record["gpu"] = properties.name
        record["gpu_memory_bytes"] = properties.total_memory
        record["gpu_cache_bytes"] = getattr(properties, "L2_cache_size", None)
    return record


@functools.cache
def commit() -> dict[str, Any]:
    """The commit and whether there are changes beside results.

    FDKERNELS_COMMIT names the commit of a copy of the tree without its history.
    """
    if "FDKERNELS_COMMIT" in os.environ:
        return {"id": os.environ["FDKERNELS_COMMIT"], "dirty": None}
    head = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!benchmarks/README.md")
    return {"id": head, "dirty": None if head is None else bool(changes)}


def folder_name(device: str) -> str:
    """A name for the machine's kind, such as `nvidia-h100-80gb-hbm3` or `amd-epyc`."""
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_model()
    words = re.sub(r"\((r|tm)\)|processor|cpu|@.*|\d+-core", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-") or platform.machine()


def write_results(
    path: Path, head: Mapping[str, Any], entries: Iterable[Mapping[str, Any]], kind: str = "calls"
) -> None:
    """Write a file whole or not at all; an older one stays until then.

    Args:
        path: the file; missing folders are made.
        head: what `header` gives.
        entries: the measurements, one a line.
        kind: `"calls"`, `"classes"`, `"steps"`, `"training"`, `"instructions"` or `"launches"`.
    """
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in {"kind": kind, **head}.items()]
    rows = ",\n".join(json.dumps(entry, allow_nan=False) for entry in entries)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_text("{\n" + ",\n".join([*lines, f'"measurements": [\n{rows}\n]']) + "\n}\n", encoding="utf-8")
    new.replace(path)


def _git(*arguments: str) -> str | None:
    command = ["git", *arguments]
    try:
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _copy_rate(device: str) -> float:
    """Bytes a second that `copy_` moves between buffers beyond every cache, read and written together."""
    source = torch.rand({"cpu": 2**25, "cuda": 2**28}[device], device=device)
    target = torch.rand_like(source)
    seconds = []
    for _ in range(15):
        began = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return float(f"{2 * source.nbytes / statistics.median(seconds):.4g}")


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = (
        re.search(r"^model name\s*: (.*)", info.read_text("utf-8"), re.MULTILINE) if info.is_file() else None
    )
    return found[1].strip() if found else platform.processor() or platform.machine()


def _cpu_cache_bytes() -> int | None:
    """The size of the largest cache, as Linux tells it."""
    texts = [
        path.read_text("ascii").strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("*/size")
    ]
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return max((int(text.rstrip("KMG")) * units.get(text[-1:], 1) for text in texts), default=None)


if __name__ == "__main__":  # the folder of this machine's results
    print(folder_name("cuda" if torch.cuda.is_available() else "cpu"))
