"""Trainings that have ended and whose result DVC has yet to record.

Their last checkpoint stays until then: where DVC fails, of a full disk, the next attempt is at the
end at once and trains nothing again.
"""

import hashlib
import shutil
from contextlib import suppress
from pathlib import Path

MARK = "ended"
"""A file in the folder of the checkpoints of such a training: the MD5 of its result, by which DVC
knows it."""


def mark(folder: Path, result: Path) -> None:
    """Note that the training with checkpoints in `folder` has ended with the file `result`."""
    with open(result, "rb") as file:
        (folder / MARK).write_text(hashlib.file_digest(file, "md5").hexdigest())


def clear(trainings: Path, but: Path | None = None) -> None:
    """Remove the checkpoints of all `trainings` of an experiment that have ended `but` those in a
    folder."""
    for note in trainings.glob(f"*/{MARK}"):
        if note.parent != but:
            shutil.rmtree(note.parent, ignore_errors=True)


def clear_for(folder: Path) -> None:
    """Before a training in `folder`, which is locked: remove the checkpoints of others of the
    experiment that have ended, and its own if DVC has recorded their result in the `dvc.lock`
    here, so that who asks for the training again gets one."""
    clear(folder.parent, but=folder)
    if _recorded(folder / MARK):
        for file in folder.iterdir():
            if file.name != "lock":
                file.unlink()


def _recorded(note: Path) -> bool:
    with suppress(OSError):
        return note.read_text() in Path("dvc.lock").read_text(encoding="utf-8")
    return False
