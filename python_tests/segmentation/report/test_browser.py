"""The page in a browser: every figure is on the screenshot, and no picture is broken."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fdkernels.segmentation.report.build import build_page
from fdkernels.segmentation.report.page import Page, Section
from fdkernels.segmentation.report.render import html, pictures_of
from made_up_report import PageReader, made_up_rows, write_experiment, write_logged_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SIZE = (1200, 900)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")


def screenshot(folder: Path, text: str) -> np.ndarray:
    """Take a screenshot of HTML, [H, W, 3]; no request leaves the machine, and scripts are off."""
    page, picture = folder / "page.html", folder / "screenshot.png"
    page.write_text(text, "utf-8")
    picture.unlink(missing_ok=True)
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *("--hide-scrollbars", "--force-device-scale-factor=1", "--no-first-run"),
        *("--proxy-server=127.0.0.1:9", "--blink-settings=scriptEnabled=false"),
        *(f"--user-data-dir={folder / 'profile'}", f"--window-size={SIZE[0]},{SIZE[1]}"),
        *(f"--screenshot={picture}", page.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert picture.is_file(), done.stderr[-2000:]
    return np.asarray(Image.open(picture).convert("RGB")).astype(int)


def inked(pixels: np.ndarray) -> int:
    """Count pixels that are not almost white."""
    return int((pixels.min(axis=-1) < 200).sum())


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Page:
    root = tmp_path_factory.mktemp("folders")
    write_experiment(root / "ablation", "ablation", made_up_rows({"without": 0.5, "with": 0.6}, seeds=[0]))
    write_experiment(root / "shift", "shift", made_up_rows({"before": 0.5, "after": 0.6}), runs=False)
    write_experiment(root / "figure_1", "correlation", made_up_rows({"before": 0.5}), runs=False)
    addition = made_up_rows({"plain-0": 0.5, "plain-10": 0.5, "loss-0": 0.6, "loss-10": 0.6})
    write_experiment(root / "addition", "addition", addition, runs=False)
    write_logged_run(root / "run")
    return build_page([root])


def test_the_page_is_not_blank(page, tmp_path):
    pixels = screenshot(tmp_path, html(page))
    assert pixels.shape == (SIZE[1], SIZE[0], 3)
    assert inked(pixels) > 5000
    assert inked(pixels[: SIZE[1] // 2]) > 1000


def test_every_figure_is_seen(page, tmp_path):
    """Each figure by itself: the screenshot of it holds its ink, and one with a broken picture does not."""
    pictures = list(pictures_of(page))
    kinds = {picture.name.split("-", 2)[2] for picture in pictures}
    expected = {"differences", "layers-1", "final-alpha", "shift", "correlation-1", "addition"}
    assert expected <= kinds
    assert {"learning-curves", "layers"} <= kinds
    for picture in pictures:
        alone = Page("", "", (Section("", (replace(picture, caption="", alt=""),)),))
        text = html(alone)
        (drawn,) = PageReader(text).pictures()
        seen = screenshot(tmp_path, text)
        broken = screenshot(tmp_path, text.replace(";base64,iVBOR", ";base64,AAAAA"))
        # The browser scales the picture to the width of the page.
        scale = min(1.0, SIZE[0] / drawn.width) ** 2
        gained = inked(seen) - inked(broken)
        assert gained > 0.3 * scale * inked(np.asarray(drawn).astype(int)), picture.name
        colours = {tuple(colour) for colour in np.unique(seen.reshape(-1, 3) // 32, axis=0)}
        assert len(colours) > 4, picture.name
