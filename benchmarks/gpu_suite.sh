#!/usr/bin/env bash
# Everything that needs a GPU, in one command and without network: builds, runs the tests on the device, checks memory
# accesses and races with compute-sanitizer, and measures.
#
#     benchmarks/gpu_suite.sh [FOLDER]
#
# writes suite.log, summary.json, benchmarks.json and their page README.md into FOLDER, by default
# benchmarks/results/gpu. PYTHON names the interpreter, FDKERNELS_SUITE_SECONDS the time for all steps (570), and
# FDKERNELS_COMMIT the commit, for the record, where the tree comes without its history.
# A step that fails does not stop the next. Exit status: 0 if all passed, 1 if one did not, 2 if nothing could start.
set -uo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
out="${1:-$root/benchmarks/results/gpu}"
python="${PYTHON:-python3}"
total_seconds="${FDKERNELS_SUITE_SECONDS:-570}"

if ! "$python" -c "import torch" 2>/dev/null; then
  echo "torch is missing: $python cannot import it. Set PYTHON to the interpreter that can." >&2
  exit 2
fi
if ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  echo "no CUDA device: torch.cuda.is_available() is false" >&2
  exit 2
fi

mkdir -p "$out" || exit 2
out="$(cd "$out" && pwd)"
work="$(mktemp -d)" || exit 2
trap 'rm -rf "$work"' EXIT
site="$work/site"
log="$out/suite.log"
: >"$log"
cd "$root" || exit 2

say() { echo "$*" | tee -a "$log"; }

# What was built comes first; the source tree, which has no compiled module, must not.
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
export TRITON_CACHE_DIR="$work/triton" TORCHINDUCTOR_CACHE_DIR="$work/inductor"
unset TRITON_INTERPRET

summary=()
failed=0

# step NAME SECONDS COMMAND...: run with a time limit, write down how it went.
step() {
  local name="$1" limit="$2" left status begin seconds
  shift 2
  left=$((total_seconds - SECONDS))
  if ((left < limit)); then limit=$left; fi
  begin=$SECONDS
  say "== $name"
  if ((limit < 5)); then
    say "no time is left for $name"
    status=124
  else
    # INT, so that pytest still writes what it has measured.
    timeout --kill-after=20 --signal=INT "$limit" "$@" 2>&1 | tee -a "$log"
    status="${PIPESTATUS[0]}"
  fi
  seconds=$((SECONDS - begin))
  if ((status != 0)); then failed=1; fi
  say "== $name: exit status $status after $seconds s"
  summary+=("$name" "$status" "$seconds")
}

# skip NAME REASON: a step that cannot run counts as not passed.
skip() {
  say "== $1: not run, $2"
  summary+=("$1" "-1" "0")
  failed=1
}

has_module() { "$python" -c "import sys, importlib.util as u; sys.exit(u.find_spec('$1') is None)" 2>/dev/null; }

# pytest without the working directory on sys.path, for the same reason.
run_pytest='import sys; sys.path[:] = [p for p in sys.path if p]; import pytest; sys.exit(pytest.main(sys.argv[1:]))'

missing=()
for module in numpy triton pytest hypothesis pytest_benchmark pybind11 setuptools; do
  has_module "$module" || missing+=("$module")
done
for tool in nvcc cmake ninja c++ compute-sanitizer; do
  command -v "$tool" >/dev/null || missing+=("$tool")
done
if ((${#missing[@]})); then say "missing here: ${missing[*]}"; else say "nothing is missing here"; fi

nvidia-smi 2>/dev/null | tee -a "$log"

# Only for the GPU at hand: an architecture takes most of a minute.
FDKERNELS_CUDA_ARCHS="$("$python" -c "import torch; print('%d%d' % torch.cuda.get_device_capability())")"
export FDKERNELS_CUDA_ARCHS
export FDKERNELS_CUDA=on
command -v nvcc >/dev/null || FDKERNELS_CUDA=auto

# shellcheck disable=SC2329 # called by the bash that `timeout` starts
build() {
  if has_module pip && has_module setuptools && has_module pybind11; then
    "$python" -m pip install --disable-pip-version-check --no-build-isolation --no-deps --no-index \
      --target "$site" . && return
    echo "pip did not build it; CMake is asked itself"
    rm -rf "$site"
  fi
  mkdir -p "$site" && cp -r fdkernels "$site/" && rm -f "$site"/fdkernels/_C*.so || return
  local generator=()
  if command -v ninja >/dev/null; then generator=(-G Ninja); fi
  cmake -S . -B "$work/build" "${generator[@]}" "-DFDKERNELS_CUDA=$FDKERNELS_CUDA" \
    "-DFDKERNELS_CUDA_ARCHS=$FDKERNELS_CUDA_ARCHS" "-DPython_EXECUTABLE=$(command -v "$python")" &&
    cmake --build "$work/build" && cmake --install "$work/build" --prefix "$site"
}
export -f build has_module
export python site work

step build 180 bash -c build

# Both backends of the GPU must be there: without this a test that skips would look like one that passes.
step backends 60 "$python" -c "
import sys
sys.path[:] = [p for p in sys.path if p]
import fdkernels
from fdkernels.info import info_text
print(fdkernels.__file__)
print(info_text())
sys.exit(any(fdkernels.backends()[name] for name in ('cuda', 'triton')))
"

if has_module pytest; then
  step tests 150 "$python" -c "$run_pytest" -p no:cacheprovider -q -m "not slow" --benchmark-skip python_tests
else
  skip tests "pytest is missing"
fi

calls=("$python" -c "import runpy, sys; sys.path[:] = [p for p in sys.path if p]
sys.argv[0] = 'small_calls.py'; runpy.run_path('benchmarks/small_calls.py', run_name='__main__')")
step "small calls" 60 "${calls[@]}"
for tool in memcheck racecheck initcheck synccheck; do
  if command -v compute-sanitizer >/dev/null; then
    # Each tensor an allocation of its own, whose bounds and writes the tool can see.
    step "$tool" 45 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      compute-sanitizer --tool "$tool" --error-exitcode 1 "${calls[@]}"
  else
    skip "$tool" "compute-sanitizer is missing"
  fi
done

if has_module pytest && has_module pytest_benchmark; then
  left=$((total_seconds - SECONDS - 20))
  # The time limit lets pytest end by itself: no case starts in the last minute.
  step benchmarks "$left" "$python" -c "$run_pytest" -p no:cacheprovider -q benchmarks --device cuda \
    --time-limit "$((left > 90 ? left - 60 : 30))" --benchmark-only --benchmark-json="$out/benchmarks.json" \
    --benchmark-group-by=group --benchmark-columns=median,iqr,rounds --benchmark-sort=name
  step page 20 "$python" -m benchmarks.report --results "$out" --page "$out/README.md"
else
  skip benchmarks "pytest or pytest-benchmark is missing"
fi

"$python" - "$out/summary.json" "${missing[*]-}" "${summary[@]}" <<'PYTHON'
import json
import sys

path, missing, *rest = sys.argv[1:]
steps = [
    {"name": name, "exit_status": int(status), "seconds": int(seconds)}
    for name, status, seconds in zip(*[iter(rest)] * 3)
]
with open(path, "w", encoding="utf-8") as file:
    json.dump({"missing": missing.split(), "steps": steps}, file, indent=2)
    file.write("\n")
for step in steps:
    print(f"{step['name']:12} {'passed' if step['exit_status'] == 0 else 'NOT PASSED'} {step['seconds']:5d} s")
PYTHON

exit "$failed"
