"""`python -m pipelines.flows -j 4`: what `pipelines.run` does as a Prefect flow, one task a stage.

The plan is DVC's and the scheduler is the runner's. Prefect shows, logs, retries and cancels, and
starts the flow on a schedule. If no server runs, it starts one for the time of the flow. This is
the only module that imports Prefect.
"""
# ruff: noqa: E402 (the command line stands above an import that takes seconds)

import contextlib
import contextvars
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import UUID

from pipelines import ROOT, dag, gpu, run, timeline
from pipelines.dag import Stage
from pipelines.run import Result, StageFailed
from pipelines.supervise import Cancelled, Launcher
from pipelines.timeline import Rebuild

RESTORED = "Cached"  # Prefect's own name for the state of a task that did not have to run
POLL_SECONDS = 2.0
SETTINGS = {
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",  # a busy machine needs over 20
}


def main() -> int:
    """The command line: that of the runner. Prefect is imported only if there is work to do."""

    def execute(targets: Sequence[str], force: bool, **options: Any) -> bool:
        started = time.time()
        if not force and not (plan := dag.plan(targets)).stale:
            return run.nothing_to_do(targets, plan, started)
        from pipelines import flows  # this module, by the name under which Prefect finds the flow

        state = flows.pipeline(targets=targets, force=force, **options, return_state=True)
        return state.is_completed()

    return run.main(execute)


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

from pipelines import summary


@flow(name="ebm", persist_result=False)
def pipeline(
    targets: Sequence[str] = (),
    jobs: int | None = None,
    force: bool = False,
    keep_going: bool = True,
) -> State:
    """Run what is stale of `dvc.yaml`, one task for each stage.

    Args:
        targets: What to rebuild, with all it needs: stages (`evaluate@rbm-digits`), groups
            (`train`), patterns (`*@meg-*`) or a graph (`paper/dvc.yaml`). None: all of `dvc.yaml`.
        jobs: How many stages may run at once. None: one for each core.
        force: Run the stages even if nothing that they depend on has changed.
        keep_going: After a failure, go on with what does not depend on the failed stage.
    """
    if runtime.deployment.id:
        end_with_parent()
    jobs, started = jobs or run.cores(), time.time()
    plan = dag.plan(targets)
    stages = plan.stages if force else plan.stale
    flow_run, results, cancelled = runtime.flow_run.id, list[Result](), False
    if stages:
        with (
            ThreadPoolExecutor(jobs) as pool,
            run.start_launcher(ROOT, EBM_FLOW_RUN_ID=flow_run) as launcher,
            watched(UUID(flow_run), launcher),
        ):
            tasks = Tasks(launcher, ROOT, force)
            for result in run.schedule(stages, tasks.run, pool, jobs, keep_going, gpu.count()):
                results.append(result)
                if result.outcome == "skipped":
                    tasks.mark_skipped(result)
            cancelled = launcher.cancelled
    by = f"Prefect flow run {runtime.flow_run.name}"
    last = timeline.rebuild(by, targets, plan, results, started)
    run.keep_timeline(last, ROOT)
    publish(last)
    return conclude(results, last.seconds, cancelled)


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


class Tasks:
    """The tasks of a flow run, each linked to those of its upstream stages."""

    def __init__(self, launcher: Launcher, root: Path, force: bool) -> None:
        self._launcher, self._root, self._force = launcher, root, force
        self._context = contextvars.copy_context()  # Prefect's; other threads do not have it
        self._states: dict[str, State] = {}

    def run(self, stage: Stage) -> Result:
        """Run a stage as a task, in this thread."""
        begun = run.begin(stage)
        task = _task(
            stage.name,
            lambda: self._reproduce(stage),
            retries=stage.retries,
            retry_condition_fn=lambda *_: not self._launcher.cancelled,
        )
        upstream = [self._states[name] for name in stage.upstream if name in self._states]
        state = self._context.copy().run(task, return_state=True, wait_for=upstream)
        self._states[stage.name] = state
        if state.is_completed():
            return begun("done", restored=state.name == RESTORED)
        failure = state.result(raise_on_failure=False)
        if isinstance(failure, StageFailed):
            return begun("failed", reason=str(failure), lines=failure.lines)
        return begun("failed", reason=state.message or "not done")

    def _reproduce(self, stage: Stage) -> State | None:
        log, show = run.log_path(stage, self._root), get_run_logger().info
        try:
            restored = run.reproduce(stage, self._launcher, log, show, self._force)
        except (StageFailed, Cancelled):
            if not self._launcher.cancelled:
                raise
            return states.Cancelled(message="cancelled with its flow run")
        if restored:
            return states.Completed(name=RESTORED, message="DVC had its outputs")
        return None

    def mark_skipped(self, result: Result) -> None:
        """Have a task for a stage that will not run, whose state says why."""

        def body() -> State:
            return states.Cancelled(name="Skipped", message=result.reason)

        _task(result.stage, body)(return_state=True)


def _task(name: str, body: Callable[[], Any], **options: Any) -> Task[[], Any]:
    """A task that does not keep its result: what a stage makes is in DVC's cache."""
    return Task(
        body, name=name, task_run_name=name, cache_policy=NO_CACHE, persist_result=False, **options
    )


def end_with_parent() -> None:
    """From now on, end when the worker that started this flow dies without a word.

    It gives a flow a session of its own, so that no signal to its own reaches us. Our stages end
    with us. Without this, Prefect would ask a server that is gone for its consent, for minutes.
    """
    worker = os.getppid()

    def watch() -> None:
        while os.getppid() == worker:
            time.sleep(POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def watched(flow_run: UUID, launcher: Launcher) -> Iterator[None]:
    """Within this context, end the stages when somebody cancels the flow run.

    A worker that started the flow sends it a signal then, but a flow that was started by hand has
    none, and has to look.
    """
    over = threading.Event()

    def watch() -> None:
        with get_client(sync_client=True) as client:
            while not over.wait(POLL_SECONDS):
                with contextlib.suppress(httpx.HTTPError):  # the server is busy: ask again
                    state = client.read_flow_run(flow_run).state
                    if state and (state.is_cancelling() or state.is_cancelled()):
                        launcher.cancel()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
