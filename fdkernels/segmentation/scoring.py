"""Score a trained network sample by sample, with the discrepancy loss of each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fdkernels as fdk
from fdkernels.conventions import get_convention
from fdkernels.models import SegmentationNetwork
from fdkernels.op.weights import weights_of
from fdkernels.segmentation.batches import evaluation_loader
from fdkernels.segmentation.data import SegmentationSample, default_workers
from fdkernels.segmentation.metrics import COUNTS, SCORES, sample_scores

# The eight symmetries of the square: quarter turns to the left, and whether a mirror image is turned.
SYMMETRIES = {
    "identity": (0, False),
    "left": (1, False),
    "half turn": (2, False),
    "right": (3, False),
    "mirrored": (0, True),
    "mirrored left": (1, True),
    "mirrored half turn": (2, True),
    "mirrored right": (3, True),
}


@dataclass(frozen=True)
class SampleScores:
    """The scores of one network on one image.

    Attributes:
        image: its path, relative to the folder of the data.
        patient: the patient of the image.
        phase: the phase of the run whose best weights were scored.
        fold: number of the fold, None without folds.
        symmetry: one of `SYMMETRIES`, under which the network saw the image.
        scores: `metrics.SCORES` and "foreground_share"; NaN where a score is not defined.
        counts: pixels, by `metrics.COUNTS`.
        layer_losses: L_fd by the name of the layer; NaN where it is not defined.
    """

    image: str
    patient: str
    phase: str
    fold: int | None
    symmetry: str
    scores: dict[str, float]
    counts: dict[str, int]
    layer_losses: dict[str, float]

    @property
    def key(self) -> tuple[int, str, str]:
        """Identify the image across phases and runs of the same split."""
        return self.fold or 0, self.image, self.symmetry


@dataclass(frozen=True)
class Candidate:
    """A network to be scored, with the images to score it on.

    Attributes:
        load: loads the network with its weights.
        samples: the images; `names` are their paths relative to the folder of the data.
        size: side in pixels at which the network sees them; None keeps the size of the file.
        convention: the convention of L_fd.
        phase, fold: as in `SampleScores`.
    """

    load: Callable[[], SegmentationNetwork]
    samples: Sequence[SegmentationSample]
    names: Sequence[str]
    size: int | None
    convention: str
    phase: str
    fold: int | None = None


def symmetric(images: Tensor, symmetry: str) -> Tensor:
    """Apply one of `SYMMETRIES` to images [..., H, W]; pixels are moved, never interpolated."""
    turns, mirrored = SYMMETRIES[symmetry]
    return (images.flip(-1) if mirrored else images).rot90(turns, (-2, -1))


def discrepancy_losses(features: Sequence[Tensor], mask: Tensor, convention: str) -> Tensor:
    """Compute L_fd of each sample and layer, without exchange, float [N, L].

    Where a convention sums D over the batch ("released"), each sample is a batch of its own and
    the mean over channels is taken, so that the value does not depend on the samples beside it.
    Where it leaves out samples with an empty region ("region_mean"), their value is NaN.

    Args:
        features: of L layers, [N, C, *S] each.
        mask: [N, 1, *S0], 0 or 1.
        convention: a name of `fdkernels.CONVENTIONS`.

    References:
        Equation 1; the paper's Figures 1 and 4 draw it against Dice.
    """
    how = get_convention(convention)
    if how.norm == "batch":
        return torch.stack(
            [
                torch.stack(
                    [
                        fdk.feature_discrepancy_loss(layer[n : n + 1], mask[n : n + 1], convention=how)
                        for layer in features
                    ]
                )
                for n in range(len(mask))
            ]
        )
    losses = fdk.feature_discrepancy_loss(list(features), mask, convention=how, reduction="none")
    losses = losses.reshape(len(mask), len(features))
    if how.region_weight != "region":
        return losses
    sizes = [layer.shape[2:] for layer in features]
    weights = weights_of(mask, sizes, losses.dtype, how.mask_resize, None).fg  # [N, P_l] for each layer
    empty = [(fg == 0).all(dim=1) | (fg == 1).all(dim=1) for fg in weights]  # no foreground, no background
    return losses.masked_fill(torch.stack(empty, dim=1), float("nan"))


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Turn off gradients and, on a GPU, convolve each image by itself in full float32.

    cuDNN chooses its algorithm by the shape of the batch, and in full float32 at 512² some took 50 GiB to
    work in; torch's own convolutions take image by image.
    """
    with (
        torch.inference_mode(),
        torch.backends.cudnn.flags(enabled=False),
        _full_float32_products(),
        torch.autocast(device.type, enabled=False),
    ):
        yield


@contextmanager
def _full_float32_products() -> Iterator[None]:
    """Keep matrix products on a GPU from TensorFloat-32, whatever `set_float32_matmul_precision` says."""
    products = torch.backends.cuda.matmul
    name: str
    full: bool | str
    name, full = "allow_tf32", False
    try:
        before = getattr(products, name)
    except RuntimeError:  # torch refuses to read it where the newer name was set otherwise
        name, full = "fp32_precision", "ieee"
        before = getattr(products, name)
    setattr(products, name, full)
    try:
        yield
    finally:
        setattr(products, name, before)


def score(
    candidate: Candidate,
    *,
    device: torch.device,
    batch_size: int = 4,
    workers: int | None = None,
    augmented: bool = False,
    keep: Callable[[int, Tensor], Any] | None = None,
    advance: Callable[[int], Any] | None = None,
) -> list[SampleScores]:
    """Score a network on its samples; return the scores in their order.

    The network is in evaluation mode and computes in float32, so that the numbers do not depend on
    the batch an image is in, beyond float32's rounding.

    Args:
        candidate: the network and its samples.
        device: where it runs.
        batch_size: images a step.
        workers: processes that read images; None chooses by their number.
        augmented: also score the seven other symmetries of each image (section A.4: more data
            points for the plots).
        keep: called with the index of each sample and its logits [1, H, W], on the CPU.
        advance: called after each step with its number of images.

    Raises:
        ValueError: an image cannot be read, the network does not take its size, or it puts out NaN.
    """
    network = candidate.load().to(device).eval()
    loader = evaluation_loader(
        candidate.samples,
        size=candidate.size,
        batch_size=batch_size,
        workers=default_workers(len(candidate.samples)) if workers is None else workers,
    )
    found: list[SampleScores] = []
    start = 0
    for batch in loader:
        images, masks = batch["image"].to(device), batch["mask"].to(device)
        by_symmetry = []
        for symmetry in SYMMETRIES if augmented else ("identity",):
            with (
                repeatable(device),
                fdk.FeatureTaps(network, network.tap_names) as taps,
            ):
                mask = symmetric(masks, symmetry).contiguous()
                logits = network(symmetric(images, symmetry).contiguous())
                _check_output(candidate, start, logits)
                losses = discrepancy_losses(taps.features, mask, candidate.convention).cpu()  # [N, L]
            by_symmetry.append(
                _rows(candidate, start, symmetry, sample_scores(logits, mask), network.tap_names, losses)
            )
            if keep is not None and symmetry == "identity":
                for place, one in enumerate(logits.cpu()):
                    keep(start + place, one)
        found.extend(row for rows in zip(*by_symmetry, strict=True) for row in rows)
        start += len(images)
        if advance is not None:
            advance(len(images))
    return found


def _check_output(candidate: Candidate, start: int, logits: Tensor) -> None:
    """Refuse logits [N, 1, H, W] with NaN, which would be scored as background; name the first image."""
    failed = logits.isnan().flatten(start_dim=1).any(dim=1).tolist()
    if any(failed):
        fold = "" if candidate.fold is None else f" of fold {candidate.fold}"
        raise ValueError(
            f"{candidate.names[start + failed.index(True)]} cannot be scored: the network of phase "
            f"{candidate.phase}{fold} puts out NaN for it, which is neither foreground nor background; its "
            "weights, or the statistics of its batch norms, are not finite or overflow"
        )


def _rows(
    candidate: Candidate,
    start: int,
    symmetry: str,
    scores: dict[str, Tensor],
    layers: Sequence[str],
    losses: Tensor,
) -> list[SampleScores]:
    """Make the rows of one batch; `start` is the index of its first sample."""
    return [
        SampleScores(
            image=candidate.names[start + place],
            patient=candidate.samples[start + place].patient,
            phase=candidate.phase,
            fold=candidate.fold,
            symmetry=symmetry,
            scores={name: scores[name][place].item() for name in (*SCORES, "foreground_share")},
            counts={name: int(scores[name][place]) for name in COUNTS},
            layer_losses=dict(zip(layers, losses[place].tolist(), strict=True)),
        )
        for place in range(len(losses))
    ]


__all__ = [
    "SYMMETRIES",
    "Candidate",
    "SampleScores",
    "discrepancy_losses",
    "repeatable",
    "score",
    "symmetric",
]
