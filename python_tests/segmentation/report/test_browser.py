"""The page in a browser: every figure is on the screenshot, pixel by pixel."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fdkernels.segmentation.report.build import build_page
from fdkernels.segmentation.report.page import Page, Picture, Section
from fdkernels.segmentation.report.render import html, pictures_of
from made_up_report import PageReader, made_up_rows, write_experiment, write_logged_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTH = 1200
LEFT = 24  # of the page's content at this width
SHADES = 6  # by which a browser may round a colour

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")


def screenshot(folder: Path, text: str, height: int) -> np.ndarray:
    """Take a screenshot of HTML, [H, W, 3]; no request leaves the machine."""
    page, picture = folder / "page.html", folder / "screenshot.png"
    page.write_text(text, "utf-8")
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *("--hide-scrollbars", "--force-device-scale-factor=1", "--no-first-run"),
        *("--force-color-profile=srgb", "--proxy-server=127.0.0.1:9"),
        *(f"--user-data-dir={folder / 'profile'}", f"--window-size={WIDTH},{height}"),
        *(f"--screenshot={picture}", page.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert picture.is_file(), done.stderr[-2000:]
    return np.asarray(Image.open(picture).convert("RGB")).astype(int)


def is_seen(pixels: np.ndarray, drawn: np.ndarray) -> bool:
    """Tell whether a picture [h, w, 3], with whatever it shows, is somewhere at the left of a screenshot."""
    height, width, _ = drawn.shape
    telling = int(drawn.std(axis=(1, 2)).argmax())  # the row with most to see
    strip = pixels[:, LEFT : LEFT + width]
    rows = np.flatnonzero((np.abs(strip - drawn[telling]) <= SHADES).all(axis=(1, 2))) - telling
    return any(
        0 <= row <= len(pixels) - height and (np.abs(strip[row : row + height] - drawn) <= SHADES).all()
        for row in rows
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Page:
    root = tmp_path_factory.mktemp("folders")
    write_experiment(root / "ablation", "ablation", made_up_rows({"without": 0.5, "with": 0.6}, seeds=[0]))
    write_experiment(root / "shift", "shift", made_up_rows({"before": 0.5, "after": 0.6}), runs=False)
    write_experiment(root / "figure_1", "correlation", made_up_rows({"before": 0.5}), runs=False)
    addition = made_up_rows({"plain-0": 0.5, "plain-10": 0.5, "loss-0": 0.6, "loss-10": 0.6})
    write_experiment(root / "addition", "addition", addition, runs=False)
    write_logged_run(root / "run")
    with pytest.MonkeyPatch.context() as patch:
        # So small that the browser does not scale them.
        patch.setattr("fdkernels.segmentation.report.drawing.DOTS", 72)
        return build_page([root])


def test_the_page_is_not_blank(page, tmp_path):
    pixels = screenshot(tmp_path, html(page), 900)
    assert pixels.shape == (900, WIDTH, 3)
    for half in (pixels[:450], pixels[450:]):
        assert (half.min(axis=-1) < 128).mean() > 0.005


def test_every_figure_is_seen(page, tmp_path):
    pictures = list(pictures_of(page))
    kinds = {picture.name.split("-", 2)[2] for picture in pictures}
    assert {"differences", "layers-1", "final-alpha", "shift", "correlation-1", "addition"} <= kinds
    assert {"learning-curves", "layers"} <= kinds
    text = html(Page("Figures", (), (Section("All", tuple(pictures)),)))
    drawn = [np.asarray(picture).astype(int) for picture in PageReader(text).pictures()]
    pixels = screenshot(tmp_path, text, sum(len(one) + 150 for one in drawn))
    assert [
        picture.name for picture, one in zip(pictures, drawn, strict=True) if not is_seen(pixels, one)
    ] == []


def test_a_broken_picture_is_not_seen(page, tmp_path):
    picture = next(pictures_of(page))
    broken = Picture(picture.name, picture.png[:100], picture.caption, picture.alt)
    (drawn,) = PageReader(html(Page("", (), (Section("", (picture,)),)))).pictures()
    pixels = screenshot(tmp_path, html(Page("", (), (Section("", (broken,)),))), 900)
    assert not is_seen(pixels, np.asarray(drawn).astype(int))
