"""Checkpoints that survive a kill, a full disk and a damaged file.

A file is written beside its final name, flushed to the disk and renamed, so it is whole or
absent; it begins with the SHA-256 of what follows, so damage is noticed. The newest two are kept.
Loading never unpickles code (`weights_only`).
"""

import hashlib
import io
import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ebm import EBMError, files

log = logging.getLogger(__name__)

KEPT = 2
_DIGEST = hashlib.sha256().digest_size


class Damaged(EBMError):
    """What lies in a file is not what was written to it."""


class Checkpoints:
    """The checkpoints of one training in `folder`, which nothing else may use meanwhile."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder against a second training; the lock dies with the process."""
        refusal = f"{self.folder}: another process is training here"
        with files.locked(self.folder / "lock", refusal):
            for rest in self.folder.glob(".step-*"):  # of one that was killed while it wrote
                rest.unlink()
            yield

    def save(self, step: int, content: dict[str, Any]) -> None:
        """Write the checkpoint of `step` atomically, then drop all but the newest two."""
        buffer = io.BytesIO()
        torch.save(content, buffer)
        payload = buffer.getvalue()
        new = self._path(step)
        try:
            files.replace(new, hashlib.sha256(payload).digest() + payload)
        except OSError as error:
            raise EBMError(f"{new}: cannot be written: {error.strerror}") from None
        for path in self.paths()[:-KEPT]:
            path.unlink()

    def paths(self) -> list[Path]:
        """All checkpoints, oldest first."""
        return sorted(self.folder.glob("step-*.ckpt"))

    def newest(self) -> dict[str, Any] | None:
        """The newest checkpoint that is whole; damaged ones are reported, removed and passed over.

        Going back further is safe: a run is a function of (seed, step), so it ends the same. One
        that cannot be read as things are (no memory, a disk that fails, another version of
        PyTorch) may be whole: EBMError, and nothing is removed.
        """
        for path in reversed(self.paths()):
            try:
                return _read(path)
            except Damaged as error:
                log.warning("%s; going back to an older one", error)
                path.unlink()
        return None

    def oldest(self) -> dict[str, Any]:
        """The older of the kept checkpoints, or the newer if the older is damaged, which is
        reported; all others are dropped. EBMError if neither is whole, or one cannot be read."""
        for path in self.paths()[-KEPT:]:  # a kill can have left more
            try:
                content = _read(path)
            except Damaged as error:
                log.warning("%s; passing over it", error)
                continue
            for other in self.paths():
                if other != path:
                    other.unlink()
            return content
        raise EBMError(f"{self.folder}: no checkpoint is whole")

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:010d}.ckpt"


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise EBMError(f"{path}: cannot be read: {error.strerror}") from None
    if hashlib.sha256(raw[_DIGEST:]).digest() != raw[:_DIGEST]:
        raise Damaged(f"{path}: damaged checkpoint (wrong checksum, {len(raw)} bytes)")
    try:
        return torch.load(io.BytesIO(raw[_DIGEST:]), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        problem = " ".join(str(error).split())[:200]
        advice = f"delete {path.parent} to begin anew"
        raise EBMError(f"{path}: whole, but cannot be loaded ({problem}); {advice}") from None
