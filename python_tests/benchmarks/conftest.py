from __future__ import annotations

import sys
from pathlib import Path

# Where `benchmarks` is. At the end, as `import fdkernels` must be the installed package, not this tree.
sys.path.append(str(Path(__file__).resolve().parents[2]))
