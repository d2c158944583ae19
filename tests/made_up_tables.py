"""Tables and a KDD Cup that were made up, for tests of what reads and scores them."""

import gzip

import pandas as pd
import torch
from test_data import AS_THEY_ARE
from test_images import publish

from ebm import data
from ebm.data import files, kddcup99
from ebm.schema import KDDCup99Data, TableData

CATEGORIES = {
    "protocol_type": 3,
    "service": 66,
    "flag": 11,
    "land": 2,
    "logged_in": 2,
    "is_host_login": 1,
    "is_guest_login": 2,
}
CONTRADICTORY, REPEATED, ROWS = 500, 510, 700


def made_up(rows=200, anomalies=0.3):
    """A table of numbers of very different size, with a label and a column to be ignored."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(rows, 3, generator=generator, dtype=torch.float64)
    kinds = ["fraud" if draw < anomalies else "fine" for draw in draws[:, 0].tolist()]
    return pd.DataFrame(
        {
            "id": [f"no {row}" for row in range(rows)],
            "amount": (1e6 * draws[:, 1] - 5e5).tolist(),
            "colour": [("red", "green", "blue")[int(3 * draw)] for draw in draws[:, 2].tolist()],
            "kind": kinds,
        }
    )


def settings(path, **changes):
    options = {
        "label": "kind",
        "normal": ["fine"],
        "categorical": ["colour"],
        "ignore": ["id"],
        "missing": "error",
        "scale": "minmax",
        "validation": 0.2,
        "test": 0.25,
        "seed": 0,
    }
    return TableData(kind="table", path=str(path), reference=AS_THEY_ARE, **options | changes)


def connections():
    """Rows like those of the KDD Cup, all categories among them: a quarter is normal, the last are
    repeated from the first, and one has twins with the other label."""
    rows = torch.arange(ROWS)
    columns = {name: (rows % 5).tolist() for name in kddcup99.COLUMNS}
    columns |= {name: (rows % n).tolist() for name, n in CATEGORIES.items()}
    columns["src_bytes"] = (1000 * rows).tolist()
    columns["num_outbound_cmds"] = [0] * ROWS
    labels = ["normal." if row % 4 == 0 else f"attack{row % 3}." for row in range(ROWS)]
    frame = pd.DataFrame(columns).assign(label=labels)
    frame.loc[::4, "src_bytes"] += 1_000_000
    frame.loc[REPEATED:] = frame.loc[: ROWS - REPEATED - 1].to_numpy()
    frame.loc[CONTRADICTORY] = frame.loc[CONTRADICTORY + 1].to_numpy()
    frame.loc[CONTRADICTORY, "label"] = "normal."
    return frame


def publish_cup(tmp_path, monkeypatch):
    """What prepares a made-up KDD Cup, which is all that is to be had."""
    content = gzip.compress(connections().to_csv(index=False, header=False).encode())
    publish(tmp_path, monkeypatch, kddcup99.FILE, content)
    monkeypatch.setenv(files.MIRROR, str(tmp_path))

    def prepare(protocol, scale=None, validation=0.25, seed=0):
        scale = scale or {"paper": "none", "strict": "minmax"}[protocol]  # as in paper/params.yaml
        options = {"protocol": protocol, "scale": scale, "validation": validation, "seed": seed}
        return data.prepare(KDDCup99Data(kind="kddcup99", reference=AS_THEY_ARE, **options))

    return prepare
