"""NucleiSegNet's own conventions: Keras initialisers, batch norm settings, order of layers."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from fdkernels import models
from fdkernels.models.nucleisegnet import TRUNCATED_STD

RESIDUAL = ("enc1", "enc2", "enc3", "enc4")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return models.create("nucleisegnet", base_channels=16)


def keras_fans(conv: nn.Conv2d | nn.ConvTranspose2d) -> int:
    """fan_in + fan_out as Keras counts them for a kernel [kh, kw, in, out], or [kh, kw, c, 1]."""
    area = conv.kernel_size[0] * conv.kernel_size[1]
    outputs = 1 if conv.groups > 1 else conv.out_channels
    return area * (conv.in_channels + outputs)


def convolutions(model: nn.Module) -> dict[str, nn.Conv2d | nn.ConvTranspose2d]:
    kinds = (nn.Conv2d, nn.ConvTranspose2d)
    return {key: module for key, module in model.named_modules() if isinstance(module, kinds)}


def is_uniform(key: str, conv: nn.Module) -> bool:
    """Return whether weights are uniform: separable convolutions, the last one of a gate, the head."""
    separable = key.startswith(RESIDUAL) and (conv.groups > 1 or conv.kernel_size == (1, 1))
    return separable or key.endswith(".weight.0") or key == "head"


def standard_error(weight: Tensor) -> float:
    return 4 / math.sqrt(weight.numel())


def test_uniform_weights_have_keras_limits(model: nn.Module) -> None:
    chosen = {key: conv for key, conv in convolutions(model).items() if is_uniform(key, conv)}
    assert len(chosen) == 2 * 4 + 4 + 1
    for conv in chosen.values():
        limit = math.sqrt(6 / keras_fans(conv))
        assert conv.weight.abs().max() <= limit
        assert conv.weight.abs().max() >= limit * (1 - 20 / conv.weight.numel())


def test_other_weights_are_truncated_normal_with_glorot_std(model: nn.Module) -> None:
    chosen = {key: conv for key, conv in convolutions(model).items() if not is_uniform(key, conv)}
    assert len(chosen) == 3 * 4 + 3 + 4 * 4 + 2 * 4
    for conv in chosen.values():
        weight = conv.weight.detach()
        std = math.sqrt(2 / keras_fans(conv))
        assert weight.std().item() == pytest.approx(std, rel=standard_error(weight))
        assert weight.mean().abs().item() <= std * standard_error(weight)
        # A plain normal exceeds this limit; a uniform of that std ends at 1.73 std.
        assert 1.8 * std < weight.abs().max().item() <= 2 * std / 0.87962566


def test_weights_are_distributed_as_keras_draws_them(model: nn.Module) -> None:
    """Kolmogorov-Smirnov test over all weights, in units of their nominal standard deviation."""
    uniform, normal = [], []
    for key, conv in convolutions(model).items():
        weight = conv.weight.detach().flatten().double()
        if is_uniform(key, conv):
            uniform.append(weight / math.sqrt(6 / keras_fans(conv)))
        else:
            normal.append(weight / math.sqrt(2 / keras_fans(conv)))
    cut = stats.truncnorm(-2, 2, scale=1 / 0.87962566103423978)
    assert stats.kstest(torch.cat(uniform).numpy(), stats.uniform(-1, 2).cdf).pvalue > 1e-3
    assert stats.kstest(torch.cat(normal).numpy()[::10], cut.cdf).pvalue > 1e-3


def test_truncated_std_is_that_of_a_normal_cut_at_two() -> None:
    assert pytest.approx(0.87962566103423978, rel=1e-12) == TRUNCATED_STD


def test_biases_are_a_tenth_but_zero_in_gate_and_head(model: nn.Module) -> None:
    for key, conv in convolutions(model).items():
        if conv.groups > 1:
            assert conv.bias is None, key
            continue
        expected = 0.0 if key == "head" or key.endswith(".weight.0") else 0.1
        assert torch.equal(conv.bias, torch.full_like(conv.bias, expected)), key


def test_batch_norms_have_keras_settings(model: nn.Module) -> None:
    norms = {key: m for key, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert len(norms) == 4 * 4 + 3 + 4 + 2 * 4
    for key, norm in norms.items():
        beta = 0.01 if key.startswith(RESIDUAL) else 0.0
        assert (norm.eps, norm.momentum) == (1e-3, 0.5), key
        assert torch.equal(norm.weight, torch.ones_like(norm.weight)), key
        assert torch.equal(norm.bias, torch.full_like(norm.bias, beta)), key


def test_fresh_taps_are_signed_with_mean_beta(model: nn.Module) -> None:
    """Batch norm comes last, so in training each channel's mean is beta, and signs are mixed."""
    taps: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(tap).register_forward_hook(
            lambda _module, _args, output, tap=tap: taps.__setitem__(tap, output.detach())
        )
        for tap in model.tap_names
    ]
    model.train()(torch.rand(2, 3, 32, 32))
    for handle in handles:
        handle.remove()
    for tap, features in taps.items():
        beta = 0.01 if tap in RESIDUAL else 0.0
        mean = features.mean(dim=(0, 2, 3))
        torch.testing.assert_close(mean, torch.full_like(mean, beta), rtol=0, atol=1e-5)
        assert features.min() < 0 < features.max()
