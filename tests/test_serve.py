"""What prefect.yaml says is fit to be deployed, fires on a real server, and ends with it."""

import ast
import fcntl
import os
import signal
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import httpx
import psutil
import pytest
from ruamel.yaml import YAML
from test_flows import runs, table_of
from toy_house import alive, built, free_port, healthy, wait_for

from ebm import EBMError
from pipelines import dag, serve

# DVC's dependency pygtrie warns DVC.
pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")

ROOT = Path(__file__).resolve().parents[1]
DEPLOYED = YAML(typ="safe").load(ROOT / "prefect.yaml")
slow = pytest.mark.slow


@pytest.fixture
def house(tmp_path, tmp_path_factory):
    """A house in which both trainings are stale, to be rebuilt every few seconds."""
    house = built(tmp_path_factory.getbasetemp())[0].copy(tmp_path / "house")
    params = (house.root / "params.yaml").read_text()
    house.write("params.yaml", params.replace("steps: 1", "steps: 2"))
    often = 'interval: 5, anchor_date: "2026-01-01T00:00:00Z"'
    house.edit("prefect.yaml", 'cron: "0 2 * * *", timezone: UTC', often)
    return house


@pytest.fixture
def port():
    return free_port()


def signature(entrypoint):
    """The parameters of the function that an entrypoint names."""
    path, _, name = entrypoint.partition(":")
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return [argument.arg for argument in node.args.args + node.args.kwonlyargs]
    raise AssertionError(f"{path} has no function {name}")


@pytest.mark.parametrize("deployment", DEPLOYED["deployments"], ids=lambda d: d["name"])
def test_a_deployment_fits_the_flow_and_the_pool(deployment):
    assert deployment["parameters"].keys() <= set(signature(deployment["entrypoint"]))
    assert deployment["work_pool"] == {"name": serve.POOL}
    assert deployment["concurrency_limit"] == {"limit": 1, "collision_strategy": "ENQUEUE"}


def test_the_targets_of_deployments_are_in_the_graph():
    targets = [target for d in DEPLOYED["deployments"] for target in d["parameters"]["targets"]]
    names = {stage.name for stage in dag.plan(["dvc.yaml", *targets], ROOT).stages}
    assert {"report", "paper/dvc.yaml:report", "evaluate@rbm-digits"} <= names


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Prefect, as it is imported
def test_schedules_are_such_as_prefect_reads():
    from prefect.client.schemas.schedules import CronSchedule

    schedules = {d["name"]: d.get("schedules", []) for d in DEPLOYED["deployments"]}
    assert {name: len(found) for name, found in schedules.items()} == {
        "nightly": 1,
        "weekly-paper": 1,
        "experiment": 0,
    }
    for schedule in (one for found in schedules.values() for one in found):
        assert schedule.pop("slug")  # by which Prefect knows one that is switched off
        assert CronSchedule(**schedule).timezone == "UTC"


def test_no_path_of_a_machine_stands_in_the_file():
    (step,) = DEPLOYED["pull"]
    assert step["prefect.deployments.steps.set_working_directory"]["directory"] == "{{ $PWD }}"


def test_a_port_that_is_taken_is_told_in_one_line(house, port):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        told = f"error: 127.0.0.1, port {port}: Address already in use; --port takes another\n"
        assert house.run("--port", str(port), module="serve", PREFECT_API_URL="") == (1, told)


class Health(BaseHTTPRequestHandler):
    """Healthy to who asks for `/api/health`, with a page at `/page`; elsewhere it wants a
    password. It takes nothing."""

    ANSWERS: ClassVar = {"/api/health": (200, b"true"), "/page/health": (200, b"<html>")}

    def do_GET(self):
        status, body = self.ANSWERS.get(self.path, (401, b"true"))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_a_server_that_is_named_has_to_answer_and_none_here_is_asked_through_a_proxy(
    port, monkeypatch, tmp_path
):
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", "elsewhere")
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    serve.check_prefect()
    for url in (f"http://127.0.0.1:{port}/api", "nonsense", "http://127.0.0.1:42oo/api"):
        monkeypatch.setenv("PREFECT_API_URL", url)
        with pytest.raises(EBMError, match=f"PREFECT_API_URL = {url}: no server answers"):
            serve.check_prefect()
    with ThreadingHTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever).start()
        for path in ("api", "api/", "guarded"):
            url = f"http://127.0.0.1:{server.server_port}/{path}"
            monkeypatch.setenv("PREFECT_API_URL", url)
            serve.check_prefect()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("PREFECT_API_URL", f"{url}/page")
        with pytest.raises(EBMError, match=f"PREFECT_API_URL = {url}/page: no server answers"):
            serve.check_prefect()
        with pytest.raises(EBMError, match=f"^{url}/api: .*501"):
            serve.end_dead_runs(f"{url}/api")
        server.shutdown()
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "elsewhere,127.0.0.1,localhost,::1"
    monkeypatch.setenv("no_proxy", "*")
    serve.without_proxy()
    assert os.environ["no_proxy"] == "*"


def test_a_flow_without_a_place_for_its_server_is_one_line(monkeypatch, tmp_path):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.setattr(serve.os, "access", lambda path, mode: False)
    with pytest.raises(EBMError, match="may not be written"):
        serve.check_prefect()


def test_a_checkout_is_served_once(house, port):
    (house.root / ".prefect").mkdir()
    with (house.root / ".prefect" / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        told = "error: this checkout is served already; end that one first\n"
        assert house.run("--port", str(port), module="serve") == (1, told)


def test_it_listens_on_the_loopback_and_warns_whom_it_tells_otherwise(port, capsys):
    serve.check_port("127.0.0.1", port)
    assert capsys.readouterr().out == ""
    serve.check_port("0.0.0.0", port)
    assert capsys.readouterr().out.startswith(f"warning: who reaches port {port}")
    with pytest.raises(EBMError, match=r"^--port 65536: no port"):
        serve.check_port("127.0.0.1", 65536)
    with pytest.raises(EBMError, match=r"^no\.such\.host\.invalid, port 1: .*--port"):
        serve.check_port("no.such.host.invalid", 1)


@pytest.fixture
def started(house, port):
    """Starts `serve`; gives its process and a client of its server, when that answers."""
    environment = {"PREFECT_API_URL": "", "PREFECT_HOME": str(house.root / ".prefect")}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}/api", timeout=30) as client:

        def start():
            process = house.start("--port", str(port), module="serve", **environment)
            return process, client

        yield start


def of_schedule(client):
    """(state, message) of the flow runs that have begun, oldest first."""
    begun = [run for run in runs(client) if run["start_time"]]
    return [(run["state_type"], run["state"]["message"] or "") for run in begun]


def completed(client):
    return [message for state, message in of_schedule(client) if state == "COMPLETED"]


@slow
def test_a_schedule_fires_runs_what_is_stale_and_then_skips_what_is_cached(house, started):
    starting, client = started()
    with starting as process:
        wait_for(lambda: healthy(client), 120)
        first, second, *_ = wait_for(lambda: len(m := completed(client)) >= 2 and m, 180)
        assert first.startswith("5 done, 0 failed, 0 skipped in ")
        assert second == "nothing to do: every stage is up to date"
        assert sorted(house.ran()) == ["evaluate@a", "evaluate@b", "report", "train@a", "train@b"]
        begun = [run for run in runs(client) if run["state_type"] == "COMPLETED"][:2]
        assert [{row["outcome"] for row in table_of(client, run)} for run in begun] == [
            {"ran", "up to date"},
            {"up to date"},
        ]
        everything = [one.pid for one in psutil.Process(process.pid).children(True)]
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"Prefect is at {str(client.base_url).removesuffix('/api/')}" in output
    assert "Traceback" not in output
    wait_for(lambda: not any(map(alive, everything)), 15)
    assert house.status() == {}


@slow
def test_what_is_killed_leaves_no_process_and_does_not_keep_the_next_one_waiting(house, started):
    house.tell("train@a", seconds=600, child=True)
    starting, client = started()
    with starting as process:
        wait_for(lambda: healthy(client), 120)
        wait_for(lambda: house.events("child"), 180)
        everything = [one.pid for one in psutil.Process(process.pid).children(True)]
        process.kill()
        process.communicate(timeout=60)
    pids = [*everything, *(pid for *_, pid in house.events())]
    wait_for(lambda: not any(map(alive, pids)), 40)
    house.tell("train@a")
    starting, client = started()
    with starting as process:
        wait_for(lambda: healthy(client), 120)
        wait_for(lambda: completed(client), 180)
        assert of_schedule(client)[0][0] == "CRASHED"
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 143
    assert house.status() == {}
