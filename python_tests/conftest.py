"""What all tests share: a seed, a device, the backends that can run here, memory that is not zero by luck."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch

import fdkernels as fdk

BACKENDS = ("reference", "cpu", "triton", "cuda")

# How fast examples are drawn is the machine's affair, and that of what runs beside the tests.
_SPEED = [hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile("local", deadline=None, max_examples=25, suppress_health_check=_SPEED)
hypothesis.settings.register_profile("ci", hypothesis.settings.get_profile("local"), derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI", "false") != "false" else "local")


class _TorchRandom:
    """Torch's random numbers as hypothesis takes them, so that an example that failed fails again."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_TORCH_RANDOM = _TorchRandom()  # hypothesis keeps no reference of its own
hypothesis.register_random(_TORCH_RANDOM)


def pytest_report_header() -> list[str]:
    states = (
        f"{name}: {'available' if reason is None else reason}" for name, reason in fdk.backends().items()
    )
    versions = f"torch {torch.__version__}, python {platform.python_version()}"
    return [f"fdkernels {fdk.__version__} from {fdk.__file__} ({versions})", *states]


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn; what is not available here is skipped with the reason."""
    reason = fdk.backends()[request.param]
    if reason is not None:
        pytest.skip(f"backend {request.param!r}: {reason}")
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def interpreted(backend: str) -> bool:
    """Whether NumPy stands in for the device, slowly."""
    return backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="session")
def ulps(interpreted: bool) -> float:
    """By how many units in the last place a right result may be off: the interpreter cuts off to bfloat16."""
    return 1.01 if interpreted else 0.51


@pytest.fixture(scope="session")
def device(backend: str, interpreted: bool) -> torch.device:
    """Where the backend computes: on a GPU if there is one, but for CPU kernels and interpreted Triton."""
    on_gpu = torch.cuda.is_available() and backend != "cpu" and not interpreted
    return torch.device("cuda" if on_gpu else "cpu")


@pytest.fixture(scope="session")
def for_all(interpreted: bool) -> Callable[..., None]:
    """`for_all(strategy)(check)`: check examples, fewer and unshrunk where kernels are interpreted."""

    def run(*strategies: Any, **settings: Any) -> Callable[[Callable[..., None]], None]:
        if interpreted:
            examples = settings.get("max_examples", hypothesis.settings().max_examples)
            phases = [phase for phase in hypothesis.Phase if phase.name in ("reuse", "generate")]
            settings |= {"max_examples": min(examples, 8), "phases": phases}

        def decide(check: Callable[..., None]) -> None:
            hypothesis.settings(**settings)(hypothesis.given(*strategies)(check))()

        return decide

    return run


@pytest.fixture
def nan_filled() -> Iterator[None]:
    """Fill what torch allocates without writing it with NaN, so that what a kernel leaves out is seen."""
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    was_filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch's poolings have none on a GPU
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(was_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = was_filling
