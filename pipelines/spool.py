"""A run on disk, between the stage that writes it and the courier that delivers it.

`.tracking/<key>/` holds events.jsonl and files/, to which only a stage adds, and state.json, which
only a courier writes. Who is alive is asked of the kernel: a stage holds a shared lock on its
events, and however it ends, the lock ends with it.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ebm import files
from pipelines.places import main_checkout

Event = dict[str, Any]


class UnfitError(Exception):
    """An event that can never be delivered, whatever the store."""


@dataclass
class State:
    """What a courier knows of one spool: `offset`, the bytes of events.jsonl that are delivered;
    `open`, whether the run is RUNNING in MLflow; `problem`, why nothing could be delivered at
    `failed_at` (seconds since the epoch); `notes`, what had to be left out for good; `measured`,
    how often the run was told how busy the machine is."""

    offset: int = 0
    tracking_uri: str | None = None
    mlflow_run_id: str | None = None
    open: bool = False
    problem: str | None = None
    failed_at: float = 0.0
    notes: list[str] = field(default_factory=list)
    measured: int = 0


class Spool:
    """One run on disk: a stage appends to events.jsonl and files/, a courier keeps state.json."""

    def __init__(self, key: str, home: Path | None = None) -> None:
        folder = (home or main_checkout()) / ".tracking" / key
        self.key = key
        self.events = folder / "events.jsonl"
        self.files = folder / "files"
        self._state = folder / "state.json"

    @classmethod
    def all(cls, home: Path | None = None) -> "list[Spool]":
        """Every spool of this checkout, or of the one at `home`."""
        found = (home or main_checkout()).glob(".tracking/*/events.jsonl")
        return [cls(path.parent.name, home) for path in sorted(found)]

    def open(self) -> int:
        """A descriptor to append events to; who holds it, is seen to be alive. A line that a
        predecessor could not end is ended."""
        folder = self.events.parent
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # a URI may hold a password
        self.files.mkdir(exist_ok=True)
        descriptor = os.open(self.events, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        files.lock(descriptor, shared=True)
        if self._torn():
            os.write(descriptor, b"\n")
        return descriptor

    def state(self) -> State | None:
        """What the last courier left; None if it cannot be read."""
        try:
            return State(**json.loads(self._state.read_text(encoding="utf-8")))
        except OSError:
            return State()
        except (ValueError, TypeError):
            return None

    def save(self, state: State) -> None:
        """Replace state.json: a reader sees the old one or the new one."""
        files.replace(self._state, json.dumps(asdict(state)).encode())

    def read(self, offset: int = 0) -> Iterator[tuple[Event, int]]:
        """The events from `offset` on, each with the offset behind it. A last line without an end
        is being written, or was cut off by a kill: no event. Any other unreadable line is {}."""
        with self.events.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                if line.strip():
                    yield _parse(line), offset

    def _torn(self) -> bool:
        with self.events.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            return file.read() not in (b"", b"\n")

    def written(self) -> bool:
        """Whether a living process holds this spool open for writing."""
        return files.held(self.events, shared=True)

    def end(self) -> int:
        """The offset behind the last event."""
        return max((offset for _, offset in self.read()), default=0)

    def pending(self, end: int | None = None) -> bool:
        """Whether a courier has something to do: an event to deliver that begins before `end`, a
        dead run to close."""
        state = self.state() or State()
        waits = any(True for _ in self.read(state.offset)) if end is None else state.offset < end
        return waits or (state.open and not self.written())


def _parse(line: bytes) -> Event:
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


class Echo:
    """What couriers have to say about a spool from now on, each thing once."""

    def __init__(self, spool: Spool) -> None:
        self._spool, self._since = spool, time.time()
        self._problem: str | None = None
        self._told = len((spool.state() or State()).notes)

    def problem(self, state: State) -> str | None:
        """What keeps the courier from delivering, if it has tried since this echo began."""
        return state.problem if state.failed_at >= self._since else None

    def news(self) -> list[str]:
        """What is new since the last call, in lines."""
        state = self._spool.state() or State()
        lines, problem = state.notes[self._told :], self.problem(state)
        if problem != self._problem:
            lines.append(problem or "MLflow answers again")
        self._told, self._problem = len(state.notes), problem
        return lines
