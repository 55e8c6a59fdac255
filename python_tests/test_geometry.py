"""A mask of another aspect is refused by a sentence; what networks do to sizes is taken."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fdkernels as fdk
from fdkernels import models
from fdkernels.geometry import check_aspect

Size = tuple[int, ...]


def check(full: Size, *sizes: Size, aspect: str = "same") -> None:
    """The check of a mask of size `full` and layers [2, 3, *size]."""
    layers = [torch.empty(2, 3, *size, device="meta") for size in sizes]
    check_aspect(torch.empty(2, 1, *full, device="meta"), layers, aspect)


def assert_refused(full: Size, *sizes: Size) -> None:
    with pytest.raises(ValueError, match='aspect="any"'):
        check(full, *sizes)
    check(full, *sizes, aspect="any")


def up(extent: int) -> int:
    return -(-extent // 2)


def down(extent: int) -> int:
    return max(extent // 2, 1)


def unpadded(extent: int) -> int:
    """A 3x3 convolution of stride 2 without padding."""
    return (extent - 1) // 2


def chain(full: Size, halve: Callable[[int], int], times: int = 5) -> list[Size]:
    """The maps of an encoder, as long as they have pixels."""
    maps = [full]
    while len(maps) <= times and min(maps[-1]) > 2:
        maps.append(tuple(map(halve, maps[-1])))
    return maps


def strided(full: Size, *strides: Size) -> list[Size]:
    maps = [full]
    for stride in strides:
        maps.append(tuple(-(-extent // s) for extent, s in zip(maps[-1], stride, strict=True)))
    return maps


def unet_without_padding(image: Size) -> list[Size]:
    """The taps of Ronneberger's U-Net, two 3x3 convolutions a level; the last has the logits' size."""
    maps, size = [], image
    for _ in range(4):
        maps.append(tuple(extent - 4 for extent in size))
        size = tuple(extent // 2 for extent in maps[-1])
    maps.append(tuple(extent - 4 for extent in size))
    for _ in range(4):
        maps.append(tuple(2 * extent - 4 for extent in maps[-1]))
    return maps


@given(
    st.lists(st.integers(3, 1500), min_size=1, max_size=3).map(tuple),
    st.sampled_from([up, down, unpadded]),
)
def test_the_maps_of_an_encoder_fit_an_image_of_any_size(full: Size, halve: Callable[[int], int]):
    maps = chain(full, halve)
    check(full, *maps)
    for size in maps:
        check(full, size)


@given(st.tuples(st.integers(3, 1500), st.integers(3, 1500)), st.data())
def test_halvings_may_round_each_to_its_own_side(full: Size, data: st.DataObject):
    size = full
    for _ in range(5):
        size = tuple(data.draw(st.sampled_from([up, down]))(extent) for extent in size)
        check(full, size)


@given(st.integers(20, 70), st.integers(20, 70))
def test_the_unet_without_padding_fits_masks_of_the_image_and_of_the_logits(rows: int, columns: int):
    image = 16 * rows + 12, 16 * columns + 12
    maps = unet_without_padding(image)
    check(image, *maps)
    check(maps[-1], *maps)


def test_the_published_size_of_the_unet_without_padding():
    maps = unet_without_padding((572, 572))
    assert maps[0] == (568, 568)
    assert maps[4] == (28, 28)
    assert maps[-1] == (388, 388)


FLAT, ALL = (1, 2, 2), (2, 2, 2)
# Patches and strides of nnU-Net's plans, and volumes with the slices last, as MONAI has them.
ANISOTROPIC = {
    "16x320x320": strided((16, 320, 320), FLAT, FLAT, ALL, ALL, FLAT, FLAT),
    "20x320x256": strided((20, 320, 256), FLAT, FLAT, ALL, ALL, FLAT, FLAT),
    "28x256x256": strided((28, 256, 256), FLAT, FLAT, ALL, ALL, ALL, FLAT),
    "14x256x224": strided((14, 256, 224), FLAT, FLAT, ALL, ALL, FLAT),
    "40x56x40": strided((40, 56, 40), ALL, ALL, ALL),
    "80x192x160": strided((80, 192, 160), ALL, ALL, ALL, ALL, FLAT),
    "128x128x128 in thick slices": strided((128, 128, 128), FLAT, ALL, ALL, ALL, ALL),
    "9x250x333": strided((9, 250, 333), FLAT, FLAT, FLAT, ALL, ALL),
    "19x155x240": strided((19, 155, 240), FLAT, ALL, ALL, ALL),
    "320x320x16": strided((320, 320, 16), (2, 2, 1), (2, 2, 1), ALL, ALL, (2, 2, 1)),
}


@pytest.mark.parametrize("maps", ANISOTROPIC.values(), ids=ANISOTROPIC)
def test_the_maps_of_anisotropic_networks_fit_and_exchanged_axes_do_not(maps: list[Size]):
    full = maps[0]
    check(full, *maps)
    for size in maps:
        check(full, size)
    for exchanged in set(itertools.permutations(full)) - {full}:
        assert_refused(exchanged, *maps)


def test_a_long_image_may_be_halved_more_often_along_its_longer_axis():
    maps = strided((64, 512), *[(2, 2)] * 4, (1, 2), (1, 2))
    check((64, 512), *maps)
    assert_refused((512, 64), *maps)


def test_other_strides_paddings_and_decoders_fit():
    for full in ((500, 375), (518, 700), (224, 224)):
        check(full, *[tuple(extent // patch for extent in full) for patch in (7, 14, 16, 32)])
    check((500, 375), *chain((698, 573), up))  # FCN-8s pads by 100 pixels
    check((1000, 33), (992, 32), (496, 16))  # a decoder that doubles 62x2
    check((64, 48), (256, 192), (128, 96), (32, 24))  # a mask smaller than the image
    check((33, 17), (130, 65))


@pytest.mark.parametrize(
    ("full", "size"),
    [
        ((20, 12), (12, 20)),
        ((48, 64), (32, 24)),
        ((6, 4), (4, 6)),
        ((5, 4), (4, 5)),
        ((250, 256), (256, 250)),
        ((512, 500), (250, 256)),
        ((33, 47), (24, 17)),
        ((16, 64, 64), (64, 64, 16)),
        ((16, 64, 64), (16, 16, 4)),
        ((8, 16, 24), (24, 16, 8)),
    ],
    ids=str,
)
def test_exchanged_axes_are_refused_with_the_order_that_fits(full: Size, size: Size):
    with pytest.raises(ValueError, match=r"axes seem to be in another order: transpose it to \[") as caught:
        check(full, size)
    (advice,) = [
        order for order in set(itertools.permutations(full)) if f"to {list(order)}," in str(caught.value)
    ]
    check(advice, size)


@pytest.mark.parametrize("depth", [2, 3, 4, 8, 64])
@pytest.mark.parametrize("side", [8, 16, 128])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_one_slice_is_no_mask_for_volumes(depth: int, side: int, stride: int):
    with pytest.raises(ValueError, match=r"a mask of volumes is \[N, 1, D, H, W\] or \[N, D, H, W\]"):
        check((1, side, side), (depth, side // stride, side // stride))


@pytest.mark.parametrize(
    ("full", "size"),
    [
        ((64, 64), (32, 16)),
        ((64, 48), (32, 32)),
        ((96, 64), (32, 32)),
        ((640, 480), (64, 64)),
        ((512, 256), (128, 128)),
        ((16, 16, 16), (32, 64, 64)),
        ((32, 64, 64), (8, 64, 64)),
    ],
    ids=str,
)
def test_a_mask_of_another_aspect_is_refused(full: Size, size: Size):
    with pytest.raises(ValueError, match="resize or crop it as the images were"):
        check(full, size)


@pytest.mark.parametrize(
    ("full", "shape"),
    [
        ((224, 224), (2, 56, 56, 96)),
        ((224, 224), (2, 28, 28, 192)),
        ((224, 224), (2, 14, 14, 384)),
        ((224, 224), (2, 7, 7, 768)),
        ((48, 64), (2, 24, 32, 6)),
        ((33, 47), (2, 17, 24, 5)),
        ((16, 32, 32), (2, 8, 16, 16, 6)),
    ],
    ids=str,
)
def test_channels_in_the_last_place_are_named_with_the_argument_for_them(full: Size, shape: Size):
    mask, given = torch.zeros(2, 1, *full), torch.zeros(shape)
    with pytest.raises(ValueError, match=r"features seem to be \[N, \*S, C\].*pass channel_dim=-1"):
        fdk.feature_discrepancy_loss(given, mask)
    fdk.feature_discrepancy_loss(given, mask, channel_dim=-1)
    with pytest.raises(ValueError, match=r"features seem to be \[N, C, \*S\].*pass channel_dim=1"):
        fdk.feature_discrepancy_loss(given.movedim(-1, 1).contiguous(), mask, channel_dim=-1)


def test_the_sentence_names_the_layer_as_it_was_given():
    maps = [torch.zeros(2, 3, 32, 24), torch.zeros(2, 3, 24, 32)]
    with pytest.raises(
        ValueError, match=r"size \[64, 48\] does not have the aspect of features\[1\] \[2, 3, 24, 32\]"
    ):
        fdk.feature_discrepancy_loss(maps, torch.zeros(2, 64, 48))
    swin = [torch.zeros(2, 32, 24, 32), torch.zeros(2, 16, 12, 64)]
    with pytest.raises(ValueError, match=r"the aspect of features\[0\] \[2, 32, 24, 32\]"):
        fdk.feature_discrepancy_loss(swin, torch.zeros(2, 64, 48))


@pytest.mark.parametrize("function", ["feature_discrepancy_loss", "tap", "region_sums"])
def test_every_function_checks_and_can_be_told_that_it_is_meant(function: str):
    call = getattr(fdk, function)
    features, mask = torch.randn(2, 3, 8, 6), torch.ones(2, 1, 6, 8)
    with pytest.raises(ValueError, match="transpose it"):
        call(features, mask)
    call(features, mask, aspect="any")
    with pytest.raises(ValueError, match="aspect must be one of 'same', 'any', got 'other'"):
        call(features, mask, aspect="other")


def test_a_compiled_call_checks_too():
    compiled = torch.compile(fdk.region_sums, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="transpose it"):
        compiled(torch.randn(2, 3, 8, 6), torch.ones(2, 1, 12, 16))
    torch._dynamo.reset()  # which remembers code that raised
    compiled(torch.randn(2, 3, 8, 6), torch.ones(2, 1, 16, 12))


def test_one_spatial_dimension_has_no_aspect():
    check((100,), (7,), (100,), (250,))


@pytest.mark.parametrize("name", models.names())
@pytest.mark.parametrize("size", [(16, 16), (48, 160), (112, 32)])
def test_the_taps_of_every_network_fit_their_image(name: str, size: Size):
    model = models.create(name, base_channels=4, in_channels=1).eval()
    with torch.no_grad(), fdk.FeatureTaps(model, model.tap_names) as taps:
        model(torch.randn(1, 1, *size))
    check(size, *[tuple(layer.shape[2:]) for layer in taps.features])
    for layer in taps.features:
        check(size, tuple(layer.shape[2:]))
