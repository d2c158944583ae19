"""`python -m pipelines.worker tcp://host:8786`: let this clone work for flows with `--dask`.

It joins a Dask cluster, with one place for a stage. A stage runs as everywhere else, in a
supervised process: it does not outlive the worker, nor the flow that waits for it. The clone has
to stand at the commit of the flow's and to reach the same DVC remote. One worker a clone; a worker
that dies is replaced by its nanny.
"""

import argparse
import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import ROOT, run
from pipelines.dag import Stage
from pipelines.lockfile import Entry
from pipelines.polling import polling
from pipelines.supervise import Launcher

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Made:
    """What became of a stage: its entry in `dvc.lock`, whether DVC restored its outputs rather
    than run it, and who did."""

    entry: Entry
    restored: bool
    worker: str


def name() -> str:
    """This clone's: a cluster has one worker of that name."""
    return f"{socket.gethostname()}:{ROOT}"


def start_launcher(root: Path, flow_run: str) -> Launcher:
    """What starts the stages of a flow run on a cluster in a clone."""
    return run.start_launcher(root, "pipelines.reproduce:traveller", EBM_FLOW_RUN_ID=flow_run)


def reproduce(
    stage: Stage,
    launcher: Launcher,
    root: Path,
    show: Callable[[str], None],
    force: bool,
    job: dict[str, Any],
) -> Made:
    """Run a stage in a clone, as the `job` of `reproduce.travel` says.

    Raises:
        StageFailed: it failed, took too long or was cancelled.
    """
    show(f"on {name()}")
    log = run.log_path(stage, root)
    file = log.with_suffix(".json")
    file.write_text(json.dumps(job), encoding="utf-8")
    restored = run.reproduce(stage, launcher, log, show, force, str(file))
    answer = json.loads(file.read_text(encoding="utf-8"))
    return Made(answer["entry"], restored, name())


@contextlib.contextmanager
def ends_with_its_task(launcher: Launcher) -> Iterator[None]:
    """Within this context, end the stages when nobody waits any more for the Dask task that this
    thread works on: it was cancelled, or the process that had submitted it is gone."""
    from distributed import get_worker

    dask_worker = get_worker()
    task = dask_worker.state.tasks[dask_worker.get_current_task()]

    def look() -> None:
        if task.state == "cancelled":
            launcher.cancel()

    with polling(look, POLL_SECONDS):
        yield


def main() -> None:
    """The command line: that of `dask worker`, reduced to what makes sense here."""
    parser = argparse.ArgumentParser(description="Run stages of flows on a Dask cluster.")
    parser.add_argument("scheduler", help="its address, as tcp://host:8786")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address of this machine to listen at (loopback)"
    )
    options = parser.parse_args()
    os.chdir(ROOT)
    from distributed.cli.dask_worker import main as dask_worker

    dask_worker(
        [
            options.scheduler,
            *("--host", options.host),
            *("--name", name()),
            *("--nworkers", "1"),
            *("--nthreads", "1"),
            *("--memory-limit", "0"),  # what needs memory is a stage, another process
            *("--local-directory", str(ROOT / ".checkpoints" / "dask")),
            *("--preload", "pipelines.flows"),  # seconds of imports, before it takes on a stage
            "--no-dashboard",
        ]
    )


if __name__ == "__main__":
    main()
