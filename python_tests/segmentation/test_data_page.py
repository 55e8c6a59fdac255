"""The page of the data sets agrees with the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fdkernels as fdk
from fdkernels.segmentation.data import DATASETS, reading
from tiny_data import make_tiny

PAGE = Path(reading.__file__).with_name("README.md")


@pytest.fixture(scope="module")
def text():
    return PAGE.read_text("utf-8")


def _section(text, name):
    (found,) = [
        part for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:] if f"`{name}`" in part.split("\n")[0]
    ]
    return found


@pytest.mark.parametrize("name", DATASETS)
def test_each_data_set_has_a_section_with_source_licence_layout_and_command(text, name):
    section = _section(text, name)
    for part in ("**Where:**", "**Licence:**", "**Cite:**", "```text\nDIR/"):
        assert part in section
    presets = re.findall(r"^fdkernels train --preset (\S+) --data DIR .*--output \S+$", section, re.MULTILINE)
    (preset,) = [preset for preset in presets if preset.startswith(f"{name}-")]
    assert preset.removeprefix(f"{name}-") in fdk.models.names()


@pytest.mark.parametrize("name", DATASETS)
def test_the_table_equals_the_presets(text, name):
    (row,) = re.findall(rf"^\| \[`{name}`\]\((\S+)\) \|(.*)\|$", text, re.MULTILINE)
    cells = [cell.strip() for cell in row[1].split("|")]
    preset = DATASETS[name]
    assert [int(cells[3]), float(cells[4])] == [preset.size, preset.lr]
    assert cells[5] == ("" if preset.worst_off is None else str(preset.worst_off))
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    anchors = {"#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert row[0] in anchors


def test_the_example_runs(text, tmp_path, capsys, monkeypatch):
    make_tiny("busi", tmp_path / "DIR")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(compile(code, str(PAGE), "exec"), names)
    assert len(names["train"]) == 7
    assert capsys.readouterr().out == "\n"


def test_the_named_limits_are_those_of_the_code(text):
    from fdkernels.segmentation.data import foreground, polygons

    assert f"`{reading.LIMIT_VARIABLE}`" in text
    assert polygons._MOST_BYTES == 64 * 2**20
    assert foreground.GREY == foreground._FLAT == 1 / 5
