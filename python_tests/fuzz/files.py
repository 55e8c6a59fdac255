"""Changed images, annotations, DICOM files, weights, checkpoints and run folders through the loaders.

    make fuzz FUZZ_CASES=100000
    cd python_tests && python -m fuzz.files --cases 1000 --first 5000 --kinds dicom
    cd python_tests && python -m fuzz.files --cases 1 --first 5123 --keep /tmp/here    writes the file of a
    seed, too

A loader may read a file or refuse it with a ValueError that names it. Anything else is a finding: another
exception, a process that dies, more than `--memory` megabytes beyond those of the imports, or `--seconds`
of the processor.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

import torch

from fdkernels.segmentation.checkpoints import WholeFiles
from fdkernels.segmentation.data.prepare.dicom import DicomFile
from fdkernels.segmentation.data.reading import read_image, read_mask
from fdkernels.segmentation.saved_runs import load_network, read_run
from fuzz.mutate import in_header_of_safetensors, in_pickle_of_zip, mutate, with_png_checksums
from fuzz.parallel import BLOCK
from fuzz.small_files import BASE_CHANNELS, KINDS, SIZE, SmallFile, small_files

WEIGHTS = {"image": 9, "xml": 3, "dicom": 6, "weights": 2, "checkpoint": 2, "run": 2}


class TooLongError(BaseException):
    """No loader catches it, as it would an OSError."""


def changed(seed: int, kinds: list[str]) -> tuple[str, SmallFile]:
    """The kind and the changed file of a seed."""
    rng = random.Random(seed)
    kind = rng.choices(kinds, [WEIGHTS[kind] for kind in kinds])[0]
    file = rng.choice(small_files(kind))
    inside = rng.random() < 0.5
    if inside and kind == "checkpoint" and file.name == "zip":
        content = in_pickle_of_zip(rng, file.content)
    elif inside and kind == "weights":
        content = in_header_of_safetensors(rng, file.content)
    else:
        content = mutate(rng, file.content, text=kind in ("xml", "run") and rng.random() < 0.8)
        if inside and file.ending == "png":
            content = with_png_checksums(content)
    return kind, file._replace(content=content)


def load(kind: str, path: Path) -> None:
    """Read a file as the package does."""
    if kind == "image":
        try:
            read_mask(path)  # refuses most images for their many values
        except ValueError as error:
            _named(error, path)
        read_image(path)
    elif kind == "xml":
        read_mask(path, SIZE)
    elif kind == "dicom":
        file = DicomFile(path)
        file.text("PatientID")
        file.says_annotated  # noqa: B018
        file.regions(*SIZE)
        for frame in sorted({1, file.frames}):
            file.picture(frame)
    elif kind == "weights":
        load_network(path, "unet", BASE_CHANNELS)
    elif kind == "checkpoint":
        WholeFiles().load_checkpoint(path)
    else:
        _read_run(path)


def _read_run(path: Path) -> None:
    """Read a run whose config.json or split.json is the file; the other one is whole."""
    whole = {file.name: file.content for file in small_files("run")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_bytes(whole["config"])
        (folder / "split.json").write_bytes(whole["split"])
        part = "split" if path.name.startswith("split") else "config"
        (folder / f"{part}.json").write_bytes(path.read_bytes())
        try:
            run = read_run(folder)
            if part == "split":
                run.part("train", folder)
        except ValueError as error:
            _named(error, folder)  # it may name a missing file instead
            raise


def _named(error: ValueError, path: Path) -> None:
    if path.name not in str(error):
        raise RuntimeError(f"the ValueError does not name the file: {error}") from error


def verdict(kind: str, path: Path) -> str:
    """ "read", "refused", or what else came of a file."""
    try:
        load(kind, path)
    except ValueError as error:
        if kind != "run" and path.name not in str(error):
            return f"ValueError without the file's name: {error}"
        return "refused" if type(error) is ValueError else f"{type(error).__name__}: {error}"
    except (Exception, TooLongError) as error:
        return f"{type(error).__name__}: {error}"
    return "read"


def _stop(signum: int, frame: FrameType | None) -> None:
    raise TooLongError("the processor time of one file")


def limit_memory(megabytes: int) -> None:
    """Bound this process to so much more memory than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def work(first: int, count: int, kinds: list[str], keep: str, memory: int, seconds: float) -> None:
    """Try seeds; a line of JSON before and after each."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for kind in kinds:  # and imports what the loaders import
        for number, file in enumerate(small_files(kind)):
            with tempfile.TemporaryDirectory() as name:
                path = Path(name) / f"{file.name}-{number}.{file.ending}"
                path.write_bytes(file.content)
                verdict(kind, path)
    limit_memory(memory)
    signal.signal(signal.SIGPROF, _stop)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(keep or name)
        for seed in range(first, first + count):
            kind, file = changed(seed, kinds)
            print(json.dumps([seed, kind, file.name]), flush=True)
            path = folder / f"{file.name}-{seed}.{file.ending}"
            path.write_bytes(file.content)
            signal.setitimer(signal.ITIMER_PROF, seconds)
            try:
                said = verdict(kind, path)
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            print(json.dumps([seed, kind, file.name, said]), flush=True)
            if not keep:
                path.unlink()


def run_block(first: int, count: int, options: argparse.Namespace) -> list[list[str]]:
    """Try seeds in processes of their own, another one after each that dies: seed, kind, name, verdict."""
    found, at = [], first
    while at < first + count:
        command = [sys.executable, "-m", "fuzz.files", "--worker", "--first", str(at)]
        command += ["--cases", str(first + count - at), "--kinds", *options.kinds, "--keep", options.keep]
        command += ["--memory", str(options.memory), "--seconds", str(options.seconds)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
        found += [line for line in lines if len(line) == 4]
        if done.returncode == 0:
            break
        if not lines or len(lines[-1]) == 4:
            sys.exit(f"The process of seed {at} on did not begin: {done.stderr[-2000:]}")
        found.append([*lines[-1], f"the process died with {done.returncode}: {done.stderr.strip()[-200:]}"])
        at = lines[-1][0] + 1
    return found


def kind_of_finding(kind: str, said: str) -> str:
    """A finding without what differs from file to file."""
    return (
        f"{kind}: "
        + re.sub(r"\S*/\S+|0x[0-9a-f]+|\d+|'[^']*'|\"[^\"]*\"", "…", said.partition("\n")[0])[:160]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument(
        "--first", type=int, default=0, help="the first seed; a run that was ended goes on from there"
    )
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--keep", default="", help="folder to keep the changed files in")
    parser.add_argument("--memory", type=int, default=1024, help="megabytes beyond the imports")
    parser.add_argument("--seconds", type=float, default=10.0, help="processor time of a file")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.first, options.cases, options.kinds, options.keep, options.memory, options.seconds)
        return
    started, last = time.monotonic(), options.first + options.cases
    blocks = [(at, min(4 * BLOCK, last - at)) for at in range(options.first, last, 4 * BLOCK)]
    counts: Counter[str] = Counter()
    groups: dict[str, list[tuple[int, str]]] = defaultdict(list)
    with ThreadPoolExecutor(options.jobs) as pool:
        waiting = [pool.submit(run_block, at, size, options) for at, size in blocks]
        for (at, size), future in zip(blocks, waiting, strict=True):
            for seed, kind, name, said in future.result():
                expected = said in ("read", "refused")
                counts[f"{kind} {said if expected else 'otherwise'}"] += 1
                if not expected:
                    group = groups[kind_of_finding(kind, said)]
                    group.append((seed, said))
                    if len(group) == 1:
                        print(f"seed {seed}, {kind} {name}: {said[:400]}", flush=True)
            done = at + size - options.first
            print(f"{done} files, {time.monotonic() - started:.0f} s, {json.dumps(counts)}", flush=True)
    for name, group in sorted(groups.items(), key=lambda item: -len(item[1])):
        print(f"{len(group)} × {name} (seed {group[0][0]})")
    total = sum(map(len, groups.values()))
    print(f"Seeds {options.first} to {last - 1}: {total} neither read nor refused by name")
    sys.exit(bool(groups))


if __name__ == "__main__":
    main()
