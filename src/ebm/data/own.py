"""What a user's tables and images have in common: they lie where DVC sees a change, and fit into
memory."""

from pathlib import Path

import psutil

from ebm import EBMError


def refuse_links(*folders: Path) -> None:
    """EBMError names the first of the folders that is a link."""
    if links := [folder for folder in folders if folder.is_symlink()]:
        advice = "a link to a folder, in which DVC sees no change; expected the folder itself"
        raise EBMError(f"{links[0]}: {advice}")


def check_room(needed: int, what: str, advice: str) -> None:
    """EBMError if so many bytes are more than the memory of this machine."""
    if needed > (there := memory()):
        size = f"take {needed / 1e9:.1f} GB, more than the {there / 1e9:.1f} GB of memory"
        raise EBMError(f"{what} {size}; {advice}")


def memory() -> int:
    """Bytes of memory that this machine has."""
    return psutil.virtual_memory().total
