"""The champion is the best recorded run, it answers the energies of its weights, and whatever
happens there is a way back."""

import contextlib
import io
import json
import math
import subprocess
import sys
import threading
import time
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import save_file
from test_mlflow_model import MODELS
from test_tracking import log_model
from tracking_store import MLFLOW_WARNS, Lookup, deliver, start

from ebm import EBMError, variants
from pipelines import ROOT, tracking
from pipelines.promote import direction, main, promote, rollback

pytestmark = [
    MLFLOW_WARNS,
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred"),  # MLflow, of its own classes
]


@pytest.fixture
def light(monkeypatch):
    """A model is one file: packing a real one takes a second."""

    def save(files, event, model):
        (files / "model").mkdir(exist_ok=True)
        (files / "model" / "MLmodel").write_text("{}")

    monkeypatch.setattr("pipelines.mlflow_store.save_model", save)


@pytest.fixture
def record(store, light, tmp_path):
    """What records runs of `toy`, each with its metrics, in order; their ids in MLflow."""

    def record(*measured, model=True, data="a"):
        runs = []
        for metrics in measured:
            with start(tags={"data.sha256": data} if data else {}) as run:
                if model:
                    log_model(run, tmp_path)
                run.log_final(metrics)
            runs.append(run)
        assert deliver()
        return [run.mlflow_run_id() for run in runs]

    return record


def champion(store, alias="champion"):
    """The run that the alias stands for."""
    return store.client.get_model_version_by_alias("toy", alias).run_id


def versions(store):
    return store.client.search_model_versions("name = 'toy'")


def refusal(*arguments):
    """The one line with which a command ends that does nothing."""
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        assert main(["toy", *arguments]) == 1
    [line] = told.getvalue().splitlines()
    assert line.startswith("error: ")
    return line


def test_without_a_database_it_is_told_what_makes_one(fresh_root):
    line = refusal("--metric", "modes")
    assert "nothing is recorded yet; `python -m pipelines.tracking` delivers what waits" in line


def test_the_best_of_three_by_the_direction_of_the_metric(store, record):
    runs = record(
        {"modes": 3, "mode_kl": 0.2, "gap": 1},
        {"modes": 8, "mode_kl": 0.3, "gap": math.nan},
        {"modes": 5, "mode_kl": 0.1, "gap": 2},
    )
    cases = {"modes": 1, "mode_kl": 2, "modes --lower": 0, "gap --higher": 2}
    for number, (arguments, best) in enumerate(cases.items()):
        assert main(["toy", "--alias", f"a{number}", "--metric", *arguments.split()]) == 0
        assert champion(store, f"a{number}") == runs[best]
    assert len(versions(store)) == 3  # the same run twice is one version


def test_the_champion_answers_the_energies_of_its_weights(store, tmp_path, monkeypatch):
    shape, settings = MODELS["meg"]
    files = [tmp_path / name for name in ("w.safetensors", "c.json")]
    points, models = torch.rand(20, *shape), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(variants.build("meg", shape, settings).eval())
        save_file({n: t.contiguous() for n, t in models[-1].state_dict().items()}, files[0])
        files[1].write_text(json.dumps({"variant": "meg", "shape": shape, "model": settings}))
        serving = {"threshold": 0.0, "sample": {"steps": 1}}
        with start() as run:
            run.model(*files, serving, {"inputs": points[:2].tolist()})
            run.log_final({"modes": seed})
    assert deliver()
    promote("toy", "modes", "champion", None)
    answer = served("models:/toy@champion", points, store, monkeypatch)
    assert answer == pytest.approx(models[1].energy(points).tolist(), rel=1e-5)
    assert answer != pytest.approx(models[0].energy(points).tolist(), rel=1e-5)


def test_a_checkout_that_was_moved_has_its_models_with_it(store, record, tmp_path, monkeypatch):
    """And nothing is written to where it was."""
    (first,) = record({"modes": 1})
    promote("toy", "modes", "champion", None)
    new = tmp_path.parent / f"{tmp_path.name} moved"
    tmp_path.rename(new)
    monkeypatch.setenv("DVC_ROOT", str(new))
    monkeypatch.chdir(new)
    # MLflow remembers within a process where a model lies
    again = [sys.executable, "-m", "pipelines.promote", "toy", "--metric", "modes"]
    subprocess.run([*again, "--alias", "again"], cwd=ROOT, check=True)
    with start(tags={"data.sha256": "a"}) as run:
        log_model(run, new)
        run.log_final({"modes": 2})
    assert deliver()
    promote("toy", "modes", "champion", None)
    moved = Lookup(f"sqlite:///{new}/mlflow.db")
    assert champion(moved) == run.mlflow_run_id()
    assert champion(moved, "again") == first
    for one in moved.runs():
        assert Path(one.info.artifact_uri).is_relative_to(new / "mlruns")
    for version in versions(moved):
        assert Path(version.source, "MLmodel").is_file()
        loaded = moved.client.get_model_version_download_uri("toy", version.version)
        assert Path(loaded, "MLmodel").is_file()
    assert not tmp_path.exists()


def served(uri, points, store, monkeypatch):
    """What MLflow answers under `uri`, by default settings and the address of the store."""
    import mlflow.pyfunc

    monkeypatch.setattr(sys, "path", list(sys.path))  # MLflow adds the code of the model
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.client.tracking_uri)
    return mlflow.pyfunc.load_model(uri).predict(points.double().numpy())["energy"].tolist()


def test_a_worse_run_and_an_equal_one_change_nothing(store, record):
    [first] = record({"modes": 8, "mode_kl": 0.1})
    promote("toy", "modes", "champion", None)
    record({"modes": 9, "mode_kl": 0.2}, model=False)  # as good, but nothing to serve
    [better] = record({"modes": 9, "mode_kl": 0.2})
    assert "stays version 1, mode_kl 0.1" in promote("toy", "mode_kl", "champion", None)
    promote("toy", "modes", "champion", None)
    record({"modes": 9, "mode_kl": 0.2})
    again = promote("toy", "modes", "champion", None)
    assert "stays version 2, modes 9: the best finished" in again
    assert champion(store) == better != first
    assert len(versions(store)) == 2


def test_what_waits_for_mlflow_takes_part(store, light, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "flush", deliver)
    with start() as run:
        log_model(run, tmp_path)
        run.log_final({"modes": 8})
    assert main(["toy", "--metric", "modes"]) == 0
    assert champion(store) == run.mlflow_run_id()


def test_runs_on_every_page_of_mlflow_are_compared(store, record, monkeypatch):
    search = MlflowClient.search_runs
    monkeypatch.setattr(MlflowClient, "search_runs", partialmethod(search, max_results=1))
    runs = record({"modes": 1}, {"modes": 3}, {"modes": 2})
    promote("toy", "modes", "champion", None)
    assert champion(store) == runs[1]


def test_a_model_of_which_a_part_has_still_to_arrive_is_not_served(store, record, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "finalize_logged_model", lambda *_: None)
        record({"modes": 1})
    assert "no complete model" in refusal("--metric", "modes")


def test_a_run_of_which_nobody_knows_on_what_data_is_not_the_newest(store, record):
    [best] = record({"modes": 9})
    record({"modes": 3}, data=None)
    promote("toy", "modes", "champion", None)
    assert champion(store) == best


def test_only_runs_on_the_newest_data_are_compared(store, record, capsys):
    """The metric of an easier test split would keep a model that knows another table."""
    record({"modes": 9})
    promote("toy", "modes", "champion", None)
    [new, _] = record({"modes": 4}, {"modes": 3}, data="b")
    assert main(["toy", "--metric", "modes"]) == 0
    assert champion(store) == new
    assert capsys.readouterr().out.endswith(", modes 4 (before: version 1, on other data)\n")
    assert "stays version 2, modes 4" in promote("toy", "modes", "champion", None)
    assert main(["toy", "--metric", "modes", "--alias", "fresh"]) == 0
    assert champion(store, "fresh") == new


def test_the_same_run_evaluated_anew_is_a_new_version(store, record, tmp_path):
    with start() as run:
        log_model(run, tmp_path)
        run.log_final({"modes": 8})
    assert deliver()
    promote("toy", "modes", "champion", None)
    with start(key=run.key) as evaluation:
        log_model(evaluation, tmp_path, threshold=2.0)
    assert deliver()
    assert "is version 2" in promote("toy", "modes", "champion", None)
    assert "stays version 2" in promote("toy", "modes", "champion", None)
    assert rollback("toy", "champion") == "toy@champion is version 1 again"


def test_rollback_goes_back_step_by_step_and_each_alias_has_its_own_past(store, record):
    runs = []
    for modes in (1, 2, 3):
        runs += record({"modes": modes})
        promote("toy", "modes", "champion", None)
        promote("toy", "modes", "other", None)
    promote("toy", "modes", "shadow", None)
    for earlier in (1, 0):
        assert rollback("toy", "champion") == f"toy@champion is version {earlier + 1} again"
        assert champion(store) == runs[earlier]
    assert "no earlier version" in refusal("--rollback")
    assert "no earlier version" in refusal("--rollback", "--alias", "shadow")
    assert champion(store) == runs[0]
    assert "is version 3" in promote("toy", "modes", "champion", None)
    assert len(versions(store)) == 3  # registered once, champion twice
    assert main(["toy", "--rollback"]) == 0
    assert champion(store) == runs[0]
    assert champion(store, "shadow") == runs[2]
    store.client.delete_model_version("toy", "2")
    assert rollback("toy", "other") == "toy@other is version 1 again"


def test_a_kill_between_two_changes_is_made_good_by_the_next_call(store, record, monkeypatch):
    from pipelines.mlflow_registry import Registry

    def twice(act, killed_at, *arguments):
        """First killed at the second change, then in full."""

        def die(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Registry, killed_at, die)
            with pytest.raises(KeyboardInterrupt):
                act("toy", *arguments)
        act("toy", *arguments)

    runs = []
    for modes in (1, 2, 3):
        runs += record({"modes": modes})
        twice(promote, "point", "modes", "champion", None)
    assert len(versions(store)) == 3
    assert champion(store) == runs[2]
    twice(rollback, "point", "champion")  # the first one had changed nothing
    assert champion(store) == runs[1]
    promote("toy", "modes", "champion", None)
    twice(rollback, "remember", "champion")  # the first one had moved the alias
    assert champion(store) == runs[0]


def test_what_cannot_be_promoted_is_said_in_one_line(store, record):
    assert "no such experiment" in refusal("--metric", "modes")
    record({"modes": 1, "mode_kl": math.nan})
    unfinished = start()
    unfinished.log_final({"modes": 9, "recall": 1})
    assert deliver()
    assert "say --higher or --lower" in refusal("--metric", "loss")
    assert "has a mode_kl" in refusal("--metric", "mode_kl")
    assert "has a recall" in refusal("--metric", "recall")
    assert "similar: modes" in refusal("--metric", "mode", "--higher")
    assert "--alias latest" in refusal("--metric", "modes", "--alias", "latest")
    assert "no earlier version" in refusal("--rollback")
    record({"modes": 2}, model=False)
    assert "no complete model" in refusal("--metric", "modes")
    assert versions(store) == []
    unfinished.close()


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("sqlite:///{}/bad.db", "file is not a database"),
        ("sqlite:///{}", "no such file"),
        ("sqlite:///{}/a%2Fb.db", "something else; name another path in MLFLOW_TRACKING_URI"),
        ("postgresql://u:p@127.0.0.1:9/db", "psycopg2"),
    ],
)
def test_a_store_that_is_none_is_one_line(tmp_path, monkeypatch, uri, told):
    (tmp_path / "bad.db").write_bytes(bytes(range(256)) * 40)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(tmp_path))
    message = refusal("--metric", "modes")
    assert told in message
    assert "\n" not in message.strip()


def test_without_a_database_nothing_is_made(fresh_root):
    assert "nothing is recorded yet" in refusal("--metric", "modes")
    assert not (fresh_root / "mlflow.db").exists()


def test_directions():
    assert (direction("auroc_mean"), direction("bits_per_dim")) == (1, -1)
    for name in ("loss", "acceptance", "auroc_std"):
        with pytest.raises(EBMError, match="--higher or --lower"):
            direction(name)
    with pytest.raises(EBMError, match="--lower; did you mean 'log_likelihood'"):
        direction("loglikelihood")


def test_two_at_once_leave_one_version_and_its_alias(store, record, monkeypatch):
    from pipelines.mlflow_registry import Registry

    runs = record({"modes": 1}, {"modes": 2})
    register, answers = Registry.register, []

    def slowly(*arguments):
        time.sleep(0.3)
        return register(*arguments)

    def one():
        try:
            answers.append(promote("toy", "modes", "champion", None))
        except EBMError as error:
            answers.append(str(error))

    monkeypatch.setattr(Registry, "register", slowly)
    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ["stays version 1" in answer for answer in answers] == [False, True]
    assert champion(store) == runs[1]
    assert len(versions(store)) == 1
