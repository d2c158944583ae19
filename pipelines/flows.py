"""`python -m pipelines.flows -j 4`: what `pipelines.run` does as a Prefect flow, one task a stage.

The plan is DVC's and the scheduler is the runner's. Prefect shows, logs, retries and cancels, and
starts the flow on a schedule. If no server runs, it starts one for the time of the flow. Only this
module and `sweep_flow` import Prefect.

With `--dask tcp://host:8786`, stages run in the clones of a Dask cluster's workers
(`pipelines.worker`). What they make goes through DVC's remote, and what has to be known of it here
into `dvc.lock`, so that it is as if they had run here and nothing but their outputs was missing.
"""
# ruff: noqa: E402 (the command line stands above an import that takes seconds)

import concurrent.futures
import contextlib
import contextvars
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import UUID

from pipelines import ROOT, EBMError, dag, gpu, lockfile, reproduce, run, serve, timeline, worker
from pipelines.commands import cores
from pipelines.dag import Stage
from pipelines.polling import end_with_parent, polling
from pipelines.run import StageFailed
from pipelines.supervise import Cancelled, Launcher
from pipelines.timeline import Rebuild, Result
from pipelines.worker import Made

RESTORED = "Cached"  # Prefect's own name for the state of a task that did not have to run
BY = "python -m pipelines.flows"
POLL_SECONDS = 2.0
SETTINGS = {
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",  # a busy machine needs over 20
}


def main() -> int:
    """The command line: that of the runner. Prefect is imported only if there is work to do."""
    grammar = run.parser()
    grammar.add_argument(
        "--dask", metavar="ADDRESS", help="run stages on this cluster, as tcp://host:8786"
    )

    def execute(targets: Sequence[str], force: bool, dask: str | None, **options: Any) -> bool:
        started = time.time()
        plan = dag.plan_when_free(targets, made_elsewhere=bool(dask))
        if not force and not plan.stale:
            return run.nothing_to_do(BY, targets, plan, started)
        if dask:
            reproduce.commit()  # or one line that says why not
        serve.check_prefect()
        from pipelines import flows  # this module, by the name under which Prefect finds the flow

        state = flows.pipeline(
            targets=targets, force=force, dask=dask, **options, return_state=True
        )
        return state.is_completed()

    return run.main(execute, grammar)


if __name__ == "__main__":
    sys.exit(main())

for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)

import httpx
from prefect import Task, flow, get_client, get_run_logger, runtime, states
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas import State
from prefect.server.api import server as prefects
from prefect.settings import PREFECT_API_URL

from pipelines import summary

# A temporary server in a session of its own: Ctrl-C in a terminal is for the flow, which has still
# to tell it how it ended.
apart = ModuleType("subprocess")
vars(apart).update(vars(subprocess), Popen=partial(subprocess.Popen, start_new_session=True))
prefects.subprocess = apart


@flow(name="ebm", persist_result=False)
def pipeline(
    targets: Sequence[str] = (),
    jobs: int | None = None,
    force: bool = False,
    keep_going: bool = True,
    dask: str | None = None,
) -> State:
    """Run what is stale of `dvc.yaml`, one task for each stage.

    Args:
        targets: What to rebuild, with all it needs: stages (`evaluate@rbm-digits`), groups
            (`train`), patterns (`*@meg-*`), a graph (`paper/dvc.yaml`). Empty: all of `dvc.yaml`.
        jobs: How many stages may run at once. None: one for each core, or one for each worker.
        force: Run the stages even if nothing that they depend on has changed.
        keep_going: After a failure, go on with what does not depend on the failed stage.
        dask: The address of a Dask scheduler (`tcp://host:8786`) on whose workers the stages run.
    """
    end_with_worker()
    started = time.time()
    plan = dag.plan_when_free(targets, made_elsewhere=bool(dask))
    stages = plan.stages if force else plan.stale
    flow_run, results, cancelled = runtime.flow_run.id, list[Result](), False
    if stages:
        try:
            with (
                ThreadPoolExecutor(len(stages)) as pool,
                started_tasks(dask, ROOT, force, flow_run) as tasks,
                watched(UUID(flow_run), tasks),
            ):
                places, cards = jobs or tasks.places, tasks.cards
                for result in run.schedule(stages, tasks.run, pool, places, keep_going, cards):
                    results.append(result)
                    if result.outcome == "skipped":
                        tasks.mark_skipped(result)
                cancelled = tasks.cancelled
        except EBMError as error:  # no cluster to run them on
            return states.Failed(message=str(error))
    by = f"Prefect flow run {runtime.flow_run.name}"
    last = timeline.rebuild(by, targets, plan, results, started)
    run.keep_timeline(last, ROOT)
    try:
        publish(last)
    except Exception as error:  # of the server; the rebuild is what it is
        get_run_logger().warning("tables and figures are not in Prefect: %s", error)
    return conclude(results, last.seconds, cancelled)


def end_with_worker() -> None:
    """End with the worker that started this flow run, if one did. It gave us a session of our own:
    no signal to its own reaches us, and Prefect would ask a server that is gone for its consent,
    for minutes."""
    if runtime.deployment.id:
        end_with_parent(POLL_SECONDS)


def publish(last: Rebuild) -> None:
    """Leave in Prefect what the stages did, what was measured and drawn, and where MLflow has
    it."""
    create_table_artifact(
        summary.stages(last), key="stages", description="What became of each stage of the plan."
    )
    found = summary.experiments(last, ROOT)
    if not found:
        return
    create_table_artifact(
        summary.table(found),
        key="results",
        description="The experiments of the plan: their headline numbers on the test split. The "
        "report, `reports/index.html`, has all of them.",
    )
    create_markdown_artifact(
        summary.figures(found),
        key="figures",
        description="The figures of what was rebuilt, one of each experiment that was up to date.",
    )
    for experiment in found:
        if experiment.ran and experiment.address:
            create_link_artifact(
                experiment.address,
                f"{experiment.title} in MLflow",
                key=f"mlflow-{experiment.key}",
                description="The training: curves, parameters, figures, the model.",
            )


def conclude(results: Sequence[Result], seconds: float, cancelled: bool) -> State:
    """Log what failed; the state of the flow run."""
    if failures := run.failures(results):
        get_run_logger().error(failures)
    message = run.tally(results, seconds) if results else run.NOTHING_TO_DO
    if cancelled:
        return states.Cancelled(message=message)
    if any(result.outcome != "done" for result in results):
        return states.Failed(message=message)
    return states.Completed(message=message)


@contextlib.contextmanager
def started_tasks(dask: str | None, root: Path, force: bool, flow_run: str) -> "Iterator[Tasks]":
    """What runs stages as tasks, here or on a cluster, and ends them when the context is left."""
    if not dask:
        with run.start_launcher(root, EBM_FLOW_RUN_ID=flow_run) as launcher:
            yield Tasks(launcher, root, force)
        return
    commit = reproduce.commit(root)
    if not PREFECT_API_URL.value():
        raise EBMError("PREFECT_API_URL is not set: workers need the address of a Prefect server")
    with (
        connected(dask) as (cluster, threads),
        worker.start_launcher(root, flow_run) as launcher,
    ):
        tasks = TasksElsewhere(launcher, root, force, cluster, threads, commit)
        try:
            yield tasks
        finally:
            tasks.cancel()


@contextlib.contextmanager
def connected(dask: str) -> Iterator[tuple[Any, int]]:
    """Prefect's task runner for a Dask cluster, and how many threads its workers have.

    Raises:
        EBMError: there is no scheduler at that address, or it has no worker.
    """
    from prefect_dask import DaskTaskRunner

    with DaskTaskRunner(address=dask) as cluster:
        try:
            threads = sum(cluster.client.nthreads().values())
        except (OSError, ValueError) as error:
            raise EBMError(f"no Dask scheduler at {dask}: {error}") from error
        if not threads:
            raise EBMError(f"no worker at {dask}; in a clone: python -m pipelines.worker {dask}")
        yield cluster, threads


class Tasks:
    """The tasks of a flow run, each linked to those of its upstream stages.

    `places` is how many of them may run at once if nobody says it, `cards` how many of those that
    use a GPU (0: as many as there are places).
    """

    def __init__(self, launcher: Launcher, root: Path, force: bool) -> None:
        self.places, self.cards = cores(), gpu.count()
        self._launcher, self._root, self._force = launcher, root, force
        self._context = contextvars.copy_context()  # Prefect's; other threads do not have it
        self._states: dict[str, State] = {}

    @property
    def cancelled(self) -> bool:
        return self._launcher.cancelled

    def cancel(self) -> None:
        """Have every stage ended and start no other. Returns at once."""
        self._launcher.cancel()

    def run(self, stage: Stage) -> Result:
        """Run a stage as a task, in this thread."""
        begun = run.begin(stage)
        upstream = [self._states[name] for name in stage.upstream if name in self._states]
        state = self._context.copy().run(self._final_state, stage, upstream)
        self._states[stage.name] = state
        if state.is_completed():
            return begun("done", **self._about(state))
        failure = state.result(raise_on_failure=False)
        if isinstance(failure, StageFailed):
            return begun("failed", reason=str(failure), lines=failure.lines)
        return begun("failed", reason=state.message or "not done")

    def _final_state(self, stage: Stage, upstream: Sequence[State]) -> State:
        task = new_task(
            stage.name,
            lambda: self._reproduce(stage),
            retries=stage.retries,
            retry_condition_fn=lambda *_: not self._launcher.cancelled,
        )
        return task(return_state=True, wait_for=upstream)

    def _reproduce(self, stage: Stage) -> Any:
        return _unless_cancelled(self._launcher, lambda: self._work(stage))

    def _work(self, stage: Stage) -> Any:
        log, show = run.log_path(stage, self._root), get_run_logger().info
        restored = run.reproduce(stage, self._launcher, log, show, self._force)
        message = "DVC had its outputs"
        return states.Completed(name=RESTORED, message=message) if restored else None

    def _about(self, state: State) -> dict[str, Any]:
        """What the final state of a task tells of how it was done."""
        return {"restored": state.name == RESTORED}

    def mark_skipped(self, result: Result) -> None:
        """Have a task for a stage that will not run, whose state says why."""

        def body() -> State:
            return states.Cancelled(name="Skipped", message=result.reason)

        new_task(result.stage, body)(return_state=True)


class TasksElsewhere(Tasks):
    """Tasks whose stages run on a cluster. What DVC's remote cannot carry is made here.

    The entry of each stage is in `dvc.lock` as soon as it is done: a flow that fails or dies keeps
    it. If a worker dies, Dask gives its stage to another one, or to the one that comes after it.
    """

    def __init__(
        self,
        launcher: Launcher,
        root: Path,
        force: bool,
        cluster: Any,
        threads: int,
        commit: str,
    ) -> None:
        super().__init__(launcher, root, force)
        self.places, self.cards = threads, 0  # each worker has its own
        self._cluster, self._commit = cluster, commit
        self._futures: list[Any] = []
        self._lock = threading.Lock()

    def cancel(self) -> None:
        super().cancel()
        with self._lock:
            for future in self._futures:
                if not future.done():
                    future.cancel()

    def _final_state(self, stage: Stage, upstream: Sequence[State]) -> State:
        if not stage.portable:
            return super()._final_state(stage, upstream)
        try:
            state = self._submit(stage, upstream).result()
            if state.is_completed():
                with self._lock:
                    lockfile.record(stage.name, state.result().entry, self._root)
        except (concurrent.futures.CancelledError, Cancelled):
            return states.Cancelled(message="cancelled with its flow run")
        except Exception as error:  # whatever Dask raises when it gives up, or DVC's one line
            return states.Failed(message=" ".join(str(error).split()))
        return state

    def _about(self, state: State) -> dict[str, Any]:
        made = state.result()
        return {"restored": made.restored, "worker": made.worker}

    def _submit(self, stage: Stage, upstream: Sequence[State]) -> Any:
        """Dask's future of the final state of a stage's task."""
        entries = lockfile.entries([stage.name, *stage.upstream], self._root)
        task = new_task(stage.name, elsewhere, retries=stage.retries)
        job = {"force": self._force, "commit": self._commit, "entries": entries}
        with self._lock:
            if self.cancelled:
                raise Cancelled
            future = self._cluster.submit(task, {"stage": stage, **job}, wait_for=upstream)
            self._futures.append(future.wrapped_future)
        return future.wrapped_future

    def _work(self, stage: Stage) -> Any:
        show, job = get_run_logger().info, {"commit": self._commit, "entries": None}
        return worker.reproduce(stage, self._launcher, self._root, show, self._force, job)


def elsewhere(stage: Stage, force: bool, commit: str, entries: dict[str, Any]) -> Made | State:
    """The body of a stage's task on a worker. Found by its name there, and on the scheduler."""
    show, job = get_run_logger().info, {"commit": commit, "entries": entries}
    with (
        worker.start_launcher(ROOT, runtime.flow_run.id) as launcher,
        worker.ends_with_its_task(launcher),
    ):
        return _unless_cancelled(
            launcher, lambda: worker.reproduce(stage, launcher, ROOT, show, force, job)
        )


def _unless_cancelled(launcher: Launcher, work: Callable[[], Any]) -> Any:
    """What `work` returns; a state if it was cancelled, which is no failure of the stage."""
    try:
        return work()
    except (StageFailed, Cancelled):
        if not launcher.cancelled:
            raise
        return states.Cancelled(message="cancelled with its flow run")


def new_task(name: str, body: Callable[..., Any], **options: Any) -> Task[[], Any]:
    """A task that does not keep its result: what a stage makes is in DVC's cache."""
    return Task(
        body, name=name, task_run_name=name, cache_policy=NO_CACHE, persist_result=False, **options
    )


@contextlib.contextmanager
def watched(flow_run: UUID, tasks: Tasks | Launcher) -> Iterator[None]:
    """Within this context, end the stages when somebody cancels the flow run.

    A worker that started the flow sends it a signal then, but a flow that was started by hand has
    none, and has to look.
    """

    def look() -> None:
        with contextlib.suppress(httpx.HTTPError):  # the server is busy: ask again
            state = client.read_flow_run(flow_run).state
            if state and (state.is_cancelling() or state.is_cancelled()):
                tasks.cancel()

    with get_client(sync_client=True) as client, polling(look, POLL_SECONDS):
        yield
