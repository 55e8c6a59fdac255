"""The fuzzer of files: whole files are read, and what is neither read nor refused by name is found."""

from __future__ import annotations

import io
import random

import pytest
from PIL import Image

from fuzz import files
from fuzz.mutate import in_header_of_safetensors, in_pickle_of_zip, mutate, with_png_checksums
from fuzz.small_files import KINDS, SIZE, small_files

# 32-bit pixels, images that are not there, and the format of before torch 1.6.
REFUSED = {"float", "split", "legacy"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_whole_files_are_read_or_refused_as_they_should_be(kind, tmp_path):
    verdicts = {}
    for file in small_files(kind):
        path = tmp_path / f"{file.name}.{file.ending}"
        path.write_bytes(file.content)
        verdicts[path.name] = files.verdict(kind, path)
    assert len(verdicts) >= 1
    others = {name: said for name, said in verdicts.items() if name.partition(".")[0] not in REFUSED}
    assert set(others.values()) == {"read"}, verdicts
    assert all(verdicts[name] == "refused" for name in verdicts if name not in others)


def test_a_seed_is_one_file():
    assert files.changed(11, list(KINDS)) == files.changed(11, list(KINDS))
    assert len({files.changed(seed, list(KINDS))[1].content for seed in range(40)}) > 35


def test_changes_depend_on_the_seed_alone():
    content = bytes(range(256)) * 2
    assert mutate(random.Random(5), content) == mutate(random.Random(5), content)
    assert mutate(random.Random(5), content) != content


def test_a_wrong_width_gets_past_the_checksum_of_its_chunk():
    out = io.BytesIO()
    Image.new("L", SIZE).save(out, "PNG")
    changed = bytearray(out.getvalue())
    changed[19] = 7  # the last byte of IHDR's width
    with pytest.raises((SyntaxError, OSError)):
        Image.open(io.BytesIO(changed)).load()
    assert Image.open(io.BytesIO(with_png_checksums(changed))).width == 7


def test_changes_inside_leave_the_container_whole():
    whole = next(file.content for file in small_files("checkpoint") if file.name == "zip")
    assert in_pickle_of_zip(random.Random(0), whole)[:4] == b"PK\3\4"
    weights = small_files("weights")[0].content
    changed = in_header_of_safetensors(random.Random(0), weights)
    length = int.from_bytes(changed[:8], "little")
    assert changed[8 + length :] == weights[8 + int.from_bytes(weights[:8], "little") :]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("Rows"), "KeyError: 'Rows'"),
        (MemoryError(), "MemoryError: "),
        (files.TooLongError("stopped"), "TooLongError: stopped"),
        (ValueError("no"), "ValueError without the file's name: no"),
        (ValueError("broken.xml cannot be read"), "refused"),
    ],
)
def test_what_a_loader_raises_is_judged(monkeypatch, tmp_path, error, said):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(files, "read_mask", fail)
    assert files.verdict("xml", tmp_path / "broken.xml") == said


def test_findings_of_one_kind_are_one_group():
    first = files.kind_of_finding("dicom", "KeyError: /tmp/a/b.dcm has 'x' 12")
    assert first == files.kind_of_finding("dicom", "KeyError: /tmp/c/d.dcm has 'y' 7")
    assert first != files.kind_of_finding("dicom", "TypeError: /tmp/c/d.dcm has 'y' 7")
