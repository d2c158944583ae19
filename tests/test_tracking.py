"""Laws of the stage's side and of delivery, within one process. Real couriers: test_courier.py."""

import json
import math
import os
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file
from tracking_store import MLFLOW_WARNS, abandon, deliver, start, undelivered

from pipelines import ROOT, courier, tracking
from pipelines.places import public, tracking_uri
from pipelines.spool import Spool

pytestmark = MLFLOW_WARNS


def spool_of(run):
    return Spool(run.key)


def everything(run, folder):
    """Put one of each kind of event into a run, but for its end."""
    (folder / "figure.png").write_bytes(b"picture")
    for step in range(700):
        run.log({"loss": step / 7, "gap": -step}, step)
    run.artifact(folder / "figure.png", "figures")
    log_model(run, folder)
    run.log_final({"modes": 8, "lost": math.nan})


def log_model(run, folder, **serving):
    weights, config = folder / "weights.safetensors", folder / "config.json"
    save_file({"w": np.ones(2, np.float32)}, weights)
    config.write_text(json.dumps({"shape": [2]}))
    serving = {"threshold": 1.0, "sample": {}} | serving
    run.model(weights, config, serving, {"inputs": [[1.0, 1.0]]})


def holds_everything(store):
    """Whether the store has each thing of `everything` exactly once."""
    run = store.run()
    figures = store.client.list_artifacts(run.info.run_id, "figures")
    [model] = store.client.search_logged_models([store.experiment()])
    return (
        store.rows("loss") == [(step, step / 7) for step in range(700)]
        and store.rows("gap") == [(step, -step) for step in range(700)]
        and store.rows("modes") == [(699, 8.0)]
        and [figure.path for figure in figures] == ["figures/figure.png"]
        and [output.model_id for output in run.outputs.model_outputs] == [model.model_id]
        and run.data.tags["ebm.model_id"] == model.model_id
        and model.status == "READY"
        and [(metric.key, metric.value) for metric in model.metrics] == [("modes", 8.0)]
    )


def test_every_value_arrives_once_and_in_order(store, tmp_path):
    with start() as run:
        everything(run, tmp_path)
    assert deliver()
    assert holds_everything(store)
    assert store.run().info.status == "FINISHED"
    assert not list(spool_of(run).files.iterdir())


def test_a_delivery_killed_at_any_point_has_the_same_effect(store, tmp_path, monkeypatch):
    """Everything reaches MLflow twice: a courier dies before it notes what it has delivered."""

    class KilledError(BaseException):
        pass

    calls, save = count(), Spool.save

    def save_or_die(spool, state):
        if next(calls) % 2 == 0:
            raise KilledError
        save(spool, state)

    monkeypatch.setattr(Spool, "save", save_or_die)
    monkeypatch.setattr(courier, "shutil", SimpleNamespace(rmtree=lambda _: None))
    with start() as run:
        everything(run, tmp_path)
    while undelivered():
        try:
            deliver()
        except KilledError:
            continue
    assert next(calls) > 10
    assert holds_everything(store)


def test_what_is_served_otherwise_is_another_model_and_the_last_one_counts(store, tmp_path):
    run = start()
    run.close()
    known = []
    for modes, threshold in enumerate([1.0, 2.0, 2.0, 1.0]):
        with start(key=run.key) as evaluation:
            log_model(evaluation, tmp_path, threshold=threshold)
            evaluation.log_final({"modes": modes})
        assert deliver()
        known.append(store.run().data.tags["ebm.model_id"])
        model = store.client.get_logged_model(known[-1])
        assert max(metric.value for metric in model.metrics) == modes
    assert known[0] == known[3] != known[1] == known[2]
    assert len(store.client.search_logged_models([store.experiment()])) == 2


def test_a_damaged_state_is_said_and_loses_nothing(store, tmp_path, caplog):
    with start() as run:
        everything(run, tmp_path)
        assert deliver()
        (spool_of(run).events.parent / "state.json").write_text('{"offset": 12')
        run.log({"loss": 100.0}, 700)
        assert deliver()
    assert deliver()
    assert store.rows("loss")[-1] == (700, 100.0)
    assert len(store.rows("loss")) == 701
    [line] = [message for message in caplog.messages if "damaged" in message]
    assert run.key in line


def test_not_a_number_stays_and_infinity_becomes_the_largest_number(store):
    with start() as run:
        run.log({"nan": math.nan, "up": math.inf, "down": -math.inf}, 1)
    assert deliver()
    assert math.isnan(store.rows("nan")[0][1])
    assert store.rows("up") == [(1, sys.float_info.max)]
    assert store.rows("down") == [(1, -sys.float_info.max)]


def test_a_resumed_run_is_the_same_run_and_repeats_no_step(store):
    first = start()
    for step in (10, 20, 30):
        first.log({"loss": step}, step)
    first.log({"loss": 21}, 20, restarts=1)
    abandon(first)
    assert deliver()
    assert store.run().info.status == "KILLED"
    again = start(key=first.key)
    again.log({"loss": 30}, 30)
    again.log({"loss": 21}, 20, restarts=1)
    again.log({"loss": 31}, 30, restarts=1)
    assert deliver()
    assert store.run().info.status == "RUNNING"
    again.close()
    assert deliver()
    assert store.run().info.status == "FINISHED"
    rows = [(10, 10.0), (20, 20.0), (20, 21.0), (30, 30.0), (30, 31.0)]
    assert sorted(store.rows("loss")) == rows
    assert store.rows("restarts") == [(20, 1.0), (30, 1.0)]


def test_a_run_that_was_killed_ended_when_it_wrote_last(store):
    run = start()
    run.log({"loss": 1}, 1)
    abandon(run)
    os.utime(spool_of(run).events, (1_800_000_000, 1_800_000_000))
    assert deliver()
    assert store.run().info.end_time == 1_800_000_000_000


def test_a_spool_cut_off_anywhere_is_read_up_to_there_and_continued(store):
    for cut in (1, 2, 30):
        run = start(f"cut-{cut}")
        for step in range(3):
            run.log({"loss": step}, step)
        abandon(run)
        events = spool_of(run).events
        os.truncate(events, events.stat().st_size - cut)
        assert deliver()
        again = start(f"cut-{cut}", key=run.key)
        again.log({"loss": 2}, 2)
        again.close()
        assert deliver()
        [tracked] = [r for r in store.runs() if r.info.run_name == f"cut-{cut}"]
        assert store.rows("loss", tracked) == [(0, 0.0), (1, 1.0), (2, 2.0)]


def test_an_unreadable_line_is_said_and_the_rest_arrives(store, caplog):
    with start() as run:
        run.log({"loss": 1}, 1)
        with spool_of(run).events.open("ab") as file:
            file.write(b"\x00\xff{]\n")
        run.log({"loss": 2}, 2)
        assert deliver()
    assert store.rows("loss") == [(1, 1.0), (2, 2.0)]
    assert sum("unreadable" in message for message in caplog.messages) == 1


def test_results_are_the_latest_values_also_after_a_second_evaluation(store):
    run = start()
    run.log({"loss": 5, "modes": 3}, 1000)
    run.close()
    for modes in (7, 8):
        with start(key=run.key) as evaluation:
            evaluation.log_final({"modes": modes})
        assert deliver()
        assert store.run().data.metrics["modes"] == modes


def test_a_continued_run_keeps_what_it_was_and_tells_what_is_new(store, monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "train@toy")
    params = {"seed": 1, "model": {"width": 3, "wide": {"er": True}}, "odd@name": "x"}
    with start(params=params, tags={"git.commit": "abc"}) as run:
        pass
    monkeypatch.setenv("DVC_STAGE", "evaluate@toy")
    monkeypatch.setenv("DVC_EXP_NAME", "fast-cat")
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "flow")
    with start(key=run.key, params=params | {"seed": 2, "new": 3}, tags={"git.commit": "def"}):
        pass
    assert deliver()
    data = store.run().data
    flat = {"seed": "1", "model.width": "3", "model.wide.er": "True", "odd-name": "x", "new": "3"}
    assert data.params == flat
    expected = {
        "ebm.experiment": "toy",
        "git.commit": "abc",
        "evaluate.git.commit": "def",
        "evaluate.seed": "2",
        "dvc.stage": "train@toy",
        "evaluate.dvc.stage": "evaluate@toy",
        "dvc.exp_name": "fast-cat",
        "prefect.flow_run_id": "flow",
    }
    assert expected.items() <= data.tags.items()


def test_more_params_than_a_request_takes(store):
    with start(params={f"p{i}": i for i in range(250)}):
        pass
    assert deliver()
    assert len(store.run().data.params) == 250


def test_the_data_set_is_an_input_of_the_run(store):
    with start(dataset={"name": "digits", "source": "scikit-learn", "digest": "ab" * 32}) as run:
        pass
    start(key=run.key, dataset={"name": "digits", "source": "scikit-learn", "digest": "ab" * 32})
    assert deliver()
    [data] = store.run().inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("digits", ("ab" * 32)[:36])
    assert "scikit-learn" in data.dataset.source


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")]
)
def test_a_run_that_ends_by_an_exception_says_so(store, error, status):
    with pytest.raises(error), start():
        raise error
    assert deliver()
    assert store.run().info.status == status


def test_a_run_of_another_machine_is_continued_by_its_key(store):
    """A model that came from a cache names a key of which this machine has no spool."""
    with start(key="0" * 32) as run:
        run.log({"loss": 1}, 1)
    assert deliver()
    for file in spool_of(run).events.parent.glob("*.json*"):
        file.unlink()
    with start(key="0" * 32) as run:
        run.log_final({"modes": 8})
    assert deliver()
    assert store.run().data.metrics == {"loss": 1, "modes": 8}


def test_a_run_that_was_deleted_in_mlflow_holds_nobody_up(store, caplog):
    with start("deleted") as run, start("kept") as other:
        assert deliver()
        [deleted] = [r for r in store.runs() if r.info.run_name == "deleted"]
        store.client.delete_run(deleted.info.run_id)
        run.log({"loss": 1}, 1)
        other.log({"loss": 1}, 1)
        assert deliver()
    assert store.rows("loss") == [(1, 1.0)]
    [line] = [message for message in caplog.messages if "left out" in message]
    assert "must be in the 'active' state" in line


def test_a_run_that_was_deleted_and_then_killed_is_over(store):
    run = start("deleted")
    assert deliver()
    store.client.delete_run(store.run().info.run_id)
    run._release()  # as if its process had died
    assert deliver()
    assert undelivered() == []
    [note] = spool_of(run).state().notes
    assert "its end was left out" in note


def test_a_run_that_cannot_begin_holds_nobody_up(store, caplog):
    with start(key="0" * 32, dataset={"name": "n" * 501, "source": "", "digest": ""}) as bad:
        bad.log({"loss": 1}, 1)
        with start(key="1" * 32) as good:
            good.log({"loss": 1}, 1)
        assert not deliver()
        assert undelivered() == ["0" * 32]
    [line] = caplog.messages
    assert "does not take what is logged" in line
    assert "500" in line


def test_a_server_that_is_down_is_said_once_and_gets_everything_later(server, caplog, monkeypatch):
    monkeypatch.setattr(tracking, "LISTEN_EVERY", 0.0)
    run = start()
    for step, mood in enumerate(["broken", "lost", "broken", "well", "well"]):
        server.mood = mood
        run.log({"loss": step}, step)
        assert deliver() == (mood == "well")
    run.log({"loss": 5}, 5)
    assert server.rows == [(step, step) for step in range(5)]
    run.close()
    assert deliver()
    assert server.rows[-1] == (5, 5)
    complaints = [message for message in caplog.messages if "does not take" in message]
    assert server.uri in complaints[0]
    assert caplog.messages[-1] == "tracking: MLflow answers again"


def test_a_server_that_fails_is_not_asked_for_every_run(server):
    """Each of them would wait for its answer in vain."""
    for name in "abc":
        with start(name):
            pass
    server.mood = "broken"
    assert not deliver()
    assert len(server.calls) == 1
    assert len(undelivered()) == 3


def test_a_second_store_gets_the_run_when_the_environment_changes(store, server, monkeypatch):
    with start() as run:
        run.log({"loss": 1}, 1)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with start(key=run.key) as evaluation:
        evaluation.log_final({"modes": 8})
    assert deliver()
    assert server.rows == [(1, 1)]
    assert store.run().data.metrics == {"modes": 8}


def test_the_id_is_known_once_the_run_is_delivered_or_at_once_if_hopeless(store, server):
    server.mood = "broken"
    run = start()
    begin = time.monotonic()
    assert run.mlflow_run_id(wait=0.2) is None
    assert 0.2 < time.monotonic() - begin < 2
    assert not deliver()
    begin = time.monotonic()
    assert run.mlflow_run_id(wait=60) is None
    assert time.monotonic() - begin < 1
    server.mood = "well"
    assert deliver()
    assert run.mlflow_run_id() == "f" * 32


def test_a_stage_goes_on_without_disk_and_says_so_once(store, tmp_path, caplog, monkeypatch):
    """The disk takes half of a line, then nothing, then is free again."""
    run = start()
    write, full = os.write, {3: 10, 4: 0, 5: 0}
    run.log({"loss": 2}, 2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda to, line: write(to, line[: full[step]]))
        patch.setattr("shutil.copy", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
        for step in full:
            run.log({"loss": step}, step)
        run.artifact(ROOT / "params.yaml")
    run.log({"loss": 6}, 6)
    run.close()
    assert deliver()
    assert store.rows("loss") == [(2, 2.0), (6, 6.0)]
    assert sum("the stage goes on without" in message for message in caplog.messages) == 1
    assert not list(spool_of(run).files.iterdir())


def test_a_root_that_cannot_be_written_stops_no_stage(store, monkeypatch, caplog):
    monkeypatch.setenv("DVC_ROOT", "/dev/null/nowhere")
    with start() as run:
        run.log({"loss": 1}, 1)
        run.artifact(ROOT / "params.yaml")
        assert run.mlflow_run_id(wait=60) is None
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("off", [False, True])
def test_a_model_that_cannot_be_kept_stops_no_stage(store, tmp_path, monkeypatch, caplog, off):
    monkeypatch.setenv("EBM_TRACKING", "0" if off else "1")
    weights, config = tmp_path / "w", tmp_path / "c"
    weights.touch()
    config.touch()
    write, full = Path.write_text, OSError(28, "No space")

    def write_text(path, *args, **options):
        if path.name == "example.json":
            raise full
        return write(path, *args, **options)

    with start() as run:
        monkeypatch.setattr(Path, "write_text", write_text)
        run.model(weights, config, {}, {"inputs": [[1.0]]})
    assert len(caplog.messages) == (0 if off else 1)
    assert off or not list(spool_of(run).files.iterdir())


def test_a_model_that_cannot_be_packed_for_want_of_room_is_packed_later(
    store, tmp_path, monkeypatch
):
    def full(*_):
        raise OSError(28, "No space left on device")

    with start() as run:
        log_model(run, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.mlflow_store.save_model", full)
        assert not deliver()
    assert deliver()
    assert spool_of(run).state().notes == []
    [model] = store.client.search_logged_models([store.experiment()])
    assert model.status == "READY"


def test_what_a_run_keeps_is_for_its_owner_alone(fresh_root, no_courier):
    """An address may hold a password."""
    with start() as run:
        pass
    paths = [spool_of(run).events.parent, spool_of(run).events]
    assert [path.stat().st_mode & 0o077 for path in paths] == [0, 0]


def test_a_stage_of_a_trial_continues_its_run_and_one_of_a_flow_names_it(store, monkeypatch):
    monkeypatch.setenv("EBM_RUN", "0" * 32)
    monkeypatch.setenv("EBM_FLOW_RUN_ID", "flow")
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "another")
    with start(key="1" * 32) as run:
        pass
    assert run.key == "0" * 32
    assert deliver()
    assert store.run().data.tags["prefect.flow_run_id"] == "flow"


def test_what_a_user_has_set_for_mlflow_counts(fresh_root, monkeypatch):
    monkeypatch.setattr(courier.signal, "signal", lambda *_: None)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES")
    (fresh_root / ".tracking").mkdir()
    assert courier.main([]) == 0
    names = "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    assert [os.environ[name] for name in names] == ["3", "0"]


def test_tracking_turned_off_writes_nothing(fresh_root, monkeypatch):
    monkeypatch.setenv("EBM_TRACKING", "0")
    with start() as run:
        run.log({"loss": 1}, 1)
        run.artifact(ROOT / "params.yaml")
        assert run.mlflow_run_id(wait=60) is None
    assert tracking.flush()
    assert list(fresh_root.iterdir()) == []


CPU, MEMORY = "system/cpu_utilization_percentage", "system/system_memory_usage_percentage"


@pytest.fixture
def watched(store, monkeypatch):
    """A store that is told how busy the machine is, in every round of delivery."""
    monkeypatch.setenv(courier.SYSTEM_METRICS, "true")
    monkeypatch.setattr(courier, "MEASURE", 0.0)
    return store


def test_a_run_knows_how_busy_the_machine_was_while_its_stage_lived(watched):
    run, carrier = start(), courier.Courier()
    for _ in range(3):
        assert carrier.round()
    abandon(run)
    assert carrier.round()
    assert [step for step, _ in watched.rows(CPU)] == [0, 1, 2]
    assert all(0 <= value <= 100 for name in (CPU, MEMORY) for _, value in watched.rows(name))
    again = start(key=run.key)
    assert carrier.round()
    again.close()
    assert carrier.round()
    assert [step for step, _ in watched.rows(CPU)] == [0, 1, 2, 3]


def test_a_stage_that_is_over_at_once_has_one_look_and_one_of_long_ago_none(watched, monkeypatch):
    for name, since in (("ago", 0.0), ("now", 60.0)):
        with start(name):
            pass
        monkeypatch.setattr(courier, "LINGER", since)
        assert deliver()
    looks = {run.info.run_name: watched.rows(MEMORY, run) for run in watched.runs()}
    assert {name: len(rows) for name, rows in looks.items()} == {"ago": 0, "now": 1}


def test_looks_at_the_machine_that_cannot_be_sent_are_lost_and_hold_nobody(watched, monkeypatch):
    from pipelines.mlflow_store import Store

    def broken(*_):
        raise OSError("gone")

    carrier = courier.Courier()
    with start() as run:
        with monkeypatch.context() as patch:
            patch.setattr(Store, "load", broken)
            assert carrier.round()
            run.log({"loss": 1}, 1)
            assert carrier.round()
        assert carrier.round()
    assert carrier.round()
    assert watched.rows("loss") == [(1, 1.0)]
    assert [step for step, _ in watched.rows(CPU)] == [0]
    assert watched.run().info.status == "FINISHED"


def test_nobody_looks_at_the_machine_who_is_told_not_to(watched, monkeypatch):
    monkeypatch.setenv(courier.SYSTEM_METRICS, "false")
    with start() as run:
        run.log({"loss": 1}, 1)
        assert deliver()
    assert deliver()
    assert list(watched.run().data.metrics) == ["loss"]


def test_a_row_costs_the_training_next_to_nothing(store, record_property):
    run = start()
    begin = time.perf_counter()
    for step in range(10_000):
        run.log({"energy_gap": step / 7, "score_norm": step / 3, "information": -1.0}, step)
    microseconds = (time.perf_counter() - begin) / 10_000 * 1e6
    record_property("microseconds", microseconds)
    run.close()
    assert microseconds < 200  # measured: 10 on an idle machine


def test_a_stage_imports_nothing_for_it():
    code = "import sys, pipelines.tracking; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    modules = set(result.stdout.split())
    assert "pipelines.tracking" in modules
    assert not modules & {"mlflow", "numpy", "torch", "safetensors", "yaml", "sqlalchemy"}


def test_two_that_come_for_a_new_database_make_one(tmp_path, monkeypatch, empty_database):
    """Two checkouts may share a store."""
    from pipelines import mlflow_store

    made = []

    class Slow:
        def __init__(self, uri):
            self.path = Path(uri.removeprefix("sqlite:///"))

        def search_experiments(self, **_):
            made.append(self.path)
            with closing(sqlite3.connect(self.path)) as database:
                database.execute("CREATE TABLE half (x)")
                time.sleep(0.3)
                database.execute("CREATE TABLE whole (x)")

    monkeypatch.setattr(mlflow_store, "MlflowClient", Slow)
    path = tmp_path / "mlflow.db"
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(mlflow_store.create_database, [path] * 3))
    assert len(made) == 1
    assert {one.name for one in tmp_path.iterdir()} == {"mlflow.db", "mlflow.db.lock"}
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT count(*) FROM sqlite_master").fetchone() == (2,)
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_password_is_not_shown(fresh_root, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@host:5000/path@x")
    assert public(tracking_uri()) == "https://host:5000/path@x"
    assert public(f"sqlite:///{fresh_root}/mlflow.db") == "sqlite:///mlflow.db"


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("--hlep", 2)])
def test_the_command_delivers_nothing_when_it_is_asked_for_something_else(store, argument, code):
    run = start()
    run.log_final({"modes": 1.0})
    command = [sys.executable, "-m", "pipelines.tracking", argument]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == code
    assert "usage: python -m pipelines.tracking" in ended.stdout + ended.stderr
    assert undelivered()
