"""Every tap and the logits against a second forward, in arithmetic, from the state dict alone.

The oracle never names a submodule: it takes the tensors of the state dict one after the other, in
the order in which the architecture uses them. So it also fixes that order.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fdkernels import models

Outputs = list[Tensor]


class Weights:
    """Layers that consume a state dict in order; `training` selects batch statistics over running ones."""

    def __init__(self, state: dict[str, Tensor], training: bool, eps: float = 1e-5) -> None:
        self.tensors = list(state.values())
        self.training = training
        self.eps = eps

    def next(self) -> Tensor:
        return self.tensors.pop(0)

    def conv(self, x: Tensor, bias: bool = True, **options: int) -> Tensor:
        weight = self.next()
        if "dilation" not in options:
            options["padding"] = weight.shape[-1] // 2
        return F.conv2d(x, weight, self.next() if bias else None, **options)

    def deconv(self, x: Tensor) -> Tensor:
        """2x2 transposed convolution with stride 2: every pixel writes its own 2x2 cell."""
        weight, bias = self.next(), self.next()
        cells = torch.einsum("nihw,ioyx->nohywx", x, weight)
        N, C, H, _, W, _ = cells.shape
        return cells.reshape(N, C, 2 * H, 2 * W) + bias[:, None, None]

    def norm(self, x: Tensor) -> Tensor:
        gamma, beta, mean, variance, _ = (self.next()[..., None, None] for _ in range(5))
        if self.training:
            mean = x.mean(dim=(0, 2, 3))[:, None, None]
            variance = x.var(dim=(0, 2, 3), correction=0)[:, None, None]
        return gamma * (x - mean) / torch.sqrt(variance + self.eps) + beta


def relu(x: Tensor) -> Tensor:
    return x * (x > 0)


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def pool(x: Tensor) -> Tensor:
    return x.unfold(2, 2, 2).unfold(3, 2, 2).amax(dim=(-1, -2))


def nearest(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def bilinear(x: Tensor) -> Tensor:
    """Half-pixel centres: each new row is 3/4 of the nearest old one and 1/4 of the next."""
    for dim in (2, 3):
        before = torch.cat([x.narrow(dim, 0, 1), x.narrow(dim, 0, x.shape[dim] - 1)], dim)
        after = torch.cat([x.narrow(dim, 1, x.shape[dim] - 1), x.narrow(dim, -1, 1)], dim)
        x = torch.stack([(3 * x + before) / 4, (3 * x + after) / 4], dim + 1).flatten(dim, dim + 1)
    return x


def unet(w: Weights, image: Tensor, gate: Callable | None, mixer_depth: int = 0) -> Outputs:
    """U-Net, and with `gate(w, skip, up)` the two networks built on it."""

    def block(x: Tensor) -> Tensor:
        return relu(w.norm(w.conv(relu(w.norm(w.conv(x))))))

    skips = []
    x = image
    for _ in range(4):
        skips.append(block(x))
        x = pool(skips[-1])
    x = block(x)
    for _ in range(mixer_depth):
        x = x + w.norm(gelu(w.conv(x, groups=x.shape[1])))
        x = w.norm(gelu(w.conv(x)))
    outputs = [*skips, x]
    for skip in reversed(skips):
        up = relu(w.norm(w.conv(nearest(x))))
        x = block(torch.cat([gate(w, skip, up) if gate else skip, up], 1))
        outputs.append(x)
    return [*outputs, w.conv(x)]


def additive_gate(w: Weights, skip: Tensor, up: Tensor) -> Tensor:
    joint = w.norm(w.conv(up))
    joint = relu(joint + w.norm(w.conv(skip)))
    return sigmoid(w.norm(w.conv(joint))) * skip


def multi_scale_gate(w: Weights, skip: Tensor, up: Tensor) -> Tensor:
    scales = [
        w.norm(w.conv(skip)),
        w.norm(w.conv(skip)),
        w.norm(w.conv(skip, dilation=2, padding=2)),
    ]
    a = sigmoid(w.norm(w.conv(relu(torch.cat(scales, 1)))))
    return skip * (1 + a)


def nucleisegnet(w: Weights, image: Tensor) -> Outputs:
    def step(x: Tensor) -> Tensor:
        return w.norm(relu(w.conv(x)))

    def residual(x: Tensor) -> Tensor:
        h = step(x)
        h = w.conv(h, bias=False, groups=h.shape[1])
        return step(torch.cat([x, step(step(h))], 1))

    def attend(g: Tensor, x: Tensor) -> Tensor:
        reduced = relu(w.conv(g))
        theta = relu(w.conv(x))
        phi = relu(w.conv(reduced))
        q = relu(theta + bilinear(phi))
        gated = sigmoid(w.norm(relu(w.conv(q)))) * x
        return torch.cat([relu(w.deconv(g)), gated], 1)

    skips = []
    x = image
    for _ in range(4):
        skips.append(residual(x))
        x = pool(skips[-1])
    x = step(step(step(x)))
    outputs = [*skips, x]
    for skip in reversed(skips):
        x = step(step(attend(x, skip)))
        outputs.append(x)
    return [*outputs, w.conv(x)]


ORACLES: dict[str, Callable[[Weights, Tensor], Outputs]] = {
    "unet": lambda w, image: unet(w, image, None),
    "attention_unet": lambda w, image: unet(w, image, additive_gate),
    "nucleisegnet": nucleisegnet,
    "cmunet": lambda w, image: unet(w, image, multi_scale_gate, mixer_depth=7),
}
EPS = {"nucleisegnet": 1e-3}


def random_state(model: torch.nn.Module) -> dict[str, Tensor]:
    """Copy the state and change it so that no batch norm is the identity."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for key, value in state.items():
        if value.is_floating_point() and value.dim() == 1:
            value.uniform_(0.5, 1.5) if key.endswith(("weight", "var")) else value.normal_(std=0.3)
    return state


def run(
    name: str, dtype: torch.dtype, training: bool, base_channels: int | None = 4
) -> tuple[Outputs, Outputs]:
    """Return taps and logits of the network, and of the oracle in float64."""
    torch.manual_seed(1)
    model = models.create(name, in_channels=2, num_classes=3, base_channels=base_channels)
    state = random_state(model)
    model.load_state_dict(state)
    model.to(dtype).train(training)
    outputs: Outputs = []
    for tap in model.tap_names:
        model.get_submodule(tap).register_forward_hook(lambda _module, _args, output: outputs.append(output))
    image = torch.randn(2, 2, 48, 32)
    weights = Weights({key: value.double() for key, value in state.items()}, training, EPS.get(name, 1e-5))
    with torch.no_grad():
        expected = ORACLES[name](weights, image.double())
        outputs.append(model(image.to(dtype)))
    assert weights.tensors == []  # the oracle used every one
    return outputs, expected


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ORACLES)
def test_taps_and_logits_equal_the_oracle(name: str, training: bool) -> None:
    outputs, expected = run(name, torch.float64, training)
    assert len(outputs) == len(expected) == 10
    for got, want in zip(outputs, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "base_channels", [4, pytest.param(None, marks=pytest.mark.slow)], ids=["narrow", "published"]
)
@pytest.mark.parametrize("name", ORACLES)
def test_float32_taps_and_logits_are_within_1e_5_of_the_oracle(name: str, base_channels: int | None) -> None:
    outputs, expected = run(name, torch.float32, training=False, base_channels=base_channels)
    for got, want in zip(outputs, expected, strict=True):
        assert (got.double() - want).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["unet", "attention_unet"])
def test_taps_end_in_a_relu(name: str) -> None:
    outputs, _ = run(name, torch.float32, training=True)
    for tap in outputs[:9]:
        assert tap.min() == 0


def test_cmunet_bottleneck_tap_is_behind_the_mixer() -> None:
    outputs, _ = run("cmunet", torch.float32, training=True)
    assert [bool(tap.min() < 0) for tap in outputs[:9]] == [False] * 4 + [True] + [False] * 4
