"""The flow does what the runner does, shows it in Prefect, and obeys when Prefect cancels it."""

import os
import signal
import socket
import subprocess
import sys

import httpx
import pytest
from toy_house import built, wait_for

slow = pytest.mark.slow


@pytest.fixture
def house(tmp_path, tmp_path_factory):
    """A house in which both trainings, and what is downstream, are stale."""
    house = built(tmp_path_factory.getbasetemp())[0].copy(tmp_path / "house")
    params = (house.root / "params.yaml").read_text()
    house.write("params.yaml", params.replace("steps: 1", "steps: 2"))
    return house


@pytest.fixture(scope="session")
def prefect(tmp_path_factory):
    """A Prefect server on the loopback, as a client and the environment of those who use it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = tmp_path_factory.mktemp("prefect")
    environment = {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "true",
    }
    command = ["-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (
        (home / "server.log").open("w") as log,
        httpx.Client(base_url=environment["PREFECT_API_URL"], timeout=30) as client,
        subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **environment},
            stdout=log,
            stderr=log,
            start_new_session=True,
        ) as server,
    ):
        try:
            wait_for(lambda: healthy(client), 120)
            yield client, environment
        finally:
            os.killpg(server.pid, signal.SIGKILL)


def healthy(client):
    try:
        return client.get("/health").is_success
    except httpx.TransportError:
        return False


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


def test_what_is_up_to_date_ends_without_prefect(tmp_path_factory):
    """Without a server, and without the seconds that Prefect's import takes."""
    house, _ = built(tmp_path_factory.getbasetemp())
    assert house.run(module="flows", PYTHONPROFILEIMPORTTIME="1")[1].splitlines()[-1]
