"""What the tests of tracking share: a look into a store, processes, a server that can fail."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipelines import tracking
from pipelines.courier import Courier
from pipelines.places import main_checkout
from pipelines.spool import Spool

MLFLOW_WARNS = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy"  # MLflow 3.17 with SQLAlchemy 2.1
)


class Lookup:
    """What a store holds, as its users see it."""

    def __init__(self, uri):
        from mlflow import MlflowClient

        self.client = MlflowClient(uri)

    def runs(self):
        return self.client.search_runs([self.experiment()], order_by=["attributes.start_time"])

    def run(self):
        [run] = self.runs()
        return run

    def experiment(self):
        return self.client.get_experiment_by_name("ebm").experiment_id

    def rows(self, name, run=None):
        """The (step, value) that a run has of one metric, in MLflow's order."""
        history = self.client.get_metric_history((run or self.run()).info.run_id, name)
        return [(metric.step, metric.value) for metric in history]


def start(experiment="toy", **changes):
    """A run with the arguments that a test does not care about."""
    return tracking.Run.start(experiment, **{"params": {}, "tags": {}, "dataset": None, **changes})


def deliver():
    """What a courier does in one round; whether nothing is left."""
    return Courier().round()


def abandon(run):
    """Leave a run as a killed process does: without a word, and without its lock."""
    run._release()


def couriers():
    """The process ids of this root's living couriers."""
    return [int(folder.name) for folder in Path("/proc").glob("[0-9]*") if _is_courier(folder)]


def _is_courier(folder):
    try:
        command = (folder / "cmdline").read_bytes()
        environment = (folder / "environ").read_bytes()
    except OSError:
        return False
    return (
        b"pipelines.courier" in command and f"DVC_ROOT={main_checkout()}\0".encode() in environment
    )


def wait_until(condition, seconds):
    """Whether `condition` came true in time."""
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return met


def undelivered():
    return [spool.key for spool in Spool.all() if spool.pending()]


class Server(ThreadingHTTPServer):
    """As much of MLflow's HTTP interface as a courier uses, with failures on command.

    `mood`: "well"; "silent" accepts and never answers; "lost" answers as a proxy without a server
    does; "broken" as a server that fails.
    """

    daemon_threads = True

    def __init__(self, port=0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.mood = "well"
        self.runs, self.rows, self.calls = [], [], []

    @property
    def uri(self):
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({})

    def do_POST(self):
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}"))

    do_PATCH = do_POST

    def answer(self, body):
        server, call = self.server, self.path.partition("?")[0].rpartition("mlflow/")[2]
        server.calls.append(call)
        match server.mood:
            case "silent":
                time.sleep(3600)
            case "lost":
                self.send(404, b"<html>no such page</html>")
            case "broken":
                self.send(500, b'{"error_code": "INTERNAL_ERROR", "message": "out of order"}')
            case _:
                self.send(200, json.dumps(_reply(server, call, body)).encode())

    def send(self, status, content):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


def _reply(server, call, body):
    match call:
        case "experiments/get-by-name":
            return {"experiment": {"experiment_id": "1", "name": "ebm"}}
        case "runs/create":
            info = {"run_id": "f" * 32, "experiment_id": "1", "status": "RUNNING"}
            server.runs.append({"info": info, "data": {"tags": body["tags"]}})
            return {"run": server.runs[-1]}
        case "runs/search":
            return {"runs": server.runs}
        case "runs/log-batch":
            server.rows += [(row["step"], row["value"]) for row in body.get("metrics", ())]
    return {}


@contextmanager
def serving(port=0):
    server = Server(port)
    thread = threading.Thread(target=server.serve_forever, args=[0.05])
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
