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
from benchmarks.memory import kernel_launches, peak_bytes
from benchmarks.peers import OP_BOUNDS, PEER_BOUNDS, contenders, is_op
from benchmarks.timing import Functions, Rounds, device_samples, summarize
from benchmarks.truth import Truth, clear_gradients

# Bound on the region sums that the kernels alone give.
SUMS_BOUND = 1e-6


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
        truth = Truth(inputs)
        self.left_out: dict[str, str] = {}
        reason = compile_reason(case.device) if compiled else "not asked for"
        if reason is not None:
            self.left_out["compiled"] = reason
        self.losses = contenders(case, inputs, compiled=reason is None)
        self.errors = {
            name: dict(zip(("loss", "gradient"), truth.errors(loss), strict=True))
            for name, loss in self.losses.items()
        }
        self.steps = {name: self._step(loss) for name, loss in self.losses.items()}
        self.floors = Floors(inputs.layers)
        self.kernels = Kernels(inputs, truth)
        self.kernel_errors = _kernel_errors(self.kernels, truth)
        self.backend = self.kernels.backend

    def require_agreement(self) -> None:
        """Raise AssertionError unless every contender and kernel gives the numbers of the truth."""
        for name, errors in self.errors.items():
            bounds = (OP_BOUNDS if is_op(name) else PEER_BOUNDS)[self.case.dtype]
            for (what, error), bound in zip(errors.items(), bounds, strict=True):
                _require(f"{what} of {name}", self.case, error, bound)
        for name, error in self.kernel_errors.items():
            bound = SUMS_BOUND if name == "forward" else OP_BOUNDS[self.case.dtype][1]
            _require(f"kernel {name}", self.case, error, bound)

    def measure(
        self,
        benchmark: Any,
        mode: str,
        functions: Functions,
        budget: float,
    ) -> None:
        """Time `functions`, the first by pytest-benchmark, and write all that is known into `extra_info`.

        Args:
            benchmark: the fixture. mode: what of the case it is, such as `"forward"`. functions: by name,
            `"floor"` among them; the first is the one of this package. Ratios are those of
                the first to the floor and of the others to the first.
            budget: seconds.
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
            return
        seconds, ratios = summarize(samples, pairs)
        benchmark.extra_info.update(
            mode=mode,
            case=case.name,
            dtype=dtype_name(case.dtype),
            layout=case.layout,
            device=case.device,
            layers=["x".join(map(str, shape)) for shape in case.layers],
            mask="x".join(map(str, case.mask_size)),
            feature_bytes=case.feature_bytes,
            backend=self.backend,
            rounds=len(samples[first]),
            seconds=seconds,
            ratios=ratios,
            peak_bytes=peaks,
            errors={
                name: {what: float(f"{error:.2g}") for what, error in self.errors[name].items()}
                for name in functions
                if name in self.errors
            },
            left_out=self.left_out,
        )
        if case.device == "cuda":
            medians = {name: times["median"] for name, times in seconds.items()}
            on_device = device_samples(functions, medians, budget)
            device_seconds, device_ratios = summarize(on_device, pairs)
            launches = {name: kernel_launches(function) for name, function in functions.items()}
            benchmark.extra_info.update(
                device_seconds=device_seconds, device_ratios=device_ratios, launches=launches
            )
        self._forget()

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


def too_little_memory(case: Case) -> str | None:
    """Why a case does not fit onto the GPU, or None. Eager PyTorch needs several times the features."""
    if case.device != "cuda":
        return None
    free, needed = torch.cuda.mem_get_info()[0], 8 * case.feature_bytes
    if free >= needed:
        return None
    return f"{needed / 2**30:.1f} GiB are needed, {free / 2**30:.1f} GiB are free"
