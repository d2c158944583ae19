"""One trial of a sweep: the stages of an experiment, run with other parameters in a folder of
their own.

`.sweeps/<study>/trial-<number>/` looks to a stage like the root: its `params.yaml` is the root's
with the values of the trial, and what the stages read but no trial changes is linked. Checkpoints
lie there too, so two trials never share one, and a trial that is run again goes on from where it
was killed: after the last stage that is noted in `done`, within a training from its checkpoint.
"""

import contextlib
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ebm import EBMError, params
from pipelines import patch, space, stage, tracking
from pipelines.commands import LAST_LINES
from pipelines.places import main_checkout
from pipelines.polling import polling
from pipelines.spool import Spool
from pipelines.supervise import Cancelled, Launcher, Process

if TYPE_CHECKING:
    from pipelines.dag import Stage
    from pipelines.study import State, Study, Trial

SHELL = "pipelines.trial:shell"
LOOK_EVERY = 1.0  # seconds between two looks at the scalars of a training
CLOSED = {"done": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}
"""What MLflow calls it."""


@dataclass(frozen=True)
class Outcome:
    """How a trial ended, after how many seconds; why, and its last lines, if it did not well."""

    trial: "Trial"
    state: "State"
    seconds: float
    value: float | None = None
    reason: str = ""
    lines: tuple[str, ...] = ()

    def __str__(self) -> str:
        tried = ", ".join(f"{key} {text}" for key, text in self.trial.texts.items())
        told = self.reason if self.value is None else f"{self.value:.6g}"
        name = f"trial {self.trial.number}"
        return f"{self.state} {name} after {self.seconds:.1f} s: {told} ({tried})"


@dataclass(frozen=True)
class Scalar:
    """A logged scalar by which trials are pruned; `sign` is -1 if it is good where the metric is
    bad."""

    name: str
    sign: int


@dataclass(frozen=True)
class Recipe:
    """What the trials of a sweep have in common.

    Attributes:
        params: the text of the root's `params.yaml`.
        stages: those to run, upstream first.
        linked: what they read of the root, as paths from it.
    """

    root: Path
    folder: Path
    params: str
    experiment: str
    metric: str
    prune_by: Scalar | None
    stages: "Sequence[Stage]"
    linked: Sequence[str]


def shell() -> Callable[[str, str, dict[str, str]], NoReturn]:
    """What a launcher calls to run a command."""
    return execute


def execute(command: str, folder: str, changed: dict[str, str]) -> NoReturn:
    """Become a shell that runs a command in a folder."""
    os.chdir(folder)
    os.execve("/bin/sh", ["sh", "-ec", command], {**os.environ, **changed})


class Trials:
    """Runs the trials of a study."""

    def __init__(self, recipe: Recipe, study: "Study", launcher: Launcher) -> None:
        self._recipe, self._study, self._launcher = recipe, study, launcher

    def run(self, trial: "Trial", show: Callable[[str], None]) -> Outcome:
        """Run a trial, or the rest of one; `show` is given what its stages print.

        Raises:
            Cancelled: the sweep was ended meanwhile, and the trial is not over.
            EBMError: no trial of this sweep can succeed.
        """
        started = time.monotonic()
        with self._tracked(trial) as run:
            try:
                attempt = Attempt(self._recipe, self._study, self._launcher, trial, run.key, show)
                state, value, reason = attempt.run()
            except Cancelled:
                run.close("KILLED")
                raise
            run.tag({"sweep.state": state, **({"sweep.reason": reason} if reason else {})})
            run.close(CLOSED[state])
        if state != "done":  # nothing goes on from its checkpoints
            shutil.rmtree(attempt.folder / ".checkpoints", ignore_errors=True)
        seconds, lines = time.monotonic() - started, tuple(attempt.tail) if reason else ()
        return Outcome(trial, state, seconds, value, reason, lines)

    def _tracked(self, trial: "Trial") -> tracking.Run:
        """The tracked run of a trial, which its stages continue."""
        experiment = self._recipe.experiment
        return tracking.Run.start(
            f"{experiment}-trial-{trial.number}",
            key=f"{self._study.key}-{trial.number}",
            parent=self._study.key,
            params={key: patch.value(text) for key, text in trial.texts.items()},
            tags={
                "ebm.experiment": experiment,
                "sweep.study": self._recipe.folder.name,
                "sweep.trial": str(trial.number),
            },
            dataset=None,
        )


class Attempt:
    """One trial, from its beginning or from where it was left."""

    def __init__(
        self,
        recipe: Recipe,
        study: "Study",
        launcher: Launcher,
        trial: "Trial",
        key: str,
        show: Callable[[str], None],
    ) -> None:
        self._recipe, self._study, self._launcher = recipe, study, launcher
        self._trial, self._show = trial, show
        self._spool = Spool(key)
        self.folder = recipe.folder / f"trial-{trial.number}"
        self._pruned = ""
        self._mistake: EBMError | OSError | None = None
        self.tail: deque[str] = deque(maxlen=LAST_LINES)

    def run(self) -> "tuple[State, float | None, str]":
        """How it ended: with which value, or why without one."""
        try:
            self._furnish()
        except EBMError as error:
            return "failed", None, str(error)
        done = self.folder / "done"
        over = done.read_text().splitlines() if done.exists() else []
        for one in self._recipe.stages:
            if one.name in over:
                continue
            if reason := self._stage(one):
                return "pruned" if self._pruned else "failed", None, reason
            with done.open("a") as file:
                file.write(f"{one.name}\n")
        if not math.isfinite(value := self._value()):
            return "failed", None, f"{self._recipe.metric} is {value}"
        return "done", value, ""

    def _furnish(self) -> None:
        """Make the folder look like the root."""
        recipe = self._recipe
        text = space.patched(recipe.params, recipe.experiment, self._trial.texts)
        params.parse(text)
        for path in map(Path, recipe.linked):
            link = self.folder / path
            link.parent.mkdir(parents=True, exist_ok=True)
            if link.is_symlink() and link.readlink() != recipe.root / path:
                link.unlink()  # of a checkout that has been moved since
            if not link.is_symlink():
                link.symlink_to(recipe.root / path)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "params.yaml").write_text(text, encoding="utf-8")

    def _stage(self, one: "Stage") -> str:
        """Run a stage; why it did not succeed, or nothing."""
        process = self._launcher.start(
            one.cmd, str(self.folder), self._environment(one), timeout=one.timeout
        )
        with self._watched(process), (self.folder / "log.txt").open("a", buffering=1) as file:
            for line in process.lines():
                self.tail.append(line)
                self._show(line)
                file.write(f"{line}\n")
        ended = process.wait()
        if self._mistake:
            raise self._mistake
        if self._pruned:
            return self._pruned
        if ended.reason == "cancelled":
            raise Cancelled
        return f"{one.name}: {ended}" if ended.code else ""

    def _environment(self, one: "Stage") -> dict[str, str]:
        return {
            "PYTHONPATH": str(self._recipe.root),
            "DVC_ROOT": str(main_checkout().resolve()),
            "DVC_STAGE": one.name,
            "EBM_SCRATCH": str(self.folder),
            "EBM_RUN": self._spool.key,
        }

    @contextlib.contextmanager
    def _watched(self, process: Process) -> Iterator[None]:
        """Within this context, report the scalar as it is logged, and end the process if the
        study finds that the trial is not worth going on with."""
        if self._recipe.prune_by is None:
            yield
            return
        with polling(partial(self._look, process), LOOK_EVERY):
            yield

    def _look(self, process: Process) -> bool:
        """Report; whether that ended the process."""
        try:
            self._pruned = self._report()
        except (EBMError, OSError) as error:
            self._mistake = error
        if ended := bool(self._pruned or self._mistake):
            process.cancel()
        return ended

    def _report(self) -> str:
        """Report what is new; why the trial should be pruned, or nothing."""
        assert self._recipe.prune_by
        scalar, number = self._recipe.prune_by, self._trial.number
        last = self._study.reported(number)
        for event, _ in self._spool.read():
            if event.get("op") != "row" or event["step"] <= last:
                continue  # after a restart of the training, steps come again
            last, values = event["step"], event["values"]
            check_known("logged scalar", scalar.name, values)
            if self._study.report(number, last, scalar.sign * values[scalar.name]):
                return f"{scalar.name} = {values[scalar.name]:.4g} at step {last}"
        return ""

    def _value(self) -> float:
        name = self._recipe.experiment
        path = self.folder / "models" / name / "evaluation" / "metrics.json"
        metrics = stage.read_json(path, f"evaluate@{name}")
        check_known("metric", self._recipe.metric, metrics)
        return float(metrics[self._recipe.metric])


def check_known(what: str, name: str, measured: Collection[str]) -> None:
    """EBMError if a name is not among those of what was measured."""
    if name not in measured:
        similar = get_close_matches(name, measured) or sorted(measured)
        raise EBMError(f"there is no {what} {name}; there are: {', '.join(similar)}")
