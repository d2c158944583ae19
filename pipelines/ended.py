"""Trainings that have ended and whose result DVC has yet to record.

Their last checkpoint stays until then: where DVC fails, of a full disk, the next attempt is at the
end at once and trains nothing again.
"""

import shutil
from pathlib import Path

from pipelines import places

MARK = "ended"
"""A file in the folder of the checkpoints of such a training."""


def mark(folder: Path) -> None:
    """Note that the training whose checkpoints are in `folder` has ended."""
    (folder / MARK).touch()


def clear(experiment: str, but: Path | None = None) -> None:
    """Remove the checkpoints of all trainings of an experiment that have ended `but` those in a
    folder."""
    for note in places.checkpoints(experiment).glob(f"*/{MARK}"):
        if note.parent != but:
            shutil.rmtree(note.parent, ignore_errors=True)
