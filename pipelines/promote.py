"""Choose the model of an experiment that is served: the best of its recorded runs.

    python -m pipelines.promote EXPERIMENT --metric NAME    # EXPERIMENT@champion: the best run
    python -m pipelines.promote EXPERIMENT --rollback       # and back to the version before

Among the finished runs that MLflow has of the experiment (of `dvc exp run`, of other machines)
the best one by the metric is registered in MLflow's model registry, under the experiment's name,
and the alias points at it; the versions it pointed at before are kept as a tag of the registered
model. Only runs on the data of the newest one are compared: a metric of another test split says
nothing about them, so a champion of other data gives way. Nothing changes if the present version
is as good, unless it is of the same run, which was evaluated anew since and has another
threshold. What waits for MLflow is delivered first.

Metrics are mostly those of the test split, so the best of many runs looks better than it is: quote
numbers of a run that was not chosen by them.
"""

import argparse
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import TYPE_CHECKING

from ebm import EBMError, did_you_mean, files
from pipelines import tracking, words
from pipelines.commands import guarded
from pipelines.courier import SETTINGS
from pipelines.places import main_checkout, public, tracking_uri

if TYPE_CHECKING:
    from pipelines.mlflow_registry import Recorded, Registry


def promote(experiment: str, metric: str, alias: str, better: int | None) -> str:
    """Point `alias` at the best run by `metric`, of which `better` is +1 (higher), -1 (lower) or
    None (as the report has it). What was done, if anything, in one line."""
    better = better or direction(metric)
    with _registry() as registry:
        present = registry.present(experiment, alias)
        own = present.run if present else None
        runs = registry.runs(experiment)
        alike = _on_the_newest_data(_measured(runs, experiment, metric))
        best = _best(alike, metric, better, own)
        model, value, before = best.model, best.metrics[metric], "the first one"
        if present:
            old = own in {run.id for run in runs if run.data != best.data}
            held = None if old else registry.metric(present, metric)
            shown = "on other data" if old else _shown(metric, held)
            before = f"before: version {present.number}, {shown}"
            renewed = (
                model is not None
                and best.id == present.run
                and registry.number(experiment, model) != present.number
            )
            if held is not None and better * value <= better * held and not renewed:
                return (
                    f"{experiment}@{alias} stays version {present.number}, {_shown(metric, held)}:"
                    f" the best finished run, {best.id}, has {value:.6g}"
                )
        if model is None or not registry.complete(model):
            problem = f"has no complete model; stage evaluate@{experiment} logs it"
            raise EBMError(f"{experiment}: its best run, {best.id}, {problem}")
        number = registry.register(experiment, best.id, model)
        past = _past(registry, experiment, alias)
        if present and present.number != number:
            registry.remember(experiment, alias, [*past, present.number])
        registry.point(experiment, alias, number)
    now = f"version {number}, run {best.id}, {_shown(metric, value)}"
    return f"{experiment}@{alias} is {now} ({before})"


def rollback(experiment: str, alias: str) -> str:
    """Point `alias` at the version that it was before. What was done, in one line."""
    with _registry() as registry:
        past = _past(registry, experiment, alias)
        if not past:
            raise EBMError(f"{experiment}@{alias} has no earlier version to go back to")
        registry.point(experiment, alias, past[-1])
        registry.remember(experiment, alias, past[:-1])
    return f"{experiment}@{alias} is version {past[-1]} again"


def direction(metric: str) -> int:
    """+1 if a higher `metric` is better, -1 if a lower one, as `pipelines.words` has it."""
    better = 0 if metric.endswith("_std") else words.metric(metric).better
    if not better:
        hint = did_you_mean(metric, words.METRICS)
        problem = "not known whether more is better; say --higher or --lower"
        raise EBMError(f"{metric}: {problem}{hint}")
    return better


def check_alias(alias: str) -> None:
    """EBMError if MLflow has no place for it: names like `latest` and `v1` are its own."""
    if not re.fullmatch(r"[\w-]+", alias) or re.fullmatch(r"latest|v\d+", alias.lower()):
        problem = "expected letters, digits, _ and -, and neither latest nor v and a number"
        raise EBMError(f"--alias {alias}: {problem}")


def _measured(runs: "list[Recorded]", experiment: str, metric: str) -> "list[Recorded]":
    """The finished runs that have the metric, at least one; one that is NaN is none."""
    if not runs:
        raise EBMError(f"{experiment}: no such experiment among the runs at {_where()}")
    fit = [
        run for run in runs if run.finished and not math.isnan(run.metrics.get(metric, math.nan))
    ]
    if not fit:
        known = {name for run in runs if run.finished for name in run.metrics}
        similar = get_close_matches(metric, sorted(known - {metric}))
        hint = f"; similar: {', '.join(similar)}" if similar else ""
        raise EBMError(f"{experiment}: no finished run at {_where()} has a {metric}{hint}")
    return fit


def _on_the_newest_data(runs: "list[Recorded]") -> "list[Recorded]":
    """Runs on the same data as the newest one whose data are known; all if none has any."""
    known = [run for run in runs if run.data]
    return [run for run in known if run.data == known[-1].data] or runs


def _best(runs: "list[Recorded]", metric: str, better: int, own: str | None) -> "Recorded":
    """The best run; of equals one that has a model, then the run `own`, then the oldest."""
    return max(
        runs, key=lambda run: (better * run.metrics[metric], bool(run.model), run.id == own)
    )


def _past(registry: "Registry", experiment: str, alias: str) -> list[str]:
    """The versions that `alias` was before. Its present one stands last in the list if a process
    was killed between the two changes that it takes."""
    past, present = registry.history(experiment, alias), registry.present(experiment, alias)
    while present and past and past[-1] == present.number:
        past.pop()
    return past


@contextmanager
def _registry() -> "Iterator[Registry]":
    """The registry, which no other process of this checkout changes meanwhile."""
    from pipelines.mlflow_registry import Registry, plain_errors  # takes seconds

    folder = main_checkout() / ".tracking"
    folder.mkdir(parents=True, exist_ok=True)
    with plain_errors(tracking_uri()), files.locked(folder / "promote.lock"):
        yield Registry(tracking_uri())


def _shown(metric: str, value: float | None) -> str:
    return f"no {metric}" if value is None else f"{metric} {value:.6g}"


def _where() -> str:
    return public(tracking_uri())


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)

    def act() -> None:
        check_alias(options.alias)
        if options.rollback:
            print(rollback(options.experiment, options.alias))
        else:
            tracking.flush()  # a run that still waits may be the best
            print(promote(options.experiment, options.metric, options.alias, options.better))

    return guarded(act)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.promote",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("experiment", help="its name: a key of params.yaml")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--metric", help="by which runs are compared, such as log_likelihood")
    what.add_argument("--rollback", action="store_true", help="back to the version before")
    parser.add_argument("--alias", default="champion", help="what to point (default: champion)")
    add_direction(parser)
    return parser


def add_direction(parser: argparse.ArgumentParser) -> None:
    """Options of a command line that say which way a metric is better."""
    way = parser.add_mutually_exclusive_group()
    for name, sign in (("higher", +1), ("lower", -1)):
        way.add_argument(
            f"--{name}", dest="better", action="store_const", const=sign, help=f"{name} is better"
        )


if __name__ == "__main__":
    sys.exit(main())
