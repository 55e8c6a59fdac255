"""The contract of all four networks: size, taps, logits, validation, memory formats, compilation."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

import fdkernels as fdk
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
    """Return the logits and the output of each tap's submodule, in call order."""
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


def conv(kernel: int, inputs: int, outputs: int) -> int:
    return kernel**2 * inputs * outputs + outputs


def norm(channels: int) -> int:
    return 2 * channels


def block(inputs: int, outputs: int) -> int:
    """Twice a 3x3 convolution and a norm."""
    return conv(3, inputs, outputs) + conv(3, outputs, outputs) + 2 * norm(outputs)


def unet_count(i: int, k: int, b: int) -> int:
    widths = [b, 2 * b, 4 * b, 8 * b]
    encoder = block(i, b) + sum(block(f, 2 * f) for f in widths)
    decoder = sum(conv(3, 2 * f, f) + norm(f) + block(2 * f, f) for f in widths)
    return encoder + decoder + conv(1, b, k)


def attention_unet_count(i: int, k: int, b: int) -> int:
    gates = (
        2 * (conv(1, f, f // 2) + norm(f // 2)) + conv(1, f // 2, 1) + norm(1)
        for f in (b, 2 * b, 4 * b, 8 * b)
    )
    return unet_count(i, k, b) + sum(gates)


def cmunet_count(i: int, k: int, b: int) -> int:
    c = 16 * b
    mixer = 7 * (49 * c + c + norm(c) + conv(1, c, c) + norm(c))
    gates = (
        conv(1, f, f) + 2 * conv(3, f, f) + 3 * norm(f) + conv(1, 3 * f, f) + norm(f)
        for f in (b, 2 * b, 4 * b, 8 * b)
    )
    return unet_count(i, k, b) + mixer + sum(gates)


def nucleisegnet_count(i: int, k: int, b: int) -> int:
    def residual(inputs: int, f: int) -> int:
        separable = 9 * f + conv(1, f, f)
        return conv(3, inputs, f) + separable + conv(3, f, f) + conv(3, inputs + f, f) + 4 * norm(f)

    def decoder(f: int) -> int:
        gate = conv(1, 2 * f, f) + 2 * conv(3, f, f // 2) + conv(1, f // 2, f) + norm(f)
        return gate + conv(2, 2 * f, f) + block(2 * f, f)

    encoder = residual(i, b) + residual(b, 2 * b) + residual(2 * b, 4 * b) + residual(4 * b, 8 * b)
    bottleneck = block(8 * b, 16 * b) + conv(3, 16 * b, 16 * b) + norm(16 * b)
    return encoder + bottleneck + sum(decoder(f) for f in (b, 2 * b, 4 * b, 8 * b)) + conv(1, b, k)


COUNTS = {
    "unet": unet_count,
    "attention_unet": attention_unet_count,
    "nucleisegnet": nucleisegnet_count,
    "cmunet": cmunet_count,
}


@pytest.mark.parametrize(("channels", "classes", "width"), [(3, 1, 32), (1, 4, 16), (5, 2, 6)])
def test_parameter_count_follows_channels_classes_and_width(
    name: str, channels: int, classes: int, width: int
) -> None:
    """Counts layer by layer; the published counts are for width 64, or 32 for NucleiSegNet."""
    with torch.device("meta"):
        model = models.create(name, channels, classes, base_channels=width)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name](channels, classes, width)


@pytest.mark.parametrize("name", ["unet", "attention_unet", "cmunet"])
def test_layers_have_torchs_defaults(name: str) -> None:
    model = models.create(name, base_channels=16)
    for key, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.eps, module.momentum) == (1e-5, 0.1), key
            assert torch.equal(module.weight, torch.ones_like(module.weight)), key
            assert torch.equal(module.bias, torch.zeros_like(module.bias)), key
        elif isinstance(module, nn.Conv2d):
            limit = module.weight[0].numel() ** -0.5  # uniform within 1/sqrt(fan_in), the bias too
            assert module.bias is not None, key
            assert module.bias.abs().max() <= limit, key
            assert limit * (1 - 20 / module.weight.numel()) <= module.weight.abs().max() <= limit, key


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


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_tapped_features_are_not_modified_in_place(name: str, training: bool) -> None:
    """An in-place activation after a tap would change the features that the loss reads."""
    model = models.create(name, base_channels=4).train(training)
    copies: dict[str, Tensor] = {}
    for tap in TAPS:
        model.get_submodule(tap).register_forward_hook(
            lambda _module, _args, output, tap=tap: copies.__setitem__(tap, output.detach().clone())
        )
    with fdk.FeatureTaps(model, model.tap_names) as taps:
        logits = model(torch.rand(2, 3, 32, 32))
        loss = fdk.feature_discrepancy_loss(taps.features, torch.rand(2, 32, 32))
        (loss + logits.square().mean()).backward()
        for tap, features in zip(TAPS, taps.features, strict=True):
            assert torch.equal(features, copies[tap]), tap


def test_the_loss_on_one_tap_reaches_every_layer_before_it(name: str) -> None:
    model = models.create(name, base_channels=4)
    with fdk.FeatureTaps(model, ["bottleneck"]) as taps:
        model(torch.rand(2, 3, 32, 32))
        fdk.feature_discrepancy_loss(taps.features, torch.rand(2, 32, 32)).backward()
    reached = {key.partition(".")[0] for key, p in model.named_parameters() if p.grad is not None}
    assert reached == {"enc1", "enc2", "enc3", "enc4", "bottleneck"}


@pytest.mark.parametrize("size", [(30, 32), (32, 33), (8, 8), (100, 100), (0, 16)])
def test_size_not_divisible_by_16_is_rejected(name: str, size: tuple[int, int]) -> None:
    model = models.create(name, base_channels=2)
    sentence = f"multiples of 16, got {size[0]}x{size[1]}"
    with pytest.raises(ValueError, match=sentence):
        model(torch.rand(1, 3, *size))


@pytest.mark.parametrize("shape", [(1, 1, 32, 32), (3, 32, 32), (1, 3, 16, 16, 16)])
def test_image_of_another_shape_is_rejected(name: str, shape: tuple[int, ...]) -> None:
    model = models.create(name, base_channels=2)
    sentence = f"image must have shape [N, 3, H, W], got {list(shape)}"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        model(torch.rand(shape))


def test_image_that_is_not_floating_point_is_rejected(name: str) -> None:
    model = models.create(name, base_channels=2)
    with pytest.raises(TypeError, match=r"floating-point tensor, got torch\.uint8"):
        model(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"image must be a torch\.Tensor, got list"):
        model([[0.0]])


def test_unknown_name_raises_an_error_with_the_known_ones() -> None:
    known = '"unet", "attention_unet", "nucleisegnet", "cmunet"'
    with pytest.raises(ValueError, match=f"name must be one of {known}, got 'resnet'"):
        models.create("resnet")


@pytest.mark.parametrize("argument", ["in_channels", "num_classes", "base_channels"])
def test_count_below_one_or_not_an_integer_is_rejected(name: str, argument: str) -> None:
    for value in (0, -3):
        with pytest.raises(ValueError, match=f"{argument} must be at least 1, got {value}"):
            models.create(name, **{argument: value})
    with pytest.raises(TypeError, match=f"{argument} must be an integer, got float"):
        models.create(name, **{argument: 4.0})


@pytest.mark.parametrize("name", ["attention_unet", "nucleisegnet"])
def test_odd_width_is_rejected_if_a_gate_halves_it(name: str) -> None:
    with pytest.raises(ValueError, match=r"base_channels must be even for .*, got 5"):
        models.create(name, base_channels=5)


@pytest.mark.parametrize("name", ["unet", "cmunet"])
def test_odd_width_works_if_nothing_halves_it(name: str) -> None:
    assert models.create(name, base_channels=1)(torch.rand(2, 3, 32, 32)).shape == (2, 1, 32, 32)


def test_even_mixer_kernel_is_rejected() -> None:
    with pytest.raises(ValueError, match="mixer_kernel must be odd to keep the size, got 4"):
        models.create("cmunet", base_channels=2, mixer_kernel=4)


def step(model: nn.Module, call: nn.Module, image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return taps and logits of a step with the loss on every tap, and the gradients of all parameters."""
    with fdk.FeatureTaps(call, model.tap_names) as taps:
        logits = call(image)
        mask = torch.rand(2, 32, 32, generator=torch.Generator().manual_seed(0))
        (fdk.feature_discrepancy_loss(taps.features, mask) + logits.square().mean()).backward()
        outputs = [*(features.detach() for features in taps.features), logits.detach()]
    gradients = [p.grad for p in model.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return outputs, gradients


def assert_equal_steps(got: tuple[list[Tensor], ...], expected: tuple[list[Tensor], ...]) -> None:
    """Uses float64: batch norm over few pixels amplifies rounding in the gradients."""
    torch.testing.assert_close(got[0], expected[0], rtol=1e-9, atol=1e-9)
    scale = max(gradient.abs().max().item() for gradient in expected[1])
    torch.testing.assert_close(got[1], expected[1], rtol=1e-6, atol=1e-9 * scale)


def test_channels_last_gives_equal_steps_and_channels_last_taps(name: str) -> None:
    model = models.create(name, base_channels=4).double()
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    image = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    expected = step(model, model, image)
    got = step(other, other, image.contiguous(memory_format=torch.channels_last))
    assert_equal_steps(got, expected)
    for tap, features in zip(TAPS, got[0][:9], strict=True):
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
def test_compiles_to_one_graph_with_its_taps_and_gives_equal_steps(name: str) -> None:
    model = models.create(name, base_channels=2).double()
    compiled = copy.deepcopy(model)
    image = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    expected = step(model, model, image)
    got = step(compiled, torch.compile(compiled, fullgraph=True, backend="aot_eager"), image)
    assert_equal_steps(got, expected)
    for (key, statistic), other in zip(model.named_buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(other, statistic, rtol=1e-9, atol=1e-9, msg=key)
