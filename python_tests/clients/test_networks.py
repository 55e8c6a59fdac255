"""Other people's networks, tapped as suggest_taps says, get the reference's gradients and keep no tensor.

Weights are random, nothing is downloaded.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fdkernels as fdk
from client_packages import client
from fdkernels.integrations.monai import TappedLoss

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore:(?!alpha|the feature disc)")]

HEADS = {"deep_supervision": True, "deep_supr_num": 2}
SEGFORMER = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]}


def monai(name: str, dims: int) -> nn.Module:
    nets = client("monai.networks.nets")
    if name == "SegResNet":
        return nets.SegResNet(dims, init_filters=8, in_channels=3, out_channels=2)
    if name == "SwinUNETR":
        return nets.SwinUNETR(in_channels=3, out_channels=2, feature_size=12, spatial_dims=dims)
    if name == "DynUNet":
        kernels, strides = [3] * 4, [1, 2, 2, 2]
        return nets.DynUNet(dims, 3, 2, kernels, strides, strides[1:], filters=[4, 8, 16, 32], **HEADS)
    return getattr(nets, name)(dims, 3, 2, channels=(8, 16, 32), strides=(2, 2))


def nnunet(name: str, dims: int) -> nn.Module:
    unets = client("dynamic_network_architectures.architectures.unet")
    blocks = {"n_blocks_per_stage": 1} if name == "ResidualEncoderUNet" else {"n_conv_per_stage": 2}
    return getattr(unets, name)(
        input_channels=3, n_stages=4, features_per_stage=(4, 8, 16, 32), kernel_sizes=3, strides=(1, 2, 2, 2),
        num_classes=2, n_conv_per_stage_decoder=1, conv_bias=True, nonlin=nn.LeakyReLU, deep_supervision=True,
        conv_op=getattr(nn, f"Conv{dims}d"), norm_op=getattr(nn, f"InstanceNorm{dims}d"),
        norm_op_kwargs={"affine": True}, nonlin_kwargs={"inplace": True}, **blocks,
    )  # fmt: skip


def timm(name: str, **options: Any) -> nn.Module:
    return client("timm").create_model(name, features_only=True, pretrained=False, **options)


def smp(name: str, encoder: str) -> nn.Module:
    package = client("segmentation_models_pytorch")
    return getattr(package, name)(encoder, encoder_weights=None, classes=2)


def torchvision(name: str) -> nn.Module:
    models = client("torchvision.models.segmentation")
    return getattr(models, name)(weights=None, weights_backbone=None, num_classes=2)


def segformer() -> nn.Module:
    transformers = client("transformers")
    config = transformers.SegformerConfig(num_labels=2, decoder_hidden_size=16, **SEGFORMER)
    return transformers.SegformerForSemanticSegmentation(config)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    **{
        f"monai {name} {dims}-D": (lambda name=name, dims=dims: monai(name, dims), dims)
        for name in ("UNet", "AttentionUnet", "SegResNet", "SwinUNETR", "DynUNet")
        for dims in (2, 3)
    },
    **{
        f"nnU-Net {name} {dims}-D": (lambda name=name, dims=dims: nnunet(name, dims), dims)
        for name in ("PlainConvUNet", "ResidualEncoderUNet")
        for dims in (2, 3)
    },
    "timm resnet18": (lambda: timm("resnet18"), 2),
    "timm convnext": (lambda: timm("convnext_atto"), 2),
    "timm swin": (lambda: timm("swin_tiny_patch4_window7_224", img_size=64, window_size=2), 2),
    "smp Unet": (lambda: smp("Unet", "resnet18"), 2),
    "smp DeepLabV3Plus": (lambda: smp("DeepLabV3Plus", "resnet18"), 2),
    "smp Segformer": (lambda: smp("Segformer", "mit_b0"), 2),
    "torchvision lraspp": (lambda: torchvision("lraspp_mobilenet_v3_large"), 2),
    "torchvision fcn": (lambda: torchvision("fcn_resnet50"), 2),
    "transformers segformer": (segformer, 2),
}


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> nn.Module:
    return NETWORKS[request.param][0]().double()


@pytest.fixture
def batch(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    """Images [N, 3, *S] and class indices [N, 1, *S]."""
    name = request.node.callspec.params["network"]
    size = (64, 64) if NETWORKS[name][1] == 2 else (32, 16, 16)
    if name == "monai SwinUNETR 3-D":
        size = (64, 32, 32)  # whose stride is 32, and instance norm wants two voxels
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    return images, (images.mean(1, keepdim=True) > 0.3).double()


def segmentation_loss(output: Any, target: Tensor) -> Tensor:
    """A loss of whatever a network puts out."""
    if isinstance(output, Tensor) and output.dim() == target.dim() + 1:
        output = output.unbind(1)  # DynUNet's heads
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None:
        logits = next(iter(output.values() if isinstance(output, dict) else output))
    if logits.shape[2:] != target.shape[2:]:
        logits = nn.functional.interpolate(logits, target.shape[2:])
    if logits.shape[1] == 2:
        return nn.functional.cross_entropy(logits, target[:, 0].long())
    # Of features: every map has a part in the loss.
    return sum((each.mean() for each in output), logits.square().mean())


def criterion(suggested: Any, **options: Any) -> fdk.FeatureDiscrepancyLoss:
    return fdk.FeatureDiscrepancyLoss(len(suggested.names), channel_dim=suggested.channel_dim, **options)


def gradients(network: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Of all parameters that have one, with the same random numbers for each call."""
    torch.manual_seed(5)
    network.zero_grad()
    loss().backward()
    return {name: each.grad.clone() for name, each in network.named_parameters() if each.grad is not None}


def test_gradients_are_those_of_the_reference(network, batch):
    images, target = batch
    suggested = fdk.suggest_taps(network, images)
    assert len(suggested.names) >= 3
    crit = criterion(suggested, alpha_init=0.7)
    truth = criterion(suggested, alpha_init=0.7, backend="reference")

    def ours() -> Tensor:
        with fdk.FeatureTaps(network, suggested.names, fused=True) as taps:
            return TappedLoss(segmentation_loss, crit, taps)(network(images), target)

    def theirs() -> Tensor:
        with fdk.FeatureTaps(network, suggested.names) as taps:
            return segmentation_loss(network(images), target) + truth(taps.features, target)

    found, expected = gradients(network, ours), gradients(network, theirs)
    without = gradients(network, lambda: segmentation_loss(network(images), target))
    assert found.keys() == expected.keys()
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-6, atol=1e-9 * largest)
    assert any(not torch.allclose(grad, without[name]) for name, grad in found.items() if name in without)
    torch.testing.assert_close(crit.layer_losses, truth.layer_losses)


def test_fused_normalisations_have_the_same_gradients(network, batch):
    images, target = batch
    suggested = fdk.suggest_taps(network, images)
    fused = copy.deepcopy(network)
    report = fdk.fuse_norms(fused)
    if not any(said.startswith("fused") for said in report.values()):
        pytest.skip("no normalisation stands in an nn.Sequential")
    assert [tap.shape for tap in fdk.suggest_taps(fused, images).taps] == [
        tap.shape for tap in suggested.taps
    ]
    crit = criterion(suggested, alpha_init=0.7)

    def loss(model: nn.Module) -> Tensor:
        with fdk.FeatureTaps(model, suggested.names, fused=True) as taps:
            with taps.mask(target):
                output = model(images)
            return segmentation_loss(output, target) + crit(taps)

    found, expected = gradients(fused, lambda: loss(fused)), gradients(network, lambda: loss(network))
    largest = max(float(grad.abs().max()) for grad in expected.values())
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-6, atol=1e-9 * largest)
    torch.testing.assert_close(fused.state_dict(), network.state_dict())


@pytest.fixture
def new_objects() -> Iterator[None]:
    """Let the garbage collector see what is made from here on alone: packages make millions of objects."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def live_tensors() -> tuple[int, int]:
    """How many new tensors are alive, and their bytes."""
    gc.collect()
    alive = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    return len(alive), sum(each.nbytes for each in alive)


@pytest.mark.usefixtures("new_objects")
def test_five_steps_move_alpha_and_keep_no_tensor(network, batch):
    images, target = batch
    network.float()
    images, target = images.float(), target.float()
    suggested = fdk.suggest_taps(network, images)
    crit = criterion(suggested)
    loss = TappedLoss(segmentation_loss, crit, fdk.FeatureTaps(network, suggested.names, fused=True))
    groups = [{"params": network.parameters(), "lr": 1e-5}, *crit.parameter_groups(lr=1e-2)]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    alive = []
    for _ in range(5):
        optimizer.zero_grad()
        loss(network(images), target).backward()
        optimizer.step()
        alive.append(live_tensors())
    assert (crit.alpha > 0).all()
    assert crit.layer_losses.isfinite().all()
    assert len(set(alive[1:])) == 1, alive
