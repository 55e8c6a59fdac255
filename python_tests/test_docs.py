"""What the documentation shows runs, and the slow lines beside the derivations equal the ops."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fdkernels as fdk
from fdkernels.layer_masks import layer_masks

ROOT = Path(__file__).resolve().parents[1]
STAGES = ROOT / "fdkernels"
BLOCK = re.compile(r"(?P<before>[^\n]*)\n```python\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(path: Path) -> list[tuple[str, str]]:
    """The Python blocks of a page with the line above each; the lines of the code are those of the page."""
    text = "\n" + path.read_text(encoding="utf-8")
    return [
        (match["before"].strip(), "\n" * (text.count("\n", 0, match.start("code")) - 1) + match["code"])
        for match in BLOCK.finditer(text)
    ]


def run(path: Path, code: str, names: dict[str, Any]) -> dict[str, Any]:
    exec(compile(code, str(path), "exec"), names)
    return names


def what_a_reader_has() -> dict[str, Any]:
    """What `<!-- setup: ... -->` above a block may name."""
    model = fdk.models.create("unet", in_channels=3, num_classes=1, base_channels=4)
    images, masks = torch.rand(2, 3, 32, 32), (torch.rand(2, 1, 32, 32) > 0.5).float()
    return {
        "model": model,
        "images": images,
        "masks": masks,
        "segmentation_loss": torch.nn.BCEWithLogitsLoss(),
        "optimizer": torch.optim.Adam(model.parameters()),
        "features": torch.randn(2, 8, 16, 16, requires_grad=True),
        "mask": masks,
    }


def test_the_blocks_of_the_readme_run(tmp_path, monkeypatch):
    readme = ROOT / "README.md"
    found = blocks(readme)
    assert found
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}  # a block may use what the blocks above it made
    for before, code in found:
        if before == "<!-- not run -->":
            continue
        setup = re.fullmatch(r"<!-- setup: (.*) -->", before)
        given = what_a_reader_has()
        names |= {name: given[name] for name in (setup[1].split(", ") if setup else ())}
        run(readme, code, names)


def slow_line(stage: str, names: dict[str, Any]) -> dict[str, Any]:
    """What the one Python block of a stage's derivation computes."""
    page = STAGES / stage / "README.md"
    ((_, code),) = blocks(page)
    return run(page, code, names)


def test_the_slow_line_of_region_sums_equals_the_op():
    features, mask = torch.randn(2, 3, 5, 4), torch.rand(2, 1, 5, 4)
    slow = slow_line("region_sums", {"features": features, "mask": mask})
    sums = fdk.region_sums(features, mask)
    torch.testing.assert_close(slow["fg"], sums.fg)
    torch.testing.assert_close(slow["bg"], sums.bg)


def test_the_slow_line_of_log_norm_equals_the_op():
    features, mask = torch.randn(2, 3, 5, 4), torch.rand(2, 1, 5, 4)
    sums = fdk.region_sums(features, mask)
    names = {"fg": sums.fg, "bg": sums.bg, "valid": sums.fg_mass + sums.bg_mass, "eps": 1e-12}
    slow = slow_line("log_norm", names)
    torch.testing.assert_close(slow["loss"], fdk.feature_discrepancy_loss(features, mask))


def test_the_slow_line_of_layer_masks_equals_the_op():
    mask, size = torch.rand(2, 1, 9, 8), torch.Size((4, 4))
    slow = slow_line("layer_masks", {"torch": torch, "mask": mask, "size": size})
    masks = layer_masks(mask, [size], torch.float32, "area", None)
    torch.testing.assert_close(slow["fg"], masks.fg[0])
    torch.testing.assert_close(slow["bg"], 1 - masks.fg[0])


def test_the_slow_line_of_layer_losses_equals_the_op():
    features, mask = torch.randn(2, 3, 5, 4), torch.rand(2, 1, 5, 4)
    slow = slow_line("layer_losses", {"features": features, "mask": mask, "eps": 1e-12})
    torch.testing.assert_close(slow["loss"], fdk.feature_discrepancy_loss(features, mask))


@pytest.mark.parametrize("function", [fdk.feature_discrepancy_loss, fdk.region_sums], ids=["loss", "sums"])
def test_the_slow_line_of_the_docstring_equals_the_op(function):
    example = re.search(r"replaces::\n\n(.*?)\n\n", function.__doc__, re.DOTALL)
    code = re.sub(r"^ {8}", "", example[1], flags=re.MULTILINE)
    features, mask = torch.randn(2, 3, 5, 4), torch.rand(2, 1, 5, 4)
    names = {"features": features, "mask": mask, "eps": 1e-12}
    exec(code, names)
    if function is fdk.region_sums:
        torch.testing.assert_close(names["fg"], fdk.region_sums(features, mask).fg)
        torch.testing.assert_close(names["bg"], fdk.region_sums(features, mask).bg)
    else:
        torch.testing.assert_close(names["loss"], fdk.feature_discrepancy_loss(features, mask))


TAG_LETTERS = {"layer_masks": "M", "region_sums": "R", "log_norm": "L", "layer_losses": "F"}


@pytest.mark.parametrize("stage", TAG_LETTERS)
def test_every_tag_that_the_code_cites_is_in_the_derivation(stage):
    tags = set(re.findall(r"\\tag\{(\w+)\}", (STAGES / stage / "README.md").read_text(encoding="utf-8")))
    sources = [path for path in STAGES.rglob("*.py") if "__pycache__" not in path.parts]
    letter = TAG_LETTERS[stage]
    cited = {
        tag for path in sources for tag in re.findall(rf"\(({letter}\d+)\)", path.read_text(encoding="utf-8"))
    }
    assert cited
    assert cited <= tags


@pytest.mark.parametrize("name", fdk.__all__)
def test_every_public_name_is_documented(name):
    value = getattr(fdk, name)
    if callable(value) or name == "models":
        assert value.__doc__
        assert value.__doc__.strip()
