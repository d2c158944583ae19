"""Files that are there as a whole or not at all, and locks that end with who holds them."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ebm import EBMError


def replace(path: Path, content: bytes, sync: bool = True) -> None:
    """Write `content` to `path` so that whoever reads it, also after a kill or a full disk, sees
    the old file or the new one and never a part; with `sync` after a power cut, too."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with fresh.open("wb") as file:
            file.write(content)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, refusal: str | None = None) -> Iterator[None]:
    """Hold the lock that is the file at `path`; it dies with the process. If another one holds it:
    an EBMError that says `refusal`, or without one wait."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if refusal else 0))
        except BlockingIOError:
            raise EBMError(refusal) from None
        yield
