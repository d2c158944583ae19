"""The packed model answers energies, flags and samples, in a process that has nothing but what was
packed; whatever is wrong with a request comes back with a reason."""

import ast
import contextlib
import json
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from made_up_tables import made_up, settings
from safetensors.torch import save_file
from tracking_store import MLFLOW_WARNS, start

from ebm import data, seeds, variants
from ebm.data.transform import Transform, fit
from pipelines import tracking
from pipelines.evaluate import EXAMPLES, _example
from pipelines.spool import Spool

pytestmark = [
    MLFLOW_WARNS,
    pytest.mark.filterwarnings("ignore:Operation with range"),  # MLflow 3.17 with pandas 3.1
]

MODELS = {
    "rbm": (
        (8, 8),
        {
            "hidden": 5,
            "k": 1,
            "chains": 4,
            "learning_rate": 0.1,
            "momentum": 0.5,
            "weight_decay": 0.0,
        },
    ),
    "meg": (
        (2,),
        {
            "network": "mlp",
            "energy": [8],
            "generator": [8],
            "statistics": [8],
            "latent": 2,
            "energy_steps": 1,
            "score_penalty": 0.1,
            "entropy": 0.5,
            "energy_learning_rate": 1e-3,
            "generator_learning_rate": 1e-3,
            "betas": [0.5, 0.9],
            "ema": 0.0,
            "energy_ema": 0.0,
            "precision": "float32",
            "compile": False,
        },
    ),
    "kernel_pca": ((4,), {"points": 20, "components": 3, "gamma": 1.0, "standardise": True}),
}
SAMPLE = {"rbm": {"steps": 3}, "meg": {"steps": 2, "step_size": 0.1}, "kernel_pca": {}}

CLIENT = """
import importlib, json, sys
import mlflow.pyfunc, numpy as np

answers = {}
for folder in sys.argv[1:]:
    model = mlflow.pyfunc.load_model(folder)
    example = model.input_example
    rows = lambda answer: answer.to_dict("records")
    answers[folder] = {"example": rows(model.predict(example))}
    if "kernel" not in folder:
        answers[folder]["samples"] = rows(model.predict(example, {"samples": 3, "seed": 7}))
    if isinstance(example, np.ndarray):
        flat = example.reshape(len(example), -1).astype(np.float32)
        answers[folder]["again"] = rows(model.predict(np.repeat(example, 1000, axis=0)))
        answers[folder]["rows"] = rows(model.unwrap_python_model().predict(None, flat))
from ebm.variants import VARIANTS
for variant in VARIANTS:
    importlib.import_module(f"ebm.variants.{variant}")
modules = [m.__file__ for name, m in sys.modules.items() if name.partition(".")[0] == "ebm"]
print(json.dumps({"answers": answers, "modules": modules}))
"""


@dataclass
class Packed:
    """A model as MLflow packs it, and what it must answer: to its example, and at all."""

    folder: Path
    model: torch.nn.Module
    points: torch.Tensor
    transform: Transform | None
    threshold: float

    @property
    def energies(self):
        with torch.no_grad():
            return self.model.energy(self.points).tolist()


@pytest.fixture(scope="module")
def packed(tmp_path_factory, empty_database):
    """Models of images and of vectors, of a table a model that draws and one that only scores."""
    home = tmp_path_factory.mktemp("root")
    made_up().to_csv(home / "mine.csv", index=False)
    table = data.prepare(settings(home / "mine.csv"))
    images, vectors = torch.rand(20, 8, 8).round(), torch.rand(20, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(home))
        patch.setattr(tracking, "_courier", lambda key: None)
        return {
            "images": pack("rbm", images, None, tmp_path_factory.mktemp("images")),
            "bits": pack("meg", images, None, tmp_path_factory.mktemp("bits"), binarize="sample"),
            "vectors": pack("meg", vectors, None, tmp_path_factory.mktemp("vectors")),
            "table": pack("meg", table.points("test"), table, tmp_path_factory.mktemp("table")),
            "kernel": pack(
                "kernel_pca", table.points("test"), table, tmp_path_factory.mktemp("kernel")
            ),
        }


def log_model(run, variant, points, table, folder, **more):
    """Log a model of points as the stage does: the model, its transform and its threshold."""

    torch.manual_seed(0)
    _, options = MODELS[variant]
    model = variants.build(variant, tuple(points.shape[1:]), options)
    model.initialise(points)
    weights, config = folder / "w.safetensors", folder / "c.json"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, weights)
    content = table.transform() if table else None
    about = {"variant": variant, "shape": list(points.shape[1:]), "model": options} | more
    config.write_text(json.dumps(about | ({"transform": content} if content else {})))
    threshold = model.eval().energy(points[:EXAMPLES]).median().item()
    prepared = SimpleNamespace(points=lambda split: points, transform=lambda: content)
    serving = {"threshold": threshold, "sample": SAMPLE[variant]}
    run.model(weights, config, serving, _example(prepared))
    return model, Transform.from_json(content, "it") if content else None, threshold


def pack(variant, points, table, folder, **more):
    from mlflow.models import Model

    from pipelines.mlflow_store import save_model

    with start() as run:
        model, transform, threshold = log_model(run, variant, points, table, folder, **more)
    [event] = [event for event, _ in Spool(run.key).read() if event["op"] == "model"]
    files = Spool(run.key).files / event["files"]
    save_model(files, event, Model())
    place = (files / "model").rename(folder / "packed")
    shutil.rmtree(files)
    return Packed(place, model, points[:EXAMPLES], transform, threshold)


@pytest.fixture(scope="module")
def client(packed, tmp_path_factory):
    """What a process answers that finds neither the checkout nor an installed ebm first."""
    result = subprocess.run(
        [sys.executable, "-I", "-c", CLIENT, *(str(one.folder) for one in packed.values())],
        cwd=tmp_path_factory.mktemp("elsewhere"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def ask(packed):
    """What MLflow's scoring server makes of a request: status, and what it answers."""
    import mlflow.pyfunc
    from mlflow.exceptions import MlflowException
    from mlflow.pyfunc.scoring_server import invocations

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))  # MLflow adds the code of the model
        models = {kind: mlflow.pyfunc.load_model(str(one.folder)) for kind, one in packed.items()}

        def ask(kind, body, content_type="application/json"):
            body = body if isinstance(body, str) else json.dumps(body)
            model = models[kind]
            schema = model.metadata.get_input_schema()
            try:
                answer = invocations(body.encode(), content_type, model, schema)
            except MlflowException as error:
                return error.get_http_status_code(), error.message
            ok = answer.status == 200
            return answer.status, json.loads(answer.response)[
                "predictions"
            ] if ok else answer.response

        yield ask


def column(answer, name="energy"):
    return [row[name] for row in answer]


KINDS = ("images", "vectors", "table", "kernel")


@pytest.mark.parametrize("kind", KINDS)
def test_the_served_energy_is_the_model_s_energy_and_flagged_from_the_threshold_on(
    packed, client, kind
):
    one, answer = packed[kind], client["answers"][str(packed[kind].folder)]
    assert column(answer["example"]) == pytest.approx(one.energies, rel=1e-5)
    flags = [energy >= one.threshold for energy in column(answer["example"])]
    assert column(answer["example"], "anomaly") == flags
    assert set(flags) == {True, False}
    if one.transform is None:
        assert column(answer["rows"]) == pytest.approx(one.energies, rel=1e-5)
        assert column(answer["again"]) == pytest.approx(np.repeat(one.energies, 1000), rel=1e-5)


@pytest.mark.parametrize("kind", ["images", "vectors", "table"])
def test_samples_are_those_of_the_sample_stage_with_that_seed(packed, client, kind):
    one, answer = packed[kind], client["answers"][str(packed[kind].folder)]["samples"]
    seeds.seed("sample", 7)
    options = SAMPLE["rbm" if kind == "images" else "meg"]
    expected = one.model.sample(3, **options)["samples"].detach()
    if one.transform is None:
        assert torch.allclose(torch.tensor(column(answer, "sample")), expected, rtol=1e-5)
    else:
        rows = one.transform.decode(expected)
        drawn = pd.DataFrame(column(answer, "sample"))
        assert drawn["amount"].tolist() == pytest.approx(rows["amount"].tolist(), rel=1e-5)
        assert drawn["colour"].tolist() == rows["colour"].tolist()
        expected = one.transform.apply(rows)
    assert column(answer) == pytest.approx(one.model.energy(expected).tolist(), rel=1e-4)


def test_the_code_comes_from_the_model_and_its_requirements_are_complete(packed, client):
    from pipelines.mlflow_store import REQUIREMENTS

    folders = tuple(str(one.folder / "code") for one in packed.values())
    assert all(file.startswith(folders) for file in client["modules"])
    names = {"sklearn": "scikit-learn"}
    found = {name for file in client["modules"] for name in imports(Path(file))}
    imported = {names.get(name, name) for name in found}
    assert imported - sys.stdlib_module_names - {"ebm"} <= set(REQUIREMENTS)


def imports(file):
    """The top-level packages that a source file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("kind", KINDS)
def test_no_pickle_is_packed(packed, kind):
    files = [file for file in packed[kind].folder.rglob("*") if file.is_file()]
    suffixes = {file.suffix for file in files if file.parent.name != "__pycache__"}  # a client's
    assert suffixes <= {"", ".py", ".json", ".safetensors", ".txt", ".yaml"}


def test_json_and_csv_of_vectors_say_the_same(packed, ask):
    rows, one = packed["vectors"].points.double().tolist(), packed["vectors"]
    csv = "a,b\n" + "".join(f"{x!r},{y!r}\n" for x, y in rows)
    bodies = [
        ({"inputs": rows},),
        ({"dataframe_split": {"columns": ["x", "y"], "data": rows}},),
        (csv, "text/csv"),
    ]
    for body in bodies:
        status, answer = ask("vectors", *body)
        assert status == 200
        assert column(answer) == pytest.approx(one.energies, rel=1e-5)


@pytest.mark.parametrize("kind", ["table", "kernel"])
def test_json_and_csv_of_a_table_say_the_same_and_other_columns_do_not_count(packed, ask, kind):
    one, frame = packed[kind], made_up()
    with torch.no_grad():
        energies = one.model.energy(one.transform.apply(frame)).tolist()
    frame = frame[frame.columns[::-1]]
    bodies = [
        ({"dataframe_records": frame.to_dict("records")},),
        ({"dataframe_split": frame.drop(columns=["id", "kind"]).to_dict("split")},),
        (frame.to_csv(index=False), "text/csv"),
    ]
    for body in bodies:
        status, answer = ask(kind, *body)
        assert status == 200
        assert column(answer) == pytest.approx(energies, rel=1e-4, abs=1e-6)
        assert len(set(column(answer, "anomaly"))) == 2


def test_blanks_behind_a_comma_do_not_make_another_category(packed, ask):
    """As in the file of the training data."""
    one, frame = packed["table"], made_up()[["amount", "colour"]]
    lines = [f"{amount}, {colour}" for amount, colour in frame.itertuples(index=False)]
    status, answer = ask("table", "\n".join(["amount,colour", *lines]), CSV)
    assert status == 200
    with torch.no_grad():
        energies = one.model.energy(one.transform.apply(made_up())).tolist()
    assert column(answer) == pytest.approx(energies, rel=1e-4, abs=1e-6)


def test_a_category_that_is_known_with_its_blank_keeps_it():
    from pipelines import mlflow_model

    fitted = fit(pd.DataFrame({"a": [1.0, 2.0], "b": ["x", " x"]}), ["b"], "none", "drop", "it")
    rows = pd.DataFrame({"a": [1.0, 1.0, 1.0], "b": ["x", " x", "  x"]})
    assert mlflow_model._without_padding(rows, fitted)["b"].tolist() == ["x", " x", "x"]


def test_a_category_is_text_and_one_never_seen_is_none_of_them(packed, ask):
    one = packed["table"]
    for given in ("violet", 7):
        status, answer = ask("table", {"dataframe_records": [{"amount": 3, "colour": given}]})
        points, _ = one.transform.encode(made_up(1).assign(amount=3.0, colour=given), "it")
        assert status == 200
        assert not points[:, 1:].any()
        assert column(answer) == pytest.approx(one.model.energy(points).tolist(), rel=1e-5)


def test_the_same_seed_draws_alike_whatever_else_goes_on(packed, ask):
    def draw(seed, count=4):
        body = {"inputs": [[0, 0]], "params": {"samples": count, "seed": seed}}
        status, answer = ask("vectors", body)
        assert status == 200
        return column(answer, "sample")

    def disturb():
        while not done.is_set():
            ask("vectors", {"inputs": [[0, 0]]})
            draw(99, 2)

    first, other = draw(1), draw(2)
    before, done = torch.get_rng_state(), threading.Event()
    with disturbed(disturb, done):
        assert all(draw(1) == first for _ in range(10))
    assert other != first
    assert torch.equal(torch.get_rng_state(), before)


@contextlib.contextmanager
def disturbed(act, done):
    thread = threading.Thread(target=act)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_what_a_sample_answers_is_what_is_answered_to_it(ask):
    body = {"dataframe_records": [{"amount": 0, "colour": "red"}], "params": {"samples": 5}}
    _, drawn = ask("table", body)
    _, answer = ask("table", {"dataframe_records": column(drawn, "sample")})
    assert column(answer) == pytest.approx(column(drawn), rel=1e-6)


def test_no_rows_have_no_energies(ask):
    columns = {"columns": ["amount", "colour"], "data": []}
    assert ask("table", {"dataframe_split": columns}) == (200, [])
    assert ask("vectors", "x,y\n", "text/csv") == (200, [])


CSV = "text/csv"
ROWS = {"amount": 3, "colour": "red"}


@pytest.mark.parametrize(
    ("kind", "body", "content_type", "reason"),
    [
        ("vectors", {"inputs": [[1, 2, 3]]}, None, "rows of shape [2], not an array of [1, 3]"),
        ("vectors", {"inputs": [[1, 2], [3]]}, None, "inhomogeneous shape"),
        ("vectors", {"inputs": [1, 2]}, None, "rows of shape [2]"),
        ("vectors", {"inputs": 1}, None, "rows of shape [2]"),
        ("vectors", {"inputs": []}, None, "rows of shape [2]"),
        ("vectors", {"inputs": {"x": [1], "y": [2]}}, None, "rows of shape [2]"),
        ("vectors", {"inputs": [[1, 2], [3, "four"]]}, None, "row 2, number 2 = 'four'"),
        ("vectors", {"inputs": [[None, 2]]}, None, "row 1, number 1 = 'None'"),
        ("vectors", '{"inputs": [[1, NaN]]}', None, "row 1, number 2 = 'nan'"),
        ("vectors", '{"inputs": [[1, -Infinity]]}', None, "row 1, number 2 = '-inf'"),
        ("vectors", {"inputs": [[1, 1e39]]}, None, "row 1, number 2 = '1e+39'"),
        ("vectors", {"inputs": [[0, 0]] * 10_001}, None, "10001 rows: expected 0 to 10000"),
        ("vectors", {"points": [[1, 2]]}, None, "exactly one of the input fields"),
        ("vectors", '{"inputs": [[1', None, "valid JSON"),
        ("vectors", "[[1, 2]]", None, "Received a list"),
        ("vectors", "x,y\n1,2\n3,four\n", CSV, "row 2, number 2 = 'four'"),
        ("vectors", "x,y\n1,2\n3,\n", CSV, "row 2, number 2 = 'nan'"),
        ("vectors", "x\n1\n", CSV, "rows of shape [2], not an array of [1, 1]"),
        ("vectors", "x,y\n1,2,3\n", CSV, "no row of a CSV file more cells than the header"),
        ("vectors", "", CSV, "No columns to parse"),
        ("vectors", "x,y\n1,2\n", "text/plain", "only supports the following content types"),
        ("images", {"inputs": np.zeros((2, 8, 7)).tolist()}, None, "does not match expected"),
        ("images", {"inputs": np.zeros((2, 64)).tolist()}, None, "does not match expected"),
        ("images", {"inputs": [[["a"] * 8] * 8]}, None, "could not convert string"),
        ("images", {"inputs": [[[None] * 8] * 8]}, None, "row 1, number 1 = 'nan'"),
        ("images", {"inputs": np.full((1, 8, 8), 0.5).tolist()}, None, "0 and 1, no greys"),
        ("images", "x\n1\n", CSV, "TensorSpec"),
        ("table", {"dataframe_records": [{"colour": "red"}]}, None, "missing inputs ['amount']"),
        ("table", {"dataframe_records": [ROWS, {**ROWS, "amount": None}]}, None, "row 2, column"),
        ("table", {"dataframe_records": [{**ROWS, "colour": None}]}, None, "row 1, column 'col"),
        ("table", {"dataframe_records": [{**ROWS, "amount": "ten"}]}, None, "string to float"),
        ("table", {"dataframe_records": [{**ROWS, "amount": 1e300}]}, None, "too large for float"),
        ("table", {"dataframe_records": [ROWS] * 10_001}, None, "10001 rows: expected 0 to"),
        ("table", {"inputs": [[3, "red"]]}, None, "could not convert string to float: 'red'"),
        ("table", "amount\n3\n", CSV, "missing inputs ['colour']"),
        ("table", "amount,colour\n3,red\n,red\n", CSV, "row 2, column 'amount' is empty"),
        ("table", "amount,colour\nten,red\n", CSV, "could not convert string to float: 'ten'"),
        ("table", "colour,amount\n1,red,3\n", CSV, "no row of a CSV file more cells"),
    ],
)
def test_whatever_is_wrong_with_a_request_is_answered_4xx_with_a_reason(
    ask, kind, body, content_type, reason
):
    status, text = ask(kind, body, content_type or "application/json")
    assert 400 <= status < 500
    assert reason in text


@pytest.mark.parametrize(
    ("kind", "params", "reason"),
    [
        ("vectors", {"samples": 257}, "257 samples: expected 0 to 256"),
        ("vectors", {"samples": -1}, "-1 samples: expected 0 to 256"),
        ("vectors", {"samples": "3"}, "Can not safely convert"),
        ("vectors", {"samples": 2.5}, "Can not safely convert"),
        ("vectors", {"samples": 1, "seed": "x"}, "Can not safely convert"),
        ("vectors", [3], "must be a dictionary"),
        ("kernel", {"samples": 3}, "this model only scores, it draws none"),
    ],
)
def test_samples_that_cannot_be_drawn_are_refused_with_a_reason(ask, kind, params, reason):
    given = {"dataframe_records": [ROWS]} if kind == "kernel" else {"inputs": [[0, 0]]}
    status, text = ask(kind, given | {"params": params})
    assert status == 400
    assert reason in text


def test_a_model_of_bits_refuses_greys_and_still_draws_what_it_draws(ask):
    bits = np.eye(8)
    given = {"inputs": [bits.tolist(), (bits / 2).tolist()]}
    assert ask("bits", {"inputs": [bits.tolist()]})[0] == 200
    status, text = ask("bits", given)
    assert status == 400
    assert "row 2: has greys; the model knows 0 and 1 alone" in text
    params = {"params": {"samples": 2}}
    status, drawn = ask("bits", {"inputs": [bits.tolist()]} | params)
    assert status == 200
    assert 0 < np.array(drawn[0]["sample"]).mean() < 1


def test_an_energy_that_is_not_finite_names_its_row(packed, ask, monkeypatch):
    status, text = ask("vectors", {"inputs": [[0, 0], [3e38, 3e38]]})
    assert status == 400
    assert "row 2: its energy is" in text


def test_who_waits_too_long_for_draws_is_told_to_come_again(packed, monkeypatch):
    import mlflow.pyfunc
    from mlflow.exceptions import MlflowException

    monkeypatch.setattr(sys, "path", list(sys.path))
    model = mlflow.pyfunc.load_model(str(packed["vectors"].folder)).unwrap_python_model()
    monkeypatch.setitem(type(model)._draw.__globals__, "WAIT", 0.1)
    with model.turn, pytest.raises(MlflowException, match="again later") as refused:
        model.predict(None, np.zeros((1, 2)), {"samples": 1, "seed": 0})
    assert refused.value.get_http_status_code() == 429
    assert len(model.predict(None, np.zeros((1, 2)), {"samples": 1, "seed": 0})) == 1


def test_a_server_may_be_given_another_threshold_or_none(packed, monkeypatch):
    import mlflow.pyfunc
    from mlflow.exceptions import MlflowException

    monkeypatch.setattr(sys, "path", list(sys.path))

    def flags(threshold):
        config = {"threshold": threshold}
        model = mlflow.pyfunc.load_model(str(packed["vectors"].folder), model_config=config)
        return set(column(model.predict(np.ones((2, 2))).to_dict("records"), "anomaly"))

    assert [flags(-1e9), flags(1e9), flags(None)] == [{True}, {False}, {None}]
    with pytest.raises(MlflowException, match="threshold = 'high': expected a finite number"):
        flags("high")
