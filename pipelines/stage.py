"""What every stage shares: its argument, a device, checksums, files."""

import argparse
import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebm import EBMError
from pipelines import gpu
from pipelines.commands import guarded

if TYPE_CHECKING:
    import torch

    from ebm.figures import Drawing

PARAMS = Path("params.yaml")


def main(run: Callable[[str], None], noun: str) -> None:
    """Run a stage for the `noun` named on the command line, and exit."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("name", help=f"the {noun}, a key of params.yaml")
    name = parser.parse_args().name
    logging.basicConfig(level=logging.INFO, format=f"{name}: %(message)s", stream=sys.stderr)
    sys.exit(guarded(lambda: run(name)))


def main_alone(run: Callable[[], None]) -> None:
    """Run a stage that there is but one of, which takes no argument, and exit."""
    argparse.ArgumentParser(description=sys.modules["__main__"].__doc__).parse_args()
    sys.exit(guarded(run))


def claim_device(threads: int, wait: bool = True) -> "torch.device":
    """Claim a GPU where there is one (EBM_DEVICE overrides), else take the CPU, with `threads`
    threads.

    From then on PyTorch uses deterministic algorithms where it has them, so that a computation
    that is repeated gives the same bits, and computes convolutions in full float32, not in TF32.

    The GPU is PyTorch's current device from then on, and no other stage's until this process ends.
    Where none is free the stage waits for one, or takes the CPU if it is not to `wait`.
    """
    import torch

    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic: Any = torch.utils.deterministic
    deterministic.fill_uninitialized_memory = False  # it would take up to a tenth of a small step
    torch.backends.cudnn.allow_tf32 = False  # of a Glow it leaves an inverse that is off by 0.02
    name = os.environ.get("EBM_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    if not gpu.known_device(name):
        raise EBMError(f"EBM_DEVICE = {name}: expected {gpu.DEVICES}")
    chosen = torch.device(name)
    if chosen.type != "cuda":
        return chosen
    cards = {
        index: str(torch.cuda.get_device_properties(index).uuid)
        for index in range(torch.cuda.device_count())
        if chosen.index in (None, index)
    }
    index = gpu.claim(cards, wait)
    if index is None:
        logging.getLogger(__name__).info("others use all GPUs: the CPU does it")
        return torch.device("cpu")
    torch.cuda.set_device(index)
    return torch.device("cuda")


def digest(content: object) -> str:
    """SHA-256 of a JSON-able value, the same for equal values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content; EBMError where there is none to read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise EBMError(f"{path}: cannot be read: {error.strerror}") from None


def write_json(path: Path, content: object) -> None:
    """Write `content` as indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path, stage: str) -> dict[str, Any]:
    """Read a JSON object that `stage` wrote; EBMError names the file and the stage if it is
    unusable."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no object")
        return content
    except (OSError, ValueError) as error:
        raise EBMError(f"{path}: unusable ({error}); run stage {stage} again") from None


def write_figures(folder: Path, drawn: "Sequence[tuple[str, str, str, Drawing]]") -> None:
    """Write pictures (name, title, caption, drawing) as `figures/<name>.png` in `folder`, and
    `figures.json`, which lists them in their order."""
    from ebm import figures

    (folder / "figures").mkdir(parents=True, exist_ok=True)
    listing = [
        {"file": f"figures/{name}.png", "title": title, "caption": caption}
        for name, title, caption, _ in drawn
    ]
    write_json(folder / "figures.json", listing)
    for name, _, _, drawing in drawn:
        (folder / "figures" / f"{name}.png").write_bytes(figures.png(drawing))
