"""Write a page as one HTML file and as Markdown with its pictures in a folder beside it."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdkernels.segmentation.report.page import Notes, Page, Picture, Table, Text
from fdkernels.segmentation.report.templates import HTML, MARKDOWN
from fdkernels.segmentation.runfiles import replacing

if TYPE_CHECKING:
    from jinja2 import Environment

PICTURES = "report_pictures"
# Of pictures that this module has written into that folder: a name and eight digits of its content.
_WRITTEN = re.compile(r"[a-z0-9-]+-[0-9a-f]{8}\.png")

_TESTS = {"text_block": Text, "notes_block": Notes, "table_block": Table}


class _Raw(str):
    """Markdown that is not escaped."""

    __slots__ = ()


def check_jinja() -> None:
    """Say what to install where Jinja2 is missing.

    Raises:
        ModuleNotFoundError: it is.
    """
    try:
        import jinja2  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'a report needs Jinja2, which is not installed: pip install "fdkernels[report]"', name="jinja2"
        ) from error


def html(page: Page) -> str:
    """Give the page as HTML: pictures are inside, nothing is loaded, no script is needed."""
    check_jinja()
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    environment.filters["data_uri"] = _data_uri
    return _render(environment, HTML, page)


def markdown(page: Page) -> str:
    """Give the page as Markdown; pictures are files of `PICTURES`, by `picture_file`."""
    check_jinja()
    from jinja2 import Environment, StrictUndefined

    # Every expression is escaped, as autoescape does for HTML.
    environment = Environment(
        autoescape=False, undefined=StrictUndefined, trim_blocks=True, finalize=_escaped
    )
    environment.filters["file"] = lambda picture: _Raw(f"{PICTURES}/{picture_file(picture)}")
    environment.globals["raw"] = _Raw
    return re.sub(r"\n{3,}", "\n\n", _render(environment, MARKDOWN, page)).strip() + "\n"


def _render(environment: Environment, template: str, page: Page) -> str:
    for name, kind in _TESTS.items():
        environment.tests[name] = lambda block, kind=kind: isinstance(block, kind)
    return environment.from_string(template).render(page=page)


def _data_uri(picture: Picture) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture.png).decode('ascii')}"


def _escaped(value: Any) -> Any:
    """Escape what Markdown would take for markup, and break no line."""
    if not isinstance(value, str) or isinstance(value, _Raw):
        return value
    line = " ".join(value.split())
    line = re.sub(r"([\\`*\[\]<>|~#$&])", r"\\\1", line)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", line)


def picture_file(picture: Picture) -> str:
    """Name the file of a picture, so that another content has another name."""
    return f"{picture.name}-{hashlib.sha256(picture.png).hexdigest()[:8]}.png"


def pictures_of(page: Page) -> Iterator[Picture]:
    """Give the pictures of a page in their order."""
    for section in page.sections:
        yield from (block for block in section.blocks if isinstance(block, Picture))


def write_page(page: Page, folder: Path) -> tuple[Path, Path]:
    """Write report.html, report.md and its pictures; return the paths of the two.

    Each file is replaced whole. Pictures go first and those of an earlier report go last, so that
    report.md names files that exist at any moment, also where the process is killed.

    Raises:
        ValueError: `folder` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output must be a folder, got the file {folder}")
    texts = {"report.html": html(page), "report.md": markdown(page)}
    pictures = {picture_file(picture): picture.png for picture in pictures_of(page)}
    for name, content in pictures.items():
        with replacing(folder / PICTURES / name) as temporary:
            temporary.write_bytes(content)
    for name, text in texts.items():
        with replacing(folder / name) as temporary:
            # Names of files may hold what UTF-8 cannot.
            temporary.write_bytes(text.encode("utf-8", "backslashreplace"))
    for old in (folder / PICTURES).glob("*.png"):
        if _WRITTEN.fullmatch(old.name) and old.name not in pictures:
            old.unlink(missing_ok=True)
    return folder / "report.html", folder / "report.md"


__all__ = ["PICTURES", "check_jinja", "html", "markdown", "picture_file", "pictures_of", "write_page"]
