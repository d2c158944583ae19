"""The flow does what the runner does, shows it in Prefect, and obeys when Prefect cancels it."""

import json
import os
import signal
import subprocess
import sys

import psutil
import pytest
from toy_house import alive, built, wait_for

from pipelines import ROOT
from pipelines.run import NOTHING_TO_DO

slow = pytest.mark.slow


@pytest.fixture
def house(tmp_path, tmp_path_factory):
    """A house in which both trainings, and what is downstream, are stale."""
    house = built(tmp_path_factory.getbasetemp())[0].copy(tmp_path / "house")
    params = (house.root / "params.yaml").read_text()
    house.write("params.yaml", params.replace("steps: 1", "steps: 2"))
    return house


def runs(client, kind="flow_runs", **filters):
    """All runs of a kind, in the order in which they were created."""
    answer = client.post(f"/{kind}/filter", json=filters)
    answer.raise_for_status()
    return sorted(answer.json(), key=lambda run: run["created"])


def newest_with_tasks(client):
    """The newest flow run and, by name, its task runs."""
    flow_run = runs(client)[-1]
    tasks = runs(client, "task_runs", flow_runs={"id": {"any_": [flow_run["id"]]}})
    return flow_run, {task["name"]: task for task in tasks}


def states_of_tasks(client):
    return {name: task["state_name"] for name, task in newest_with_tasks(client)[1].items()}


def logged(client, flow_run):
    """The log lines that Prefect has of a flow run, by the task run that wrote them."""
    query = {"flow_run_id": {"any_": [flow_run["id"]]}}
    return [(log["task_run_id"], log["message"]) for log in runs(client, "logs", logs=query)]


def table_of(client, flow_run):
    """The rows of the table of stages that a flow run has left."""
    (table,) = runs(client, "artifacts", artifacts={"flow_run_id": {"any_": [flow_run["id"]]}})
    assert table["key"] == "stages"
    return json.loads(table["data"])


def test_what_is_up_to_date_ends_without_prefect(tmp_path_factory):
    """Without a server, and without the seconds that Prefect's import takes."""
    house, _ = built(tmp_path_factory.getbasetemp())
    code, output = house.run(module="flows", PYTHONPROFILEIMPORTTIME="1")
    assert code == 0
    assert NOTHING_TO_DO in output.splitlines()
    assert "prefect" not in output


REFUSED = """
from types import SimpleNamespace
from pipelines import dag, flows, run

def refuse(*args, **kwargs):
    raise RuntimeError("503")

flows.create_table_artifact = refuse
flows.get_run_logger = lambda: SimpleNamespace(warning=lambda text, *of: print(text % of))
dag.plan_when_free = lambda *args, **kwargs: dag.Plan(())
run.keep_timeline = lambda *args: None
print(flows.pipeline.fn().type.value)
"""


def test_a_rebuild_whose_tables_prefect_refuses_has_not_failed():
    """In a process of its own: Prefect reads its settings when it is imported."""
    result = subprocess.run(
        [sys.executable, "-c", REFUSED], capture_output=True, text=True, cwd=ROOT, check=True
    )
    told = "tables and figures are not in Prefect: 503"
    assert result.stdout.splitlines() == [told, "COMPLETED"], result.stderr


@slow
def test_every_stale_stage_is_a_task_linked_to_those_upstream(house, prefect):
    client, environment = prefect
    house.edit("dvc.yaml", "retries: 0", "retries: 1")
    house.tell("train@a", failures=1, prints="its loss is 0.5")
    code, output = house.run("-j2", module="flows", **environment)
    assert code == 0, output
    assert sorted(house.ran()) == ["evaluate@a", "evaluate@b", "report", "train@a", "train@b"]
    wait_for(lambda: set(states_of_tasks(client).values()) == {"Completed"}, 10)
    flow_run, tasks = newest_with_tasks(client)
    assert flow_run["state"]["message"].startswith("5 done, 0 failed, 0 skipped in ")
    assert {name: task["run_count"] for name, task in tasks.items()} == {
        "train@a": 2,
        "train@b": 1,
        "evaluate@a": 1,
        "evaluate@b": 1,
        "report": 1,
    }
    (source,) = tasks["evaluate@a"]["task_inputs"]["wait_for"]
    assert source["id"] == tasks["train@a"]["id"]
    assert (tasks["train@a"]["id"], "its loss is 0.5") in logged(client, flow_run)
    outcomes = {row["stage"]: row["outcome"] for row in table_of(client, flow_run)}
    assert outcomes == {"prepare": "up to date", **dict.fromkeys(tasks, "ran")}
    assert house.status() == {}


@slow
def test_what_dvc_restores_is_cached_for_prefect_too(house, prefect):
    client, environment = prefect
    house.tell("train@a", failures=100)  # it would fail if it ran
    house.edit("params.yaml", "a:\n    train: {steps: 2}", "a:\n    train: {steps: 1}")
    (house.root / "out" / "train@a").unlink()
    code, output = house.run("train@a", module="flows", **environment)
    assert code == 0, output
    wait_for(lambda: states_of_tasks(client) == {"train@a": "Cached"}, 10)
    flow_run, _ = newest_with_tasks(client)
    outcomes = {row["stage"]: row["outcome"] for row in table_of(client, flow_run)}
    assert outcomes == {"prepare": "up to date", "train@a": "restored from the cache"}


@slow
def test_a_failed_stage_fails_the_flow_and_skips_what_depends_on_it(house, prefect):
    client, environment = prefect
    house.tell("train@a", failures=1)
    code, output = house.run("-j2", module="flows", **environment)
    assert code == 1
    assert "    ValueError: the dog ate it" in output.splitlines()
    flow_run, _ = newest_with_tasks(client)
    assert flow_run["state_type"] == "FAILED"
    expected = {
        "train@a": "Failed",
        "train@b": "Completed",
        "evaluate@a": "Skipped",
        "evaluate@b": "Completed",
        "report": "Skipped",
    }
    wait_for(lambda: states_of_tasks(client) == expected, 10)  # Prefect learns of them later


@slow
@pytest.mark.parametrize("stubborn", [False, True])
def test_cancelling_a_flow_run_in_prefect_ends_its_processes(house, prefect, stubborn):
    """As the interface does. No worker watches over a flow that was started by hand."""
    client, environment = prefect
    for name in ("train@a", "train@b"):
        house.tell(name, seconds=600, child=True, stubborn=stubborn)
    with house.start("-j2", module="flows", **environment) as flow:
        wait_for(lambda: len(house.events("start")) == 2, 60)
        flow_run, _ = newest_with_tasks(client)
        state = {"state": {"type": "CANCELLING"}}
        client.post(f"/flow_runs/{flow_run['id']}/set_state", json=state).raise_for_status()
        wait_for(lambda: not any(alive(pid) for *_, pid in house.events()), 15)
        output, _ = flow.communicate(timeout=15)
    assert flow.returncode == 1, output
    assert newest_with_tasks(client)[0]["state_type"] == "CANCELLED"
    for name in ("train@a", "train@b"):
        house.tell(name)
    code, output = house.run(module="run")
    assert code == 0, output


@slow
@pytest.mark.parametrize(
    ("ends", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_a_flow_that_is_ended_leaves_nothing(house, prefect, ends, code):
    _, environment = prefect
    house.tell("train@a", seconds=600, child=True)
    with house.start("-j2", module="flows", **environment) as flow:
        wait_for(lambda: house.events("start"), 60)
        everything = [process.pid for process in psutil.Process(flow.pid).children(True)]
        flow.send_signal(ends)
        flow.communicate(timeout=15)
    assert flow.returncode == code
    pids = [*everything, *(pid for *_, pid in house.events())]
    wait_for(lambda: not any(map(alive, pids)), 15)


@slow
@pytest.mark.parametrize(("ends", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_who_ends_a_flow_in_a_terminal_does_not_end_its_server_first(house, tmp_path, ends, code):
    """Ctrl-C goes to all processes in the foreground, and the flow has still to say how it
    ended."""
    house.tell("train@a", seconds=600, child=True)
    environment = {"PREFECT_HOME": str(tmp_path / "prefect"), "PREFECT_API_URL": ""}
    with house.start("-j2", module="flows", **environment) as flow:
        wait_for(lambda: house.events("start"), 180)
        everything = [process.pid for process in psutil.Process(flow.pid).children(True)]
        os.killpg(flow.pid, ends)
        flow.communicate(timeout=45)
    assert flow.returncode == code
    wait_for(lambda: not any(map(alive, everything)), 15)


@slow
def test_cancelling_a_deployed_flow_ends_its_processes(house, prefect):
    """Here Prefect's runner ends the flow's process: it has to pass that on."""
    client, environment = prefect
    house.tell("train@a", seconds=600, child=True)
    serve = "from pipelines.flows import pipeline; pipeline.serve('test')"
    with subprocess.Popen(
        [sys.executable, "-c", serve],
        cwd=house.root,
        env={**os.environ, **environment},
        start_new_session=True,
    ) as server:
        try:
            wait_for(lambda: client.get("/deployments/name/ebm/test").is_success, 60)
            deployment = client.get("/deployments/name/ebm/test").json()["id"]
            answer = client.post(f"/deployments/{deployment}/create_flow_run", json={})
            flow_run = f"/flow_runs/{answer.json()['id']}"
            wait_for(lambda: house.events("start"), 90)
            state = {"state": {"type": "CANCELLING"}}
            client.post(f"{flow_run}/set_state", json=state).raise_for_status()
            wait_for(lambda: not any(alive(pid) for *_, pid in house.events()), 15)
            wait_for(lambda: client.get(flow_run).json()["state_type"] == "CANCELLED", 60)
        finally:
            os.killpg(server.pid, signal.SIGKILL)


@slow
def test_a_flow_without_a_server_starts_its_own_and_ends_it(house, tmp_path):
    environment = {"PREFECT_HOME": str(tmp_path / "prefect")}
    code, output = house.run("-j2", module="flows", **environment)
    assert code == 0, output
    assert house.status() == {}
