"""Files that are there as a whole or not at all."""

import os
from pathlib import Path


def replace(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old file or the new one, never a part, and
    so does whoever comes after a kill or finds the disk full."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
