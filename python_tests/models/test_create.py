"""What all four networks promise: size, taps, logits, refusals, memory formats, compilation."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from fdkernels import models

NAMES = ["unet", "attention_unet", "nucleisegnet", "cmunet"]
TAPS = ["enc1", "enc2", "enc3", "enc4", "bottleneck", "dec4", "dec3", "dec2", "dec1"]


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run_with_taps(model: nn.Module, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits, and what each tap's submodule returned, in the order of the calls."""
    seen: dict[str, Tensor] = {}

    def keep(tap: str) -> RemovableHandle:
        return model.get_submodule(tap).register_forward_hook(
            lambda _module, _args, output: seen.__setitem__(tap, output)
        )

    handles = [keep(tap) for tap in model.tap_names]
    try:
        return model(image), seen
    finally:
        for handle in handles:
            handle.remove()


def test_names_lists_the_four_networks() -> None:
    assert models.names() == NAMES


@pytest.mark.parametrize(
    ("name", "in_channels", "count"),
    [
        ("unet", 3, 34_527_041),
        ("unet", 1, 34_525_889),
        ("attention_unet", 3, 34_878_573),
        ("attention_unet", 1, 34_877_421),
        ("nucleisegnet", 3, 12_395_713),
        ("nucleisegnet", 1, 12_394_561),
        ("cmunet", 3, 49_932_353),
        ("cmunet", 1, 49_931_201),
    ],
)
def test_parameter_count_is_the_published_one(name: str, in_channels: int, count: int) -> None:
    with torch.device("meta"):
        model = models.create(name, in_channels=in_channels)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("unet", 130_694_512_640),
        ("attention_unet", 132_849_860_608),
        ("nucleisegnet", 36_271_816_704),
        ("cmunet", 181_877_080_064),
    ],
)
def test_flops_are_the_published_ones(name: str, flops: int) -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        models.create(name).eval()(torch.empty(1, 3, 256, 256))
    assert counter.get_total_flops() == flops


def test_taps_are_nine_submodules_with_doubling_widths(name: str) -> None:
    model = models.create(name, base_channels=4)
    _, seen = run_with_taps(model, torch.rand(2, 3, 48, 32))
    assert model.tap_names == TAPS
    assert list(seen) == TAPS  # also the order in which they run
    assert [list(tap.shape) for tap in seen.values()] == [
        [2, 4, 48, 32],
        [2, 8, 24, 16],
        [2, 16, 12, 8],
        [2, 32, 6, 4],
        [2, 64, 3, 2],
        [2, 32, 6, 4],
        [2, 16, 12, 8],
        [2, 8, 24, 16],
        [2, 4, 48, 32],
    ]


def test_tap_names_of_one_model_are_its_own(name: str) -> None:
    first, second = (models.create(name, base_channels=2) for _ in range(2))
    first.tap_names.pop()
    assert second.tap_names == TAPS


@pytest.mark.parametrize(("in_channels", "num_classes"), [(1, 1), (3, 4), (5, 2)])
def test_logits_have_the_images_size(name: str, in_channels: int, num_classes: int) -> None:
    model = models.create(name, in_channels, num_classes, base_channels=4)
    logits = model(torch.rand(2, in_channels, 32, 16))
    assert logits.shape == (2, num_classes, 32, 16)


def test_every_parameter_is_used(name: str) -> None:
    model = models.create(name, base_channels=4)
    model(torch.rand(2, 3, 32, 32)).square().mean().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


def test_no_tap_is_overwritten_after_it_is_seen(name: str) -> None:
    """An activation in place behind a tap would change what the loss reads."""
    model = models.create(name, base_channels=4)
    copies: dict[str, Tensor] = {}
    for tap in TAPS:
        model.get_submodule(tap).register_forward_hook(
            lambda _module, _args, output, tap=tap: copies.__setitem__(tap, output.clone())
        )
    _, seen = run_with_taps(model, torch.rand(2, 3, 32, 32))
    for tap in TAPS:
        assert torch.equal(seen[tap], copies[tap]), tap


@pytest.mark.parametrize("size", [(30, 32), (32, 33), (8, 8), (100, 100), (0, 16)])
def test_size_not_divisible_by_16_is_refused(name: str, size: tuple[int, int]) -> None:
    model = models.create(name, base_channels=2)
    sentence = f"multiples of 16, got {size[0]}x{size[1]}"
    with pytest.raises(ValueError, match=sentence):
        model(torch.rand(1, 3, *size))


@pytest.mark.parametrize("shape", [(1, 1, 32, 32), (3, 32, 32), (1, 3, 16, 16, 16)])
def test_image_of_another_shape_is_refused(name: str, shape: tuple[int, ...]) -> None:
    model = models.create(name, base_channels=2)
    sentence = f"image must have shape [N, 3, H, W], got {list(shape)}"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        model(torch.rand(shape))


def test_image_that_is_not_floating_point_is_refused(name: str) -> None:
    model = models.create(name, base_channels=2)
    with pytest.raises(TypeError, match=r"floating-point tensor, got torch\.uint8"):
        model(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"image must be a torch\.Tensor, got list"):
        model([[0.0]])


def test_unknown_name_is_refused_with_the_known_ones() -> None:
    known = '"unet", "attention_unet", "nucleisegnet", "cmunet"'
    with pytest.raises(ValueError, match=f"name must be one of {known}, got 'resnet'"):
        models.create("resnet")


@pytest.mark.parametrize("argument", ["in_channels", "num_classes", "base_channels"])
def test_count_below_one_or_not_an_integer_is_refused(name: str, argument: str) -> None:
    for value in (0, -3):
        with pytest.raises(ValueError, match=f"{argument} must be at least 1, got {value}"):
            models.create(name, **{argument: value})
    with pytest.raises(TypeError, match=f"{argument} must be an integer, got float"):
        models.create(name, **{argument: 4.0})


@pytest.mark.parametrize("name", ["attention_unet", "nucleisegnet"])
def test_odd_width_is_refused_where_a_gate_halves_it(name: str) -> None:
    with pytest.raises(ValueError, match=r"base_channels must be even for .*, got 5"):
        models.create(name, base_channels=5)


@pytest.mark.parametrize("name", ["unet", "cmunet"])
def test_odd_width_works_where_nothing_halves_it(name: str) -> None:
    assert models.create(name, base_channels=1)(torch.rand(2, 3, 32, 32)).shape == (2, 1, 32, 32)


def test_even_mixer_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="mixer_kernel must be odd to keep the size, got 4"):
        models.create("cmunet", base_channels=2, mixer_kernel=4)


def test_channels_last_gives_the_contiguous_logits_and_channels_last_taps(name: str) -> None:
    model = models.create(name, base_channels=4).eval()
    image = torch.rand(2, 3, 32, 32)
    plain = model(image)
    logits, seen = run_with_taps(
        model.to(memory_format=torch.channels_last),
        image.contiguous(memory_format=torch.channels_last),
    )
    torch.testing.assert_close(logits, plain, rtol=1e-5, atol=1e-5)
    for tap, features in seen.items():
        assert features.is_contiguous(memory_format=torch.channels_last), tap


def test_state_dict_round_trip_gives_equal_logits(name: str) -> None:
    first, second = (models.create(name, base_channels=4).eval() for _ in range(2))
    image = torch.rand(1, 3, 32, 32)
    assert not torch.equal(first(image), second(image))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(image), second(image))


def test_same_seed_gives_the_same_weights(name: str) -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(models.create(name, base_channels=4).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiles_without_a_graph_break(name: str) -> None:
    model = models.create(name, base_channels=2).eval()
    image = torch.rand(1, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image), model(image), rtol=1e-5, atol=1e-5)
