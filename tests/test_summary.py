"""What a flow run leaves in Prefect is what the report says of the same experiments."""

import base64
import json
import re
import shutil

import pytest
from test_report import MEG, RBM, ROOT, all_params, make

from pipelines import summary
from pipelines.spool import Spool, State
from pipelines.timeline import UP_TO_DATE, Rebuild, Result


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A checkout in which two experiments are evaluated, and one of them in paper/ as well."""
    root = tmp_path_factory.mktemp("project")
    for folder in (root, root / "paper"):
        folder.mkdir(exist_ok=True)
        shutil.copy(ROOT / "params.yaml", folder)
        make(folder, MEG)
    make(root, RBM)
    lock(root)
    return root


def lock(root, **stages):
    """What DVC says that the two were trained with: all that stands in params.yaml."""
    written = all_params()["experiments"]
    for name in (RBM, MEG):
        used = {f"experiments.{name}.{key}": value for key, value in written[name].items()}
        stages.setdefault(f"train@{name}", {})["params"] = {"params.yaml": used}
    (root / "dvc.lock").write_text(json.dumps({"schema": "2.0", "stages": stages}))


def rebuild(*entries):
    return Rebuild("a test", (), 1_000_000_000.0, 10.0, entries)


def done(stage, **fields):
    return Result(stage, "done", 1_000_000_001.0, 2.5, "here", **fields)


def old(stage):
    return Result(stage, UP_TO_DATE)


LAST = rebuild(
    done(f"evaluate@{MEG}"),
    done("report"),
    old("prepare@digits"),
    old(f"train@{MEG}"),
    old(f"evaluate@{RBM}"),
    old("train@igebm-digits"),
    done(f"paper/dvc.yaml:train@{MEG}", restored=True),
)


@pytest.fixture
def found(project):
    return summary.experiments(LAST, project)


def test_every_stage_of_the_plan_has_a_row():
    rows = summary.stages(rebuild(done("a"), done("b", restored=True), old("c")))
    assert [(row["stage"], row["outcome"]) for row in rows] == [
        ("a", "ran"),
        ("b", "restored from the cache"),
        ("c", "up to date"),
    ]
    assert rows[0]["took"] == "2.5 s"
    assert rows[2]["started"] == rows[2]["took"] == rows[2]["worker"] == ""
    assert len({tuple(row) for row in rows}) == 1, "Prefect shows the columns of the first row"


def test_experiments_are_those_of_the_plan_that_are_evaluated(found):
    assert [(one.title, one.ran) for one in found] == [
        (MEG, True),
        (RBM, False),
        (f"paper/{MEG}", False),
    ]


def test_what_was_restored_was_not_measured_now(project):
    (restored,) = summary.experiments(rebuild(done(f"evaluate@{RBM}", restored=True)), project)
    assert {row["measured"] for row in summary.table([restored])} == {"before"}


def test_what_is_trained_but_not_measured_has_no_numbers_now(project, tmp_path):
    only = rebuild(done(f"train@{RBM}"))
    (before,) = summary.experiments(only, project)
    assert not before.ran
    copy = shutil.copytree(project, tmp_path / "copy")
    path = f"models/{RBM}/weights.safetensors"
    stages = {
        f"train@{RBM}": {"outs": [{"path": path, "md5": "new"}]},
        f"evaluate@{RBM}": {"deps": [{"path": path, "md5": "old"}]},
    }
    lock(copy, **stages)
    assert not summary.experiments(only, copy)


def test_what_params_say_no_more_is_left_out(project, tmp_path):
    """They may be edited while a rebuild of hours goes on."""
    copy = shutil.copytree(project, tmp_path / "copy")
    text = (ROOT / "params.yaml").read_text()
    (copy / "params.yaml").write_text(text.replace(f"\n  {MEG}:", "\n  another:"))
    (copy / "paper" / "params.yaml").write_text(text.replace("variant:", "varaint:", 1))
    assert [one.title for one in summary.experiments(LAST, copy)] == [RBM]


def test_an_experiment_of_which_a_file_is_missing_is_left_out(project, tmp_path):
    copy = shutil.copytree(project, tmp_path / "copy")
    (copy / "models" / MEG / "run.json").unlink()
    assert [one.title for one in summary.experiments(LAST, copy)] == [RBM, f"paper/{MEG}"]


def test_numbers_stand_beside_what_they_are_held_against_as_in_the_report(found):
    rows = summary.table(found)
    assert len({tuple(row) for row in rows}) == 1
    numbers = {(row["experiment"], row["metric"]): row for row in rows}
    row = numbers[RBM, "Log-likelihood [nats]"]
    assert (row["value"], row["held against"], row["measured"]) == (
        "−22.57",
        "baseline −27.00",
        "before",
    )
    row = numbers[MEG, "Modes found"]
    assert (row["value"], row["held against"]) == ("8 / 8", "ceiling 8, published 7.5")
    assert row["measured"] == "now"
    assert (MEG, "seconds") not in numbers


def test_means_over_classes_stand_for_what_is_measured_class_by_class(found):
    result = found[0].result
    result.metrics.update({"auprc_strict_0": 0.25, "auprc_strict_mean": 0.5})
    values = {row["metric"]: row["value"] for row in summary.table(found[:1])}
    assert values["AUPRC, strict, mean"] == "0.5000"
    assert not [metric for metric in values if "0" in metric]


def test_figures_are_those_of_what_was_rebuilt_and_one_of_each_other_experiment(found):
    markdown = summary.figures(found)
    images = re.findall(r"!\[([^]]*)\]\(data:image/png;base64,([^)]*)\)", markdown)
    expected = [p.png for one in found for p in one.result.pictures[: None if one.ran else 1]]
    assert [base64.b64decode(image) for _, image in images] == expected
    assert [title for title, _ in images] == ["Density", "Samples", "Density"]
    assert re.findall("(?m)^## (.*)$", markdown) == [MEG, RBM, f"paper/{MEG}"]


def test_a_link_leads_to_the_run_where_it_is_tracked(found, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = "d" * 32
    assert [one.address for one in found[:2]] == [f"http://127.0.0.1:5000/#/runs/{run}", ""]
    assert f"[training in MLflow](http://127.0.0.1:5000/#/runs/{run})" in summary.figures(found)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    assert found[0].address.startswith("http://127.0.0.1:5000/")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow.example/")
    assert found[0].address == f"https://mlflow.example/#/runs/{run}"


def test_a_run_that_was_delivered_after_its_training_has_a_link_too(found, monkeypatch, tmp_path):
    """`run.json` waits a few seconds for MLflow's id, no longer."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    late = found[1]
    assert late.result.record.mlflow_run_id is None
    spool = Spool(late.result.record.tracking_key)
    spool.events.parent.mkdir(parents=True)
    spool.save(State(mlflow_run_id="e" * 32))
    assert late.address.endswith(f"/#/runs/{'e' * 32}")


def test_keys_are_such_as_prefect_allows(found):
    assert [one.key for one in found] == [MEG, RBM, f"paper-{MEG}"]
    assert all(re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", one.key) for one in found)
