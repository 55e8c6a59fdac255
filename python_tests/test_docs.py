"""What the documentation shows runs, and the slow lines beside the derivations equal the ops."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fdkernels as fdk
from fdkernels.op.weights import weights_of

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fdkernels"
DERIVATION = PACKAGE / "op" / "README.md"
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
        "device": torch.device("cpu"),
        "images": images,
        "masks": masks,
        "segmentation_loss": torch.nn.BCEWithLogitsLoss(),
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


def test_the_slow_lines_of_the_derivation_equal_the_op():
    features, mask, size = torch.randn(2, 3, 4, 4), torch.rand(2, 1, 9, 8), torch.Size((4, 4))
    names = {"torch": torch, "features": features, "mask": mask, "size": size, "eps": 1e-12}
    weights, sums, loss = [code for _, code in blocks(DERIVATION)]

    run(DERIVATION, weights, names)
    op_weights = weights_of(mask, [size], torch.float32, "area", None)
    torch.testing.assert_close(names["w_fg"], op_weights.fg[0])

    run(DERIVATION, sums, names)
    op_sums = fdk.region_sums(features, mask)
    torch.testing.assert_close(names["fg"], op_sums.fg)
    torch.testing.assert_close(names["bg"], op_sums.bg)

    names["valid"] = op_sums.fg_mass + op_sums.bg_mass
    run(DERIVATION, loss, names)
    torch.testing.assert_close(names["loss"], fdk.feature_discrepancy_loss(features, mask))


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


@pytest.mark.parametrize("letter", "MRLF")
def test_every_tag_that_the_code_cites_is_in_the_derivation(letter):
    tags = set(re.findall(r"\\tag\{(\w+)\}", DERIVATION.read_text(encoding="utf-8")))
    sources = [path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts]
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
