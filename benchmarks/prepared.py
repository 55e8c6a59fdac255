"""A case made ready: its tensors, everyone who computes it, and how far each is from the truth."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, dtype_name, make_inputs
from benchmarks.floors import Floors
from benchmarks.kernels import Kernels
from benchmarks.memory import dispatched_ops, does_not_fit, kernel_launches, peak_bytes
from benchmarks.peers import OP_BOUNDS, bounds, contenders, options
from benchmarks.taps import Tapped
from benchmarks.timing import Functions, Rounds, device_samples, summarize
from benchmarks.truth import Truth, clear_gradients
from fdkernels.backend import auto_backend

# Bound on the region sums that the kernels alone give.
SUMS_BOUND = 1e-6
# The fixture by which a test measures: a mode, and functions by name.
Measure = Callable[[str, Functions], None]


class Prepared:
    """One case, compared with the truth before anything of it is timed.

    Attributes:
        losses: forward of every contender, by name.
        steps: forward and backward of every contender into a fresh gradient.
        floors, kernels: what they are compared with, and the stage alone.
        errors: of loss and gradient of every contender, as `Truth.errors` gives them.
        left_out: why a contender is not there.
    """

    def __init__(self, case: Case, compiled: bool = True) -> None:
        self.case = case
        self.inputs = inputs = make_inputs(case)
        self.truth = Truth(case, inputs)
        self.left_out: dict[str, str] = {}
        reason = compile_reason(case.device) if compiled else "not asked for"
        if reason is not None:
            self.left_out["compiled"] = reason
        self.losses = contenders(case, inputs, compiled=reason is None)
        for name in list(self.losses):
            too_large = does_not_fit(case, name)
            if too_large is not None:
                del self.losses[name]
                self.left_out[name] = too_large
        self.errors = {
            name: dict(zip(("loss", "gradient"), self.truth.errors(loss), strict=True))
            for name, loss in self.losses.items()
        }
        self.steps = {name: self._step(loss) for name, loss in self.losses.items()}
        self.floors = Floors(inputs.layers)

    @functools.cached_property
    def kernels(self) -> Kernels:
        """The stage alone, compared with the truth."""
        kernels = Kernels(self.case, self.inputs, self.truth)
        for name, error in _kernel_errors(kernels, self.truth).items():
            bound = SUMS_BOUND if name == "forward" else OP_BOUNDS[self.case.dtype][1]
            _require(f"kernel {name}", self.case, error, bound)
        return kernels

    @functools.cached_property
    def tapped(self) -> Tapped:
        """`tap` and what it replaces, compared with the truth."""
        tapped = Tapped(self.inputs, self.truth, options(self.case, self.inputs))
        bound = OP_BOUNDS[self.case.dtype][1]
        errors = tapped.errors()
        _require("gradient of tap", self.case, errors["tap"], bound)
        # Rounded as the gradient of the loss, and again as the sum.
        _require("gradient of separate", self.case, errors["separate"], 2 * bound)
        return tapped

    def require_agreement(self) -> None:
        """Raise AssertionError unless every contender gives the numbers of the truth."""
        for name, errors in self.errors.items():
            for (what, error), bound in zip(errors.items(), bounds(self.case, name), strict=True):
                _require(f"{what} of {name}", self.case, error, bound)

    def measure(
        self, benchmark: Any, mode: str, functions: Functions, budget: float
    ) -> dict[str, Any] | None:
        """Time `functions`, the first by pytest-benchmark.

        Args:
            benchmark: the fixture.
            mode: what of the case it is, such as `"forward"`.
            functions: by name, `"floor"` among them; the first is the one of this package. Ratios are those
            of
                the first to the floor and of the others to the first.
            budget: seconds.

        Returns:
            All that is known, as `results.read_results` reads it; None if pytest-benchmark is switched off.
        """
        self.require_agreement()
        case, first = self.case, next(iter(functions))
        pairs = [(name, first) for name in functions if name not in (first, "floor")]
        pairs.append((first, "floor"))
        self._forget()
        benchmark.group = mode
        peaks = {name: self._peak(function) for name, function in functions.items()}
        rounds = Rounds(functions, first, case.device)
        samples = rounds.run(benchmark, budget)
        if not samples:
            return None
        seconds, ratios = summarize(samples, pairs)
        entry: dict[str, Any] = {
            "mode": mode,
            "case": case.name,
            "dtype": dtype_name(case.dtype),
            "layout": case.layout,
            "device": case.device,
            "layers": ["x".join(map(str, shape)) for shape in case.layers],
            "mask": "x".join(map(str, case.mask_size)),
            "mask_kind": case.mask_kind,
            "convention": case.convention,
            "exchange": case.exchange,
            "feature_bytes": case.feature_bytes,
            "backend": auto_backend(case.device),
            "rounds": len(samples[first]),
            "seconds": seconds,
            "ratios": ratios,
            "peak_bytes": peaks,
            "ops": {
                name: dispatched_ops(function)
                for name, function in functions.items()
                if name != "compiled" and name in self.losses
            },
            "errors": {
                name: {what: float(f"{error:.2g}") for what, error in self.errors[name].items()}
                for name in functions
                if name in self.errors
            },
            "left_out": self.left_out,
        }
        if case.device == "cuda":
            medians = {name: times["median"] for name, times in seconds.items()}
            on_device = device_samples(functions, medians, budget)
            entry["device_seconds"], entry["device_ratios"] = summarize(on_device, pairs)
            entry["launches"] = {name: kernel_launches(function) for name, function in functions.items()}
        self._forget()
        return entry

    def _step(self, loss: Callable[[], Tensor]) -> Callable[[], None]:
        def step() -> None:
            clear_gradients(self.inputs.layers)
            loss().backward()

        return step

    def _peak(self, function: Callable[[], object]) -> int:
        peak = peak_bytes(function, self.case.device)
        self._forget()
        return peak

    def _forget(self) -> None:
        clear_gradients(self.inputs.layers)
        if "kernels" in self.__dict__:
            self.kernels.grads = []
        self.floors.release()


def _kernel_errors(kernels: Kernels, truth: Truth) -> dict[str, float]:
    errors = {"forward": truth.sums_error(kernels.forward()[0])}
    kernels.backward()
    errors["backward"] = truth.gradient_error(kernels.grads)
    kernels.grads = []
    if kernels.backend == "cpu":
        kernels.warm()
        errors["backward, warm"] = truth.gradient_error(kernels.buffers)
    return errors


def _require(what: str, case: Case, error: float, bound: float) -> None:
    if not error <= bound:  # NaN is not
        raise AssertionError(
            f"{what} is wrong for {case.id}, so nothing is timed: its error is {error:.2g}, "
            f"at most {bound:.2g} was expected"
        )


@functools.cache
def compile_reason(device: str) -> str | None:
    """Why torch.compile does not work here, or None."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # noqa: BLE001 - a missing compiler or Triton shows in many ways
        return f"torch.compile does not work here: {str(error).splitlines()[0]}"
    return None
