"""Which backend computes: what is available, what "auto" takes, and that a named one is never replaced."""

from __future__ import annotations

import inspect
import sys
from types import SimpleNamespace

import numpy
import pytest
import torch

import fdkernels as fdk
from fdkernels import backend as backend_module
from fdkernels.backend import auto_backend, resolve
from fdkernels.op.kernels import Kernels, kernels_of
from kernel_launches import recorded_calls

CPU = torch.device("cpu")


@pytest.fixture
def unavailable(monkeypatch):
    """`unavailable("cpu")` makes a backend report a reason, until the test ends."""

    def hide(name: str, reason: str = "it was taken away") -> None:
        reasons = {**fdk.backends(), name: reason}
        monkeypatch.setattr(backend_module, "_reasons", reasons)

    return hide


def test_backends_names_all_four_and_the_reference_is_always_there():
    found = fdk.backends()
    assert set(found) == {"cuda", "triton", "cpu", "reference"}
    assert found["reference"] is None
    assert all(reason is None or isinstance(reason, str) for reason in found.values())


def test_backends_hands_out_a_copy():
    fdk.backends()["reference"] = "changed"
    assert fdk.backends()["reference"] is None


FUNCTIONS = [name for name in vars(Kernels) if not name.startswith("_")]


def test_a_backend_is_five_functions_and_three_for_any_number_of_regions():
    of_two = ["masks", "sums", "losses", "gradient", "mask_gradient"]
    of_any = ["region_sums", "region_gradient", "region_weight_gradient"]
    assert of_two + of_any == FUNCTIONS


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_available_backend_has_every_function_with_the_same_parameters(backend, function):
    found = inspect.signature(getattr(kernels_of(backend), function))
    wanted = list(inspect.signature(getattr(Kernels, function)).parameters)[1:]  # without self
    assert list(found.parameters) == wanted


def test_auto_takes_the_cpu_kernels_for_cpu_tensors():
    assert auto_backend("cpu") == ("cpu" if fdk.backends()["cpu"] is None else "reference")
    assert resolve("auto", CPU) == auto_backend("cpu")


def test_auto_falls_back_to_the_reference(unavailable):
    unavailable("cpu")
    assert resolve("auto", CPU) == "reference"
    assert auto_backend("mps") == "reference"


def test_a_triton_without_tuples_is_refused_by_its_version(monkeypatch):
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(triton, "__version__", "3.3.1")
    assert "need Triton 3.4; this is 3.3.1" in backend_module._PROBES["triton"]()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton, "__version__", "3.10.0")
    assert backend_module._PROBES["triton"]() is None


@pytest.mark.parametrize(
    ("triton_version", "numpy_version", "available"),
    [
        ("3.4.0", "2.3.5", True),
        ("3.6.0", "2.4.0", False),
        ("3.6.0", "2.10.1", False),
        ("3.7.1", "2.4.6", True),
    ],
)
def test_an_interpreter_that_the_numpy_here_ends_is_refused_by_their_versions(
    monkeypatch, triton_version, numpy_version, available
):
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=triton_version))
    monkeypatch.setattr(numpy, "__version__", numpy_version)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    reason = backend_module._PROBES["triton"]()
    wanted = f"Triton {triton_version} interprets no loops under numpy {numpy_version}"
    assert reason == (None if available else f"{wanted}; install Triton 3.7 or numpy<2.4")
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # compiled kernels do without numpy
    assert "numpy" not in (backend_module._PROBES["triton"]() or "")


def test_auto_never_takes_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert auto_backend("cpu") != "triton"


def test_a_named_backend_is_never_replaced(unavailable):
    unavailable("cpu", "there is no compiler")
    with pytest.raises(RuntimeError, match="backend='cpu' is not available here: there is no compiler"):
        fdk.region_sums(torch.ones(1, 1, 2), torch.ones(1, 2), backend="cpu")


def test_a_backend_refuses_tensors_of_another_device(monkeypatch):
    monkeypatch.setattr(backend_module, "_reasons", dict.fromkeys(backend_module.BACKENDS))
    with pytest.raises(RuntimeError, match=r"backend='cuda' computes on cuda tensors here, got .* cpu"):
        resolve("cuda", CPU)
    with pytest.raises(RuntimeError, match=r"backend='cpu' computes on cpu tensors here, got .* cuda:1"):
        resolve("cpu", torch.device("cuda", 1))
    assert resolve("reference", torch.device("meta")) == "reference"


def test_use_backend_sets_what_auto_means_until_the_block_ends():
    before = resolve("auto", CPU)
    with fdk.use_backend("reference"):
        assert resolve("auto", CPU) == "reference"
        with fdk.use_backend("auto"):
            assert resolve("auto", CPU) == before
        assert resolve("auto", CPU) == "reference"
    assert resolve("auto", CPU) == before


def test_use_backend_ends_with_an_error_too():
    before = resolve("auto", CPU)
    with pytest.raises(KeyError), fdk.use_backend("reference"):
        raise KeyError
    assert resolve("auto", CPU) == before


def test_one_use_backend_can_be_entered_twice():
    choice = fdk.use_backend("reference")
    before = resolve("auto", CPU)
    with choice, choice:
        pass
    assert resolve("auto", CPU) == before


def test_a_call_that_names_a_backend_goes_before_use_backend(backend, device):
    with fdk.use_backend("reference"):
        assert resolve(backend, device) == backend


def test_backward_of_a_call_uses_the_backend_of_its_forward(backend, device):
    features = torch.randn(2, 3, 4, device=device, requires_grad=True)
    with recorded_calls(backend) as calls:  # in which no other backend can be called
        with fdk.use_backend(backend):
            loss = fdk.feature_discrepancy_loss(features, torch.rand(2, 4, device=device) > 0.5)
        loss.backward()
    assert calls.names == ["sums", "gradient"]  # the mask has the size of the layer


@pytest.mark.parametrize("name", ["gpu", "", "Reference", None])
def test_use_backend_refuses_unknown_names(name):
    with pytest.raises(ValueError, match=r"backend must be one of 'auto', .*got"):
        fdk.use_backend(name)


def test_use_backend_refuses_what_is_not_here(unavailable):
    unavailable("cpu", "there is no compiler")
    with pytest.raises(RuntimeError, match="backend='cpu' is not available here: there is no compiler"):
        fdk.use_backend("cpu")


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("sm_80,compute_80", (8, 0), True),
        ("sm_80", (8, 6), True),  # machine code runs within its generation
        ("sm_80", (9, 0), False),
        ("sm_86", (8, 0), False),
        ("sm_80,compute_80", (12, 0), True),  # PTX is compiled for later GPUs
        ("sm_90,compute_90", (7, 5), False),
        ("sm_90a", (9, 0), True),
        ("sm_90a,compute_90", (10, 0), True),
        ("sm_100,compute_100", (12, 0), True),
        ("sm_120", (10, 0), False),
        ("", (9, 0), False),
    ],
)
def test_code_runs_on_the_gpus_that_it_was_built_for(archs, capability, runs):
    assert backend_module.runs_on(archs, capability) == runs


def test_a_gpu_that_the_kernels_were_not_built_for_is_the_reason(monkeypatch):
    extension = SimpleNamespace(with_cuda=True, cuda_archs="sm_90,compute_90")
    monkeypatch.setattr(backend_module, "_extension_reason", lambda: None)
    monkeypatch.setattr(backend_module.importlib, "import_module", lambda name: extension)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name, value in {
        "is_available": True,
        "device_count": 1,
        "get_device_capability": (7, 5),
        "get_device_name": "Tesla T4",
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *index, value=value: value)
    reason = backend_module._probe_cuda()
    assert reason is not None
    assert "built for sm_90,compute_90, and Tesla T4 is sm_75; install it again here" in reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert backend_module._probe_cuda() is None
