"""Times the loss of several classes and the Fisher convention: `python -m benchmarks.classes --results FILE`.

Beside the op stand K calls of it, one a class; the sums of all classes by one matrix product; those under
torch.compile; and the op's own binary call, whose time is what the form adds to. On a CPU times are CPU time
of one thread, which other work on the machine hardly disturbs; on a GPU those of its kernels.

| case | layers, 4 samples |
| --- | --- |
| `map-128`, `map-256` | 64 channels of 128² and 256² |
| `levels-128` | the five levels of the UNet's encoder for images of 128² |
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fdkernels
from benchmarks import cases, peers
from benchmarks.calls import Functions, Samples, device_samples, summarize
from benchmarks.cases import BATCH, LEVELS, Case
from benchmarks.counts import peak_bytes
from benchmarks.peers import EPS, OP_BOUNDS, Contender, Floors, resize

MODES = ("forward", "forward+backward")
# Seconds of timing for each mode of a form. A GPU's times scatter less, and a lent one is short of time.
BUDGETS = {"cpu": 0.25, "cuda": 0.1}
MIN_ROUNDS, MAX_ROUNDS = 7, 100
CELLS = 8  # the classes are patches, CELLS² of them in the mask


@dataclass(frozen=True)
class Form:
    """What of the loss a call computes.

    Args:
        mode: `"binary"`, `"multiclass"` (the mask holds indices) or `"multilabel"` (planes).
        num_classes: K; 2 for `"binary"`, foreground and background.
        convention: `"paper"` or `"fisher"`.
    """

    mode: str
    num_classes: int
    convention: str = "paper"

    @property
    def name(self) -> str:
        """Such as `multiclass-4` or `fisher-binary`."""
        stem = "fisher" if self.convention == "fisher" else self.mode
        return f"{stem}-{'binary' if self.mode == 'binary' else self.num_classes}"

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `fdkernels.feature_discrepancy_loss`."""
        classes = {} if self.mode == "binary" else {"mode": self.mode, "num_classes": self.num_classes}
        return {"convention": self.convention, "eps": EPS, **classes}


FISHER = (Form("binary", 2, "fisher"), Form("multiclass", 4, "fisher"))
FORMS = (*(Form("multiclass", k) for k in (2, 4, 8)), Form("multilabel", 4), *FISHER)
_CORE_FORMS = (Form("multiclass", 4), *FISHER)
_FLOAT, _BFLOAT = torch.float32, torch.bfloat16
# The most important first: a time limit cuts off the end.
VARIANTS = (
    ("map-128", _FLOAT, "contiguous", FORMS),
    ("map-256", _FLOAT, "contiguous", _CORE_FORMS[::2]),
    ("map-128", _FLOAT, "channels_last", _CORE_FORMS),
    ("levels-128", _FLOAT, "contiguous", _CORE_FORMS),
    ("map-128", _BFLOAT, "channels_last", _CORE_FORMS),
    ("map-256", _FLOAT, "channels_last", _CORE_FORMS[::2]),
)


class ClassInputs(NamedTuple):
    """The tensors of a form and case.

    Attributes:
        layers: [N, C, *S] of each layer, asking for gradients.
        mask: what a data loader gives: [N, 1, *S0] of uint8, [N, *S0] of int64, or [N, K, *S0] of uint8.
        planes: [N, K, *S0], the weight of each class, which the peers get before the clock starts.
    """

    layers: list[Tensor]
    mask: Tensor
    planes: Tensor


def class_case(name: str, dtype: torch.dtype, layout: str, device: str) -> Case:
    """The case of that name."""
    stem, _, number = name.rpartition("-")
    shapes = cases.tap_shapes("unet", int(number), BATCH)
    layers = tuple(shapes[level] for level in LEVELS[: 1 if stem == "map" else None])
    return Case(name, layers, (int(number),) * 2, dtype, layout, device)


def make_class_inputs(case: Case, form: Form, seed: int = 0) -> ClassInputs:
    """Features in [0.5, 1.5) plus what each class adds to each channel: equal means would be all rounding.

    Every sample holds every class, so that K calls of one class count as many entries.
    """
    layers = cases.make_inputs(case, seed).layers
    generator = torch.Generator(case.device).manual_seed(seed)
    draw = functools.partial(torch.rand, generator=generator, device=case.device)
    order = draw(BATCH, form.num_classes if form.mode == "multilabel" else 1, CELLS**2).argsort(-1)
    labels = (order % form.num_classes).unflatten(-1, (CELLS, CELLS))
    labels = torch.nn.functional.interpolate(labels.float(), case.mask_size, mode="nearest").long()
    if form.mode == "multilabel":
        mask = (labels == 0).to(torch.uint8)  # classes of their own patches, which overlap
        planes = mask.float()
    else:
        planes = (labels == torch.arange(form.num_classes, device=case.device)[:, None, None]).float()
        mask = planes[:, :1].to(torch.uint8) if form.mode == "binary" else labels.squeeze(1)
    with torch.no_grad():
        for layer in layers:
            added = draw(form.num_classes, layer.shape[1]) / 2
            layer.add_(torch.einsum("kc,nkhw->nchw", added, resize(planes, layer.shape[2:])))
    return ClassInputs(layers, mask, planes)


def contenders(case: Case, form: Form, inputs: ClassInputs, compiled: bool) -> dict[str, Contender]:
    """Everyone who computes the loss of a form, by name, and `binary`, the op's call of one class."""
    layers, mask, planes = inputs
    features = layers[0] if len(layers) == 1 else layers
    loss = functools.partial(fdkernels.feature_discrepancy_loss, features, eps=EPS)
    first = planes[:, :1].to(torch.uint8)
    named: dict[str, Contender] = {
        "op": lambda: fdkernels.feature_discrepancy_loss(features, mask, **form.options),
        "binary": lambda: loss(first),
        "einsum": lambda: plain(layers, planes, form, by_einsum),
    }
    if form.mode != "binary":

        def single_calls() -> Tensor:
            kinds = mask.unbind(1) if form.mode == "multilabel" else map(mask.eq, range(form.num_classes))
            return torch.stack([loss(kind, convention=form.convention) for kind in kinds]).mean()

        named["single calls"] = single_calls
    if compiled:
        torch.compiler.reset()
        function = torch.compile(plain, fullgraph=True, dynamic=False)
        named["compiled"] = lambda: function(layers, planes, form, one_by_one)
    return named


def by_einsum(weights: Tensor, features: Tensor) -> Tensor:
    """Sums [N, R, C] of features [N, C, *S] under weights [N, R, *S], by one matrix product."""
    return torch.einsum("nrp,ncp->nrc", weights.flatten(2), features.flatten(2))


def one_by_one(weights: Tensor, features: Tensor) -> Tensor:
    """The same by a masked copy for each region, which torch.compile makes one read of the features."""
    sums = [(features * weight.unsqueeze(1)).flatten(2).sum(-1) for weight in weights.unbind(1)]
    return torch.stack(sums, dim=1)


def plain(
    layers: Sequence[Tensor], planes: Tensor, form: Form, sums_of: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The loss the way anyone would write it, in float32, which half precision needs, or in float64."""
    losses = []
    for layer in layers:
        features = layer.to(planes.dtype)
        weights = resize(planes, layer.shape[2:])  # [N, K, *S]
        if form.mode == "multilabel":
            weights = torch.cat([weights, 1 - weights], dim=1)
        S, M = sums_of(weights, features), weights.flatten(2).sum(-1, keepdim=True)  # [N, R, C], [N, R, 1]
        fg, bg = _sides(S, form)
        fg_mass, bg_mass = _sides(M, form)
        if form.convention == "paper":
            distance = ((fg - bg) / (fg_mass + bg_mass)).square().sum(-1)  # [N, E]
            losses.append(-distance.add(EPS).log().mean())
            continue
        fg_square, bg_square = _sides(sums_of(weights, features.square()), form)
        f, b = fg / fg_mass, bg / bg_mass
        variances = fg_square / fg_mass - f.square() + bg_square / bg_mass - b.square()
        distance = (f - b).square().sum(-1) / (variances.sum(-1) + EPS)
        losses.append(-0.5 * distance.add(EPS).log().mean())
    return torch.stack(losses).mean()


def _sides(sums: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Each class and its rest, [N, E, …], of sums [N, R, …]."""
    if form.mode == "multilabel":
        classes, rest = sums.chunk(2, dim=1)
        return classes, rest
    rest = sums.sum(1, keepdim=True) - sums
    return (sums[:, :1], rest[:, :1]) if form.mode == "binary" else (sums, rest)


def errors(inputs: ClassInputs, form: Form, named: dict[str, Contender]) -> dict[str, dict[str, float]]:
    """|loss - truth| / max(1, |truth|) and ‖gradient - truth‖ / ‖truth‖ of everyone; truth is float64."""
    # With the channels innermost the product is several times as fast.
    options = {"dtype": torch.float64, "memory_format": torch.channels_last}
    wide = [layer.detach().to(**options).requires_grad_() for layer in inputs.layers]
    truth = plain(wide, inputs.planes.double(), form, by_einsum)
    expected = torch.autograd.grad(truth, wide)
    found = {}
    for name, contender in named.items():
        if name == "binary":
            continue
        peers.clear_gradients(inputs.layers)
        loss = contender()
        loss.backward()
        worst = max(
            float((layer.grad - grad).norm() / grad.norm())
            for layer, grad in zip(inputs.layers, expected, strict=True)
        )
        found[name] = {
            "loss": abs(loss.item() - truth.item()) / max(1.0, abs(truth.item())),
            "gradient": worst,
        }
    peers.clear_gradients(inputs.layers)
    return found


def measure(case: Case, form: Form, compiled: bool, budget: float) -> Iterator[dict[str, Any]]:
    """The entries of a form, a mode each.

    Raises:
        AssertionError: someone's loss or gradient is wrong; then nothing of the form is timed.
    """
    inputs = make_class_inputs(case, form)
    named, floors = contenders(case, form, inputs, compiled), Floors(inputs.layers)
    found = errors(inputs, form, named)
    for name, error in found.items():
        for (what, value), bound in zip(error.items(), OP_BOUNDS[case.dtype], strict=True):
            # A difference of float32 sums of a map keeps fewer digits in the peers.
            if not value <= bound * (1 if name in ("op", "single calls") else 10):
                raise AssertionError(f"{what} of {name} is wrong for {form.name}, {case.id}: {value:.2g}")

    def step(loss: Contender) -> None:
        peers.clear_gradients(inputs.layers)
        loss().backward()

    steps = {name: functools.partial(step, loss) for name, loss in named.items()}
    functions: dict[str, Functions] = {
        "forward": {**named, "floor": floors.forward},
        "forward+backward": {**steps, "floor": floors.forward_backward},
    }
    for mode, of_mode in functions.items():
        peaks = {}
        for name, function in of_mode.items():
            peers.clear_gradients(inputs.layers)
            peaks[name] = peak_bytes(function, case.device)
        samples = cpu_samples(of_mode, budget)
        if case.device == "cuda":
            medians = {name: sorted(values)[len(values) // 2] for name, values in samples.items()}
            samples = device_samples(of_mode, medians, budget)
        pairs = [(name, "op") for name in of_mode if name not in ("op", "floor")] + [("op", "floor")]
        seconds, ratios = summarize(samples, pairs)
        peers.clear_gradients(inputs.layers)
        yield {
            "mode": mode,
            "form": form.name,
            "case": case.name,
            "dtype": cases.dtype_name(case.dtype),
            "layout": case.layout,
            "device": case.device,
            "layers": ["x".join(map(str, shape)) for shape in case.layers],
            "feature_bytes": case.feature_bytes,
            "backend": cases.auto_backend(case.device),
            "rounds": len(samples["op"]),
            "seconds": seconds,
            "ratios": ratios,
            "peak_bytes": peaks,
            "errors": found,
        }


def cpu_samples(functions: Functions, budget: float) -> Samples:
    """CPU seconds of calls, in rounds that each begin with the next function, each called once untimed."""

    def seconds_of(name: str) -> float:
        start = time.process_time()
        functions[name]()
        return time.process_time() - start

    once = sum(min(seconds_of(name), seconds_of(name)) for name in functions)
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(budget / (2 * once))))
    samples: Samples = {name: [] for name in functions}
    order = list(functions)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            order.append(order.pop(0))
            for name in order:
                functions[name]()
                samples[name].append(seconds_of(name))
    finally:
        gc.enable()
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    parser.add_argument("--results", type=Path, metavar="FILE", help="the JSON, written after each form")
    parser.add_argument(
        "--time-limit", type=float, default=130, metavar="SECONDS", help="start no form after it"
    )
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="of timing for each mode of a form")
    arguments = parser.parse_args()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    head = cases.header(["python", "-m", "benchmarks.classes", *sys.argv[1:]], device)
    head |= {
        "clock": "kernels" if device == "cuda" else "CPU time of one thread",
        "load": [os.getloadavg()[0]],
    }
    # torch.compile takes seconds for each form, so it is one of the contenders in one case.
    compiles = peers.compile_reason(device) is None
    began, entries = time.monotonic(), []
    for name, dtype, layout, forms in VARIANTS:
        case = class_case(name, dtype, layout, device)
        for form in forms:
            if time.monotonic() - began > arguments.time_limit:
                print(f"{form.name}, {case.id}: left out, the time limit has passed")
                continue
            compiled = compiles and (name, layout) == ("map-128", "contiguous") and form in _CORE_FORMS
            for entry in measure(case, form, compiled, arguments.budget or BUDGETS[device]):
                entries.append(entry)
                shown = ", ".join(f"{pair} {ratio['median']:.3g}" for pair, ratio in entry["ratios"].items())
                print(f"{form.name}, {case.id}, {entry['mode']}: {shown}", flush=True)
            if arguments.results is not None:
                head["load"] = [head["load"][0], os.getloadavg()[0]]
                cases.write_results(arguments.results, head, entries, "classes")


if __name__ == "__main__":
    main()
