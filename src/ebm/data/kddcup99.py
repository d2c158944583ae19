"""The 10 % file of the KDD Cup 1999: 494,021 connections to a network, 41 columns and a label.

As in the literature since Zhai et al. 2016 (arXiv:1605.07717) and Zong et al. 2018 (DAGMM), the
attacks, four fifths of the rows, are what is trained on, and a `normal.` connection is the
anomaly. Seven columns are categorical and have 3, 66, 11, 2, 2, 1 and 2 categories in the file,
34 are numbers: points have 121 dimensions.

Protocol `paper` is what the code of MEG does, as its forerunners did:

- Half of the rows, drawn at random, are test, anomalies and attacks as they come (with seed 0,
  19.8 % are anomalies). The attacks of the other half are train. Most test rows have a twin in
  train.
- Nothing is set apart to choose a threshold with. Here validation is the anomalies of the first
  half and a share `validation` of its attacks, **which are trained on as well**.

Protocol `strict` mends that:

- Of rows that are equal in all 41 columns only the first is kept, and none if labels differ.
- Half of the attacks, drawn at random, are train; a share `validation` of the others is in
  validation, the rest in test. No row is in two of them.
- Anomalies are drawn at random so that they are exactly 20 % of validation and of test.

`scale: minmax` scales numbers by the bounds of train, `scale: log` their logarithms. The released
code fits a scaler to the bounds and throws its result away: what it trains on is `scale: none`.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ebm import EBMError
from ebm.data import files, table
from ebm.data.made import Made
from ebm.data.transform import fit
from ebm.schema import KDDCup99Data

if TYPE_CHECKING:
    from pandas import DataFrame

FILE = "kddcup99/kddcup.data_10_percent.gz"

NAMES = (
    "duration protocol_type service flag src_bytes dst_bytes land wrong_fragment urgent hot "
    "num_failed_logins logged_in num_compromised root_shell su_attempted num_root "
    "num_file_creations num_shells num_access_files num_outbound_cmds is_host_login "
    "is_guest_login count srv_count serror_rate srv_serror_rate rerror_rate srv_rerror_rate "
    "same_srv_rate diff_srv_rate srv_diff_host_rate dst_host_count dst_host_srv_count "
    "dst_host_same_srv_rate dst_host_diff_srv_rate dst_host_same_src_port_rate "
    "dst_host_srv_diff_host_rate dst_host_serror_rate dst_host_srv_serror_rate "
    "dst_host_rerror_rate dst_host_srv_rerror_rate"
)
COLUMNS = NAMES.split()
LABEL, ANOMALY = "label", "normal."
CATEGORICAL = [COLUMNS[number] for number in (1, 2, 3, 6, 11, 20, 21)]

PER_ANOMALY = 4
"""Attacks to one anomaly in the splits of `strict`."""

Split = tuple[dict[str, Tensor], dict[str, Any]]


def prepare(settings: KDDCup99Data) -> Made:
    """Splits float32 [N, 121] with rows of the file (from 0) and, but for train, labels; the notes
    say how many rows were dropped, how many anomalies are where, and what validation shares with
    train."""
    frame, anomaly = _read()
    divide = _paper if settings.protocol == "paper" else _strict
    index, notes = divide(frame, anomaly, settings)
    transform = fit(
        frame.iloc[index["train"].numpy()],
        CATEGORICAL,
        settings.scale,
        FILE,
        others=[LABEL],
        vocabulary=frame,  # so that points have the published 121 dimensions
    )
    tensors = table.splits(frame, anomaly, index, transform, FILE)
    notes |= {"anomalies": table.counts(anomaly, index)["anomalies"]}
    source = f"{FILE}, protocol {settings.protocol}"
    return Made(source, tensors, notes=notes, transform=transform.to_json())


def _read() -> tuple["DataFrame", Tensor]:
    """The 41 columns, and which rows are anomalies: bool [N]."""
    import pandas as pd

    frame = pd.read_csv(
        files.fetch(FILE),
        compression="gzip",
        names=[*COLUMNS, LABEL],
        dtype=dict.fromkeys([*CATEGORICAL, LABEL], "str"),
        keep_default_na=False,
    )
    anomaly = torch.from_numpy((frame.pop(LABEL) == ANOMALY).to_numpy(copy=True))
    return frame, anomaly


def _paper(frame: "DataFrame", anomaly: Tensor, settings: KDDCup99Data) -> Split:
    """Rows of each split in random order, and what is to be noted."""
    first, test = _permutation(len(frame), settings.seed).tensor_split(2)
    attack = ~anomaly[first]
    shared = round(settings.validation * int(attack.sum()))
    validation = first[~attack | (attack.cumsum(0) <= shared)]
    notes = {"validation_rows_in_train": shared}
    return {"train": first[attack], "validation": validation, "test": test}, notes


def _strict(frame: "DataFrame", anomaly: Tensor, settings: KDDCup99Data) -> Split:
    """Rows of each split in random order, and what is to be noted."""
    rows, notes = _unique(frame, anomaly)
    order = rows[_permutation(len(rows), settings.seed)]
    attacks, anomalies = order[~anomaly[order]], order[anomaly[order]]
    train, rest = attacks[: len(attacks) // 2], attacks[len(attacks) // 2 :]
    sizes = _sizes(len(rest), len(anomalies), settings.validation)
    index = {"train": train}
    for split, size in sizes.items():
        pieces = [rest[: PER_ANOMALY * size], anomalies[:size]]
        rest, anomalies = rest[PER_ANOMALY * size :], anomalies[size:]
        index[split] = order[torch.isin(order, torch.cat(pieces))]
    return index, notes | {"unused": {"attacks": len(rest), "anomalies": len(anomalies)}}


def _unique(frame: "DataFrame", anomaly: Tensor) -> tuple[Tensor, dict[str, int]]:
    """The first of all rows that are equal in every column and, if they differ in the label, none;
    with the number of rows `repeated` and of those `contradictory`."""
    labelled = frame.assign(**{LABEL: anomaly.numpy()}).drop_duplicates()
    contradictory = labelled.duplicated(COLUMNS, keep=False).to_numpy()
    kept = labelled.index.to_numpy()[~contradictory]
    notes = {"repeated": len(frame) - len(labelled), "contradictory": int(contradictory.sum())}
    return torch.from_numpy(kept.copy()), notes


def _sizes(attacks: int, anomalies: int, validation: float) -> dict[str, int]:
    """Anomalies in each split, given how many rows there are to be split."""
    first = int(round(validation * attacks) // PER_ANOMALY)
    sizes = {"validation": first, "test": attacks // PER_ANOMALY - first}
    if min(sizes.values()) < 1 or sum(sizes.values()) > anomalies:
        held = f"{attacks} attacks and {anomalies} anomalies"
        raise EBMError(f"kddcup99: validation = {validation} does not split {held}")
    return sizes


def _permutation(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))
