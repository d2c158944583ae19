"""`mlflow models serve` with a registered model: a real server, many clients, bodies of all kinds.
What is answered to which request in detail: test_mlflow_model.py."""

import http.client
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from made_up_tables import made_up, settings
from test_courier import answers
from test_mlflow_model import column, log_model
from toy_house import free_port
from tracking_store import MLFLOW_WARNS, deliver, start, wait_until

from ebm import data
from pipelines.promote import promote

pytestmark = [
    pytest.mark.slow,
    MLFLOW_WARNS,
    pytest.mark.filterwarnings("ignore:Operation with range"),  # MLflow 3.17 with pandas 3.1
]

REQUESTS, CLIENTS = 1000, 50
HUGE = 50 * 2**20


class Client:
    """One connection, kept open; the server closes one where nothing happens for seconds."""

    def __init__(self, port):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.connection.close()

    def ask(self, body, content_type="application/json"):
        body = body if isinstance(body, str) else json.dumps(body)
        self.connection.request("POST", "/invocations", body, {"Content-Type": content_type})
        reply = self.connection.getresponse()
        content = reply.read().decode()
        return reply.status, json.loads(content)["predictions"] if reply.status == 200 else content


@contextmanager
def served(store):
    """The port where the champion is served, by MLflow's own command."""
    port = free_port()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # where it looks for uvicorn
    options = ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    command = ["models", "serve", "--model-uri", "models:/toy@champion", "--timeout", "300"]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", *command, *options],
        env=os.environ | {"MLFLOW_TRACKING_URI": store.client.tracking_uri, "PATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        assert wait_until(lambda: answers(port), 180)
        yield port
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def champion(variant, points, table, folder):
    """Log a model and promote it; itself, its transform, its threshold."""
    with start() as run:
        found = log_model(run, variant, points, table, folder)
        run.log_final({"modes": 1})
    assert deliver()
    promote("toy", "modes", "champion", None)
    return found


def test_a_thousand_requests_and_fifty_clients_get_the_energies_of_the_model(store, tmp_path):
    points = torch.randn(REQUESTS, 2)
    model, _, threshold = champion("meg", points, None, tmp_path)
    energies = model.energy(points).tolist()
    rows = points.double().tolist()

    def right(client, i):
        csv = i % 2, "text/csv"
        body = ("x,y\n{},{}\n".format(*rows[i]), csv[1]) if csv[0] else ({"inputs": [rows[i]]},)
        status, answer = client.ask(*body)
        [row] = answer
        flagged = row["anomaly"] == (row["energy"] >= threshold)
        return status == 200 and flagged and row["energy"] == pytest.approx(energies[i], rel=1e-5)

    def work(number):
        with Client(port) as client:
            return all(right(client, i) for i in range(number, REQUESTS, CLIENTS))

    def draw(number):
        with Client(port) as client:
            params = {"samples": 5, "seed": number % 2}
            return client.ask({"inputs": [[0, 0]], "params": params})

    with served(store) as port:
        with Client(port) as client:
            assert all(right(client, i) for i in range(REQUESTS))
        with ThreadPoolExecutor(CLIENTS) as pool:
            assert all(pool.map(work, range(CLIENTS)))
            drawn = list(pool.map(draw, range(CLIENTS)))
        assert drawn == drawn[:2] * (CLIENTS // 2)
        assert drawn[0] != drawn[1]
        assert {len(sample) for _, answer in drawn for sample in column(answer, "sample")} == {2}
        assert {(status, len(answer)) for status, answer in drawn} == {(200, 5)}
        refused = {
            "wrong columns": ({"inputs": [[1, 2, 3]]},),
            "NaN": ('{"inputs": [[NaN, 1]]}',),
            "text": ("x,y\n1,two\n", "text/csv"),
            "half": ('{"inputs": [[1',),
            "type": ("x", "text/plain"),
            "huge": ('{"inputs": [' + ",".join(["[0.25,0.5]"] * (HUGE // 11)) + "]}",),
            "huge and half": ('{"inputs": [' + "[0.25,0.5]," * (HUGE // 11),),
        }
        for name, body in refused.items():
            with Client(port) as client:
                status, reason = client.ask(*body)
            assert 400 <= status < 500, name
            assert reason
        with Client(port) as client:
            assert right(client, 0)


def test_rows_of_a_table_are_served_as_they_stand_in_its_file(store, tmp_path):
    made_up().to_csv(tmp_path / "mine.csv", index=False)
    table = data.prepare(settings(tmp_path / "mine.csv"))
    model, transform, _ = champion("meg", table.points("test"), table, tmp_path)
    energies = model.energy(transform.apply(made_up())).tolist()
    with served(store) as port, Client(port) as client:
        for body in (
            ({"dataframe_records": made_up().to_dict("records")},),
            ((tmp_path / "mine.csv").read_text(), "text/csv"),
        ):
            status, answer = client.ask(*body)
            assert status == 200
            assert column(answer) == pytest.approx(energies, rel=1e-4, abs=1e-6)
            assert set(column(answer, "anomaly")) == {True, False}
        status, reason = client.ask("amount,colour\n3,red\n,red\n", "text/csv")
        assert (status, "row 2, column 'amount' is empty" in reason) == (400, True)
        status, reason = client.ask({"dataframe_records": [{"colour": "red"}]})
        assert (status, "missing inputs ['amount']" in reason) == (400, True)
