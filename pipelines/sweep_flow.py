"""`python -m pipelines.sweep_flow ...`: what `pipelines.sweep` does as a Prefect flow, one task a
trial.

The study and the scheduler are those of the sweep. Prefect shows, logs and cancels, and starts the
flow on a schedule: a sweep that was cancelled goes on when it is started again.
"""

import contextvars
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID

from pipelines import EBMError, serve, sweep
from pipelines.commands import cores
from pipelines.flows import (
    end_with_worker,
    new_task,
    pipeline,
    watched,
)  # and Prefect's settings, before Prefect
from pipelines.study import Study, Trial
from pipelines.supervise import Cancelled, Launcher
from pipelines.sweep import Work
from pipelines.trial import Outcome, Trials

# isort: split
from prefect import flow, get_run_logger, runtime, states
from prefect.artifacts import create_table_artifact
from prefect.client.schemas import State


@flow(name="ebm-sweep", persist_result=False)
def search(
    experiment: str,
    metric: str,
    search: Sequence[str],
    trials: int = 20,
    jobs: int | None = None,
    prune_by: str | None = None,
    better: int | None = None,
    study: str | None = None,
    seed: int = 0,
    apply: bool = False,
) -> State:
    """Search for the parameters of an experiment with which a metric is best. The parameters are
    the options of `python -m pipelines.sweep`; `better` is 1 for --higher, -1 for --lower."""
    end_with_worker()
    try:
        planned = sweep.plan(experiment, metric, search, trials, prune_by, better, study, seed)
        if planned.upstream:
            state = pipeline(planned.upstream, jobs, return_state=True)
            if not state.is_completed():
                return states.Failed(message=sweep.NOT_READY)
        with sweep.begun(planned) as opened:
            try:
                flow_run = runtime.flow_run.id
                jobs = jobs or cores()
                sweep.conduct(planned, opened, jobs, tasks, EBM_FLOW_RUN_ID=flow_run)
            except Cancelled:
                return states.Cancelled(message=sweep.tally(opened))
            return report(planned, opened, apply)
    except EBMError as error:
        return states.Failed(message=str(error))


@contextmanager
def tasks(trials: Trials, launcher: Launcher) -> Iterator[Work]:
    """What runs a trial as a task of this flow run, in any thread."""
    context = contextvars.copy_context()  # Prefect's; other threads do not have it

    def work(trial: Trial) -> Outcome:
        outcomes = list[Outcome]()

        def body() -> State:
            try:
                outcome = trials.run(trial, get_run_logger().info)
            except Cancelled:
                return states.Cancelled(message="cancelled with its flow run")
            outcomes.append(outcome)
            make = states.Failed if outcome.state == "failed" else states.Completed
            return make(name="Pruned" if outcome.state == "pruned" else None, message=str(outcome))

        task = new_task(f"trial-{trial.number}", body)
        state = context.copy().run(task, return_state=True)
        if not outcomes and not state.is_cancelled():
            state.result()  # raises what ended it
        if not outcomes:
            raise Cancelled
        return outcomes[0]

    with watched(UUID(runtime.flow_run.id), launcher):
        yield work


def report(planned: sweep.Sweep, study: Study, apply: bool) -> State:
    """Write the table of trials and conclude the sweep; the state of the flow run."""
    rows = sweep.rows(study)
    try:
        create_table_artifact(rows, key="trials", description="The trials of this study")
    except Exception as error:  # of the server; the study is what it is
        get_run_logger().warning("the table of trials is not in Prefect: %s", error)
    if not sweep.conclude(planned, study, apply):
        return states.Failed(message=sweep.tally(study))
    return states.Completed(message=sweep.tally(study))


def main() -> int:
    """The command line: that of the sweep."""

    def execute(**options: Any) -> bool:
        from pipelines import sweep_flow  # this module, by the name under which Prefect finds it

        asked = {key: value for key, value in options.items() if key not in ("jobs", "apply")}
        sweep.plan(**asked)  # what is wrong is told before a server is started
        serve.check_prefect()
        return sweep_flow.search(**options, return_state=True).is_completed()

    return sweep.main(execute, "pipelines.sweep_flow")


if __name__ == "__main__":
    sys.exit(main())
