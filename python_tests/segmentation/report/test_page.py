"""The page as files: HTML that needs nothing else, Markdown with its pictures, names that break neither."""

from __future__ import annotations

import io
import re
import sys

import pytest
from PIL import Image

from fdkernels.segmentation.report.page import (
    Notes,
    Page,
    Picture,
    Section,
    Table,
    Text,
    duration,
    interval_text,
    number,
)
from fdkernels.segmentation.report.render import PICTURES, html, markdown, write_page
from made_up_report import PageReader

HOSTILE = [
    '<script>alert("1")</script>',
    '"><img src=http://example.org/x.png>',
    "{{ page.title }}{% raw %}",
    "a|b\n# c",
    "[x](http://example.org) `code` *bold* <b>",
    "&lt;&amp;",
    "bad\udce9name.png",
]


def picture(name: str = "one", colour: str = "red", alt: str = "a red square") -> Picture:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), colour).save(file, "PNG")
    return Picture(name, file.getvalue(), "A square.", alt)


def page(*blocks, title: str = "Title", summary: str = "Sum.") -> Page:
    return Page(title, (summary,), (Section("Part", blocks),))


def test_html_needs_nothing_else():
    whole = page(
        Text("A paragraph."), Notes(("One.", "Two.")), picture(), Table("T", ("a", "b"), (("x", "1"),))
    )
    text = html(whole)
    reader = PageReader(text)
    (image,) = reader.pictures()
    assert image.getpixel((0, 0)) == (255, 0, 0)
    assert reader.images[0]["alt"] == "a red square"
    assert not {"script", "link", "iframe", "object"} & set(reader.elements)
    assert not re.search("https?:", text)
    assert "@import" not in text
    assert "url(" not in text
    assert next(value for _, name, value in reader.attributes if name in ("src", "href")) == "#section-1"


def test_numbers_are_aligned_right_and_words_left():
    table = Table("T", ("word", "number"), (("x", "1"), ("y", "−2")), own=frozenset({1}))
    reader = PageReader(html(page(table)))
    cells = [value for tag, name, value in reader.attributes if tag in ("td", "th") and name == "class"]
    assert cells == ["word", "number"] * 3
    assert reader.table("T") == [["word", "number"], ["x", "1"], ["y", "−2"]]
    assert [value for tag, name, value in reader.attributes if tag == "tr"] == ["own"]
    assert "| --- | ---: |\n| x | 1 |\n| **y** | −2 |\n" in markdown(page(table))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_breaks_no_page(tmp_path, name):
    blocks = (Text(name), Notes((name,)), Table(name, (name, "n"), ((name, "1"),)), picture(alt=name))
    paths = write_page(page(*blocks, title=name, summary=name), tmp_path)
    printed = name.encode("utf-8", "backslashreplace").decode()
    reader = PageReader(paths[0].read_text("utf-8"))
    assert "script" not in reader.elements
    assert len(reader.images) == 1
    assert reader.images[0]["alt"] == printed
    assert reader.tables == [[[printed, "n"], [printed, "1"]]]
    assert reader.text.count(printed) >= 6
    text = paths[1].read_text("utf-8")
    rows = [line for line in text.splitlines() if re.match(r"\|", line)]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [3, 3, 3]
    # Nothing of it is left that Markdown would read as markup.
    assert not re.search(r"(?<!\\)<", text)
    assert not re.search(r"(?<!\\)\]\(http", text)
    assert len(re.findall(r"^# ", text, flags=re.MULTILINE)) == 1


def test_the_markdown_names_pictures_that_exist(tmp_path):
    _, text = write_page(page(picture(), picture("two", "blue", "a [blue] square")), tmp_path)
    named = re.findall(r"^!\[(.*)\]\((\S+)\)$", text.read_text("utf-8"), flags=re.MULTILINE)
    assert [alt for alt, _ in named] == ["a red square", r"a \[blue\] square"]
    colours = [Image.open(tmp_path / path).getpixel((0, 0)) for _, path in named]
    assert colours == [(255, 0, 0), (0, 0, 255)]


def test_a_later_report_replaces_the_pictures_and_leaves_other_files(tmp_path):
    write_page(page(picture(), picture("two", "blue")), tmp_path)
    foreign = tmp_path / PICTURES / "Photo.png"
    foreign.write_bytes(b"mine")
    write_page(page(picture("one", "green")), tmp_path)
    names = sorted(path.name for path in (tmp_path / PICTURES).iterdir())
    assert len(names) == 2
    assert names[0] == "Photo.png"
    assert names[1].startswith("one-")


def test_a_write_that_fails_leaves_the_earlier_report(tmp_path, monkeypatch):
    write_page(page(Text("First.")), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def broken(page):
        raise RuntimeError("broken")

    monkeypatch.setitem(write_page.__globals__, "markdown", broken)
    with pytest.raises(RuntimeError, match="broken"):
        write_page(page(Text("Second."), picture()), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_output_may_not_be_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="output must be a folder, got the file"):
        write_page(page(), tmp_path / "file")


def test_without_jinja_a_sentence_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "fdkernels\[report\]"') as caught:
        html(page())
    assert caught.value.name == "jinja2"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.12345, "0.123"),
        (-0.5, "−0.500"),
        (0.0000123, "1.2e−05"),
        (0.0, "0.000"),
        (None, "–"),
        (float("nan"), "–"),
        (float("-inf"), "−∞"),
        (-3, "−3"),
        (True, "–"),
    ],
)
def test_numbers(value, text):
    assert number(value) == text


def test_intervals_and_times():
    assert interval_text((-0.5, 1.25), 2) == "−0.50 to +1.25"
    assert interval_text(None) == "–"
    times = [duration(seconds) for seconds in (None, 3.21, 41, 200, 7500)]
    assert times == ["–", "3.2 s", "41 s", "3 min 20 s", "2 h 5 min"]


def test_a_table_refuses_a_row_of_another_length():
    with pytest.raises(ValueError, match="a row must have 2 cells"):
        Table("T", ("a", "b"), (("x",),))
