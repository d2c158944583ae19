"""The pages of MLflow are those of this checkout's runs, under an address that is told."""

import os
import socket
import sqlite3
import sys
from contextlib import closing

import pytest
from toy_house import free_port
from tracking_store import MLFLOW_WARNS, Lookup, start

from pipelines import ui

pytestmark = MLFLOW_WARNS


class Replaced(BaseException):
    """This process would be MLflow's from here on."""


@pytest.fixture
def port():
    return free_port()


@pytest.fixture
def opened(monkeypatch, port):
    """Open the pages; the command that this process becomes."""

    def execve(path, command, environment):
        assert environment.keys() > ui.SETTINGS.keys()
        raise Replaced(command)

    monkeypatch.setattr(os, "execve", execve)

    def opened():
        with pytest.raises(Replaced) as end:
            ui.ui(port)
        return end.value.args[0]

    return opened


def test_before_the_first_run_there_is_a_whole_database(
    fresh_root, empty_database, opened, port, capsys
):
    command = opened()
    uri = f"sqlite:///{fresh_root}/mlflow.db"
    assert command[-1] == uri
    with closing(sqlite3.connect(fresh_root / "mlflow.db")) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    runs = f"experiments/{Lookup(uri).experiment()}/runs?workflowType=machine_learning"
    assert f"http://{ui.HOST}:{port}/#/{runs}" in capsys.readouterr().out


def test_what_waits_is_delivered_first(store, opened, monkeypatch):
    with start() as run:
        run.log({"loss": 1}, 1)
    opened()
    assert store.rows("loss") == [(1, 1.0)]


def test_a_server_has_pages_of_its_own(fresh_root, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@runs.example")
    assert ui.ui(5000)
    assert capsys.readouterr().out == "the runs are at https://runs.example\n"
    assert not (fresh_root / "mlflow.db").exists()


@pytest.mark.parametrize("problem", ["port", "database"])
def test_what_is_in_the_way_is_one_line(fresh_root, monkeypatch, capsys, port, problem):
    with socket.socket() as taken:
        if problem == "port":
            taken.bind((ui.HOST, port))
            taken.listen()
        else:
            (fresh_root / "mlflow.db").write_bytes(b"no database" * 99)
        monkeypatch.setattr(sys, "argv", ["ui", "--port", str(port)])
        assert ui.main() == 1
    [line] = capsys.readouterr().err.splitlines()
    told = {"port": f"error: {ui.HOST}, port {port}: ", "database": "error: sqlite:///mlflow.db: "}
    assert line.startswith(told[problem])
