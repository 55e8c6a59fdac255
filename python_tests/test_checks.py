"""Bad input is rejected with a sentence that names the argument, the expected and the given value."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import fdkernels as fdk
from fdkernels import checks


class Bad(NamedTuple):
    """A call that must be rejected: the arguments that are wrong, the exception and its message."""

    id: str
    wrong: dict[str, Any]
    error: type[Exception]
    message: str


def features(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def mask(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


WITH_NAN = mask(2, 4, 4)
WITH_NAN[0, 0, 0] = float("nan")
SHUFFLE, POOLED = {"exchange": "shuffle"}, {"exchange": "pooled"}

FEATURES = [
    Bad("rank 2", {"features": features(2, 3)}, ValueError,
        r"features must have shape \[N, C, \*S\] with 1 to 3 spatial dimensions, got \[2, 3\]"),
    Bad("rank 6", {"features": features(2, 3, 1, 1, 1, 1)}, ValueError,
        r"features must have shape .*, got \[2, 3, 1, 1, 1, 1\]"),
    Bad("no rows", {"features": features(2, 3, 0, 4)}, ValueError,
        r"^features must have at least one channel and one pixel, got shape \[2, 3, 0, 4\]$"),
    Bad("no columns in a layer", {"features": [features(2, 3, 4, 4), features(2, 3, 4, 0)]}, ValueError,
        r"^features\[1\] must have at least one channel and one pixel, got shape \[2, 3, 4, 0\]$"),
    Bad("no channels", {"features": features(2, 0, 4, 4)}, ValueError,
        r"^features must have at least one channel and one pixel, got shape \[2, 0, 4, 4\]$"),
    Bad("integers", {"features": features(2, 3, 4, 4, dtype=torch.int32)}, TypeError,
        r"features must be float32, float64, bfloat16 or float16, got int32"),
    Bad("complex", {"features": features(2, 3, 4, 4, dtype=torch.complex64)}, TypeError,
        r"features must be float32.*, got complex64"),
    Bad("bool", {"features": features(2, 3, 4, 4, dtype=torch.bool)}, TypeError,
        r"features must be float32.*, got bool"),
    Bad("numpy", {"features": np.ones((2, 3, 4, 4))}, TypeError,
        r"features must be a tensor or a sequence of tensors.*, got ndarray"),
    Bad("none", {"features": None}, TypeError, r"features must be a tensor or .*, got NoneType"),
    Bad("dict", {"features": {"enc1": features(2, 3, 4, 4)}}, TypeError, r"features must .*, got dict"),
    Bad("generator", {"features": (f for f in [features(2, 3, 4, 4)])}, TypeError,
        r"features must .*, got generator"),
    Bad("sparse", {"features": features(2, 3, 4, 4).to_sparse()}, TypeError,
        r"features must be a dense tensor, got layout torch.sparse_coo"),
    Bad("empty list", {"features": []}, ValueError,
        r"features must contain at least one layer, got an empty sequence"),
    Bad("a layer that is no tensor", {"features": [features(2, 3, 4, 4), 1.0]}, TypeError,
        r"features\[1\] must be a tensor, got float"),
    Bad("a layer of integers", {"features": [features(2, 3, 4, 4), mask(2, 3, 4, 4, dtype=torch.int64)]},
        TypeError, r"features\[1\] must be float32.*, got int64"),
    Bad("layers of other ranks", {"features": [features(2, 3, 4, 4), features(2, 3, 4)]}, ValueError,
        r"features must have the same number of dimensions, got 4 in features\[0\] and 3 in features\[1\]"),
    Bad("layers of other batches", {"features": [features(2, 3, 4, 4), features(3, 3, 4, 4)]}, ValueError,
        r"features must have the same batch size, got 2 in features\[0\] and 3 in features\[1\]"),
    Bad("layers on other devices",
        {"features": [features(2, 3, 4, 4), features(2, 3, 4, 4).to("meta")]}, ValueError,
        r"features must be on one device, got cpu for features\[0\] and meta for features\[1\]"),
]  # fmt: skip

MASKS = [
    Bad("another batch", {"mask": mask(3, 4, 4)}, ValueError,
        r"mask must have the batch size of the features, 2, got 3 in \[3, 1, 4, 4\]|got 3 in \[3, 4, 4\]"),
    Bad("rank too low", {"mask": mask(4, 4)}, ValueError,
        r"mask must have shape \[N, 1, \*S\] or \[N, \*S\] with 2 spatial.*got \[4, 4\]"),
    Bad("rank too high", {"mask": mask(2, 1, 4, 4, 4)}, ValueError,
        r"mask must have shape .*got \[2, 1, 4, 4, 4\]"),
    Bad("three channels", {"mask": mask(2, 3, 4, 4)}, ValueError,
        r"mask must have 1 channel, \[N, 1, \*S\], got 3 channels"),
    Bad("no pixel", {"mask": mask(2, 0, 4)}, ValueError, r"mask must have at least one pixel, got .*0, 4\]"),
    Bad("another device", {"mask": mask(2, 4, 4).to("meta")}, ValueError,
        r"mask must be on the device of the features, cpu, got meta"),
    Bad("numpy", {"mask": np.zeros((2, 4, 4))}, TypeError, r"mask must be a tensor, got ndarray"),
    Bad("none", {"mask": None}, TypeError, r"mask must be a tensor, got NoneType"),
    Bad("complex", {"mask": mask(2, 4, 4, dtype=torch.complex64)}, TypeError,
        r"mask must be bool, integer or floating point, got complex64"),
    Bad("1.01", {"mask": mask(2, 4, 4) + 1.01}, ValueError,
        r"mask must have values in \[0, 1\], got .* 1.009"),
    Bad("-0.01", {"mask": mask(2, 4, 4) - 0.01}, ValueError,
        r"mask must have values in \[0, 1\], got .* -0.009"),
    Bad("1.01 in half precision", {"mask": mask(2, 4, 4, dtype=torch.float16) + 1.01}, ValueError,
        r"mask must have values in \[0, 1\], got values from 1.00"),
    Bad("two roundings above 1", {"mask": mask(2, 4, 4, dtype=torch.bfloat16) + 1.015625}, ValueError,
        r"mask must have values in \[0, 1\], got values from 1.015625"),
    Bad("above 1", {"mask": mask(2, 4, 4) + 1.5}, ValueError,
        r"mask must have values in \[0, 1\], got values from 1.5 to 1.5"),
    Bad("below 0", {"mask": mask(2, 4, 4) - 0.5}, ValueError,
        r"mask must have values in \[0, 1\], got values from -0.5 to -0.5"),
    Bad("0/255 bytes", {"mask": mask(2, 4, 4, dtype=torch.uint8) + 255}, ValueError,
        r"mask must have the values 0 and 1, got values from 255 to 255; divide a 0/255 mask by 255"),
    Bad("0/255 floats", {"mask": mask(2, 4, 4) + 255}, ValueError, r"mask must .*divide a 0/255 mask by 255"),
    Bad("class numbers", {"mask": mask(2, 4, 4, dtype=torch.int64) + 3}, ValueError,
        r"mask must have the values 0 and 1, got values from 3 to 3"),
    Bad("NaN", {"mask": WITH_NAN}, ValueError, r"mask must have values in \[0, 1\], got NaN"),
    Bad("infinite", {"mask": mask(2, 4, 4) + float("inf")}, ValueError, r"mask must .* got values from inf"),
    Bad("values beside ignore_index", {"mask": mask(2, 4, 4, dtype=torch.int64) + 7, "ignore_index": 255},
        ValueError, r"mask must have the values 0 and 1 beside ignore_index=255, got values from 7"),
    Bad("an ignore_index that wraps", {"mask": mask(2, 4, 4, dtype=torch.uint8), "ignore_index": -1},
        ValueError, r"ignore_index must be representable in the mask's dtype, 0 to 255 for uint8, got -1"),
    Bad("an ignore_index between integers",
        {"mask": mask(2, 4, 4, dtype=torch.uint8), "ignore_index": 0.5}, ValueError,
        r"ignore_index must be representable in the mask's dtype.*got 0.5"),
    Bad("an infinite ignore_index",
        {"mask": mask(2, 4, 4, dtype=torch.uint8), "ignore_index": float("inf")}, ValueError,
        r"ignore_index must be .*got inf"),
    Bad("a NaN ignore_index",
        {"mask": mask(2, 4, 4, dtype=torch.uint8), "ignore_index": float("nan")}, ValueError,
        r"ignore_index must be .*got nan"),
    Bad("an ignore_index that is no number", {"ignore_index": "255"}, TypeError,
        r"ignore_index must be a number or None, got str"),
]  # fmt: skip

NAMES = [
    Bad("convention", {"convention": "papers"}, ValueError,
        r"convention must be one of 'paper', .*got 'papers'"),
    Bad("convention of another type", {"convention": 3}, TypeError,
        r"convention must be a name or a fdkernels.Convention, got int"),
    Bad("exchange", {"exchange": "swap"}, ValueError,
        r"exchange must be one of 'none', 'shuffle', 'pooled', got 'swap'"),
    Bad("no exchange", {"exchange": None}, ValueError, r"exchange must be one of .*got None"),
    Bad("reduction", {"reduction": "max"}, ValueError, r"reduction must be one of .*got 'max'"),
    Bad("mask_resize", {"mask_resize": "bilinear"}, ValueError,
        r"mask_resize must be one of 'area', 'max', 'nearest', got 'bilinear'"),
    Bad("backend", {"backend": "cublas"}, ValueError, r"backend must be one of 'auto', .*got 'cublas'"),
    Bad("a name in a list", {"reduction": ["mean"]}, ValueError, r"reduction must be one of .*\['mean'\]"),
    Bad("negative eps", {"eps": -1e-6}, ValueError, r"eps must be at least 0, got -1e-06"),
    Bad("NaN eps", {"eps": float("nan")}, ValueError, r"eps must be at least 0, got nan"),
    Bad("eps that is no number", {"eps": "1e-6"}, TypeError, r"eps must be a number, got str"),
]  # fmt: skip

WEIGHTS = [
    Bad("too many", {"layer_weights": torch.ones(3)}, ValueError,
        r"layer_weights must have shape \[1\], one weight for each layer, got \[3\]"),
    Bad("a list too short", {"features": [features(2, 3, 4, 4)] * 2, "layer_weights": [1.0]}, ValueError,
        r"layer_weights must have shape \[2\], .*got \[1\]"),
    Bad("a matrix", {"layer_weights": torch.ones(1, 1)}, ValueError, r"layer_weights must .*got \[1, 1\]"),
    Bad("a number", {"layer_weights": 0.5}, TypeError, r"layer_weights must be a tensor \[L\].*got float"),
    Bad("integers", {"layer_weights": torch.ones(1, dtype=torch.int64)}, TypeError,
        r"layer_weights must be floating point, got int64"),
    Bad("a list of parameters, whose gradient a copy would lose",
        {"layer_weights": [torch.nn.Parameter(torch.ones(()))]}, TypeError,
        r"layer_weights must be a tensor \[L\] or a list of numbers, got .*Parameter"),
    Bad("names", {"layer_weights": ["enc1"]}, TypeError,
        r"layer_weights must be a tensor \[L\] or a list of numbers, got .*str"),
    Bad("another device", {"layer_weights": torch.ones(1, device="meta")}, ValueError,
        r"layer_weights must be on the device of the features, cpu, got meta"),
]  # fmt: skip

EXCHANGES = [
    Bad("one sample", {"features": features(1, 3, 4, 4), "mask": mask(1, 4, 4), **SHUFFLE}, ValueError,
        r"exchange='shuffle' pairs samples, so the batch must have at least 2, got 1"),
    Bad("one sample, pooled",
        {"features": features(1, 3, 4, 4), "mask": mask(1, 4, 4), **POOLED, "domains": [1]}, ValueError,
        r"exchange='pooled' pairs samples, so the batch must have at least 2, got 1"),
    Bad("partner out of range", {**SHUFFLE, "pairing": torch.tensor([0, 2])}, ValueError,
        r"pairing must contain sample indices from 0 to 1, got values from 0 to 2"),
    Bad("negative partner", {**SHUFFLE, "pairing": [0, -1]}, ValueError,
        r"pairing must contain sample indices from 0 to 1, got values from -1 to 0"),
    Bad("too few partners", {**SHUFFLE, "pairing": torch.tensor([0])}, ValueError,
        r"pairing must have shape \[2\], one partner for each sample, got \[1\]"),
    Bad("pairs for a shuffle", {**SHUFFLE, "pairing": torch.tensor([[0, 1]])}, ValueError,
        r"pairing must have shape \[2\], .*got \[1, 2\]"),
    Bad("pair out of range", {**POOLED, "pairing": torch.tensor([[0, 5]])}, ValueError,
        r"pairing must contain sample indices from 0 to 1, got values from 0 to 5"),
    Bad("partners for pooled", {**POOLED, "pairing": torch.tensor([1, 0])}, ValueError,
        r"pairing must have shape \[K, 2\], .*got \[2\]"),
    Bad("triples", {**POOLED, "pairing": torch.zeros(2, 3, dtype=torch.int64)}, ValueError,
        r"pairing must have shape \[K, 2\], .*got \[2, 3\]"),
    Bad("no pairs", {**POOLED, "pairing": torch.zeros(0, 2, dtype=torch.int64)}, ValueError,
        r"pairing must have shape \[K, 2\], .*got \[0, 2\]"),
    Bad("partners between samples", {**SHUFFLE, "pairing": torch.tensor([0.0, 1.0])}, TypeError,
        r"pairing must contain integers, got float32"),
    Bad("a list of partners between samples", {**SHUFFLE, "pairing": [0.7, 1.2]}, TypeError,
        r"pairing must contain integers, got float"),
    Bad("a seed for a generator", {**SHUFFLE, "generator": 0}, TypeError,
        r"generator must be a torch.Generator or None, got int"),
    Bad("a numpy pairing", {**SHUFFLE, "pairing": np.array([1, 0])}, TypeError,
        r"pairing must be a tensor or a list of sample indices, got ndarray"),
    Bad("pairs within a domain", {**POOLED, "pairing": [[0, 0]], "domains": [0, 1]}, ValueError,
        r"pairing must join samples of different domains"),
    Bad("no domains", POOLED, ValueError, r"domains must be given for exchange='pooled'.*got None"),
    Bad("one domain", {**POOLED, "domains": torch.tensor([0, 0])}, ValueError,
        r"domains must include base and novel samples .*got only base samples \(0\)"),
    Bad("the other domain", {**POOLED, "domains": torch.tensor([1, 1])}, ValueError,
        r"domains must include base and novel samples .*got only novel samples \(1\)"),
    Bad("three domains", {**POOLED, "domains": torch.tensor([0, 2])}, ValueError,
        r"domains must contain only 0 \(base\) and 1 \(novel\), got the values \[0, 2\]"),
    Bad("too many domains", {**POOLED, "domains": torch.tensor([0, 1, 1])}, ValueError,
        r"domains must have shape \[2\], one entry for each sample, got \[3\]"),
    Bad("float domains", {**POOLED, "domains": torch.tensor([0.0, 1.0])}, TypeError,
        r"domains must be bool or integer, got float32"),
    Bad("a name", {**POOLED, "domains": "novel"}, TypeError, r"domains must be a tensor or a list, got str"),
]  # fmt: skip

ALL = {"features": FEATURES, "mask": MASKS, "name": NAMES, "weights": WEIGHTS, "exchange": EXCHANGES}
CASES = [pytest.param(bad, id=f"{group}: {bad.id}") for group, cases in ALL.items() for bad in cases]


def arguments(wrong: dict[str, Any]) -> dict[str, Any]:
    return {"features": features(2, 3, 4, 4), "mask": mask(2, 4, 4), **wrong}


@pytest.mark.parametrize("bad", CASES)
@pytest.mark.parametrize("function", ["feature_discrepancy_loss", "tap"])
def test_bad_arguments_raise_an_error_that_names_them(function, bad):
    with pytest.raises(bad.error, match=bad.message):
        getattr(fdk, function)(**arguments(bad.wrong))


@pytest.mark.parametrize("bad", [param for param in CASES if param.id.startswith(("features", "mask"))])
def test_region_sums_raises_the_same_errors(bad):
    with pytest.raises(bad.error, match=bad.message):
        fdk.region_sums(**arguments(bad.wrong))


@pytest.mark.parametrize(
    "wrong", [{"mask_resize": "sum"}, {"backend": "gpu"}], ids=["mask_resize", "backend"]
)
def test_region_sums_rejects_unknown_names(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=rf"{name} must be one of .*got '{wrong[name]}'"):
        fdk.region_sums(**arguments(wrong))


@pytest.mark.parametrize("name", ["reference", "cpu", "triton", "cuda"])
def test_an_unavailable_backend_is_rejected_with_its_reason(name):
    reason = fdk.backends()[name]
    if reason is None:
        pytest.skip(f"backend {name!r} is available")
    with pytest.raises(RuntimeError, match=f"backend='{name}' is not available here: {re.escape(reason)}"):
        fdk.feature_discrepancy_loss(**arguments({"backend": name}))


def test_messages_contain_no_tensors():
    with pytest.raises(ValueError, match="mask") as caught:
        fdk.feature_discrepancy_loss(features(2, 3, 64, 64), mask(2, 64, 64) + 2)
    assert len(str(caught.value)) < 200


# What resizing, blurring and sums of softmax make of 1, and the last values taken of each dtype.
HAIRS = [
    (torch.float32, 1 + 1e-6),
    (torch.float32, -1e-6),
    (torch.float32, 1 + 9.9e-6),
    (torch.float64, 1 + 9.9e-6),
    (torch.float16, 1 + 2**-10),
    (torch.float16, -(2**-10)),
    (torch.bfloat16, -(2**-9)),
]


@pytest.mark.parametrize(("dtype", "value"), HAIRS, ids=str)
@pytest.mark.parametrize("ignore_index", [None, 255])
def test_soft_masks_that_rounding_put_a_hair_outside_are_taken(dtype, value, ignore_index):
    F, hair = torch.randn(2, 3, 4, 4), torch.full((2, 4, 4), value, dtype=dtype)
    hair[0, 0] = 0.5
    loss = fdk.feature_discrepancy_loss(F, hair, ignore_index=ignore_index)
    assert loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [1 + 2e-5, -2e-5])
def test_what_is_farther_outside_than_the_tolerance_is_refused(dtype, value):
    with pytest.raises(ValueError, match=r"mask must have values in \[0, 1\]"):
        fdk.feature_discrepancy_loss(features(2, 3, 4, 4), torch.full((2, 4, 4), value, dtype=dtype))


def test_a_network_that_needs_no_gradient_is_said_by_layer():
    trained, detached = features(2, 3, 4, 4).requires_grad_(), features(2, 3, 2, 2)
    with pytest.warns(UserWarning, match=r"^features\[1\] does not require a gradient, so its loss cannot"):
        assert checks.warn_if_detached([trained, detached])
    with pytest.warns(
        UserWarning, match=r"^features\[0\], features\[1\] do not .* were they detached, or made "
    ):
        assert checks.warn_if_detached([detached, detached])


def test_nothing_is_said_of_features_that_train_or_are_not_meant_to():
    assert not checks.warn_if_detached([features(2, 3, 4, 4).requires_grad_()])
    with torch.no_grad():
        assert not checks.warn_if_detached([features(2, 3, 4, 4)])


class TestValueChecks:
    """Values are never read in a compiled graph, and on a GPU only under debug()."""

    def test_compiled_calls_contain_no_value_checks(self):
        compiled = torch.compile(fdk.region_sums, backend="aot_eager", fullgraph=True)
        sums = compiled(features(2, 3, 4, 4).requires_grad_(), mask(2, 4, 4) + 2)
        assert sums.fg.shape == (2, 3)

    def test_debug_can_be_nested(self):
        with fdk.debug(), fdk.debug():
            pass
        with fdk.debug(), pytest.raises(ValueError, match="mask must have values"):
            fdk.region_sums(features(2, 3, 4, 4), mask(2, 4, 4) + 2)

    @pytest.mark.cuda
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    def test_cuda_values_are_checked_under_debug(self):
        good, wrong = features(2, 3, 4, 4).cuda(), mask(2, 4, 4).cuda() + 2
        fdk.region_sums(good, wrong)
        with fdk.debug(), pytest.raises(ValueError, match="mask must have values"):
            fdk.region_sums(good, wrong)

    def test_meta_tensors_are_accepted_without_value_checks(self):
        loss = fdk.feature_discrepancy_loss(
            features(2, 3, 4, 4).to("meta"), mask(2, 4, 4).to("meta"), backend="reference"
        )
        assert loss.device.type == "meta"


def test_values_at_the_bounds_are_accepted():
    F = features(2, 3, 4, 4)
    fdk.feature_discrepancy_loss(F, torch.ones(2, 4, 4), eps=0)
    fdk.feature_discrepancy_loss(F, mask(2, 4, 4, dtype=torch.uint8) + 255, ignore_index=255)
    fdk.feature_discrepancy_loss(F, mask(2, 4, 4) - 1, ignore_index=-1)
    fdk.feature_discrepancy_loss(F, mask(2, 1, 4, 4, dtype=torch.bool), ignore_index=0)
