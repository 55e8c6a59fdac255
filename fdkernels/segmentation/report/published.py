"""The published numbers of Tables 2, 3 and 4, as printed, in percent.

Source: "Causal frameworks and feature discrepancy loss: addressing data scarcity and enhancing medical image
segmentation", Tables 2 to 4 and the conditions of sections 3.1 and A.4. None stands for a number that is not
printed. The differences are taken from the printed scores, as the printed differences are rounded and some
do not fit them.
"""

from __future__ import annotations

from typing import NamedTuple

SOURCE = (
    "Causal frameworks and feature discrepancy loss: addressing data scarcity and enhancing medical image "
    "segmentation"
)
CONDITIONS = (
    "100 epochs with α = 0 and 75 with α trained, Adam at a learning rate of 0.0001 (TNBC, MoNuSeg, UDIAT) "
    "or 0.001 (AD, US-TNBC), 5-fold cross-validation with 70-20-10 % for training, test and validation, "
    "images resized to 512×512 (TNBC, US-TNBC) or 256×256 (UDIAT, AD), flips and quarter turns in training; "
    "the paper states neither seeds nor intervals, nor how Tables 2 and 3 are averaged"
)


class Pair(NamedTuple):
    """Dice and IoU without and with the loss; None where only one is printed."""

    dice: tuple[float, float]
    iou: tuple[float, float]


class Ablation(NamedTuple):
    """A row of Table 2: network and data set (as the command line calls them), and its three sets."""

    model: str
    dataset: str
    worst_off: Pair
    best_off: Pair
    all: Pair


class Score(NamedTuple):
    """A network's row of Table 3 or 4: its name with its source, Dice and IoU."""

    network: str
    dice: float
    iou: float | None


def _row(model: str, dataset: str, without: tuple[float, ...], with_loss: tuple[float, ...]) -> Ablation:
    """Make a row of Dice and IoU of the worst-off, the best-off and all samples, as they are printed."""
    pairs = list(zip(without, with_loss, strict=True))
    return Ablation(model, dataset, *(Pair(pairs[place], pairs[place + 1]) for place in (0, 2, 4)))


TABLE_2 = (
    _row(
        *("attention_unet", "udiat"),
        (22.42, 29.47, 75.86, 68.46, 67.21, 35.61),
        (23.28, 30.31, 77.29, 69.50, 68.96, 38.43),
    ),
    _row(
        *("attention_unet", "tnbc"),
        (77.88, 68.64, 85.82, 74.38, 80.61, 67.79),
        (77.86, 68.66, 86.25, 77.57, 81.16, 69.19),
    ),
    _row(
        *("attention_unet", "monuseg"),
        (66.03, 52.38, 82.57, 73.48, 75.92, 61.28),
        (68.61, 53.06, 83.62, 74.50, 77.97, 62.87),
    ),
    _row(
        *("attention_unet", "ad-256"),
        (56.35, 31.92, 81.34, 70.88, 61.14, 43.87),
        (57.67, 33.10, 85.64, 72.93, 64.69, 46.67),
    ),
    _row(
        *("cmunet", "udiat"),
        (31.56, 26.58, 90.88, 88.25, 81.85, 69.87),
        (33.19, 28.17, 95.32, 90.01, 84.22, 73.02),
    ),
    _row(
        *("cmunet", "us-tnbc"),
        (25.08, 21.44, 86.27, 68.09, 49.59, 34.53),
        (26.94, 22.35, 86.04, 69.35, 50.22, 36.52),
    ),
    _row(
        *("nucleisegnet", "tnbc"),
        (77.29, 68.00, 86.49, 71.29, 81.69, 69.22),
        (79.40, 68.42, 88.82, 72.58, 82.65, 70.58),
    ),
    _row(
        *("nucleisegnet", "monuseg"),
        (63.95, 50.05, 84.61, 70.40, 80.95, 67.91),
        (64.61, 52.11, 84.96, 71.65, 81.69, 68.65),
    ),
    _row(
        *("nucleisegnet", "ad-256"),
        (32.55, 23.19, 64.75, 46.28, 51.15, 36.17),
        (35.78, 25.46, 71.15, 51.35, 56.57, 40.61),
    ),
)

TABLE_3 = {
    "tnbc": (
        Score("AttnUNet, Jiménez et al. (2022)", 80.61, 67.79),
        Score("AWGUNet, Roy et al. (2024b)", 81.65, 69.18),
        Score("GRUNet, Roy et al. (2024a)", 80.24, 66.25),
        Score("MCFNet, Feng et al. (2021)", 73.37, 57.94),
        Score("Deep-Fuzz, Das et al. (2023)", 77.80, 64.20),
        Score("NuSegNet, Lal et al. (2021)", 81.69, 69.22),
        Score("CellTrip, Keaton et al. (2023)", 77.68, 59.06),
        Score("ASNet, Singha & Bhowmik (2023)", 66.88, None),
        Score("MMPSO-S, Kanadath et al. (2023)", 65.00, 49.0),
        Score("the paper's, with the loss", 82.65, 70.58),
    ),
    "udiat": (
        Score("UNet, Ronneberger et al. (2015)", 75.00, 65.00),
        Score("AttnUNet, Jiménez et al. (2022)", 68.96, 55.00),
        Score("CMUNet, Tang et al. (2023)", 81.85, 69.87),
        Score("SCAN, Zhang et al. (2020)", 74.00, 65.00),
        Score("STAN, Shareef et al. (2020)", 78.20, 69.50),
        Score("RRC-Net, Chen et al. (2023)", 80.40, 71.81),
        Score("EU²Net, Roy et al. (2024c)", 83.47, 72.11),
        Score("CE-Net, Gu et al. (2019)", 72.00, 61.00),
        Score("DAUNet, Pramanik et al. (2024)", 78.58, 64.71),
        Score("the paper's, with the loss", 84.22, 73.02),
    ),
    "monuseg": (
        Score("NuSegNet, Lal et al. (2021)", 80.95, 67.91),
        Score("MedT, Valanarasu et al. (2021)", 79.55, 66.17),
        Score("HistoSeg, Wazir & Fraz (2022)", 75.08, 71.06),
        Score("SPPNet, Xu et al. (2023)", 79.77, 66.43),
        Score("D-Net, Islam Sumon et al. (2023)", 73.20, 58.00),
        Score("MMPSO-S, Kanadath et al. (2023)", 72.00, 56.00),
        Score("TSCA-Net, Fu et al. (2024)", 80.23, 67.13),
        Score("GRUNet, Roy et al. (2024a)", 80.35, 67.21),
        Score("AWGUNet, Roy et al. (2024b)", 79.46, 66.57),
        Score("the paper's, with the loss", 81.69, 68.65),
    ),
}

# Printed with ± and a second number, whose meaning the paper does not state.
TABLE_4 = {
    "ad-128": (
        Score("UNet, Jiménez et al. (2022)", 68.52, None),
        Score("AttnUNet, Jiménez et al. (2022)", 70.02, 56.83),
        Score("NuSegNet, Tomar et al. (2022b)", 72.53, 54.47),
        Score("the paper's AttnUNet, with the loss", 71.18, 58.11),
        Score("the paper's NuSegNet, with the loss", 74.27, 56.51),
    ),
    "ad-256": (
        Score("UNet, Jiménez et al. (2022)", 64.60, None),
        Score("AttnUNet, Jiménez et al. (2022)", 61.14, 43.87),
        Score("NuSegNet, Tomar et al. (2022b)", 51.15, 36.17),
        Score("the paper's AttnUNet, with the loss", 64.69, 46.67),
        Score("the paper's NuSegNet, with the loss", 56.57, 40.61),
    ),
}

__all__ = ["CONDITIONS", "SOURCE", "TABLE_2", "TABLE_3", "TABLE_4", "Ablation", "Pair", "Score"]
