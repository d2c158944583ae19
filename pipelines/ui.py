"""`make ui`: deliver what waits in `.tracking`, and open MLflow's pages of all runs.

Of a database (`mlflow.db`, or the one that MLFLOW_TRACKING_URI names) this process becomes
MLflow's server, on the loopback; a server has its own pages, of which the address is told.
"""

import argparse
import os
import sys
from typing import NoReturn

from pipelines import tracking
from pipelines.commands import guarded, positive, show
from pipelines.places import public, tracking_uri
from pipelines.serve import check_port

HOST = "127.0.0.1"
SETTINGS = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # of language models


def ui(port: int) -> bool:
    """Serve the pages until a signal comes, or tell where they are: whether all is delivered then.

    Raises:
        EBMError: the port is taken, or the database is none.
    """
    uri = tracking_uri()
    if not uri.startswith("http"):
        become_server(uri, port)
    show(f"the runs are at {public(uri)}")
    return tracking.flush()


def become_server(uri: str, port: int) -> NoReturn:
    """MLflow's, of the database at `uri`, when what waits is delivered or was told."""
    check_port(HOST, port)
    tracking.flush()
    from pipelines.mlflow_registry import plain_errors  # takes seconds
    from pipelines.mlflow_store import Store

    with plain_errors(uri):
        runs = f"experiments/{Store(uri).experiment}/runs"
    show(f"the runs are at http://{HOST}:{port}/#/{runs}?workflowType=machine_learning")
    command = [sys.executable, "-m", "mlflow", "ui", "--host", HOST, "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", uri]
    os.execve(sys.executable, command, {**os.environ, **SETTINGS})


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Open the tracked runs in MLflow.")
    parser.add_argument(
        "--port", type=positive, default=5000, help="its port (default: %(default)s)"
    )
    return guarded(lambda: ui(parser.parse_args().port), stages=True)


if __name__ == "__main__":
    sys.exit(main())
