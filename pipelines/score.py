"""Energies of the rows of a CSV file, by a trained model of a table.

The file is read in chunks, so it may be of any size. Columns are found by the names in its header;
the model brings the transform that it was trained with. The output is there when it is complete
and not before. Its columns:

    row      of the data, from 1
    energy   lower = more likely; empty where the row has an empty cell, if the model's data set
             drops such rows
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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ebm import EBMError
from pipelines import stage

if TYPE_CHECKING:
    import numpy as np
    import torch
    from pandas import DataFrame

    from ebm.data.table import Transform
    from ebm.variants.base import EBM

log = logging.getLogger(__name__)

BATCH = 4096  # points in one forward pass


@dataclass
class Seen:
    """What went by: rows, those among them with an energy and those flagged, and by column the
    categories that were never fitted."""

    rows: int
    scored: int
    flagged: int
    unseen: Counter[str]


def score(
    model: Path,
    input: Path,
    output: Path,
    threshold: float | None,
    chunk: int,
    threads: int | None,
) -> None:
    """Write the energies of the rows of `input` to `output`; what went by goes to the log."""
    started = time.perf_counter()
    _check(input, output, threshold, chunk, threads)
    content = _transform(model / "config.json")
    threshold = _threshold(model) if threshold is None else threshold
    import torch  # only once the arguments are known to be right
    from tqdm import tqdm

    from ebm import variants
    from ebm.data import table

    transform = table.Transform.from_json(content, str(model / "config.json"))
    names = table.header(input)
    transform.check(names, str(input))
    numeric = set(transform.numeric)
    chunks = table.chunks(input, [name for name in names if name not in numeric], chunk)
    device = stage.device(threads or torch.get_num_threads())
    network = variants.load(model / "weights.safetensors", model / "config.json").to(device)
    seen = Seen(0, 0, 0, Counter())
    with (
        _complete_or_absent(output) as file,
        tqdm(unit=" rows", unit_scale=True, disable=None) as bar,
    ):
        for frame in chunks:
            energy = _energies(network, transform, frame, device, input, seen)
            _append(file, energy, threshold, seen)
            bar.update(len(frame))
    table.warn_of_unseen(seen.unseen, str(input))
    _report(seen, threshold, time.perf_counter() - started)


def _check(
    source: Path, target: Path, threshold: float | None, chunk: int, threads: int | None
) -> None:
    for name, value in (("chunk", chunk), ("threads", threads)):
        if value is not None and value < 1:
            raise EBMError(f"--{name} {value}: expected a number of at least 1")
    if threshold is not None and not math.isfinite(threshold):
        raise EBMError(f"--threshold {threshold}: expected a finite number")
    if not source.is_file():
        raise EBMError(f"{source}: no such file")
    if not target.parent.is_dir():
        raise EBMError(f"{target.parent}: no such folder")
    if target.exists() and (not target.is_file() or target.samefile(source)):
        problem = "the input itself" if target.is_file() else "no file"
        raise EBMError(f"--output {target}: {problem}; expected the name of a new file")


def _transform(config: Path) -> Any:
    """What a row has to go through, as JSON; EBMError if the model is none of a table."""
    if not config.exists():
        raise EBMError(f"{config.parent}: no model: there is no {config.name}")
    settings = stage.read_json(config, f"train@{config.parent.name}")
    if "transform" not in settings:
        kind = f"of data set {settings.get('dataset')!r}, which is no table"
        raise EBMError(f"{config.parent}: a model {kind}; expected one of kind table or kddcup99")
    return settings["transform"]


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


def _energies(
    network: "EBM",
    transform: "Transform",
    frame: "DataFrame",
    device: "torch.device",
    source: Path,
    seen: Seen,
) -> "np.ndarray":
    """Energies [N] of the rows of `frame`, NaN where a row is left out, infinite of one that the
    model holds for impossible."""
    import numpy as np

    from ebm.metrics import in_batches

    kept = np.full(len(frame), True)
    if transform.missing == "drop":
        kept = transform.complete(frame)
    points, unseen = transform.encode(frame[kept], str(source))
    seen.unseen.update(unseen)
    energy = np.full(len(frame), np.nan)
    if kept.any():
        found = in_batches(lambda x: network.energy(x.to(device)).cpu().double(), points, BATCH)
        energy[kept] = found.numpy()
    if (wrong := kept & (np.isnan(energy) | np.isneginf(energy))).any():
        first = int(np.flatnonzero(wrong)[0])
        row = int(frame.index[first]) + 2  # as messages count: the header is row 1
        raise EBMError(f"{source}: row {row}: its energy is {energy[first]}; nothing was written")
    return energy


def _append(file: TextIO, energy: "np.ndarray", threshold: float | None, seen: Seen) -> None:
    """Write a line for each of the energies [N], and count them."""
    import numpy as np
    import pandas as pd

    known = ~np.isnan(energy)
    flagged = energy >= (math.nan if threshold is None else threshold)
    anomaly = pd.array(flagged.astype(np.int8), dtype="Int8")
    anomaly[~known | (threshold is None)] = pd.NA
    row = np.arange(seen.rows, seen.rows + len(energy)) + 1
    lines = pd.DataFrame({"row": row, "energy": energy, "anomaly": anomaly})
    how: dict[str, Any] = {"index": False, "float_format": "%.9g", "lineterminator": "\n"}
    lines.to_csv(file, header=not seen.rows, **how)
    seen.rows += len(energy)
    seen.scored += int(known.sum())
    seen.flagged += int(flagged.sum())


def _report(seen: Seen, threshold: float | None, seconds: float) -> None:
    log.info("%d rows in %.1f s, %.0f rows per second", seen.rows, seconds, seen.rows / seconds)
    if seen.scored < seen.rows:
        log.warning("%d rows have an empty cell and no energy", seen.rows - seen.scored)
    if threshold is None:
        log.info("no threshold, so nothing is flagged: give one by --threshold")
    elif seen.scored:
        share = 100 * seen.flagged / seen.scored
        log.info(
            "%d flagged, %.2f %%, at energies of %.6g or more", seen.flagged, share, threshold
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.score",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="its folder, such as models/<experiment>")
    add("--input", type=Path, required=True, help="a CSV file with a header, may be packed")
    add("--output", type=Path, required=True, help="a CSV file to write, packed if its name says")
    add("--threshold", type=float, help="if not that of evaluation/threshold.json in the folder")
    add("--chunk", type=int, default=50_000, help="rows in memory at once (default: 50000)")
    add("--threads", type=int, help="of the CPU (default: all)")
    options = vars(parser.parse_args(arguments))
    logging.basicConfig(level=logging.INFO, format="score: %(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is half done goes
    stage.guarded(lambda: score(**options))


if __name__ == "__main__":
    main()
