"""The last rebuild: what ran when, on which worker, and what did not have to.

The runner and the flow keep it in `reports/timeline.json`, and `reports/timeline.html` shows it:
one page, which loads nothing from anywhere. A rebuild in which nothing ran is one too.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from ebm import files

if TYPE_CHECKING:
    from pipelines.dag import Plan

FOLDER = "reports"
UP_TO_DATE: Final = "up to date"
WIDTH = 1000  # of the picture, in its own units
ROW = 30
LETTER = 6.4  # about the width of one

WORDS = {
    "done": "ran",
    "restored": "restored from the cache",
    "failed": "failed",
    "skipped": "could not run",
    UP_TO_DATE: UP_TO_DATE,
}
"""The kinds of results, as the page calls them."""


@dataclass(frozen=True)
class Result:
    """What became of a stage.

    Attributes:
        started: when, in seconds since 1970; 0 if never.
        seconds: after how many, all its tries together.
        worker: the name of the machine on which it ran.
        restored: DVC had its outputs, and did not run the command.
        reason: why it is not done.
        lines: the last ones that it wrote, if it failed.
    """

    stage: str
    outcome: Literal["done", "failed", "skipped", "up to date"]
    started: float = 0.0
    seconds: float = 0.0
    worker: str = ""
    restored: bool = False
    reason: str = ""
    lines: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.outcome == "skipped":
            return f"skipped {self.stage}: {self.reason}"
        note = "restored, not run" if self.restored else self.reason
        return f"{self.outcome} {self.stage} after {self.seconds:.1f} s" + (
            f": {note}" if note else ""
        )

    @property
    def ran(self) -> bool:
        """Whether somebody was busy with it, be it only to restore its outputs."""
        return self.outcome in ("done", "failed")

    @property
    def kind(self) -> str:
        """What became of it, in a word."""
        return "restored" if self.restored else self.outcome


@dataclass(frozen=True)
class Rebuild:
    """One run of a plan. `entries`: what ran, in the order of its start, then all else."""

    by: str
    targets: tuple[str, ...]
    started: float
    seconds: float
    entries: tuple[Result, ...]


def rebuild(
    by: str, targets: Sequence[str], plan: "Plan", results: Sequence[Result], started: float
) -> Rebuild:
    """What a run of `plan` by a runner named `by`, from `started` (since 1970) until now, did."""
    done = {result.stage: result for result in results}
    entries = [done.get(stage.name, Result(stage.name, UP_TO_DATE)) for stage in plan.stages]
    entries.sort(key=lambda entry: entry.started if entry.ran else math.inf)
    seconds = max(datetime.now().timestamp() - started, 0.0)
    return Rebuild(by, tuple(targets), started, seconds, tuple(entries))


def write(last: Rebuild, root: Path) -> None:
    """Replace the files of the DVC repository `root`, each of them whole or not at all."""
    folder = root / FOLDER
    folder.mkdir(exist_ok=True)
    content = asdict(last, dict_factory=lambda pairs: {k: v for k, v in pairs if k != "lines"})
    files.replace(folder / "timeline.json", json.dumps(content, indent=1).encode())
    files.replace(folder / "timeline.html", render(last).encode())


@dataclass(frozen=True)
class Bar:
    """An entry as a bar from x to x + width, in a row of its worker."""

    entry: Result
    x: float
    width: float
    row: int

    @property
    def text(self) -> str:
        """The name of the stage, if it fits."""
        return self.entry.stage if LETTER * (len(self.entry.stage) + 2) <= self.width else ""


def render(last: Rebuild) -> str:
    """The page, self-contained: styles and picture inline, no script."""
    from pipelines import typeset  # jinja2: only when something is to be shown

    counts = Counter(entry.kind for entry in last.entries)
    return typeset.template("timeline.html.j2", {"clock": clock}).render(
        last=last,
        ran=[entry for entry in last.entries if entry.ran],
        skipped=[entry for entry in last.entries if entry.outcome == "skipped"],
        up_to_date=[entry.stage for entry in last.entries if entry.outcome == UP_TO_DATE],
        counts={kind: counts[kind] for kind in WORDS if kind in counts},
        words=WORDS,
        reports=list(reports(last)),
        workers=dict(bars(last)),
        ticks=list(ticks(last.seconds)),
        width=WIDTH,
        row=ROW,
    )


def reports(last: Rebuild) -> Iterator[tuple[str, str]]:
    """(name, address) of the reports on what the stages make: that of each `dvc.yaml`."""
    for path in dict.fromkeys(entry.stage.rpartition("dvc.yaml:")[0] for entry in last.entries):
        yield f"{path}reports", f"../{path}reports/index.html" if path else "index.html"


def bars(last: Rebuild) -> Iterator[tuple[str, list[Bar]]]:
    """The bars of each worker. Each lies in the first row in which the one before has ended."""
    scale = WIDTH / (last.seconds or 1)
    for worker in sorted({entry.worker for entry in last.entries if entry.ran}):
        rows: list[list[Result]] = []
        for entry in last.entries:
            if entry.ran and entry.worker == worker:
                _first_free(rows, entry.started).append(entry)
        yield (
            worker,
            [
                Bar(entry, scale * (entry.started - last.started), scale * entry.seconds, row)
                for row, entries in enumerate(rows)
                for entry in entries
            ],
        )


def _first_free(rows: list[list[Result]], moment: float) -> list[Result]:
    for row in rows:
        if row[-1].started + row[-1].seconds <= moment:
            return row
    rows.append([])
    return rows[-1]


def ticks(seconds: float) -> Iterator[tuple[float, str]]:
    """About six round times since the start: position, text."""
    steps = [m * unit for unit in (1, 60, 3600) for m in (1, 2, 5, 10, 15, 30)] + [36000, 86400]
    step = next((step for step in steps if seconds / step <= 7), seconds / 6)
    for number in range(int(seconds / step) + 1):
        moment = number * step
        yield WIDTH * moment / (seconds or 1), _elapsed(moment)


def _elapsed(seconds: float) -> str:
    """0:05, 12:30, 3:00:00."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def clock(moment: float, form: str = "%H:%M:%S") -> str:
    """Seconds since 1970 as the local time of day."""
    return datetime.fromtimestamp(moment).astimezone().strftime(form)
