from __future__ import annotations

import pytest
import torch

from benchmarks.calls import SETS, VARIANTS, chosen_cases, modes
from benchmarks.cases import IGNORED, make_inputs, named_case, tap_shapes

SMALL = [case.shrunk() for case in chosen_cases("cpu", ("core",))]


def plain_case(name):
    return named_case(name, torch.float32, "contiguous", "cpu")


def test_a_network_has_the_nine_taps_of_its_model():
    shapes = tap_shapes("unet", 512, 4)
    assert list(shapes) == ["enc1", "enc2", "enc3", "enc4", "bottleneck", "dec4", "dec3", "dec2", "dec1"]
    assert shapes["enc1"] == shapes["dec1"] == (4, 64, 512, 512)
    assert shapes["bottleneck"] == (4, 1024, 32, 32)
    assert tap_shapes("nucleisegnet", 256, 16)["enc4"] == (16, 256, 32, 32)


@pytest.mark.parametrize("network", ["attention_unet", "cmunet"])
def test_the_page_may_say_that_their_taps_have_the_shapes_of_the_unet(network):
    assert tap_shapes(network, 256, 16) == tap_shapes("unet", 256, 16)


def test_both_sizes_of_a_network_have_the_same_bytes():
    assert plain_case("unet-512").feature_bytes == plain_case("unet-256").feature_bytes == 976 * 2**20


def test_the_series_has_maps_of_exactly_so_many_mib():
    for dtype, layout in VARIANTS:
        sizes = [named_case(f"scaling-{2**power}", dtype, layout, "cpu") for power in range(16)]
        assert [case.feature_bytes for case in sizes] == [2 ** (20 + power) for power in range(16)]


def test_a_name_that_is_no_case_is_refused():
    with pytest.raises(ValueError, match="name must be that of a case, got 'enc9-256'"):
        plain_case("enc9-256")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", SETS)
def test_a_set_has_each_case_once(name, device):
    ids = [case.id for case in chosen_cases(device, (name,))]
    assert ids
    assert len(set(ids)) == len(ids)


def test_sets_add_up_without_repeating_a_case():
    both = {case.id for case in chosen_cases("cpu", ("core", "quick"))}
    assert both == {case.id for case in chosen_cases("cpu", ("core",))}


def test_a_set_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="set must be one of core, scaling, full, brief, quick, got 'all'"):
        chosen_cases("cpu", ("all",))


def test_kernels_are_timed_where_the_mask_changes_nothing_about_them():
    assert modes(plain_case("soft-256")) == ["forward", "forward+backward"]
    assert modes(plain_case("scaling-64")) == ["forward", "forward+backward"]
    assert "kernel backward, warm" in modes(plain_case("enc1-256"))
    # The memory that a GPU's allocator gives is warm.
    on_gpu = modes(named_case("enc1-256", torch.float32, "contiguous", "cuda"))
    assert {"kernel forward", "kernel backward", "tap"} <= set(on_gpu)
    assert "kernel backward, warm" not in on_gpu


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_inputs_are_as_the_case_says(case):
    layers, mask, pairing = make_inputs(case)
    assert [tuple(layer.shape) for layer in layers] == list(case.layers)
    assert sum(layer.nbytes for layer in layers) == case.feature_bytes
    assert all(layer.requires_grad and layer.is_leaf for layer in layers)
    if case.layout == "channels_last":
        assert all(layer.flatten(2).stride(1) == 1 for layer in layers)
    assert (pairing is None) == (case.exchange == "none")
    if case.mask_kind == "soft":
        assert 0 <= mask.min() < mask.max() <= 1
    else:
        expected = [0, 1, IGNORED] if case.mask_kind == "ignore" else [0, 1]
        assert mask.unique().tolist() == expected
