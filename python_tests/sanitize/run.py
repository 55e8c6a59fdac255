"""Run the tests of the op with sanitizers, on each instruction set that this machine has.

    make sanitize                             all of it
    make sanitize SANITIZE="threads"          one or several of kernels, emulation, threads

- kernels: fdkernels._C with AddressSanitizer and UndefinedBehaviorSanitizer under python_tests/op;
- emulation: the CUDA kernels as host code with both, under python_tests/cuda_emulation;
- threads: the kernels in a program of their own (threads.cpp) with ThreadSanitizer.

Each first shows that it sees a fault made on purpose. Sanitizers go on after a finding, so that one run
shows all; the exit status says whether there were any.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("kernels", "emulation", "threads")
ISAS = ("baseline", "avx2", "avx512")
FLAGS = "address,undefined"
KERNEL_TESTS = [
    f"python_tests/{name}" for name in ("op", "test_loss.py", "test_norm_act.py", "test_free_loss.py")
]
FINDING = re.compile(r"^(?:SUMMARY: \w+Sanitizer: .*|.*runtime error: .*)$", re.MULTILINE)

# Sums of 4 channels into memory for 2.
FAULT = """
import torch
import fdkernels._C as C
words = [0] * C.layer_words
at = C.layer_fields
features, weights = torch.ones(1, 4, 8, 8), torch.ones(1, 64, dtype=torch.uint8)
for name, value in {"features": features.data_ptr(), "dtype": int(C.DType.float32), "channels": 4,
    "stride_n": 256, "stride_c": 64, "fg": weights.data_ptr(), "mask_dtype": int(C.DType.uint8)}.items():
    words[at[name]] = value
words[at["size"] : at["size"] + 3] = 1, 8, 8
words[at["stride"] : at["stride"] + 3] = 64, 8, 1
sums, masses = torch.empty(2 * 2), torch.empty(2)
C.cpu_sums(layers=words, batch=1, accumulate=C.DType.float32, sums=sums.data_ptr(),
    masses=masses.data_ptr(), options=None, pairing=0, num_pairs=0, losses=0, total=0, slopes=0,
    num_threads=1)
"""


class Outcome(NamedTuple):
    """What one run under a sanitizer gave."""

    name: str
    counts: str
    findings: list[str]
    failed: bool
    seconds: float

    def __str__(self) -> str:
        return f"| {self.name} | {self.counts} | {len(self.findings)} | {self.seconds / 60:.1f} |"


def run(
    command: list[str], log: Path, environment: Mapping[str, str], folder: Path = ROOT
) -> tuple[int, str]:
    """Run a command with its output in a log."""
    with log.open("w") as out:
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, **environment}, stdout=out, stderr=out, check=False
        )
    return done.returncode, log.read_text("utf-8", "replace")


def need(command: list[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
    """Run a command that must succeed."""
    code, said = run(command, log, environment or {})
    if code:
        sys.exit(f"{' '.join(command)} failed, see {log}:\n{said[-2000:]}")


def configure(folder: Path, sanitizers: str, *targets: str) -> Path:
    """Build with CMake under sanitizers; the build folder."""
    build = folder / f"build-{sanitizers.partition(',')[0]}"
    named = [f"-DFDKERNELS_SANITIZE={sanitizers}", "-DFDKERNELS_CUDA=off", "-DFDKERNELS_CPP=on"]
    python = f"-DPython_EXECUTABLE={sys.executable}"
    log = folder / f"{build.name}.log"
    need(["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *named, python], log)
    need(["cmake", "--build", str(build), "--target", *targets], log)
    return build


def usable_isas(command: list[str], environment: Mapping[str, str], folder: Path) -> list[str]:
    """The instruction sets under which a command, which loads the kernels, ends well.

    It runs in `folder`: Python would take the package of this source tree where it is the working directory.
    """
    log = folder / "isa.log"
    usable = [
        isa for isa in ISAS if run(command, log, {**environment, "FDKERNELS_CPU_ISA": isa}, folder)[0] == 0
    ]
    return usable or sys.exit(f"The kernels load under no instruction set, see {log}")


def preloaded(folder: Path) -> dict[str, str]:
    """The environment in which Python runs with AddressSanitizer and writes what it finds into `folder`."""
    libraries = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    options = "detect_leaks=0:detect_stack_use_after_return=0:halt_on_error=0"
    return {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": f"{options}:log_path={folder / 'asan'}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={folder / 'ubsan'}",
        "TRITON_INTERPRET": "0",
        "CI": "true",
    }


def findings_in(folder: Path) -> list[str]:
    """Each finding once, of all logs of sanitizers."""
    texts = (
        path.read_text("utf-8", "replace") for kind in ("asan", "ubsan") for path in folder.glob(f"{kind}*")
    )
    return sorted({line for text in texts for line in FINDING.findall(text)})


def tests_under(
    name: str, folder: Path, environment: Mapping[str, str], selected: list[str], python_path: str
) -> Outcome:
    """Run tests in an environment whose sanitizers write into a folder of this run."""
    logs = folder / re.sub(r"\W+", "-", name)
    logs.mkdir()
    started = time.monotonic()
    # The script and not `python -m pytest`, which would put this source tree before PYTHONPATH.
    script = str(Path(sys.executable).with_name("pytest"))
    command = [script, "-q", "-p", "no:cacheprovider", "-m", "not slow", *selected]
    variables = {**environment, **preloaded(logs), "PYTHONPATH": python_path}
    code, said = run(command, logs / "pytest.log", variables)
    counts = re.findall(r"^(?:=+ )?((?:\d+ \w+(?:, )?)+) in [\d.]+s", said, re.MULTILINE)
    outcome = Outcome(
        name,
        counts[-1] if counts else f"ended with {code}, see {logs}",
        findings_in(logs),
        code != 0,
        time.monotonic() - started,
    )
    print(outcome, *outcome.findings, sep="\n", flush=True)
    return outcome


def sanitize_kernels(folder: Path) -> list[Outcome]:
    """The op's tests with an instrumented fdkernels._C."""
    build = configure(folder, FLAGS, "_C")
    package = folder / "package"
    shutil.copytree(
        ROOT / "fdkernels", package / "fdkernels", ignore=shutil.ignore_patterns("_C.*.so", "__pycache__")
    )
    need(["cmake", "--install", str(build), "--prefix", str(package)], folder / "install.log")
    made = folder / "made-on-purpose"
    made.mkdir()
    path = {"PYTHONPATH": str(package)}
    run([sys.executable, "-c", FAULT], made / "python.log", {**preloaded(made), **path}, folder)
    if not any("heap-buffer-overflow" in line for line in findings_in(made)):
        sys.exit(f"AddressSanitizer did not see a write past the end made on purpose, see {made}")
    isas = usable_isas([sys.executable, "-c", "import fdkernels._C"], {**preloaded(made), **path}, folder)
    return [
        tests_under(
            f"kernels, {isa}, address and undefined",
            folder,
            {"FDKERNELS_CPU_ISA": isa},
            # The reference, Triton and the emulation are none of these kernels.
            [*KERNEL_TESTS, "-k", "not reference and not triton and not cuda"],
            str(package),
        )
        for isa in isas
    ]


def sanitize_emulation(folder: Path) -> list[Outcome]:
    """The tests of the CUDA kernels, built as host code with sanitizers."""
    flags = f"-g -fno-omit-frame-pointer -fsanitize={FLAGS} -fsanitize-recover=all"
    environment = {"FDKERNELS_EMULATION_FLAGS": flags}
    name = "emulated CUDA, address and undefined"
    return [
        tests_under(
            name, folder, environment, ["python_tests/cuda_emulation"], os.environ.get("PYTHONPATH", "")
        )
    ]


def sanitize_threads(folder: Path) -> list[Outcome]:
    """Every kernel on several threads and from several threads at once."""
    build = configure(folder, "thread", "threads")
    # Without random addresses, for which ThreadSanitizer of some compilers has no room.
    command = [*(["setarch", "-R"] if shutil.which("setarch") else []), str(build / "threads")]
    environment = {"TSAN_OPTIONS": "halt_on_error=0"}
    _, said = run([*command, "race"], folder / "race.log", environment)
    if "data race" not in said:
        sys.exit(f"ThreadSanitizer did not see a race made on purpose, see {folder / 'race.log'}")
    outcomes = []
    for isa in usable_isas([*command, "race"], {"TSAN_OPTIONS": "exitcode=0"}, folder):
        started = time.monotonic()
        log = folder / f"threads-{isa}.log"
        code, said = run(command, log, {**environment, "FDKERNELS_CPU_ISA": isa})
        last = said.strip().splitlines()[-1]
        found = sorted(set(FINDING.findall(said)))
        outcomes.append(
            Outcome(
                f"kernels, {isa}, threads",
                last.partition(": ")[2],
                found,
                code != 0,
                time.monotonic() - started,
            )
        )
        print(outcomes[-1], *found, sep="\n", flush=True)
    return outcomes


def main() -> None:
    wanted = os.environ.get("SANITIZE", "").split() or list(PARTS)
    if unknown := set(wanted) - set(PARTS):
        sys.exit(f"SANITIZE must name some of {', '.join(PARTS)}, got {' '.join(sorted(unknown))}")
    folder = Path(tempfile.mkdtemp(prefix="sanitize-"))
    print(f"logs in {folder}\n| what | tests | findings | minutes |\n| --- | --- | ---: | ---: |", flush=True)
    steps = {"kernels": sanitize_kernels, "emulation": sanitize_emulation, "threads": sanitize_threads}
    outcomes = [outcome for part in PARTS if part in wanted for outcome in steps[part](folder)]
    sys.exit(any(outcome.findings or outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    main()
