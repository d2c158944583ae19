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


def lock(descriptor: int, shared: bool = False, wait: bool = True) -> bool:
    """Lock an open file, alone or `shared` with others who share it, until it is closed or the
    process ends. Where others have it: wait, or return False if this is not to `wait`."""
    how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(descriptor, how if wait else how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def held(path: Path, shared: bool = False) -> bool:
    """Whether a living process has locked the file at `path`, be it, if asked so, `shared`."""
    try:
        with path.open("rb") as file:
            return not lock(file.fileno(), shared=not shared, wait=False)
    except FileNotFoundError:
        return False


@contextmanager
def locked(path: Path, refusal: str | None = None) -> Iterator[None]:
    """Hold the lock of the file at `path`, which is made; if another process holds it, wait, or
    raise an EBMError that says `refusal`, where one is given."""
    with path.open("w") as file:
        if not lock(file.fileno(), wait=not refusal):
            raise EBMError(refusal)
        yield
