from __future__ import annotations

import math

import pytest
import torch

import fdkernels as fdk
import oracles
from fdkernels import models
from fdkernels.segmentation.data import DATASETS, SegmentationDataset
from fdkernels.segmentation.metrics import sample_scores
from fdkernels.segmentation.scoring import (
    SYMMETRIES,
    Candidate,
    discrepancy_losses,
    repeatable,
    score,
    symmetric,
)
from tiny_data import write_tiny_tnbc

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return DATASETS["tnbc"].find(write_tiny_tnbc(tmp_path_factory.mktemp("tnbc"))).samples[:5]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(1)
    network = models.create("unet", base_channels=2)
    # Statistics as training leaves them, so that a network left in training mode would be seen.
    network(torch.rand(4, 3, 32, 32))
    return network.eval()


@pytest.fixture
def candidate(samples, network):
    return Candidate(
        load=network.train,  # so that `score` has to leave training mode
        samples=samples,
        names=[sample.image.name for sample in samples],
        size=32,
        convention="paper",
        phase="active",
        fold=2,
    )


def _features(seed=0, samples=3):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((2, 8, 8), (4, 4, 4), (3, 3, 3))
    layers = [torch.randn(samples, *size, generator=generator) for size in sizes]
    return layers, torch.randint(2, (samples, 1, 8, 8), generator=generator).float()


def test_the_loss_of_a_layer_is_its_closed_form():
    layer = torch.tensor([[[[8.0, 1.0], [2.0, 1.0]], [[0.0, 4.0], [4.0, 4.0]]]])  # [1, 2, 2, 2]
    mask = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    # f = (8, 0) / 4, b = (4, 12) / 4
    expected = -math.log((2 - 1) ** 2 + (0 - 3) ** 2)
    assert discrepancy_losses([layer], mask, "paper").tolist() == [[pytest.approx(expected)]]
    assert discrepancy_losses([layer], mask, "algorithm1").tolist() == [[pytest.approx(expected / 2)]]


@pytest.mark.parametrize("convention", sorted(set(oracles.CONVENTIONS) - {"released"}))
def test_the_losses_are_those_of_the_formulas(convention):
    layers, mask = _features()
    expected = oracles.loss(
        [layer.double() for layer in layers], mask, convention=convention, reduction="none"
    )
    torch.testing.assert_close(
        discrepancy_losses(layers, mask, convention).double(), expected, rtol=1e-5, atol=1e-5
    )


def test_fisher_losses_are_those_of_the_loss():
    layers, mask = _features()
    expected = fdk.feature_discrepancy_loss(
        [layer.double() for layer in layers], mask, convention="fisher", reduction="none", backend="reference"
    )
    torch.testing.assert_close(
        discrepancy_losses(layers, mask, "fisher").double(), expected, rtol=1e-5, atol=1e-5
    )


def test_a_loss_over_the_batch_is_taken_sample_by_sample():
    layers, mask = _features()
    losses = discrepancy_losses(layers, mask, "released")
    for n in range(3):
        for index, layer in enumerate(layers):
            (channels,) = [
                oracles.loss(
                    [layer[n : n + 1].double()], mask[n : n + 1], convention="released", reduction="none"
                )
            ]
            assert losses[n, index].item() == pytest.approx(channels.mean().item(), abs=1e-5)


@pytest.mark.parametrize("convention", sorted(fdk.CONVENTIONS))
def test_a_loss_does_not_depend_on_the_samples_beside_it(convention):
    layers, mask = _features(3)
    together = discrepancy_losses(layers, mask, convention)
    alone = [
        discrepancy_losses([layer[n : n + 1] for layer in layers], mask[n : n + 1], convention)
        for n in range(3)
    ]
    assert together.shape == (3, 3)
    torch.testing.assert_close(torch.cat(alone), together)


def test_a_loss_that_leaves_out_empty_regions_is_nan_there():
    layers, mask = _features()
    mask[0], mask[1] = 0, 1
    undefined = discrepancy_losses(layers, mask, "region_mean").isnan()
    assert undefined.tolist() == [[True] * 3, [True] * 3, [False] * 3]
    assert discrepancy_losses(layers, mask, "paper").isfinite().all()


def test_the_eight_symmetries_differ_and_keep_the_pixels():
    image = torch.arange(9.0).reshape(1, 3, 3)
    seen = {tuple(symmetric(image, name).flatten().tolist()) for name in SYMMETRIES}
    assert len(seen) == len(SYMMETRIES) == 8
    assert all(sorted(pixels) == list(range(9)) for pixels in seen)
    assert torch.equal(symmetric(image, "identity"), image)
    assert symmetric(image, "left")[0].tolist() == [[2, 5, 8], [1, 4, 7], [0, 3, 6]]


def test_each_row_is_what_the_network_gives_alone(candidate, network):
    kept = {}
    rows = score(candidate, device=CPU, batch_size=3, keep=lambda index, logits: kept.update({index: logits}))
    data = SegmentationDataset(candidate.samples, size=32)
    assert [row.image for row in rows] == list(candidate.names)
    assert sorted(kept) == list(range(5))
    for index, row in enumerate(rows):
        image, mask = (data[index][name][None] for name in ("image", "mask"))
        with torch.no_grad(), fdk.FeatureTaps(network.eval(), network.tap_names) as taps:
            logits = network(image)
        expected = sample_scores(logits, mask)
        assert row.scores["dice"] == expected["dice"].item()
        assert row.counts["true_positives"] == expected["true_positives"].item()
        losses = [fdk.feature_discrepancy_loss(layer, mask).item() for layer in taps.features]
        assert list(row.layer_losses) == network.tap_names
        assert list(row.layer_losses.values()) == pytest.approx(losses, abs=1e-4)
        torch.testing.assert_close(kept[index], logits[0], rtol=1e-4, atol=1e-5)
        assert (row.patient, row.phase, row.fold) == (candidate.samples[index].patient, "active", 2)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_rows_do_not_depend_on_the_batches(candidate, batch_size):
    expected = score(candidate, device=CPU, batch_size=3)
    for row, other in zip(score(candidate, device=CPU, batch_size=batch_size), expected, strict=True):
        assert row.key == other.key
        assert row.counts == other.counts
        assert row.layer_losses == pytest.approx(other.layer_losses, abs=1e-4)


def test_the_network_sees_each_symmetry_with_its_mask(candidate, network):
    rows = score(candidate, device=CPU, augmented=True)
    assert [(row.image, row.symmetry) for row in rows] == [
        (name, symmetry) for name in candidate.names for symmetry in SYMMETRIES
    ]
    shares = {row.image: set() for row in rows}
    for row in rows:
        shares[row.image].add(row.scores["foreground_share"])
    assert all(len(values) == 1 for values in shares.values())
    plain = [row for row in rows if row.symmetry == "identity"]
    assert [row.counts for row in plain] == [row.counts for row in score(candidate, device=CPU)]
    item = SegmentationDataset(candidate.samples, size=32)[0]
    with torch.no_grad():
        turned = network.eval()(symmetric(item["image"][None], "left"))
    expected = sample_scores(turned, symmetric(item["mask"][None], "left"))
    assert rows[1].symmetry == "left"
    assert rows[1].scores["dice"] == expected["dice"].item()


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_full_float32_holds_while_scoring_alone(precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with repeatable(CPU):
            assert not torch.backends.cuda.matmul.allow_tf32
            assert not torch.backends.cudnn.enabled
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cudnn.enabled
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="this torch has the older name alone"
)
def test_full_float32_holds_where_the_newer_name_was_set():
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "tf32"
    try:
        with repeatable(CPU):
            assert products.fp32_precision == "ieee"
            assert not products.allow_tf32
        assert products.fp32_precision == "tf32"
    finally:
        products.fp32_precision = before


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_on_a_gpu_a_batch_changes_no_bit_and_takes_little_memory():
    torch.manual_seed(0)
    device = torch.device("cuda")
    network = models.create("unet", base_channels=16).to(device).eval()
    images = torch.rand(4, 3, 256, 256, device=device)
    torch.cuda.reset_peak_memory_stats()
    with repeatable(device):
        together = network(images)
        peak = torch.cuda.max_memory_allocated()
        alone = torch.cat([network(image[None]) for image in images])
    assert torch.equal(together, alone)
    assert peak < 2**30
