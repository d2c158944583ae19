"""Energies of the rows of a CSV file by a trained model of a table, or of the images in a folder
by one of images.

They are read in chunks, so there may be any number. Columns of a table are found by the names in
its header; the model brings the transform that it was trained with. Images in a folder and those
within it get the form of the model's (`ebm.data.folder`). The output is there when it is complete
and not before. Its columns:

    row      of the data, from 1; of images instead `file`, its path within the folder
    energy   lower = more likely; infinite where a number is too large for the model; empty where
             the row has an empty cell, if the model's data set drops such rows
    anomaly  1 where the energy is not below the threshold, else 0; empty where there is no energy
             or no threshold
"""

import argparse
import errno
import gzip
import json
import logging
import math
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ebm import EBMError
from pipelines import stage
from pipelines.commands import guarded

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from pandas import DataFrame

    from ebm.data.transform import Transform
    from ebm.trained import Trained

log = logging.getLogger(__name__)

PACKINGS = (".bz2", ".tar", ".xz", ".zip", ".zst")
"""What a file may be packed as for whoever reads it by its name, and is never written as."""
LARGEST = 1e18
"""From here on numbers of points have an infinite energy: the squares of some leave float32."""
CHUNK, POINTS = 50_000, 2**25  # rows of a table, and numbers of their points, in memory at once


@dataclass
class Seen:
    """What went by so far, for the summary."""

    things: str
    """What is counted: rows or images."""
    count: int = 0
    scored: int = 0
    """Those that have an energy: all but rows with an empty cell."""
    flagged: int = 0
    beyond: int = 0
    """Those with a number that is not below LARGEST."""
    far: int = 0
    """Others with a number far from all that was trained on, and all the same not flagged."""
    unseen: Counter[str] = field(default_factory=Counter)
    """By column, values of categories that the model was never fitted to."""


def score(
    model: Path,
    input: Path,
    output: Path,
    threshold: float | None,
    chunk: int | None,
    threads: int | None,
) -> None:
    """Write the energies of the rows or images of `input` to `output`; what went by goes to the
    log. Without a `chunk` as many rows are in memory at once as CHUNK says."""
    started = time.perf_counter()
    _check(input, output, threshold, chunk, threads)
    config = model / "config.json"
    _check_kind(config, input)
    import torch  # only once the arguments are known to be right
    from tqdm import tqdm

    from ebm import trained
    from ebm.data.transform import warn_of_unseen

    device = stage.claim_device(threads or torch.get_num_threads(), wait=False)
    loaded = trained.read(model / "weights.safetensors", config, device)
    threshold = _threshold(model) if threshold is None else threshold
    seen = Seen("images" if input.is_dir() else "rows")
    if loaded.transform is None:
        found = _of_images(loaded, input)
    else:
        rows = chunk or max(1, min(CHUNK, POINTS // loaded.transform.width))
        found = _of_rows(loaded, loaded.transform, input, rows, threshold, seen)
    with (
        _complete_or_absent(output) as file,
        tqdm(unit=f" {seen.things}", unit_scale=True, disable=None) as bar,
    ):
        for first, energy in found:
            _append(file, first, energy, threshold, seen)
            bar.update(len(energy))
    warn_of_unseen(seen.unseen, str(input))
    _report(seen, threshold, time.perf_counter() - started)


def _check(
    source: Path, target: Path, threshold: float | None, chunk: int | None, threads: int | None
) -> None:
    for name, value in (("chunk", chunk), ("threads", threads)):
        if value is not None and value < 1:
            raise EBMError(f"--{name} {value}: expected a number of at least 1")
    if threshold is not None and not math.isfinite(threshold):
        raise EBMError(f"--threshold {threshold}: expected a finite number")
    if not source.exists():
        raise EBMError(f"{source}: no such file or folder")
    if target.suffix in PACKINGS:
        raise EBMError(f"--output {target}: can be packed as .gz only")
    if not target.parent.is_dir():
        raise EBMError(f"{target.parent}: no such folder")
    if target.exists() and (not target.is_file() or target.samefile(source)):
        problem = "the input itself" if target.is_file() else "no file"
        raise EBMError(f"--output {target}: {problem}; expected the name of a new file")
    if source.is_dir() and target.resolve().is_relative_to(source.resolve()):
        raise EBMError(f"--output {target}: lies in the folder that is scored")


def _check_kind(config: Path, source: Path) -> None:
    """Raise EBMError unless there is a model of what `source` is, a table or a folder of
    images."""
    if not config.exists():
        raise EBMError(f"{config.parent}: no model: there is no {config.name}")
    settings = stage.read_json(config, f"train@{config.parent.name}")
    if not isinstance(shape := settings.get("shape"), list):
        raise EBMError(f"{config}: names no shape; run stage train@{config.parent.name} again")
    if source.is_dir() and len(shape) < 2:
        problem = f"a model of data set {settings.get('dataset')!r}, which is none of images"
        raise EBMError(f"{config.parent}: {problem}; --input {source} is a folder")
    if source.is_dir() and len(shape) > 2 and shape[0] != 3:
        problem = f"a model of images with {shape[0]} channels"
        raise EBMError(f"{config.parent}: {problem}; expected one of grey or colour images")
    if not source.is_dir() and len(shape) > 1:
        raise EBMError(f"{config.parent}: a model of images; expected a folder, not {source}")
    if not source.is_dir() and "transform" not in settings:
        kind = f"of data set {settings.get('dataset')!r}, which is no table"
        raise EBMError(f"{config.parent}: a model {kind}; expected one of a table")


def _threshold(model: Path) -> float | None:
    """The energy from which on the evaluation of `model` flags a row, if it found one."""
    path = model / "evaluation" / "threshold.json"
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        value, weights = float(found["energy"]), str(found["weights_sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EBMError(f"{path}: not a threshold ({error!r}); give one by --threshold") from None
    if not math.isfinite(value):
        raise EBMError(f"{path}: energy = {value}; give a threshold by --threshold")
    if weights != stage.file_digest(model / "weights.safetensors"):
        again = f"run evaluate@{model.name} again or give one by --threshold"
        raise EBMError(f"{path}: the threshold of other weights; {again}")
    return value


@contextmanager
def _complete_or_absent(target: Path) -> Iterator[TextIO]:
    """A new file that takes the place of `target` when all is well, and goes when it is not."""
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with _open(part, packed=target.suffix == ".gz") as file:
            yield file
        os.replace(part, target)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise EBMError(f"{target}: cannot be written: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)


def _open(path: Path, packed: bool) -> TextIO:
    how: dict[str, Any] = {"mode": "wt", "encoding": "utf-8", "newline": ""}
    return gzip.open(path, **how) if packed else open(path, **how)


def _of_rows(
    model: "Trained",
    transform: "Transform",
    source: Path,
    chunk: int,
    threshold: float | None,
    seen: Seen,
) -> "Iterator[tuple[DataFrame, np.ndarray]]":
    """Rows of a CSV file by their numbers, and their energies, `chunk` of them at a time: NaN
    where a row is left out."""
    import numpy as np
    import pandas as pd

    from ebm.data import table
    from ebm.data.transform import FIRST_ROW

    names = table.header(source)
    transform.check(names, str(source))
    numeric = set(transform.numeric)
    text = [name for name in names if name not in numeric]
    for frame in table.chunks(source, names, text, chunk):
        kept = np.full(len(frame), True)
        if transform.missing == "drop":
            kept = transform.complete(frame)
        points, unseen = transform.encode(frame[kept], str(source), finite=False)
        seen.unseen.update(unseen)
        within = (points.abs() < LARGEST).all(1).numpy()
        seen.beyond += int((~within).sum())
        found = np.full(len(points), np.inf)
        found[within] = model.energies(points[within])
        normal = found < (math.inf if threshold is None else threshold)
        seen.far += int((transform.far(points).numpy() & normal).sum())
        _refuse(found, f"{source}: row ", frame.index[kept] + FIRST_ROW)
        energy = np.full(len(frame), np.nan)
        energy[kept] = found
        yield pd.DataFrame({"row": np.arange(seen.count, seen.count + len(frame)) + 1}), energy


def _of_images(model: "Trained", source: Path) -> "Iterator[tuple[DataFrame, np.ndarray]]":
    """Images in a folder by their paths, and their energies, a batch at a time."""
    import pandas as pd

    from ebm.data import folder, unit

    paths = folder.files(source)
    size = model.batch
    for start in range(0, len(paths), size):
        some = paths[start : start + size]
        points = unit(folder.read_all(some, model.shape))
        if (row := model.first_strange(points)) is not None:
            pixels = "x".join(map(str, model.shape[-2:]))
            known = f"black and white alone (`binarize: {model.binarize}`)"
            raise EBMError(f"{some[row]}: has greys at {pixels} pixels; the model knows {known}")
        energy = model.energies(points)
        _refuse(energy, "", some)
        yield pd.DataFrame({"file": [p.relative_to(source).as_posix() for p in some]}), energy


def _refuse(energy: "np.ndarray", before: str, where: "Sequence[object] | pd.Index") -> None:
    """EBMError names `where`, after the words `before`, the first of the energies [N] is that is
    no number. It may be infinite, of what the model holds for impossible."""
    import numpy as np

    if (wrong := np.isnan(energy) | np.isneginf(energy)).any():
        first = int(np.flatnonzero(wrong)[0])
        raise EBMError(
            f"{before}{where[first]}: its energy is {energy[first]}; nothing was written"
        )


def _append(
    file: TextIO, first: "DataFrame", energy: "np.ndarray", threshold: float | None, seen: Seen
) -> None:
    """Write a line for each of the energies [N], which begins as in `first`, and count them."""
    import numpy as np
    import pandas as pd

    known = ~np.isnan(energy)
    flagged = energy >= (math.nan if threshold is None else threshold)
    anomaly = pd.array(flagged.astype(np.int8), dtype="Int8")
    anomaly[~known | (threshold is None)] = pd.NA
    lines = first.assign(energy=energy, anomaly=anomaly)
    how: dict[str, Any] = {"index": False, "float_format": "%.9g", "lineterminator": "\n"}
    lines.to_csv(file, header=not seen.count, **how)
    seen.count += len(energy)
    seen.scored += int(known.sum())
    seen.flagged += int(flagged.sum())


def _report(seen: Seen, threshold: float | None, seconds: float) -> None:
    count, things = seen.count, seen.things
    log.info("%d %s in %.1f s, %.0f per second", count, things, seconds, count / seconds)
    if seen.scored < count:
        log.warning("%d rows have an empty cell and no energy", count - seen.scored)
    if seen.beyond:
        log.warning(
            "%d rows have a number too large to compute with, so their energy is inf", seen.beyond
        )
    if seen.far:
        log.warning(
            "%d rows that are not flagged have a number far from all that were trained on, where "
            "an energy may be low without meaning it",
            seen.far,
        )
    if threshold is None:
        log.info("no threshold, so nothing is flagged: give one by --threshold")
    elif seen.scored:
        share = 100 * seen.flagged / seen.scored
        log.info(
            "%d flagged, %.2f %%, at energies of %.6g or more", seen.flagged, share, threshold
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.score",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="its folder, such as models/<experiment>")
    add(
        "--input",
        type=Path,
        required=True,
        help="a CSV file with a header, may be packed, or a folder of images",
    )
    add("--output", type=Path, required=True, help="a CSV file to write, packed if it ends in .gz")
    add(
        "--threshold",
        type=float,
        help="if not that of evaluation/threshold.json in the folder; =-1e-5 if negative",
    )
    add(
        "--chunk",
        type=int,
        help=f"rows of a table in memory at once (default: {CHUNK}, fewer of very wide ones)",
    )
    add("--threads", type=int, help="of the CPU (default: all)")
    options = vars(parser.parse_args(arguments))
    logging.basicConfig(level=logging.INFO, format="score: %(message)s", stream=sys.stderr)
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that what is half done goes
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    return guarded(lambda: score(**options))


if __name__ == "__main__":
    sys.exit(main())
