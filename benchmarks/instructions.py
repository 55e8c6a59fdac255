"""Instructions of a call on a CPU, counted by callgrind: `python -m benchmarks.instructions`.

Unlike a time the figure has no noise (a call more or less of an allocator aside), so a change of some percent
is one of the code. It says nothing about memory, which is what a large map costs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.instruction_driver import MARK
from benchmarks.results import write_results

HERE = Path(__file__).resolve().parent
# valgrind knows no AVX-512; torch's own kernels are held to the same set.
_X86_SETTINGS = {"FDKERNELS_CPU_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2"}


def main() -> None:
    """Count, compare with the file that is there, and write it; the exit status is 1 beyond --limit."""
    arguments = _parse()
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        print(
            "valgrind is missing: instructions are counted by its tool callgrind; install it (on Debian "
            "and Ubuntu `apt-get install valgrind`) and run this again.",
            file=sys.stderr,
        )
        sys.exit(2)
    before = _read(arguments.output)
    entries = count(valgrind)
    rises = compare(before, entries)
    header = record.header(["python", "-m", "benchmarks.instructions", *sys.argv[1:]], "cpu")
    write_results(arguments.output, header, entries, kind="instructions")
    print(f"{arguments.output}: {len(entries)} figures")
    if arguments.limit is not None and any(rise > arguments.limit for rise in rises):
        print(f"a figure has risen by more than {arguments.limit:g} %", file=sys.stderr)
        sys.exit(1)


def count(valgrind: str) -> list[dict[str, Any]]:
    """Run the driver under callgrind.

    Returns:
        For each figure its name, the instructions of a call and the instruction set of the kernels.

    Raises:
        RuntimeError: the driver failed, or callgrind did not see its marks.
    """
    with tempfile.TemporaryDirectory() as folder:
        pattern = f"{folder}/callgrind"
        command = [
            valgrind,
            "--tool=callgrind",
            f"--callgrind-out-file={pattern}",
            f"--dump-before={MARK}",
            sys.executable,
            "-m",
            "benchmarks.instruction_driver",
        ]
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, env=environment(), cwd=HERE.parent
        )
        if done.returncode:
            raise RuntimeError(f"the driver failed under callgrind:\n{done.stderr[-3000:]}")
        said = json.loads(done.stdout.splitlines()[-1])
        # A dump is numbered where a mark caused it; what follows the last mark has no number.
        dumps = sorted(Path(folder).glob("callgrind.*"), key=lambda path: int(path.suffix[1:]))
        totals = [total_of(path.read_text(encoding="utf-8", errors="replace")) for path in dumps]
    return per_call(totals, said["figures"], said["instruction_set"])


def per_call(
    totals: Sequence[int], called: Sequence[Mapping[str, Any]], instruction_set: str
) -> list[dict[str, Any]]:
    """Instructions of a call from those of the sections that end at each mark.

    Args:
        totals: of the sections in order; those before the first figure's mark may be more than one.
        called: for each figure its name and k; its three marks end what came before, k calls and 2k calls.
        instruction_set: of the kernels.
    """
    if len(totals) < 3 * len(called):
        raise RuntimeError(
            f"callgrind must see {3 * len(called)} marks, one at each call of {MARK}, got {len(totals)}"
        )
    sections = totals[len(totals) - 3 * len(called) :]
    return [
        {
            "figure": figure["figure"],
            "instructions": round((sections[3 * i + 2] - sections[3 * i + 1]) / figure["calls"]),
            "instruction_set": instruction_set,
        }
        for i, figure in enumerate(called)
    ]


def total_of(dump: str) -> int:
    """The instructions of one dump of callgrind."""
    found = re.search(r"^totals: (\d+)", dump, re.MULTILINE)
    if found is None:
        raise RuntimeError("a dump of callgrind must have a line `totals: ...`, got none")
    return int(found.group(1))


def compare(before: Mapping[str, int], entries: Sequence[Mapping[str, Any]]) -> list[float]:
    """Print each figure beside the one before, and return by how many percent each has risen."""
    rises = []
    print(f"{'instructions of a call':52} {'before':>14} {'now':>14} {'change':>9}")
    for entry in entries:
        old, now = before.get(entry["figure"]), entry["instructions"]
        if old:
            rises.append(100 * (now / old - 1))
        change = f"{rises[-1]:+8.2f}%" if old else "new"
        print(f"{entry['figure']:52} {old or '':>14} {now:>14} {change:>9}")
    for name in before.keys() - {entry["figure"] for entry in entries}:
        print(f"{name:52} {before[name]:>14} {'gone':>14}")
    return rises


def environment() -> dict[str, str]:
    """One thread, one hash seed, and an instruction set that callgrind knows."""
    settings = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    if platform.machine().lower() in ("x86_64", "amd64"):
        settings |= _X86_SETTINGS
    return {**os.environ, **settings}


def _read(path: Path) -> dict[str, int]:
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return {entry["figure"]: entry["instructions"] for entry in content["measurements"]}


def _parse() -> argparse.Namespace:
    default = HERE / "results" / f"instructions-{platform.machine()}.json"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=default, metavar="FILE", help="the JSON, read and written"
    )
    parser.add_argument("--limit", type=float, metavar="PERCENT", help="fail where a figure rises by more")
    return parser.parse_args()


if __name__ == "__main__":
    main()
