"""The entries of `dvc.lock`: what DVC knows of the stages that have run."""

import contextlib
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dvc.repo import Repo, lock_repo
from dvc.utils.serialize import dumps_yaml, load_yaml, modify_yaml, parse_yaml

from ebm import files
from pipelines import ROOT
from pipelines.repository import mend, opened, plain_errors

LOCK_HEAD = "schema: '2.0'\nstages:\n"
LOCK_ENTRY = re.compile(r"^(?=  \S)", re.MULTILINE)
"""A `dvc.lock` begins with the former, each of its entries where the latter matches."""

Entry = dict[str, Any]
"""What stands in `dvc.lock` of a stage: its command and the checksums of what it read and made."""


def entries(names: Sequence[str], root: Path = ROOT) -> dict[str, Entry | None]:
    """What stands in the `dvc.lock` files of these stages: plain data; None if nothing does."""
    locks: dict[Path, Any] = {}
    found = {}
    with plain_errors():
        for name in names:
            file, key = _place(name, root)
            if file not in locks:
                locks[file] = load_yaml(file).get("stages", {}) if file.exists() else {}
            found[name] = locks[file].get(key)
    return found


def record(name: str, entry: Entry, root: Path = ROOT) -> None:
    """Put into `dvc.lock` what was made of a stage in another clone.

    Its outputs are in the remote. What lies of them here is as it was, until `dvc pull`.
    """
    with opened(root) as repo, lock_repo(repo):
        _amend({name: entry}, root)


@contextlib.contextmanager
def lent(repo: Repo, entries: Mapping[str, Entry | None]) -> Iterator[None]:
    """Within this context, `entries` stand in `dvc.lock` (None: nothing does for that stage)."""
    with lock_repo(repo):
        mend(repo)
        before = _amend(entries, Path(repo.root_dir))
    try:
        yield
    finally:
        with lock_repo(repo):
            _amend(before, Path(repo.root_dir))


def _amend(entries: Mapping[str, Entry | None], root: Path) -> dict[str, Entry | None]:
    """Put entries into `dvc.lock`, or take them out; what stood there before. A reader sees the
    old file or the new one. To be called by who holds the repository's lock."""
    by_file: dict[Path, dict[str, str]] = defaultdict(dict)
    for name in entries:
        file, key = _place(name, root)
        by_file[file][key] = name
    before: dict[str, Entry | None] = {}
    for file, names in by_file.items():
        with _lock_opened(file) as lock:
            stages = lock.setdefault("stages", {})
            before |= {name: stages.get(key) for key, name in names.items()}
            for key, name in names.items():
                if entries[name] is None:
                    stages.pop(key, None)
                elif entries[name] != before[name]:
                    stages[key] = entries[name]
        if not stages:
            file.unlink(missing_ok=True)
    return before


@contextlib.contextmanager
def modified(path: str, fs: Any = None) -> Iterator[Any]:
    """DVC's `modify_yaml`, which parses and writes all of a long `dvc.lock` in Python after every
    stage: seconds, to keep the layout of what did not change."""
    with _lock_opened(Path(path)) if path.endswith(".lock") else modify_yaml(path, fs) as content:
        yield content


@contextlib.contextmanager
def _lock_opened(file: Path) -> Iterator[dict[str, Any]]:
    """What stands in a `dvc.lock`; what has changed when the context is left is written, the
    whole file or nothing. Entries that nobody has replaced keep their text, comments included."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    lock = parse_yaml(text, file) or {"schema": "2.0"}
    before = dict(lock.get("stages", {}))
    yield lock
    head, *texts = LOCK_ENTRY.split(text)
    whole = head == LOCK_HEAD and text.endswith("\n")  # no full disk has cut it off
    if not whole or list(lock) != ["schema", "stages"] or len(texts) != len(before):
        files.replace(file, dumps_yaml(lock).encode())
        return
    known = dict(zip(before, texts, strict=True))
    parts = [
        known[key] if entry is before.get(key) else _entry_text(key, entry)
        for key, entry in lock["stages"].items()
    ]
    files.replace(file, "".join([head, *parts]).encode())


def _entry_text(key: str, entry: Entry) -> str:
    return dumps_yaml({"stages": {key: entry}}).removeprefix("stages:\n")


def _place(name: str, root: Path) -> tuple[Path, str]:
    """The lock file that a stage's entry stands in, and its key there."""
    path, _, key = name.rpartition(":")
    return root / Path(path or "dvc.yaml").with_suffix(".lock"), key
