"""Search for the parameters of an experiment with which a metric is best.

    python -m pipelines.sweep rbm-digits --metric log_likelihood --trials 40 -j 2 \\
        --search model.learning_rate=1e-3..1e-1:log --search model.hidden=50..400

A trial is the part of the experiment's stages that depends on what is searched, run with other
values in `.sweeps/<study>/`; what they need is brought up to date first. An Optuna study chooses
the values. `--trials` is the number of trials that end, whether done, pruned or failed: the same
command after a kill finishes those that ran and then does the rest, and with a larger number adds
some. The best parameters become `.sweeps/<study>/best.patch`, for `git apply`.

`--prune-by SCALAR:higher` (or `:lower`, whichever is better) ends a training whose scalar, one
that is logged while it trains, was never as good as the median of the others now is, at the same
step. Metrics are mostly those of the test split, so the best of many trials looks better than it
is: search on one seed, quote another.
"""

import argparse
import contextlib
import csv
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebm import EBMError, files
from pipelines import ROOT, dag, gpu, lockfile, patch, provenance, run, space, stage, tracking
from pipelines.commands import cores, guarded, positive, show
from pipelines.promote import add_direction, direction
from pipelines.space import Space
from pipelines.supervise import Cancelled, Launcher
from pipelines.trial import SHELL, Outcome, Recipe, Scalar, Trials, check_known

if TYPE_CHECKING:
    from pipelines.study import Study, Trial

Work = Callable[["Trial"], Outcome]
NOT_READY = "what the trials need could not be brought up to date"


@dataclass(frozen=True)
class Sweep:
    """A sweep whose every part was found to be right.

    Attributes:
        needed: the stages that no trial changes, upstream first.
        better: +1 if a higher metric is better, -1 if a lower one.
        sources: the checksums of what its stages read and no stage makes, their code, by path.
    """

    recipe: Recipe
    space: Space
    needed: tuple[dag.Stage, ...]
    better: int
    trials: int
    seed: int
    sources: Mapping[str, str]

    @property
    def upstream(self) -> tuple[str, ...]:
        """What has to be brought up to date first."""
        return tuple(one.name for one in self.needed if one.stale)

    @property
    def file(self) -> Path:
        """Where the best parameters are written as a patch."""
        return self.recipe.folder / "best.patch"


def plan(
    experiment: str,
    metric: str,
    search: Sequence[str],
    trials: int = 20,
    prune_by: str | None = None,
    better: int | None = None,
    study: str | None = None,
    seed: int = 0,
    root: Path = ROOT,
) -> Sweep:
    """What is to be done. The parameters are those of the command line.

    Raises:
        EBMError: something of it is not right.
    """
    _check_place(experiment, root)
    text = (root / "params.yaml").read_text(encoding="utf-8")
    evaluated = root / "models" / experiment / "evaluation" / "metrics.json"
    reported = root / "metrics" / f"{experiment}.json"  # without what was not finite
    sources = {evaluated: f"evaluate@{experiment}", reported: "report"}
    if known := {path: by for path, by in sources.items() if path.exists()}:
        measured = set[str]().union(*(stage.read_json(path, by) for path, by in known.items()))
        check_known("metric", metric, measured - {"seconds"})  # that of the training
    better = better or direction(metric)
    spanned = space.parse(search, text, experiment)
    stages = dag.plan_when_free([f"evaluate@{experiment}"], root).stages
    searched = [f"experiments.{experiment}.{dimension.key}" for dimension in spanned]
    own = dependent(stages, searched)
    needed = tuple(one for one in stages if one not in own)
    recipe = Recipe(
        root=root,
        folder=root / ".sweeps" / _name(study or experiment),
        params=text,
        experiment=experiment,
        metric=metric,
        prune_by=_scalar(prune_by, better, own) if prune_by else None,
        stages=own,
        linked=[out for one in needed for out in one.outs],
    )
    code = dag.sources([one.name for one in own], root)
    return Sweep(recipe, spanned, needed, better, trials, seed, code)


def _check_place(experiment: str, root: Path) -> None:
    """EBMError unless the experiment stands in params.yaml; what to do if it is one of paper/."""
    from ebm import params

    try:
        params.experiment(root / "params.yaml", experiment)
    except EBMError:
        paper = root / "paper" / "params.yaml"
        if not (paper.exists() and experiment in params.load(paper).experiments):
            raise
        change = f"-S paper/params.yaml:experiments.{experiment}.KEY=VALUE"
        raise EBMError(
            f"{experiment}: stands in paper/params.yaml, and sweeps search params.yaml; copy it "
            f"and its data set, or `dvc exp run {change} paper/dvc.yaml:evaluate@{experiment}`"
        ) from None


def dependent(stages: Sequence[dag.Stage], keys: Sequence[str]) -> list[dag.Stage]:
    """Those `stages` (upstream first) that depend on one of the parameters `keys`, or on what
    another one of them makes."""
    found: dict[str, dag.Stage] = {}
    for one in stages:
        reads = any(f"{key}.".startswith(f"{param}.") for key in keys for param in one.params)
        if reads or not found.keys().isdisjoint(one.upstream):
            found[one.name] = one
    return list(found.values())


def _name(study: str) -> str:
    if not study.replace("-", "").replace("_", "").isalnum():
        raise EBMError(f"--study {study}: expected letters, digits, _ and -")
    return study


def _scalar(prune_by: str, better: int, own: Sequence[dag.Stage]) -> Scalar:
    name, _, way = prune_by.partition(":")
    if way not in ("higher", "lower"):
        raise EBMError(f"--prune-by {prune_by}: expected {name}:higher or {name}:lower")
    if os.environ.get("EBM_TRACKING") == "0":
        raise EBMError("--prune-by reads what is tracked, and EBM_TRACKING=0 turns that off")
    if not any(one.name.startswith("train@") for one in own):
        raise EBMError("--prune-by: nothing is searched on which the training depends")
    return Scalar(name, better * (1 if way == "higher" else -1))


@contextlib.contextmanager
def begun(sweep: Sweep) -> "Iterator[Study]":
    """The study of a sweep, which is this process's own within this context."""
    from pipelines import study  # optuna: only once the rest is known to be right

    recipe = sweep.recipe
    params = patch.value(recipe.params)
    content = params["experiments"][recipe.experiment]
    searched = {dimension.key for dimension in sweep.space}
    settings = {
        "experiment": recipe.experiment,
        "metric": f"{recipe.metric}, {'higher' if sweep.better > 0 else 'lower'} is better",
        "search": {dimension.key: str(dimension) for dimension in sweep.space},
        "scalar to prune by": vars(recipe.prune_by) if recipe.prune_by else None,
        "data set": params["datasets"][content["dataset"]],
        "content of what its trials read": _read(sweep),
        "code of its trials": dict(sweep.sources),
        "value of what is not searched": {
            key: value for key, value in _leaves(content) if not _within(key, searched)
        },
    }
    steps = _most_steps(sweep.space, content)
    with study.opened(
        recipe.folder, settings, sweep.space, sweep.better, steps, sweep.seed
    ) as opened:
        yield opened


def _most_steps(searched: Space, content: Mapping[str, Any]) -> int:
    """Of the longest training; 0 where there is none."""
    steps = (one.extremes for one in searched if one.key == "train.steps")
    own = content.get("train", {}).get("steps", 0)
    return max((patch.value(text) for texts in steps for text in texts), default=own)


def _read(sweep: Sweep) -> dict[str, str]:
    """The checksum of everything that its trials read of the root, by path."""
    entries = lockfile.entries([one.name for one in sweep.needed], sweep.recipe.root).values()
    return {out["path"]: out["md5"] for entry in entries if entry for out in entry["outs"]}


def _leaves(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(content, list):
        content = {str(i): item for i, item in enumerate(content)}
    if not isinstance(content, dict):
        yield prefix, content
        return
    for name, value in content.items():
        yield from _leaves(value, f"{prefix}.{name}".strip("."))


def _within(key: str, others: set[str]) -> bool:
    return any(f"{key}.".startswith(f"{other}.") for other in others)


def schedule(
    study: "Study", work: Work, pool: ThreadPoolExecutor, jobs: int, wanted: int
) -> Iterator[Outcome]:
    """Run trials, `jobs` at a time in threads of the pool, until `wanted` have ended; yield how
    they ended as they do. What ends with an exception is not over, and ends the sweep."""
    running: set[Future[Outcome]] = set()
    while True:
        while len(running) < jobs and (trial := study.next(wanted)):
            running.add(pool.submit(work, trial))
        if not running:
            return
        done, running = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            outcome = future.result()
            study.finish(outcome.trial.number, outcome.state, outcome.value, outcome.reason)
            yield outcome


def sweep(jobs: int | None = None, apply: bool = False, **options: Any) -> bool:
    """Run a sweep with the options of `plan`; True if it has a best trial."""
    planned = plan(**options)
    jobs = jobs or cores()
    if planned.upstream and not run.run(planned.upstream, jobs, root=planned.recipe.root):
        raise EBMError(NOT_READY)

    with begun(planned) as study:
        try:
            conduct(planned, study, jobs, _worker)
        except Cancelled:
            raise EBMError("a trial was ended from outside; the same command goes on") from None
        return conclude(planned, study, apply)


@contextlib.contextmanager
def _worker(trials: Trials, launcher: Launcher) -> Iterator[Work]:
    def work(trial: "Trial") -> Outcome:
        show(f"start trial {trial.number}")
        return trials.run(trial, lambda line: show(f"trial {trial.number} | {line}"))

    yield work


def conduct(
    sweep: Sweep,
    study: "Study",
    jobs: int,
    worker: Callable[[Trials, Launcher], contextlib.AbstractContextManager[Work]],
    **environment: str,
) -> None:
    """Run the trials that are missing, in threads and processes that end with this call.

    Within the context that `worker` makes, its value is what runs one. The processes see
    `environment`.

    Raises:
        Cancelled: processes were ended from outside; their trials are not over.
    """
    jobs = at_once(sweep.recipe.stages, jobs)
    finished, started = study.finished(), time.monotonic()
    show(f"study {sweep.recipe.folder.name}: {finished} of {sweep.trials} trials have ended")
    if finished >= sweep.trials:
        write_table(sweep, study)  # a sweep that was cut short has none
        return
    with (
        _tracked(sweep, study) as tracked,
        ThreadPoolExecutor(jobs) as pool,
        run.start_launcher(sweep.recipe.root, SHELL, **environment) as launcher,
        worker(Trials(sweep.recipe, study, launcher), launcher) as work,
    ):
        for outcome in schedule(study, work, pool, jobs, sweep.trials):
            finished += 1
            show(
                "\n".join(
                    [
                        f"[{finished}/{sweep.trials}] {outcome}",
                        *(f"    {line}" for line in outcome.lines),
                    ]
                )
            )
            if best := study.best():
                tracked.log({"best": best.value or 0.0}, finished)
        _summarise(sweep, study, tracked)
    show(f"{tally(study)} in {time.monotonic() - started:.1f} s")


def at_once(stages: Sequence[dag.Stage], jobs: int) -> int:
    """How many trials of these stages may run: no more than cards, where there are any and one
    uses them, or the others would wait for one while their time runs."""
    cards = gpu.count() if any(one.gpu for one in stages) else 0
    return min(jobs, cards) if cards else jobs


def tally(study: "Study") -> str:
    """How many trials are in which state."""
    counts = Counter(record.state for record in study.records())
    told = [f"{counts[state]} {state}" for state in ("done", "pruned", "failed")]
    left = counts["running"]
    return ", ".join(told + [f"{left} left in the middle"] * bool(left))


def _tracked(sweep: Sweep, study: "Study") -> tracking.Run:
    """The tracked run of the study, under which those of its trials are shown."""
    recipe = sweep.recipe
    return tracking.Run.start(
        recipe.folder.name,
        key=study.key,
        params={
            "experiment": recipe.experiment,
            "metric": recipe.metric,
            "better": "higher" if sweep.better > 0 else "lower",
            **{f"search.{dimension.key}": str(dimension) for dimension in sweep.space},
        },
        tags={
            "sweep.study": recipe.folder.name,
            **provenance.git_tags(provenance.git_state()),
        },
        dataset=None,
    )


def _summarise(sweep: Sweep, study: "Study", tracked: tracking.Run) -> None:
    """Leave what came out in the tracked run of the study."""
    counts = Counter(record.state for record in study.records())
    tracked.log_final({f"trials_{state}": counts[state] for state in ("done", "pruned", "failed")})
    if best := study.best():
        texts = {f"best.{key}": text for key, text in best.trial.texts.items()}
        tracked.tag({"best.trial": str(best.trial.number), **texts})
    tracked.artifact(write_table(sweep, study))


def rows(study: "Study") -> list[dict[str, Any]]:
    """The trials as a table."""
    return [
        {
            "trial": record.trial.number,
            "state": record.state,
            "value": record.value,
            **record.trial.texts,
            "reason": record.reason,
        }
        for record in study.records()
    ]


def write_table(sweep: Sweep, study: "Study") -> Path:
    """Write `trials.csv`."""
    path = sweep.recipe.folder / "trials.csv"
    names = ["trial", "state", "value", *(dimension.key for dimension in sweep.space), "reason"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows(study))
    return path


def conclude(sweep: Sweep, study: "Study", apply: bool) -> bool:
    """Say which trial is the best, and write its parameters as a patch of `params.yaml` as it is
    now; with `apply`, into that file."""
    best = study.best()
    if best is None:
        show("no trial is done, so there are no best parameters")
        return False
    recipe = sweep.recipe
    path = recipe.root / "params.yaml"
    now = path.read_text(encoding="utf-8")
    new = space.patched(now, recipe.experiment, best.trial.texts)
    sweep.file.write_text(patch.diff(now, new, "params.yaml"), encoding="utf-8")
    tried = ", ".join(f"{key} {text}" for key, text in best.trial.texts.items())
    show(f"best: trial {best.trial.number}, {recipe.metric} {best.value:.6g}: {tried}")
    if now == new:
        show("params.yaml has these parameters already")
    elif apply:
        files.replace(path, new.encode())
        show("params.yaml has these parameters now")
    else:
        show(f"git apply {sweep.file.relative_to(recipe.root)}  # or again with --apply")
    return True


def main(execute: Callable[..., bool] = sweep, module: str = "pipelines.sweep") -> int:
    """The command line of a module, for this function or another one with the same arguments."""
    options = parser(module).parse_args()
    return guarded(lambda: execute(**vars(options)), stages=True)


def parser(module: str) -> argparse.ArgumentParser:
    """The command line's grammar; the names are those of the arguments of `sweep`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=str(__doc__).replace("pipelines.sweep", module),
        epilog=space.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("experiment", help="a key of params.yaml")
    add("--metric", required=True, help="what is to be best, of those that evaluate measures")
    add(
        "--search",
        action="append",
        required=True,
        metavar="KEY=VALUES",
        help="a parameter of the experiment and what it may be, see below; repeatable",
    )
    add("--trials", type=positive, default=20, help="that will have ended (default: 20)")
    add("-j", "--jobs", type=positive, help="trials at a time (default: cores)")
    add("--prune-by", metavar="SCALAR:higher|lower", help="end trainings that look bad")
    add("--study", help="its name (default: the experiment's)")
    add("--seed", type=int, default=0, help="of what is tried (default: 0)")
    add("--apply", action="store_true", help="write the best parameters into params.yaml")
    add_direction(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
