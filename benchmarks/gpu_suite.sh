#!/usr/bin/env bash
# Everything that needs a GPU, in one command and without network: builds, runs the tests on the device, checks memory
# accesses and races with compute-sanitizer, and measures the op, the training step with it, and the trainings.
#
#     benchmarks/gpu_suite.sh [FOLDER]
#
# writes into FOLDER, by default benchmarks/results/gpu: suite.log, summary.json, calls.json, classes.json, steps.json,
# training.json, what each step said, and the pages README.md and tables.md with their pictures.
#
# PYTHON names the interpreter; FDKERNELS_SUITE_SECONDS is the time for all steps (570); FDKERNELS_SUITE_STEPS chooses
# among them, by default all of "build backends tests calls sanitizer benchmarks classes steps training page";
# FDKERNELS_SUITE_SET names the cases (brief: a minute or two; core and full take longer); FDKERNELS_COMMIT is the commit,
# for the record, where the tree comes without its history.
# A step that fails does not stop the next. Exit status: 0 if all passed, 1 if one did not, 2 if nothing could start.
set -uo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
out="${1:-$root/benchmarks/results/gpu}"
python="${PYTHON:-python3}"
total_seconds="${FDKERNELS_SUITE_SECONDS:-570}"
page_seconds=20
chosen="${FDKERNELS_SUITE_STEPS:-build backends tests calls sanitizer benchmarks classes steps training page}"
cases="${FDKERNELS_SUITE_SET:-brief}"

for name in $chosen; do
  case "$name" in
    build | backends | tests | calls | sanitizer | benchmarks | classes | steps | training | page) ;;
    *)
      echo "FDKERNELS_SUITE_STEPS must name steps of this suite, got $name" >&2
      exit 2
      ;;
  esac
done

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

wanted() { [[ " $chosen " == *" $1 "* ]]; }

# step NAME SECONDS COMMAND...: run with a time limit, write down how it went.
step() {
  local name="$1" limit="$2" left status begin seconds
  shift 2
  left=$((total_seconds - SECONDS))
  # What was measured must still come onto the page.
  if [[ "$name" != page ]]; then left=$((left - page_seconds)); fi
  if ((left < limit)); then limit=$left; fi
  begin=$SECONDS
  say "== $name, at most $limit s"
  if ((limit < 5)); then
    say "no time is left for $name"
    status=124
  else
    # INT, so that pytest still writes what it has measured.
    timeout --kill-after=20 --signal=INT "$limit" "$@" 2>&1 | tee "$out/${name// /-}.log" | tee -a "$log"
    status="${PIPESTATUS[0]}"
  fi
  seconds=$((SECONDS - begin))
  if ((status != 0)); then failed=1; fi
  say "== $name: exit status $status after $seconds s"
  summary+=("$name" "$status" "$seconds")
  summarize
}

# skip NAME REASON: a step that cannot run counts as not passed.
skip() {
  say "== $1: not run, $2"
  summary+=("$1" "-1" "0")
  failed=1
  summarize
}

# summary.json after each step, so that it is there if the suite is cut off.
summarize() {
  "$python" - "$out/summary.json" "${missing[*]-}" "${summary[@]}" <<'PYTHON'
import json
import os
import sys

path, missing, *rest = sys.argv[1:]
steps = [
    {"name": name, "exit_status": int(status), "seconds": int(seconds)}
    for name, status, seconds in zip(*[iter(rest)] * 3)
]
with open(path + ".new", "w", encoding="utf-8") as file:
    json.dump({"missing": missing.split(), "steps": steps}, file, indent=2)
    file.write("\n")
os.replace(path + ".new", path)
PYTHON
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

if wanted build; then
  # An interrupted pip is no reason to ask CMake.
  step build 180 bash -c 'trap "exit 130" INT; build'
else
  say "== build: not asked for; $python must find a built fdkernels"
fi

# Both backends of the GPU must be there: without this a test that skips would look like one that passes.
if wanted backends; then
  step backends 60 "$python" -c "
import sys
sys.path[:] = [p for p in sys.path if p]
import fdkernels
from fdkernels.info import info_text
print(fdkernels.__file__)
print(info_text())
sys.exit(any(fdkernels.backends()[name] for name in ('cuda', 'triton')))
"
fi

# What computes on the GPU, on all cores if pytest-xdist is there; Triton's kernels are compiled meanwhile. Warnings of
# versions that nobody has tried are shown and are no errors.
if wanted tests; then
  if has_module pytest; then
    workers=()
    if has_module xdist; then workers=(-n auto); fi
    step tests 150 "$python" -c "$run_pytest" -p no:cacheprovider -q -W default "${workers[@]}" \
      -m "not slow and not clients" --benchmark-skip python_tests/op python_tests/test_*.py \
      -k "(cuda or triton or reference) and not cpu"
  else
    skip tests "pytest is missing"
  fi
fi

# A process as short as can be: neither the fixtures of the other tests nor the plugins that they need.
calls=("$python" -c "$run_pytest" -p no:cacheprovider -q -W default --noconftest python_tests/test_small_calls.py)
if wanted calls; then step "small calls" 60 "${calls[@]}"; fi
if wanted sanitizer; then
  for tool in memcheck racecheck initcheck synccheck; do
    if command -v compute-sanitizer >/dev/null; then
      # Each tensor an allocation of its own, whose bounds and writes the tool can see. Triton would compile under it.
      step "$tool" 80 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer --tool "$tool" --error-exitcode 1 "${calls[@]}" -k "not triton"
    else
      skip "$tool" "compute-sanitizer is missing"
    fi
  done
fi

if wanted benchmarks; then
  if has_module pytest && has_module pytest_benchmark; then
    # The time limit lets pytest end by itself: no case starts in the last seconds.
    step benchmarks 130 "$python" -m benchmarks.calls -W default --device cuda --set "$cases" --time-limit 100 \
      --results "$out/calls.json"
  else
    skip benchmarks "pytest or pytest-benchmark is missing"
  fi
fi

if wanted classes; then
  step classes 60 "$python" -m benchmarks.classes --device cuda --results "$out/classes.json" --time-limit 45
fi

if wanted steps; then
  # The modes that need a compiler last: a time limit cuts off the end.
  step steps 90 "$python" -m benchmarks.steps --device cuda --output "$out/steps.json" --time-limit 70
fi

if wanted training; then
  step training 60 "$python" -m benchmarks.steps --device cuda --presets --output "$out/training.json" --time-limit 50
fi

if wanted page; then
  step page "$page_seconds" "$python" -m benchmarks.page --results "$out" --page "$out/README.md"
fi

for ((i = 0; i < ${#summary[@]}; i += 3)); do
  word="NOT PASSED"
  if ((summary[i + 1] == 0)); then word="passed"; fi
  say "$(printf '%-12s %-10s %5d s' "${summary[i]}" "$word" "${summary[i + 2]}")"
done

exit "$failed"
