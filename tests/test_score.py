"""`python -m pipelines.score`: the same energies whatever the chunks, a whole file or none, one
line for whatever is wrong."""

import gzip
import json
import logging
import math
import signal
import subprocess
import sys
import tracemalloc
from hashlib import sha256
from pathlib import Path

import pandas as pd
import pytest
import torch
from made_up_tables import connections, made_up, settings
from safetensors.torch import load_file, save_file
from small_models import MODELS
from test_data import density, digits

from ebm import EBMError, data, variants
from ebm.data import kddcup99, table
from ebm.data.transform import Transform
from ebm.trained import Trained
from ebm.variants.base import EBM
from pipelines import train
from pipelines.score import CHUNK, main, score

pytestmark = pytest.mark.usefixtures("one_stage")
ROOT = Path(__file__).resolve().parents[1]
ROWS = 200


class First(EBM):
    """The energy of a point is its first coordinate."""

    def energy(self, x):
        return x[:, 0]


def saved(folder, prepared, dataset="mine"):
    """A model of `prepared`, untrained but in the form in which `train` leaves it."""
    torch.manual_seed(0)
    model = variants.build("igebm", prepared.shape, MODELS["igebm"])
    sections = {"variant": "igebm", "model": MODELS["igebm"], "ensemble": None, "dataset": dataset}
    train._write(folder, model, sections, prepared, [{"step": 1}])
    return model.eval()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with `mine.csv`, and a model of it under `models/mine`."""
    monkeypatch.chdir(tmp_path)
    made_up(ROWS).to_csv("mine.csv", index=False)
    saved(tmp_path / "models/mine", data.prepare(settings("mine.csv", missing="drop")))
    return tmp_path


def test_a_model_of_binarised_images_says_so(tmp_path):
    for how in ("none", "sample", "dynamic"):
        saved(tmp_path, digits(binarize=how), dataset="digits")
        config = json.loads((tmp_path / "config.json").read_text())
        assert config.get("binarize", "none") == how


@pytest.fixture
def first(monkeypatch):
    """Whatever model is loaded, its energy is the first coordinate."""
    monkeypatch.setattr(variants, "load", lambda weights, config: First())


def scored(input="mine.csv", output="scores.csv", model="models/mine", **options):
    """The lines of the output, as text."""
    options = {"threshold": None, "chunk": 64, "threads": 1} | options
    score(Path(model), Path(input), Path(output), **options)
    return pd.read_csv(output, dtype=str, keep_default_na=False)


def amounts(frame=None):
    """The first coordinate of the points of a table [N]."""
    content = json.loads(Path("models/mine/config.json").read_text())["transform"]
    transform = Transform.from_json(content, "it")
    return transform.apply(made_up(ROWS) if frame is None else frame)[:, 0].double()


def test_energies_are_those_of_the_model(home):
    folder = home / "models/mine"
    model = variants.load(folder / "weights.safetensors", folder / "config.json")
    content = json.loads((folder / "config.json").read_text())["transform"]
    points = Transform.from_json(content, "it").apply(made_up(ROWS))
    with torch.no_grad():
        expected = model.energy(points)
    found = scored(chunk=64)
    assert list(found) == ["row", "energy", "anomaly"]
    assert found["row"].tolist() == [str(row + 1) for row in range(ROWS)]
    energies = torch.tensor(found["energy"].astype(float).tolist())
    assert expected.std() > 0
    assert torch.allclose(energies, expected, rtol=1e-5, atol=1e-7)
    assert set(found["anomaly"]) == {""}


@pytest.mark.parametrize("chunk", [1, 7, ROWS, 10**9])
def test_chunks_change_nothing(home, first, chunk):
    scored(threshold=0.5, chunk=ROWS)
    whole = (home / "scores.csv").read_bytes()
    scored(threshold=0.5, chunk=chunk)
    assert (home / "scores.csv").read_bytes() == whole
    assert whole.count(b"\n") == ROWS + 1


def test_energies_are_written_to_the_last_bit_of_float32(home, first):
    energies = torch.tensor(scored()["energy"].astype(float).tolist(), dtype=torch.float64)
    assert torch.equal(energies.float(), amounts().float())


def test_what_is_not_below_the_threshold_is_flagged(home, first, caplog):
    threshold = amounts().sort().values[150].item()
    with caplog.at_level(logging.INFO):
        found = scored(threshold=threshold)
    assert found["anomaly"].tolist() == [str(int(value)) for value in amounts() >= threshold]
    assert (found["anomaly"] == "1").sum() == 50
    assert "50 flagged, 25.00 %" in caplog.text
    assert "200 rows in" in caplog.text


WEIGHTS = Path("models/mine/weights.safetensors")


def write_threshold(content):
    """`content` with the checksum of the weights as they are in the place of SHA."""
    Path("models/mine/evaluation").mkdir()
    content = content.replace("SHA", sha256(WEIGHTS.read_bytes()).hexdigest())
    Path("models/mine/evaluation/threshold.json").write_text(content)


def test_the_threshold_of_the_evaluation_counts_unless_another_is_given(home, first):
    write_threshold('{"energy": 2.0, "weights_sha256": "SHA"}')
    assert set(scored()["anomaly"]) == {"0"}
    assert set(scored(threshold=-1.0)["anomaly"]) == {"1"}


def test_the_threshold_of_other_weights_is_not_used(home, first):
    """As after a training alone, or an evaluation that was killed."""
    write_threshold('{"energy": 2.0, "weights_sha256": "SHA"}')
    state = load_file(WEIGHTS)
    save_file({name: value + 1 for name, value in state.items()}, WEIGHTS)
    with pytest.raises(EBMError, match=r"of other weights; run evaluate@mine again"):
        scored()
    assert len(scored(threshold=-1.0)) == ROWS


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"energy": "high"}', '{"energy": 1}', '{"energy": NaN}']
)
def test_a_damaged_threshold_is_one_line(home, content):
    write_threshold(content)
    with pytest.raises(EBMError, match=r"threshold\.json.*--threshold") as caught:
        scored()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("chunk", [1, 7, ROWS])
def test_a_row_with_an_empty_cell_has_no_energy_where_such_rows_are_dropped(
    home, first, chunk, caplog
):
    frame = made_up(ROWS)
    frame.loc[[3, 4], "amount"] = None
    frame.loc[9, "colour"] = None
    frame.loc[12, "kind"] = None  # the label is not needed
    frame.to_csv("holes.csv", index=False)
    found = scored("holes.csv", threshold=0.5, chunk=chunk)
    empty = found.index[found["energy"] == ""].tolist()
    assert empty == found.index[found["anomaly"] == ""].tolist() == [3, 4, 9]
    others = [row for row in range(ROWS) if row not in empty]
    expected = [str(int(value)) for value in amounts()[others] >= 0.5]
    assert found["anomaly"][others].tolist() == expected
    assert "3 rows have an empty cell and no energy" in caplog.text


def test_a_row_with_an_empty_cell_is_an_error_where_it_is_one(home, first):
    saved(home / "models/strict", data.prepare(settings("mine.csv")))
    frame = made_up(ROWS)
    frame.loc[99, "amount"] = None
    frame.to_csv("holes.csv", index=False)
    with pytest.raises(EBMError, match=r"^holes\.csv: row 101, column 'amount' is empty$"):
        scored("holes.csv", model="models/strict")
    assert not (home / "scores.csv").exists()


def test_label_and_ignored_columns_may_be_there_or_not(home, first, caplog):
    whole = scored()
    made_up(ROWS)[["colour", "amount"]].to_csv("bare.csv", index=False)
    assert scored("bare.csv").equals(whole)
    assert caplog.messages == []
    made_up(ROWS).assign(note="x").to_csv("more.csv", index=False)
    assert scored("more.csv").equals(whole)
    assert caplog.messages == ["more.csv: columns that the model does not know: 'note'"]


def test_unseen_categories_are_reported_once_for_all_chunks(home, first, caplog):
    frame = made_up(ROWS)
    frame.loc[::10, "colour"] = "violet"
    frame.to_csv("violet.csv", index=False)
    scored("violet.csv", chunk=7)
    warning = "violet.csv: column 'colour': 20 rows with a category never fitted"
    assert caplog.messages == [warning]


def test_files_may_be_packed(home, first):
    whole = scored()
    Path("mine.csv.gz").write_bytes(gzip.compress(Path("mine.csv").read_bytes()))
    assert scored("mine.csv.gz", "scores.csv.gz").equals(whole)
    assert gzip.decompress(Path("scores.csv.gz").read_bytes()) == Path("scores.csv").read_bytes()


def peak(chunk):
    """Bytes of Python and NumPy that scoring `long.csv` holds at most."""
    tracemalloc.start()
    score(Path("models/mine"), Path("long.csv"), Path("scores.csv"), None, chunk, 1)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


@pytest.mark.parametrize("variant", ["of-a-newer-checkout", None])
def test_a_model_of_a_variant_that_is_not_known_is_one_line(home, variant):
    config = Path("models/mine/config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"variant": variant}))
    with pytest.raises(EBMError, match=r"config\.json: not a usable model configuration"):
        scored()


@pytest.mark.parametrize(("points", "rows"), [(10**9, CHUNK), (100, None), (1, 1)])
def test_a_chunk_is_of_as_many_rows_as_their_width_allows(home, first, monkeypatch, points, rows):
    """One-hot columns of a thousand categories would otherwise take gigabytes."""
    content = json.loads(Path("models/mine/config.json").read_text())["transform"]
    width = Transform.from_json(content, "it").width
    asked, chunks = [], table.chunks

    def watched(path, names, text, rows):
        asked.append(rows)
        return chunks(path, names, text, rows)

    monkeypatch.setattr(table, "chunks", watched)
    monkeypatch.setattr("pipelines.score.POINTS", points)
    whole = scored(chunk=ROWS)
    assert scored(chunk=None).equals(whole)
    assert asked == [ROWS, rows or points // width]


def test_memory_is_that_of_a_chunk_and_not_of_the_file(home, first):
    frame = pd.concat([made_up(ROWS)] * 50)
    frame.to_csv("long.csv", index=False)
    peak(200)  # what is imported and cached stays
    short = peak(200)
    assert short < peak(len(frame)) / 3
    pd.concat([frame] * 2).to_csv("long.csv", index=False)
    assert peak(200) < 1.2 * short


@pytest.mark.parametrize(
    ("shape", "batch"), [((2,), 4096), ((1, 32, 32), 512), ((3, 1024, 1024), 1)]
)
def test_as_many_points_as_memory_holds_are_scored_at_once_and_always_one(shape, batch):
    assert Trained(First(), torch.device("cpu"), shape).batch == batch


@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", [None, "the scores of yesterday"])
def test_a_run_that_ends_midway_leaves_no_half_file(home, monkeypatch, interruption, before):
    output = home / "scores.csv"
    if before:
        output.write_text(before)

    class Dying(First):
        def energy(self, x):
            parts = list(home.glob(".scores.csv.*.part"))
            assert len(parts) == 1
            assert (output.read_text() if before else output.exists()) == (before or False)
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == 3:
                raise interruption
            return super().energy(x)

    monkeypatch.setattr(variants, "load", lambda weights, config: Dying())
    with pytest.raises(interruption):
        scored(chunk=50)
    assert not list(home.glob(".*part"))
    assert (output.read_text() if output.exists() else None) == before


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_an_energy_that_ranks_no_row_names_its_row(home, monkeypatch, value):
    class Broken(First):
        def energy(self, x):
            return x[:, 0].masked_fill(x[:, 0] == amounts()[70], value)

    monkeypatch.setattr(variants, "load", lambda weights, config: Broken())
    with pytest.raises(EBMError, match=rf"mine\.csv: row 72: its energy is {value}"):
        scored(chunk=7)
    assert not (home / "scores.csv").exists()


def test_a_row_that_cannot_be_is_an_anomaly(home, monkeypatch):
    class Sure(First):
        def energy(self, x):
            return x[:, 0].masked_fill(x[:, 0] == amounts()[70], math.inf)

    monkeypatch.setattr(variants, "load", lambda weights, config: Sure())
    found = scored(chunk=7, threshold=1e9)
    assert float(found["energy"][70]) == math.inf
    assert found.index[found["anomaly"] == "1"].tolist() == [70]


@pytest.mark.parametrize("cell", ["1e300", "1e30", "inf", "-inf"])
def test_a_number_beyond_any_model_is_an_anomaly_and_stops_nothing(home, first, caplog, cell):
    wrong("x.csv", HEAD + f"1,red\n{cell},red\n2,red\n")
    found = scored("x.csv", chunk=2, threshold=1e9)
    assert found["energy"].tolist()[1] == "inf"
    assert found["anomaly"].tolist() == ["0", "1", "0"]
    assert "1 rows have a number too large to compute with" in caplog.text


def test_rows_far_from_all_that_were_trained_on_are_told_of(home, first, caplog):
    wrong("x.csv", HEAD + "1,red\n1e7,red\n-1e7,red\n1e30,red\n")
    told = "rows that are not flagged have a number far from all that were trained on"
    for threshold, count in ((1e9, 2), (None, 2), (2.0, 1)):  # the energy is the amount, scaled
        scored("x.csv", chunk=2, threshold=threshold)
        assert f"{count} {told}" in caplog.text
        caplog.clear()
    scored()
    assert told not in caplog.text


def test_a_table_is_not_for_a_model_of_points_in_the_plane(home):
    saved(home / "models/plane", density())
    with pytest.raises(EBMError, match=r"^models/plane: a model of data set 'mine', which is no"):
        scored(model="models/plane")
    assert "transform" not in json.loads((home / "models/plane/config.json").read_text())


def wrong(name, content):
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


HEAD = "amount,colour\n"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"input": "absent.csv"}, "absent.csv: no such file"),
        ({"input": "models"}, "models/mine: a model of data set 'mine', which is none of images"),
        ({"content": ""}, "x.csv: cannot be read as a CSV table"),
        ({"content": HEAD}, "x.csv: no rows below the header"),
        ({"content": b"\xff\xfe\x00\x01" * 99}, "x.csv: not UTF-8 (byte 0xff"),
        ({"content": "colour\nred\n"}, "x.csv: no column 'amount'; it has 'colour'"),
        (
            {"content": "amount;colour\n1;red\n"},
            "x.csv: one column 'amount;colour'; cells are separated by commas",
        ),
        ({"content": HEAD + "1,red\ntwo,red\n"}, "x.csv: row 3, column 'amount' = 'two': not a"),
        ({"input": "/dev/null"}, "/dev/null: no regular file, and it is read twice"),
        ({"output": "x.csv.zip"}, "--output x.csv.zip: can be packed as .gz only"),
        ({"content": HEAD + "1,red\n1,red,2\n"}, "x.csv: cannot be read as a CSV table"),
        ({"content": HEAD + "1,red,2\n"}, "x.csv: not a table: rows have more cells"),
        ({"content": "amount,amount,colour\n"}, "x.csv: more than one column 'amount'"),
        ({"output": "mine.csv"}, "--output mine.csv: the input itself"),
        ({"output": "models"}, "--output models: no file"),
        ({"output": "absent/scores.csv"}, "absent: no such folder"),
        ({"model": "models/absent"}, "models/absent: no model: there is no config.json"),
        ({"chunk": 0}, "--chunk 0: expected"),
        ({"threads": 0}, "--threads 0: expected"),
        ({"threshold": math.nan}, "--threshold nan: expected"),
    ],
)
def test_whatever_is_wrong_is_one_line_and_no_file(home, options, line):
    if "content" in options:
        options = {"input": wrong("x.csv", options["content"])}
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*")}
    with pytest.raises(EBMError) as caught:
        scored(**options)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*")} == before


def test_another_name_of_the_input_is_the_input(home):
    Path("link.csv").symlink_to("mine.csv")
    with pytest.raises(EBMError, match="the input itself"):
        scored(output="link.csv")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "{"),
        ("config.json", "{}"),
        ("config.json", "[]"),
        ("weights.safetensors", "{"),
    ],
)
def test_a_damaged_model_is_one_line(home, file, content):
    (home / "models/mine" / file).write_text(content)
    with pytest.raises(EBMError, match=file) as caught:
        scored()
    assert "\n" not in str(caught.value)


def test_connections_are_scored_by_their_published_columns(home, cup):
    prepared = cup("strict")
    model = saved(home / "models/cup", prepared)
    connections()[kddcup99.COLUMNS[::-1]].to_csv("connections.csv", index=False)
    found = scored("connections.csv", model="models/cup")
    index = prepared.tensors["test_index"]
    with torch.no_grad():
        expected = model.energy(prepared.points("test"))
    energies = torch.tensor(found["energy"].astype(float).tolist())[index]
    assert torch.allclose(energies, expected, rtol=1e-5, atol=1e-7)


def test_the_command_writes_what_the_function_writes(home, first, monkeypatch):
    caught = []
    monkeypatch.setattr(signal, "signal", lambda number, _: caught.append(number))
    expected = scored(threshold=0.5)
    options = {"model": "models/mine", "input": "mine.csv", "output": "again.csv"}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    assert main([*words, "--threshold", "0.5", "--chunk", "50", "--threads", "1"]) == 0
    assert set(caught) == {signal.SIGTERM, signal.SIGHUP}, "what is half done would stay"
    assert pd.read_csv("again.csv", dtype=str, keep_default_na=False).equals(expected)


def test_the_command_ends_with_one_line_and_an_exit_code(home):
    names = {"model": "models/mine", "input": "mine.csv", "output": "absent/scores.csv"}
    words = [word for name, value in names.items() for word in (f"--{name}", str(home / value))]
    command = [sys.executable, "-m", "pipelines.score", *words]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert refused.stderr == f"error: {home}/absent: no such folder\n"
