"""Tables: the transform is exact, fitted on training rows only and never lost; the KDD Cup's two
protocols are what they say; whatever is wrong with a file is one line."""

import copy
import gzip
import hashlib
import json
import logging
import math
import sys
import tarfile
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from made_up_tables import (
    CATEGORIES,
    CONTRADICTORY,
    REPEATED,
    ROWS,
    connections,
    made_up,
    settings,
)
from ruamel.yaml import YAML
from sklearn.datasets import load_breast_cancer
from test_data import AS_THEY_ARE, corrupt, density
from test_params import GOOD, ROOT, complaint, put, remove

from ebm import EBMError, data, params
from ebm.data import files, kddcup99, own, table
from ebm.data.transform import Transform, fit, numbers_of
from ebm.schema import TumoursData

FRAME = pd.DataFrame(
    {
        "size": [2.0, 4.0, 10.0],
        "colour": ["red", "blue", "red"],
        "always": [7, 7, 7],
        "port": ["80", "443", "80"],
    }
)
CATEGORICAL = ["colour", "port"]
POINTS = [  # size, blue, red, always, 443, 80
    [0.0, 0.0, 1.0, 0.0, 0.0, 1.0],
    [0.25, 1.0, 0.0, 0.0, 1.0, 0.0],
    [1.0, 0.0, 1.0, 0.0, 0.0, 1.0],
]


def fitted(scale="minmax", **options):
    return fit(FRAME, CATEGORICAL, scale, "x.csv", **options)


def changed(**columns):
    return FRAME.assign(**columns)


def test_numbers_are_scaled_by_their_bounds_and_categories_get_a_column_each():
    assert fitted().apply(FRAME).tolist() == POINTS
    assert fitted().width == 6
    assert fitted().apply(FRAME).dtype == torch.float32


def test_without_a_scale_numbers_stay():
    points = fitted("none").apply(FRAME)
    assert points[:, 0].tolist() == [2, 4, 10]
    assert points[:, 3].tolist() == [7, 7, 7]


def test_on_a_log_scale_a_factor_is_a_difference_whatever_the_sign():
    frame = changed(size=[-99.0, 0.0, 999.0])
    points = fit(frame, CATEGORICAL, "log", "x.csv").apply(frame)[:, 0]
    assert points.tolist() == pytest.approx([0, 2 / 5, 1])
    wide = fit(pd.DataFrame({"x": [0.0, 1e30]}), [], "log", "x.csv")
    steps = wide.apply(pd.DataFrame({"x": [1e10, 1e20, 1e30, 1e40]}))[:, 0].diff()
    assert steps.tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("scale", ["minmax", "log", "none"])
def test_decoded_points_are_the_rows_that_they_were(scale):
    transform, frame = fitted(scale), FRAME[[c.name for c in fitted(scale).columns]]
    back = transform.decode(transform.apply(frame))
    assert list(back) == list(frame)
    for column in transform.columns:
        before, after = frame[column.name].tolist(), back[column.name].tolist()
        exact = column.kind == "categorical"
        assert after == ([str(v) for v in before] if exact else pytest.approx(before, rel=1e-6))


def test_a_drawn_point_is_of_the_category_whose_column_is_the_largest():
    points = torch.tensor([[0.0, 0.2, 0.7, 0.0, -0.3, -0.1], [0.0, 1.4, 0.9, 0.0, 0.1, 0.0]])
    rows = fitted().decode(points)
    assert rows["colour"].tolist() == ["red", "blue"]
    assert rows["port"].tolist() == ["80", "443"]


def test_beyond_the_bounds_of_training_nothing_is_clipped():
    points = fitted().apply(changed(size=[-6.0, 18.0, 2.0], always=[7, 9, 6.5]))
    assert points[:, 0].tolist() == [-1, 2, 0]
    assert points[:, 3].tolist() == [0, 2, -0.5]


def test_bounds_are_those_of_the_rows_it_was_fitted_on():
    half = fit(FRAME[:2], CATEGORICAL, "minmax", "x.csv")
    assert (half.columns[0].low, half.columns[0].high) == (2, 4)
    assert half.apply(FRAME)[2, 0] == 4


def test_categories_may_come_from_more_rows_than_bounds_do():
    half = fit(FRAME[:1], CATEGORICAL, "minmax", "x.csv", vocabulary=FRAME)
    assert half.columns[1].categories == ("blue", "red")
    assert half.columns[0].high == 2


def test_a_transform_survives_json_bit_for_bit():
    third = fit(changed(size=[1 / 3, 0.1, 2e7 / 3]), CATEGORICAL, "minmax", "x.csv")
    again = Transform.from_json(json.loads(json.dumps(third.to_json())), "x.json")
    assert again == third
    assert torch.equal(again.apply(FRAME), third.apply(FRAME))


BARE = {"columns": [], "scale": "minmax", "missing": "drop", "others": []}
ONE = {"name": "x", "kind": "numeric", "categories": [], "low": 0.0, "high": 1.0}


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        {"columns": []},
        {"columns": [1]},
        BARE,
        BARE | {"columns": [ONE], "scale": "zz"},
    ],
)
def test_what_is_no_transform_is_named(content):
    with pytest.raises(EBMError, match=r"transform\.json: not a transform"):
        Transform.from_json(content, "transform.json")


def test_an_unseen_category_is_all_zeros_and_counted(caplog):
    points = fitted().apply(changed(colour=["green", "blue", "violet"]))
    assert points[:, 1:3].tolist() == [[0, 0], [1, 0], [0, 0]]
    assert caplog.messages == ["table: column 'colour': 2 rows with a category never fitted"]


def test_a_category_is_compared_as_text():
    points, unseen = fitted().encode(changed(port=[80, 443, 80]), "x.csv")
    assert unseen == {}
    assert points.tolist() == POINTS
    assert fitted().encode(changed(port=["80.0", "443", "80"]), "x.csv")[1] == {"port": 1}


def test_columns_are_found_by_name_and_others_are_warned_of(caplog):
    shuffled = FRAME.assign(extra=1, more="x")[
        ["more", "port", "always", "extra", "size", "colour"]
    ]
    assert fitted().apply(shuffled).tolist() == POINTS
    assert caplog.messages == ["table: columns that the model does not know: 'more', 'extra'"]


def test_a_label_is_nothing_to_warn_of(caplog):
    transform = fit(FRAME, CATEGORICAL, "minmax", "x.csv", others=["always"])
    assert transform.width == 5
    transform.apply(FRAME)
    assert caplog.messages == []


def test_a_lacking_column_is_named():
    with pytest.raises(EBMError, match="table: no column 'size', 'port'; it has 'colour'"):
        fitted().apply(FRAME[["colour", "always"]])


NAN = math.nan


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        ({"size": [1.0, NAN, NAN]}, "row 3, column 'size' is empty"),
        ({"colour": ["red", "red", None]}, "row 4, column 'colour' is empty"),
        ({"size": ["1", "2", "two"]}, "row 4, column 'size' = 'two': not a number"),
        ({"size": ["1", "2", "2,5"]}, "row 4, column 'size' = '2,5': not a number"),
        ({"size": ["1", "NA", "2"]}, "row 3, column 'size' = 'NA': not a number"),
        ({"size": [True, True, False]}, "row 2, column 'size' = 'True': not a number"),
        ({"size": [1.0, 2.0, math.inf]}, "row 4, column 'size' = 'inf': too large"),
        ({"size": [1.0, 1e300, 2.0]}, "row 3, column 'size' = '1e+300': too large"),
    ],
)
def test_a_cell_that_cannot_be_used_is_named_by_row_and_column(columns, line):
    with pytest.raises(EBMError) as caught:
        fitted().apply(changed(**columns), "x.csv")
    assert str(caught.value).startswith(f"x.csv: {line}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scale", ["minmax", "log"])
def test_numbers_that_differ_by_rounding_are_one_number(scale):
    """Else the rounding would be a coin of 0 and 1, and a true difference 12 digits long."""
    frame = pd.DataFrame({"size": [0.3] * 50 + [0.1 + 0.2] * 50, "other": range(100)})
    transform = fit(frame, [], scale, "it")
    assert transform.apply(frame)[:, 0].abs().max() < 1e-6
    assert transform.apply(pd.DataFrame({"size": [0.3001], "other": [1]}))[0, 0] < 1e-3


@pytest.mark.parametrize("step", [1, 10, 10**6])
def test_numbers_too_large_to_be_told_apart_are_no_larger_than_others(step):
    """As identities of 19 digits."""
    frame = pd.DataFrame({"size": [10**18 + step * k for k in range(100)], "other": range(100)})
    found = fit(frame, [], "minmax", "it").apply(frame)[:, 0]
    assert found.min() >= 0
    assert found.max() <= 1


@pytest.mark.parametrize("start", [10**18, 10**20])
@pytest.mark.parametrize("step", [100, 10**4])
def test_whole_numbers_that_double_precision_cannot_tell_apart_are_told_of(
    csv, caplog, start, step
):
    """Of 10^18 there is a number every 128, of 10^20 one every 16,384."""
    many = [start + step * k for k in range(100)]
    csv(pd.DataFrame({"id": many, "other": range(100)}, dtype=object), **PLAIN)
    kept = len({float(number) for number in many})
    assert (kept < 100) == (step < np.spacing(float(start)))
    told = f"column 'id': only {kept} of 100 different whole numbers stay different"
    assert (told in caplog.text) == (kept < 100)


@pytest.mark.parametrize("scale", ["minmax", "log", "none"])
def test_what_lies_beyond_the_bounds_by_more_than_they_are_apart_is_far(scale):
    def bent(x):
        return np.log1p(x) if scale == "log" else x

    frame = pd.DataFrame({"x": [10.0, 20.0, 40.0], "same": 7.0, "kind": ["a", "b", "a"]})
    transform = fit(frame, ["kind"], scale, "it")
    apart = bent(40.0) - bent(10.0)
    ends = bent(10.0) - apart, bent(40.0) + apart
    back = [np.expm1(abs(end)) * np.sign(end) if scale == "log" else end for end in ends]
    inside, outside = [back[0] + 0.01, back[1] - 0.1], [back[0] - 0.1, back[1] + 0.1]
    rows = pd.DataFrame({"x": [*inside, *outside, 20.0], "same": 7.0, "kind": "new"})
    rows.loc[4, "same"] = 7.0 + (200 if scale == "log" else 1.1)
    points, _ = transform.encode(rows, "it")
    assert transform.far(points).tolist() == [False, False, True, True, True]


@pytest.mark.parametrize(("start", "told"), [(1.7e12, True), (0.0, False)])
def test_numbers_that_single_precision_cannot_tell_apart_are_told_of(caplog, start, told):
    """Milliseconds since 1970, of one hour: of 131,072 each there is one number."""
    frame = pd.DataFrame({"at": [start + 1000.0 * k for k in range(3600)]})
    fit(frame, [], "none", "it")
    warning = "of 3600 different numbers stay different in single precision"
    assert (warning in caplog.text) == told
    caplog.clear()
    fit(frame, [], "minmax", "it")
    assert not caplog.records


def test_a_frame_that_counts_in_another_way_is_named_in_its_own():
    with pytest.raises(EBMError, match="row 'b', column 'size' is empty"):
        fitted().apply(changed(size=[1.0, NAN, 2.0]).set_index(pd.Index(["a", "b", "c"])))


PLAIN = {"label": None, "normal": [], "categorical": [], "ignore": []}


@pytest.fixture
def csv(tmp_path, monkeypatch):
    """What writes a table as `mine.csv` into the current folder, and prepares it."""
    monkeypatch.chdir(tmp_path)

    def prepare(content, **changes):
        if isinstance(content, pd.DataFrame):
            content.to_csv("mine.csv", index=False)
        else:
            (tmp_path / "mine.csv").write_bytes(content.encode())
        return data.prepare(settings("mine.csv", **changes))

    return prepare


def test_training_points_really_went_through_the_transform(csv):
    """Published code fits a scaler and throws its result away."""
    train = csv(made_up()).points("train")
    assert made_up()["amount"].abs().max() > 1e5
    assert train.abs().max() <= 1
    assert train[:, 0].min() == 0
    assert train[:, 0].max() == 1
    assert train.shape[1] == 4


def test_a_log_scale_is_that_of_a_table_s_settings(csv):
    rows = pd.DataFrame({"x": [10.0**k - 1 for k in range(7)] * 20})
    options = {"label": None, "normal": [], "categorical": [], "ignore": []}
    points = csv(rows, **options, scale="log").points("train")
    assert sorted({round(x, 6) for x in points.flatten().tolist()}) == pytest.approx(
        [k / 6 for k in range(7)], abs=1e-6
    )


def test_bounds_of_a_table_are_those_of_its_training_rows(csv):
    frame = made_up()
    frame.loc[frame["kind"] == "fraud", "amount"] *= 10
    prepared = csv(frame)
    amount = frame["amount"].iloc[prepared.tensors["train_index"].tolist()]
    column = prepared.transform()["columns"][0]
    assert (column["low"], column["high"]) == (amount.min(), amount.max())
    assert prepared.points("test").abs().max() > 1


def test_splits_of_a_table_are_disjoint_and_hold_both_kinds(csv):
    frame = made_up()
    prepared = csv(frame)
    index = {split: prepared.tensors[f"{split}_index"] for split in data.SPLITS}
    rows = torch.cat(list(index.values()))
    assert len(rows.unique()) == len(rows)
    fraud = torch.tensor((frame["kind"] == "fraud").tolist())
    n, m = int((~fraud).sum()), int(fraud.sum())
    sizes = {"validation": (round(0.2 * n), round(0.2 * m)), "test": (round(n / 4), round(m / 4))}
    for split, (normal, anomalous) in sizes.items():
        assert torch.equal(prepared.labels(split), fraud[index[split]].long())
        assert prepared.labels(split).bincount().tolist() == [normal, anomalous]
    assert not fraud[index["train"]].any()
    assert len(index["train"]) == n - sum(normal for normal, _ in sizes.values())
    held = [anomalous for _, anomalous in sizes.values()]
    assert list(prepared.manifest["anomalies"].values()) == held
    assert prepared.manifest["unused"] == m - sum(held)


def test_points_are_those_of_the_rows_that_their_index_names(csv):
    frame = made_up()
    prepared = csv(frame)
    transform = Transform.from_json(prepared.transform(), "it")
    for split in data.SPLITS:
        rows = frame.iloc[prepared.tensors[f"{split}_index"].tolist()]
        assert torch.equal(transform.apply(rows), prepared.tensors[split])


def test_a_split_mixes_the_kinds(csv):
    prepared = csv(made_up())
    assert (prepared.labels("test").diff() != 0).sum() > 5
    assert (prepared.tensors["test_index"].diff() < 0).sum() > 5


def test_without_a_label_every_row_is_trained_on_or_held_out(csv):
    frame = made_up().drop(columns="kind")
    prepared = csv(frame, label=None, normal=[])
    counts = {"train": 110, "validation": 40, "test": 50}
    assert prepared.manifest["counts"] == counts
    assert prepared.labels("test") is None
    assert "anomalies" not in prepared.manifest


def test_the_same_seed_splits_alike_and_another_seed_does_not(csv):
    a, b, c = (csv(made_up(), seed=seed).tensors for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["train_index"], c["train_index"])


def test_rows_with_an_empty_cell_are_dropped_if_they_may_be(csv, caplog):
    frame = made_up()
    frame.loc[[3, 8], "amount"] = None
    frame.loc[[8, 11], "kind"] = None
    frame.loc[20, "id"] = None  # ignored, so nothing is lacking
    prepared = csv(frame, missing="drop")
    assert prepared.manifest["dropped"] == 3
    index = torch.cat([prepared.tensors[f"{split}_index"] for split in data.SPLITS])
    assert not set(index.tolist()) & {3, 8, 11}
    told = "3 rows with an empty cell are left out; most are empty in 'amount' 2, 'kind' 2"
    assert told in caplog.text
    with pytest.raises(EBMError, match=r"mine.csv: row \d+, column '(amount|kind)' is empty"):
        csv(frame)


def test_a_line_of_the_file_is_what_the_message_names(csv):
    lines = made_up().to_csv(index=False).splitlines()
    lines[9] = lines[9].replace(lines[9].split(",")[1], "")
    with pytest.raises(EBMError, match=r"^mine\.csv: row 10, column 'amount' is empty$"):
        csv("\n".join(lines))


HEAD = "id,amount,colour,kind\n"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("", "cannot be read as a CSV table"),
        ("\n\n", "cannot be read as a CSV table"),
        (HEAD, "no rows below the header"),
        (HEAD + "1,2,red,fine,5\n", "rows have more cells than the header"),
        (HEAD + "1,2,red,fine\n1,2,red,fine,5\n", "in line 3, saw 5"),
        (HEAD + '1,2,"red,fine\n', "EOF inside string"),
        (HEAD + "1,2,red\n", "row 2, column 'kind' is empty"),
        (HEAD + "1,2,,fine\n" * 9, "column 'colour' is empty"),
        (HEAD + "1,two,red,fine\n" * 9, "column 'amount' = 'two': not a number"),
        (HEAD + "1,2,red,bad\n" * 9, "column 'kind' is never 'fine' (normal); it is 'bad'"),
        (HEAD + "1,2,red,fine\n1,2,red,fine \n", "'fine ' differ from normal by blanks only"),
        (HEAD + "1,2,red,fine \n1,2,red,bad\n", "'fine ' differ from normal by blanks only"),
        (HEAD + "1,2,red,fine\n" * 9, "no row is anomalous; set label: null, normal: []"),
        ("id,amount,colour\n1,2,red\n", "label: no column 'kind'; it has 'id', 'amount'"),
        ("id,amount,kind\n1,2,fine\n", "categorical: no column 'colour'"),
        ("amount,colour,kind\n1,2,fine\n", "ignore: no column 'id'"),
        ("id,id,amount,colour,kind\n", "more than one column 'id'"),
        (",id,amount,colour,kind\n0,1,2,red,fine\n", "ignore it as 'Unnamed: 0'"),
        ("id,colour,kind\n1,red,fine\n1,red,bad\n", "1 normal rows are too few"),
        (
            "id;amount;kind\n1;2;fine\n",
            "one column 'id;amount;kind'; cells are separated by commas",
        ),
    ],
)
def test_whatever_is_wrong_with_a_table_is_one_line_that_names_the_file(csv, content, line):
    with pytest.raises(EBMError) as caught:
        csv(content)
    assert str(caught.value).startswith("mine.csv: ")
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_line_of_a_single_column_is_an_empty_cell(csv, tmp_path):
    alone = {"label": None, "normal": [], "categorical": [], "ignore": []}
    with pytest.raises(EBMError, match=r"^mine\.csv: row 3, column 'a' is empty$"):
        csv("a\n1\n\n3\n", **alone)
    lines = [f"{n}\n" for n in range(20)]
    text = "a\n" + "".join(lines[:10]) + "\n\n" + "".join(lines[10:])
    assert csv(text, missing="drop", **alone).manifest["dropped"] == 2
    (tmp_path / "one.csv").write_text(text)
    (frame,) = table.chunks(tmp_path / "one.csv", ["a"], [])
    assert frame["a"].isna().tolist() == 10 * [False] + 2 * [True] + 10 * [False]
    for begin in ("\n", " \n"):
        with pytest.raises(EBMError, match=r"mine\.csv: begins with an empty line"):
            csv(begin + text, **alone)


def test_a_file_without_a_header_is_told_of(csv, caplog):
    csv("a,2\n" + "1,2\n" * 20, **PLAIN)
    assert "all numbers" not in caplog.text
    csv("0.5,-1e3\n" + "1,2\n" * 20, **PLAIN)
    assert "its first line is taken for names of columns, and is all numbers" in caplog.text


def test_a_table_in_a_linked_folder_is_refused(csv, tmp_path):
    """DVC sees no change there; a link to the file itself it follows."""
    csv("a,b\n" + "1,2\n" * 20, **PLAIN)
    (tmp_path / "there").mkdir()
    (tmp_path / "mine.csv").rename(tmp_path / "there/mine.csv")
    (tmp_path / "mine.csv").symlink_to("there/mine.csv")
    data.prepare(settings("mine.csv", **PLAIN))
    (tmp_path / "linked").symlink_to("there")
    with pytest.raises(EBMError, match="linked: a link to a folder, in which DVC sees no change"):
        data.prepare(settings("linked/mine.csv", **PLAIN))


def test_a_table_that_no_memory_holds_is_told_before_it_is_made(csv, monkeypatch):
    rows = pd.DataFrame({"x": range(100), "colour": [f"c{k % 90}" for k in range(100)]})
    monkeypatch.setattr(own, "memory", lambda: 50_000)
    plain = PLAIN | {"categorical": ["colour"]}
    expected = r"100 rows of \d+ numbers take .* column 'colour' takes \d+ of them"
    with pytest.raises(EBMError, match=rf"^mine\.csv: {expected}$"):
        csv(rows, **plain)
    monkeypatch.setattr(own, "memory", lambda: 200_000)
    assert len(csv(rows, **plain).points("test"))


@pytest.mark.parametrize("gap", ["", "NaN"])
def test_a_gap_among_whole_numbers_of_64_bits_is_one(tmp_path, gap):
    (tmp_path / "big.csv").write_text(f"a,b\n{2**64 - 1},x\n{gap},y\n-1,z\n")
    (frame,) = table.chunks(tmp_path / "big.csv", ["a", "b"], ["b"])
    assert frame["a"].isna().tolist() == [False, True, False]
    assert numbers_of(frame["a"].dropna(), "big.csv").tolist() == [2.0**64, -1.0]
    assert frame["b"].tolist() == ["x", "y", "z"]


def test_a_table_that_is_not_utf_8_is_told_how_to_be(csv, tmp_path):
    for encoding in ("latin-1", "utf-16"):
        (tmp_path / "mine.csv").write_bytes((HEAD + "1,2,caf\u00e9,fine\n").encode(encoding))
        with pytest.raises(
            EBMError, match=r"^mine\.csv: not UTF-8 \(.*\); save it as CSV in UTF-8$"
        ):
            data.prepare(settings("mine.csv"))


def test_a_column_may_have_any_name(csv):
    frame = made_up().rename(columns={"amount": "self"})
    assert csv(frame).tensors["train"].equal(csv(made_up()).tensors["train"])


def test_categories_that_look_alike_are_told_of(csv, caplog):
    frame = made_up()
    csv(frame)
    assert not caplog.messages
    frame.loc[::5, "colour"] += " "
    csv(frame)
    assert "differ by blanks only" in caplog.text


def test_a_column_of_names_is_no_category(csv):
    told = r"^mine\.csv: column 'id': \d{4} categories, more than 1000; ignore it"
    with pytest.raises(EBMError, match=told):
        csv(made_up(3000), ignore=[], categorical=["colour", "id"])


def test_a_table_without_a_column_for_the_model_is_refused(csv):
    with pytest.raises(EBMError, match="no column is left"):
        csv(made_up(), categorical=[], ignore=["id", "amount", "colour"])


def test_too_few_rows_are_too_few_without_a_label_too(csv):
    with pytest.raises(EBMError, match="2 complete rows are too few for validation"):
        csv("a\n1\n2\n", label=None, normal=[], categorical=[], ignore=[])


def test_a_table_of_which_no_row_is_complete_names_the_emptiest_column(csv):
    text = HEAD + "1,,red,fine\n2,,,fine\n"
    with pytest.raises(EBMError, match="no row is left: column 'amount' is empty in 2 of 2"):
        csv(text, missing="drop")


def test_what_looks_like_a_missing_number_and_is_none_is_told_what_counts(csv):
    text = HEAD + "1,2,red,fine\n1,NULL,red,fine\n"
    with pytest.raises(EBMError, match=r"= 'NULL': not a number.*empty cell or NaN counts as mi"):
        csv(text, missing="drop")


def test_a_file_that_is_missing_or_of_another_kind_is_named(csv, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(EBMError, match=r"other.csv: no such file"):
        data.prepare(settings("other.csv"))
    (tmp_path / "utf16.csv").write_bytes(HEAD.encode("utf-16"))
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(HEAD.encode() * 999)[:-12])
    (tmp_path / "plain.zip").write_text(HEAD)
    (tmp_path / "plain.xz").write_text(HEAD)
    (tmp_path / "plain.tar").write_text(HEAD)
    (tmp_path / "plain.csv.zst").write_text(HEAD)
    with zipfile.ZipFile(tmp_path / "locked.zip", "w") as archive:
        archive.writestr("locked.csv", HEAD)
        archive.filelist[0].flag_bits |= 1  # encrypted, as the directory at the end says
    with tarfile.open(tmp_path / "folder.tar", "w") as archive:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    packed = ("plain.zip", "locked.zip", "plain.xz", "plain.tar", "folder.tar", "plain.csv.zst")
    for name in ("utf16.csv", "cut.csv.gz", ".", *packed):
        with pytest.raises(EBMError, match=name) as caught:
            data.prepare(settings(name))
        assert "\n" not in str(caught.value)


def test_spaces_behind_commas_and_the_mark_of_utf_8_do_not_count(csv):
    text = "\ufeffa, b\n" + "1, x\n2, y\n3, x\n4, x\n5, y\n"
    prepared = csv(text, label=None, normal=[], categorical=["b"], ignore=[])
    columns = prepared.transform()["columns"]
    assert [column["name"] for column in columns] == ["a", "b"]
    assert set(columns[1]["categories"]) <= {"x", "y"}


def test_text_that_looks_like_a_number_or_like_nothing_is_text(csv):
    text = "a\n" + "01\n1\nNA\nNone\nnull\n" * 20
    prepared = csv(text, label=None, normal=[], categorical=["a"], ignore=[])
    assert set(prepared.transform()["columns"][0]["categories"]) == {
        "01",
        "1",
        "NA",
        "None",
        "null",
    }


def test_the_source_of_a_table_has_its_checksum(csv, tmp_path):
    source = csv(made_up()).manifest["source"]
    assert source.endswith(hashlib.sha256((tmp_path / "mine.csv").read_bytes()).hexdigest())


def test_the_transform_is_kept_with_the_data_and_read_when_it_is_asked_for(csv, tmp_path):
    prepared = csv(made_up())
    data.write(prepared, tmp_path / "mine")
    again = data.read(tmp_path / "mine")
    assert again.transform() == prepared.transform()
    assert all(torch.equal(again.tensors[n], prepared.tensors[n]) for n in prepared.tensors)
    corrupt(tmp_path / "mine" / data.TRANSFORM, "flip")
    with pytest.raises(EBMError, match=r"transform.json: checksum"):
        data.read(tmp_path / "mine").transform()
    corrupt(tmp_path / "mine" / data.TRANSFORM, "remove")
    with pytest.raises(EBMError, match=r"transform\.json"):
        data.read(tmp_path / "mine").transform()


def test_other_data_have_no_transform(tmp_path):
    data.write(density(), tmp_path)
    assert density().transform() is None
    assert data.read(tmp_path).transform() is None
    assert not (tmp_path / data.TRANSFORM).exists()


def tumours(**changes):
    options = {"scale": "minmax", "validation": 0.2, "test": 0.3, "seed": 0} | changes
    return data.prepare(TumoursData(kind="tumours", reference=AS_THEY_ARE, **options))


def test_benign_tumours_are_learned_and_malignant_ones_are_anomalies():
    prepared, bunch = tumours(), load_breast_cancer(as_frame=True)
    malignant = bunch.target.map(lambda kind: bunch.target_names[kind] == "malignant").to_numpy()
    index = {split: prepared.tensors[f"{split}_index"].tolist() for split in data.SPLITS}
    assert not malignant[index["train"]].any()
    assert prepared.labels("train") is None
    for split, share in (("validation", 0.2), ("test", 0.3)):
        labels = prepared.labels(split)
        assert labels.tolist() == malignant[index[split]].tolist()
        assert labels.sum() == round(share * 212) == prepared.manifest["anomalies"][split]
        assert (labels == 0).sum() == round(share * 357)
    rows = [row for split in data.SPLITS for row in index[split]]
    assert len(set(rows)) == len(rows) == 569 - prepared.manifest["unused"]
    transform = Transform.from_json(prepared.transform(), "it")
    assert [column.name for column in transform.columns] == list(bunch.feature_names)
    for split in data.SPLITS:
        assert torch.equal(transform.apply(bunch.data.iloc[index[split]]), prepared.points(split))
    assert prepared.points("train").amin(0).tolist() == [0.0] * 30
    assert prepared.points("train").amax(0).tolist() == [1.0] * 30
    assert prepared.points("test").max() > 1


def test_tumours_are_split_by_the_seed():
    a, b, c = (tumours(seed=seed).tensors for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["test_index"], c["test_index"])
    with pytest.raises(EBMError, match="load_breast_cancer: 357 benign tumours are too few for"):
        tumours(validation=0.001)


def anomalous(rows):
    return connections()["label"].iloc[rows.tolist()].eq("normal.").to_numpy()


@pytest.mark.parametrize("protocol", ["paper", "strict"])
def test_the_cup_has_121_columns_and_normal_is_the_anomaly(cup, protocol):
    prepared = cup(protocol)
    assert prepared.shape == (121,)
    transform = Transform.from_json(prepared.transform(), "it")
    assert [column.name for column in transform.columns] == kddcup99.COLUMNS
    assert {c.name: c.width for c in transform.columns if c.kind != "numeric"} == CATEGORIES
    assert not anomalous(prepared.tensors["train_index"]).any()
    frame = connections().astype(dict.fromkeys(CATEGORIES, str))
    for split in data.SPLITS:
        rows = prepared.tensors[f"{split}_index"]
        assert torch.equal(transform.apply(frame.iloc[rows.tolist()]), prepared.points(split))
        if split != "train":
            assert prepared.labels(split).tolist() == anomalous(rows).tolist()
            assert prepared.manifest["anomalies"][split] == anomalous(rows).sum()


def test_the_published_protocol_halves_the_rows(cup):
    prepared = cup("paper")
    index = {split: set(prepared.tensors[f"{split}_index"].tolist()) for split in data.SPLITS}
    train, validation, test = index.values()
    assert len(test) == ROWS // 2
    assert (train | validation) == set(range(ROWS)) - test
    shared = train & validation
    assert len(shared) == round(0.25 * len(train)) == prepared.manifest["validation_rows_in_train"]
    assert anomalous(torch.tensor(sorted(validation - train))).all()
    source = kddcup99.COLUMNS.index("src_bytes")
    column = sum(CATEGORIES.get(name, 1) for name in kddcup99.COLUMNS[:source])
    expected = connections()["src_bytes"].iloc[prepared.tensors["train_index"].tolist()]
    assert prepared.points("train")[:, column].tolist() == expected.tolist()


@pytest.mark.parametrize("protocol", ["paper", "strict"])
def test_numbers_are_scaled_by_train_alone_where_that_is_asked_for(cup, protocol):
    raw, scaled = cup(protocol, "none"), cup(protocol, "minmax")
    low, high = raw.points("train").amin(0), raw.points("train").amax(0)
    varies = high > low
    for split in data.SPLITS:
        assert torch.equal(raw.tensors[f"{split}_index"], scaled.tensors[f"{split}_index"])
        expected = (raw.points(split) - low) / (high - low)
        torch.testing.assert_close(scaled.points(split)[:, varies], expected[:, varies])
    assert not torch.equal(scaled.points("train"), raw.points("train"))


def test_the_strict_protocol_shares_no_row_and_scales_by_train(cup):
    prepared = cup("strict")
    index = torch.cat([prepared.tensors[f"{split}_index"] for split in data.SPLITS])
    assert len(index.unique()) == len(index)
    rows = connections().iloc[index.tolist()][kddcup99.COLUMNS]
    assert not rows.duplicated().any()
    assert not set(index.tolist()) & {CONTRADICTORY, CONTRADICTORY + 1}
    notes = prepared.manifest
    assert (notes["repeated"], notes["contradictory"]) == (ROWS - REPEATED, 2)
    for split in ("validation", "test"):
        assert prepared.labels(split).double().mean() == 0.2
    train = prepared.points("train")
    assert train.amin() == 0
    assert train.amax() == 1
    kept = set(range(REPEATED)) - {CONTRADICTORY, CONTRADICTORY + 1}
    transform = Transform.from_json(prepared.transform(), "it")
    source = transform.columns[kddcup99.COLUMNS.index("src_bytes")]
    bytes_ = connections()["src_bytes"].iloc[prepared.tensors["train_index"].tolist()]
    assert (source.low, source.high) == (bytes_.min(), bytes_.max())
    assert prepared.points("test").abs().max() > 1  # normal connections are larger
    attacks = len(kept) - anomalous(torch.tensor(sorted(kept))).sum()
    assert len(train) == attacks // 2
    used = sum((prepared.labels(split) == 0).sum() for split in ("validation", "test"))
    assert len(train) + used + notes["unused"]["attacks"] == attacks
    assert abs(len(prepared.labels("validation")) * 0.8 - 0.25 * (attacks - len(train))) < 4


@pytest.mark.parametrize("protocol", ["paper", "strict"])
def test_the_same_seed_gives_the_same_cup(cup, protocol):
    a, b, c = (cup(protocol, seed=seed).tensors for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["test_index"], c["test_index"])


def test_a_share_that_leaves_a_split_empty_is_one_line(cup):
    with pytest.raises(EBMError, match=r"kddcup99: validation = 0\.001 does not split"):
        cup("strict", validation=0.001)


def test_another_file_is_not_the_cup(cup, tmp_path):
    (tmp_path / kddcup99.FILE).write_bytes(b"another")
    with pytest.raises(EBMError, match="not the published file"):
        cup("strict")


def test_a_file_may_have_an_address_of_its_own(monkeypatch):
    monkeypatch.delenv(files.MIRROR, raising=False)
    monkeypatch.setattr(files, "_retrieve", lambda url, name: url)
    assert files.fetch(kddcup99.FILE) == "https://ndownloader.figshare.com/files/5976042"
    assert files.fetch("mnist/train-images-idx3-ubyte.gz").endswith("train-images-idx3-ubyte.gz")


TABLES = {
    "datasets": {
        "mine": settings("tables/mine.csv").model_dump(),
        "cup": {
            "kind": "kddcup99",
            "protocol": "strict",
            "scale": "minmax",
            "validation": 0.2,
            "seed": 0,
            "reference": {"kind": "coordinates"},
        },
    },
    "experiments": {"rbm": GOOD["experiments"]["rbm-digits"] | {"dataset": "mine"}},
}
MINE, CUP = "datasets.mine", "datasets.cup"
NAMED = [
    (f"{MINE}.path", remove),
    (f"{MINE}.normal", remove),
    (f"{MINE}.reference", remove),
    (f"{CUP}.protocol", remove),
    *[
        (path, value)
        for path, values in {
            f"{MINE}.kind": ["tabel"],
            f"{MINE}.lable": ["kind"],
            f"{MINE}.reference.width": [3],
            f"{MINE}.reference.kind": ["classifier"],
            f"{MINE}.path": ["", 3],
            f"{MINE}.label": ["", 3],
            f"{MINE}.normal": [[], "fine", [0]],
            f"{MINE}.categorical": ["colour", ["kind"], ["colour", "colour"]],
            f"{MINE}.ignore": [["colour"], ["kind"], ["id", "id"]],
            f"{MINE}.missing": ["skip"],
            f"{MINE}.validation": [0.0, 1.0, 20],
            f"{MINE}.test": [0.0, 0.8],
            f"{CUP}.protocol": ["stirct"],
            f"{CUP}.validation": [0.0, 1.0],
            f"{CUP}.seed": [-1],
            f"{CUP}.outliers": [[]],
        }.items()
        for value in values
    ],
]


def altered(path, value):
    content = copy.deepcopy(TABLES)
    (remove(path) if value is remove else put(path, value))(content)
    return content


@pytest.mark.parametrize(
    ("path", "value"), NAMED, ids=[f"{i}-{p}" for i, (p, _) in enumerate(NAMED)]
)
def test_a_wrong_table_in_the_parameters_is_one_line_that_names_the_key(tmp_path, path, value):
    line = complaint(tmp_path, altered(path, value))
    assert line.startswith(f"params.yaml: {path}")
    assert "\n" not in line


def test_a_table_with_or_without_label_is_right_in_the_parameters(tmp_path):
    content = altered(f"{MINE}.label", None)
    assert "be empty where the label is null" in complaint(tmp_path, content)
    put(f"{MINE}.normal", [])(content)
    put(f"{CUP}", {**TABLES["datasets"]["cup"], "protocol": "paper", "validation": 1})(content)
    paper = YAML(typ="safe").load(ROOT / "paper" / "params.yaml")["experiments"]
    content["experiments"] = {"meg": paper["meg-kdd99-paper"] | {"dataset": "cup"}}
    for right in (content, TABLES):
        YAML().dump(right, tmp_path / "params.yaml")
        assert set(params.load(tmp_path / "params.yaml").datasets) == {"mine", "cup"}


def test_a_typo_in_a_table_gets_a_suggestion(tmp_path):
    assert "did you mean 'label'" in complaint(tmp_path, altered(f"{MINE}.lable", "kind"))
    assert "did you mean 'table'" in complaint(tmp_path, altered(f"{MINE}.kind", "tabel"))
    assert "did you mean 'strict'" in complaint(tmp_path, altered(f"{CUP}.protocol", "stirct"))


def test_a_chunk_knows_which_rows_it_holds(tmp_path):
    (tmp_path / "x.csv").write_text("a\n" + "".join(f"{row}\n" for row in range(10)))
    for size in (1, 3, 10, None):
        frames = list(table.chunks(tmp_path / "x.csv", ["a"], [], size))
        assert max(map(len, frames)) == (size or 10)
        whole = pd.concat(frames)
        assert whole.index.tolist() == whole["a"].tolist() == list(range(10))


def test_nothing_is_logged_of_what_is_right(csv, caplog):
    with caplog.at_level(logging.DEBUG, logger="ebm"):
        csv(made_up())
    assert caplog.messages == []


def test_test_rows_that_were_trained_on_are_told(csv, caplog):
    rows = [f"{k % 20},{k % 20}" for k in range(200)]
    unlabelled = {"label": None, "normal": [], "categorical": [], "ignore": []}
    found = csv("\n".join(["a,b", *rows]) + "\n", **unlabelled)
    known = {tuple(row) for row in found.points("train").tolist()}
    twins = sum(tuple(row) in known for row in found.points("test").tolist())
    assert found.manifest["repeated"] == twins > 0
    assert f"{twins} of {len(found.points('test'))} test rows are in the training" in caplog.text


@pytest.mark.parametrize(("mark", "told"), [(-1e9, True), (1e9, False), (-50.0, False)])
def test_a_cell_that_makes_one_number_of_all_others_is_told(caplog, mark, told):
    numbers = pd.DataFrame({"x": [*torch.linspace(0, 1, 999).tolist(), mark]})
    fit(numbers, [], "minmax", "x.csv")
    assert ("column 'x': only" in caplog.text) == told
