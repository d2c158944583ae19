"""DVC's view of this repository: opened, waited for, mended, its errors in one line."""

import contextlib
import json
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from dvc import rwlock
from dvc.exceptions import DvcException
from dvc.lock import LockError, make_lock
from dvc.repo import Repo
from dvc.scm import map_scm_exception

from ebm import EBMError, files
from pipelines.supervise import restart_clock

PATIENCE_SECONDS = 1.0
"""Between two looks at whether files are free that another run works on."""

T = TypeVar("T")


@contextlib.contextmanager
def opened(root: Path | None = None) -> Iterator[Repo]:
    """The repository at `root`, or the one around the current directory; what DVC raises within
    this context is an EBMError of one line."""
    with plain_errors(), Repo(root and str(root), _wait_for_lock=True) as repo:
        yield repo


def when_free(act: Callable[[], T]) -> T:
    """What `act` returns, tried again as long as another run is at work on the same files. DVC
    forgets runs that were killed."""
    told = False
    while True:
        try:
            return act()
        except EBMError as error:
            if (who := _blockers(error)) is None:
                raise
        if not told:
            print(f"waiting for another run at work on the same files: {who}", file=sys.stderr)
        told = True
        time.sleep(PATIENCE_SECONDS)
        restart_clock()


def _blockers(error: BaseException | None) -> str | None:
    """Who has the files, in DVC's words, if that is what an error comes from."""
    if isinstance(error, LockError):
        found = re.search(r"blocked by:(.*?)(\n\n|$)", str(error), re.DOTALL)
        return " ".join((found[1] if found else str(error)).split())
    return None if error is None else _blockers(error.__cause__)


def mend(repo: Repo) -> None:
    """Remove DVC's table of locks if it is broken, with which DVC would do nothing ever again.

    A process that is killed while it overwrites it leaves it so. To be called by who holds the
    repository's lock: then nobody writes it, and those who did are gone.
    """
    table = Path(repo.tmp_dir, "rwlock")
    try:
        json.loads(table.read_text())
    except FileNotFoundError:
        return
    except ValueError:
        table.unlink()


@contextlib.contextmanager
def edited_rwlock(folder: str, fs: Any, hardlink: bool) -> Iterator[dict[str, Any]]:
    """DVC's `_edit_rwlock`, which overwrites its table of locks in place: where the disk is full
    for a moment it breaks, and trainings that end well beside that are not entered."""
    table = Path(folder, rwlock.RWLOCK_FILE)
    guard = str(Path(folder, rwlock.RWLOCK_LOCK))
    with make_lock(guard, tmp_dir=folder, hardlink_lock=hardlink):
        try:
            lock = rwlock.SCHEMA(json.loads(table.read_text(encoding="utf-8")))
        except FileNotFoundError:
            lock = rwlock.SCHEMA({})
        except ValueError as error:
            raise rwlock.RWLockFileCorruptedError(str(table)) from error
        except rwlock.Invalid as error:
            raise rwlock.RWLockFileFormatError(str(table)) from error
        lock["read"], lock["write"] = (
            defaultdict(kind, lock[name]) for name, kind in (("read", list), ("write", dict))
        )
        yield lock
        # not synced, which others would wait for: a power cut ends all who stand in it
        files.replace(table, json.dumps(lock).encode(), sync=False)


rwlock._edit_rwlock = edited_rwlock


def unmade(repo: Repo, stages: Iterable[Any]) -> list[Any]:
    """What DVC's `stages` depend on that no stage makes: code, and data of a user's own."""
    made = {out.fs_path for out in repo.index.outs}
    return [dep for stage in stages for dep in stage.deps if dep.fs_path not in made]


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turn DVC's errors, git's and the system's into one line."""
    try:
        with map_scm_exception():
            yield
    except (DvcException, OSError) as error:
        chain: list[str] = []
        cause: BaseException | None = error
        while cause:
            chain += [" ".join(str(cause).split())]
            cause = cause.__cause__
        if "dvc.lock'" in chain[0]:
            chain += ["remove it or `git checkout` it; results come back from DVC's cache"]
        raise EBMError(": ".join(chain)) from error
