"""Speed, side by side with peers, in one run. The source tree of this checkout comes first."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
