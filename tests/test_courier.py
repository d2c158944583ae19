"""What couriers promise, with real processes: real kills, real servers, real locks."""

import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager, suppress
from urllib.request import urlopen

import pytest
from toy_house import free_port
from tracking_store import (
    MLFLOW_WARNS,
    Lookup,
    couriers,
    serving,
    start,
    undelivered,
    wait_until,
)

from pipelines import ROOT, courier, tracking
from pipelines.places import tracking_uri
from pipelines.spool import Spool

pytestmark = MLFLOW_WARNS

LEFT = courier.LINGER + 3  # seconds after which no courier may be left

STAGE = """
import sys
from pipelines.tracking import Run

run = Run.start(sys.argv[1], params={"seed": 1}, tags={}, dataset=None)
for step in range(int(sys.argv[2])):
    run.log({"loss": step}, step)
print(run.key, flush=True)
sys.stdin.read()
run.log({"loss": -1.0}, 10**6)
run.close()
"""


def stage(name="toy", rows=100):
    """A stage that logs, and then works until its input ends, in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", STAGE, name, str(rows)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def database(fresh_root, empty_database):
    """A root with a database, where real couriers deliver."""
    shutil.copy(empty_database, fresh_root / "mlflow.db")
    yield Lookup(f"sqlite:///{fresh_root}/mlflow.db")
    assert wait_until(lambda: not couriers(), LEFT)


@pytest.mark.parametrize(
    "begun", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["later", "at once"]
)
def test_kill_9_of_a_stage_loses_nothing_and_leaves_no_courier(database, begun):
    with stage(rows=5000) as process:
        spool = Spool(process.stdout.readline().strip())
        assert wait_until(lambda: not begun or spool.state().open, 60)
        process.kill()
    assert len(couriers()) == 1
    assert wait_until(lambda: not couriers(), 5 if begun else LEFT)
    assert tracking.flush()
    assert database.run().info.status == "KILLED"
    assert database.rows("loss") == [(step, step) for step in range(5000)]


def test_a_courier_goes_on_with_the_stages_that_outlive_its_own(database):
    """So MLflow is imported once, and not for every stage."""
    with stage("first") as first:
        spool = Spool(first.stdout.readline().strip())
        assert wait_until(lambda: spool.state().open, 60)
        [deliverer] = couriers()
        with stage("second") as second:
            second.stdout.readline()
            first.communicate()
            time.sleep(2 * courier.POLL)
            assert deliverer in couriers()
            second.communicate()
    assert wait_until(lambda: not couriers(), LEFT)
    assert undelivered() == []


@pytest.mark.parametrize("delivers", [False, True])
def test_to_open_a_store_takes_as_long_as_it_takes(fresh_root, monkeypatch, delivers):
    """On a busy machine MLflow's import alone takes longer than a courier may linger."""

    class Left(BaseException):
        pass

    def leave(code):
        raise Left

    flag, opening = threading.Event(), threading.Event()
    opening.set()
    if delivers:
        flag.set()
    monkeypatch.setattr(courier, "LINGER", 0.1)
    monkeypatch.setattr(courier, "OPENING", opening)
    monkeypatch.setattr(courier.os, "_exit", leave)
    threading.Timer(2.0, opening.clear).start()
    began = time.monotonic()
    with pytest.raises(Left):
        courier._leave_in_time(Spool("nobody"), flag)
    assert (time.monotonic() - began >= 2.0) == delivers


def test_a_courier_that_only_waits_does_not_outlive_its_stage(database, monkeypatch):
    """Or those of all stages would gather while a server is down."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    with stage("first") as first:
        spool = Spool(first.stdout.readline().strip())
        assert wait_until(lambda: spool.state().problem, 60)
        [deliverer] = couriers()
        with stage("second") as second:
            second.stdout.readline()
            assert len(couriers()) == 2
            second.communicate()
        assert wait_until(lambda: couriers() == [deliverer], LEFT)
        first.communicate()


def test_a_server_that_is_down_neither_stops_nor_slows_a_stage(database, monkeypatch):
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    with stage() as process:
        begin = time.monotonic()
        spool = Spool(process.stdout.readline().strip())
        assert time.monotonic() - begin < 2
        assert wait_until(lambda: spool.state().problem, 60)
        _, said = process.communicate()
    assert process.returncode == 0
    [line] = said.splitlines()
    assert f"127.0.0.1:{port} does not take what is logged" in line
    assert "Connection refused" in line
    assert wait_until(lambda: not couriers(), LEFT)
    with serving(port) as server:
        assert tracking.flush()
    assert server.rows == [(step, step) for step in range(100)] + [(10**6, -1)]


def test_what_was_meant_for_a_wrong_address_can_go_elsewhere(database, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
        patch.setattr(tracking, "_courier", lambda key: None)
        with start("mistyped") as run:
            run.log({"loss": 1.5}, 1)
    assert not tracking.flush()
    assert tracking.flush(to=tracking_uri())
    assert undelivered() == []
    assert database.run().info.run_name == "mistyped"
    assert database.rows("loss") == [(1, 1.5)]


def test_couriers_that_start_together_deliver_each_thing_once(server):
    for name in "abc":
        with start(name) as run:
            for step in range(3000):
                run.log({"loss": step}, step)
    command = [sys.executable, "-m", "pipelines.courier"]
    racers = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) for _ in range(3)]
    assert [racer.wait() for racer in racers] == [0, 0, 0]
    assert sorted(server.rows) == sorted([(step, step) for step in range(3000)] * 3)
    assert server.calls.count("runs/create") == 1  # the stand-in finds its one run for each key


def test_flush_has_nothing_to_do_in_no_time(fresh_root):
    begin = time.monotonic()
    assert tracking.flush()
    assert time.monotonic() - begin < 0.5
    assert list(fresh_root.iterdir()) == []


def test_flush_is_done_when_the_courier_of_a_stage_that_goes_on_has_delivered(
    database, monkeypatch
):
    """That one keeps the lock, and another run waits meanwhile."""
    with stage(rows=50) as process:
        spool = Spool(process.stdout.readline().strip())
        assert wait_until(lambda: spool.state().open, 60)
        with monkeypatch.context() as patch:
            patch.setattr(tracking, "_courier", lambda key: None)
            with start("other") as run:
                run.log({"loss": 1.5}, 1)
        begin = time.monotonic()
        assert tracking.flush()
        assert time.monotonic() - begin < 30
        assert undelivered() == []
        process.kill()


def test_flush_keeps_its_time_and_says_what_is_left(server, caplog):
    with start() as run:
        run.log({"loss": 1}, 1)
    server.mood = "silent"
    assert not tracking.flush(timeout=2)
    assert "not everything could be delivered" in caplog.text
    assert undelivered() == [run.key]
    assert couriers() == []


@pytest.mark.slow
def test_a_real_server_dies_in_the_middle_and_gets_everything_once(fresh_root, monkeypatch):
    """With kill -9, so also in the middle of a request."""
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with mlflow_server(port), stage(rows=20_000) as process:
        spool = Spool(process.stdout.readline().strip())
        assert wait_until(lambda: spool.state().offset > 100_000, 60)
    assert process.returncode == 0
    assert undelivered() == [spool.key]
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "_courier", lambda key: None)
        with start("toy", key=spool.key) as evaluation:
            evaluation.log_final({"nan": math.nan})
            evaluation.artifact(ROOT / "pyproject.toml", "files")
    with mlflow_server(port):
        assert tracking.flush()
        store = Lookup(uri)
        assert store.client.list_artifacts(store.run().info.run_id, "files")
        [(step, value)] = store.rows("nan")
        assert step == 10**6
        assert math.isnan(value)
        rows = [(step, step) for step in range(20_000)] + [(10**6, -1)]
        assert sorted(store.rows("loss")) == rows


@contextmanager
def mlflow_server(port):
    """A real server, which ends by kill -9."""
    options = ["--port", str(port), "--workers", "1", "--backend-store-uri", "sqlite:///server.db"]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *options],
        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        assert wait_until(lambda: answers(port), 120)
        yield
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answers(port):
    with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
        return reply.status == 200
    return False


@pytest.mark.slow
def test_a_server_that_never_answers_holds_nobody(database, monkeypatch):
    with serving() as server:
        server.mood = "silent"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        with stage() as process:
            process.communicate()
        assert wait_until(lambda: not couriers(), LEFT)
    assert len(undelivered()) == 1


def test_eight_processes_on_a_machine_without_a_database_all_log(fresh_root):
    stages = [stage(f"run-{i}") for i in range(8)]
    for process in stages:
        process.stdout.readline()
    assert wait_until(lambda: not undelivered(), 120)
    said = [process.communicate()[1] for process in stages]
    assert said == [""] * 8
    assert wait_until(lambda: not couriers(), LEFT)
    assert tracking.flush()
    store = Lookup(f"sqlite:///{fresh_root}/mlflow.db")
    runs = store.runs()
    assert sorted(run.info.run_name for run in runs) == [f"run-{i}" for i in range(8)]
    for run in runs:
        assert store.rows("loss", run) == [(s, s) for s in range(100)] + [(10**6, -1)]
    with closing(sqlite3.connect(fresh_root / "mlflow.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.slow
@pytest.mark.parametrize("moment", [0.3, 1.5, 3.0])
def test_killed_while_it_makes_the_database_a_courier_leaves_a_clean_slate(fresh_root, moment):
    with stage() as process:
        process.stdout.readline()
        assert wait_until(lambda: (fresh_root / "mlflow.db.draft").exists(), 60)
        time.sleep(moment)
        for pid in couriers():
            os.kill(pid, signal.SIGKILL)
        process.kill()
    assert tracking.flush()
    assert Lookup(f"sqlite:///{fresh_root}/mlflow.db").run().info.status == "KILLED"
    assert {path.name for path in fresh_root.glob("mlflow.db.*")} <= {"mlflow.db.lock"}
