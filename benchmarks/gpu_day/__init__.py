"""``python -m benchmarks.gpu_day``: what a GPU is asked first, in three calls of minutes."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATHS = (ROOT, ROOT / "benchmarks", ROOT / "tests")  # of the package, the report, the cases

sys.path[:0] = map(str, PATHS)
