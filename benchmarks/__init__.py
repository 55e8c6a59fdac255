"""The benchmark suite of fdkernels: `make bench`, or `python -m benchmarks.steps` and others for a part."""

import sys
from pathlib import Path

# `python -m` puts the working directory first, but `import fdkernels` must be the installed package and not
# this source tree, which has no compiled module. A tree that PYTHONPATH names stays where it is.
_ROOT = str(Path(__file__).resolve().parents[1])
if sys.path[0] in ("", _ROOT):
    sys.path.append(sys.path.pop(0) or _ROOT)
