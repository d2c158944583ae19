"""The shell around the core: one module per DVC stage, and what schedules and tracks them.

The source tree of this very checkout comes first on the path. Without it, an editable install
would make a stage that DVC runs in a temporary copy (`dvc exp run --temp`, the queue, a worker's
clone) import the core of the main checkout instead of its own.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from ebm import EBMError  # noqa: E402  # for what Prefect loads by its path: `ebm` is found now

__all__ = ["ROOT", "EBMError"]
