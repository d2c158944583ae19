"""An Optuna study on disk: what its trials try, and how they ended. The only module that imports
Optuna.

`journal.log` holds every change, one a line. A process that opens a study has it for itself, by a
lock that the kernel takes back when the process is gone. So a line without an end was cut off by a
kill, and goes. And a trial that is RUNNING was left by a dead process: it is taken up again, under
its number and with its parameters, before any new one begins. Every trial that has begun thus ends
once, and their number is exact.

What a trial tries is drawn from (seed, number) and the trials that were over when it began: trials
one at a time are the same whether the sweep was killed while one ran or not.
"""

import json
import os
import random
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.pruners import MedianPruner
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from ebm import EBMError, files
from pipelines.space import Range, Space

STARTUP = 5
"""Trials that have to be complete before any is pruned: a median of fewer says little."""

WARMUP = 0.25
"""Share of the training steps before which none is pruned: what is early is noise."""

STATES = {
    "done": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
    "running": TrialState.RUNNING,
}

State = Literal["done", "pruned", "failed"]


@dataclass(frozen=True)
class Trial:
    """What a trial tries: a YAML text for each key of the space."""

    number: int
    texts: Mapping[str, str]


@dataclass(frozen=True)
class Record:
    """A trial as the study has it; of a finished one also how it ended."""

    trial: Trial
    state: str
    value: float | None
    reason: str


class Study:
    """A study that this process has for itself; its methods may be called by several threads.

    Attributes:
        key: names this study, and no other that ever had its name.
    """

    def __init__(self, study: optuna.Study, space: Space, seed: int, key: str) -> None:
        self._study, self._space, self._seed, self.key = study, space, seed, key
        self._lock = threading.RLock()
        self._left = study.get_trials(deepcopy=False, states=[TrialState.RUNNING])
        self._active: dict[int, optuna.Trial] = {}

    def next(self, wanted: int) -> Trial | None:
        """The next trial to run; None if with those that run now `wanted` will have ended."""
        with self._lock:
            if self.finished() + len(self._active) >= wanted:
                return None
            number = self._left[0].number if self._left else len(self._study.trials)
            chance = random.Random(f"{self._seed} {number}").getrandbits(31)
            self._study.sampler = TPESampler(seed=chance)
            if self._left:
                trial = optuna.Trial(self._study, self._left.pop(0)._trial_id)
            else:
                trial = self._study.ask()
            self._active[trial.number] = trial
            return Trial(trial.number, {d.key: _suggest(trial, d) for d in self._space})

    def report(self, number: int, step: int, value: float) -> bool:
        """Tell how a running trial does, steps upward; whether it should be pruned."""
        with self._lock:
            trial = self._active[number]
            trial.report(value, step)
            return trial.should_prune()

    def reported(self, number: int) -> int:
        """The last step of a running trial that was reported, -1 if none was."""
        with self._lock:
            frozen = self._study.get_trials(deepcopy=False)[number]
            return max(frozen.intermediate_values, default=-1)

    def finish(self, number: int, state: State, value: float | None, reason: str) -> None:
        """A running trial has ended."""
        with self._lock:
            trial = self._active.pop(number)
            trial.set_user_attr("reason", reason)
            self._study.tell(trial, value, STATES[state])

    def finished(self) -> int:
        """How many trials have ended, one way or another."""
        with self._lock:
            return sum(trial.state.is_finished() for trial in self._study.get_trials(False))

    def records(self) -> list[Record]:
        """All trials, in the order of their numbers."""
        with self._lock:
            return [self._record(trial) for trial in self._study.get_trials(deepcopy=False)]

    def best(self) -> Record | None:
        """The best trial that is done, the first of equals."""
        higher = self._study.direction == optuna.study.StudyDirection.MAXIMIZE
        done = [record for record in self.records() if record.state == "done"]
        return max(done, key=lambda r: (r.value or 0.0) * (1 if higher else -1), default=None)

    def _record(self, trial: FrozenTrial) -> Record:
        params = trial.params
        texts = {d.key: _text(d, params[d.key]) for d in self._space if d.key in params}
        state = next(name for name, known in STATES.items() if known == trial.state)
        value = trial.value if state == "done" else None  # of a pruned one it is Optuna's own
        return Record(Trial(trial.number, texts), state, value, trial.user_attrs.get("reason", ""))


@contextmanager
def opened(
    folder: Path, settings: Mapping[str, Any], space: Space, better: int, steps: int, seed: int
) -> Iterator[Study]:
    """The study in `folder`, which is made if there is none.

    Args:
        settings: what makes results comparable, as JSON; has to be what the study began with.
        better: +1 if a higher value is better, -1 if a lower one.
        steps: of the longest training, from which follows when pruning may begin.

    Raises:
        EBMError: another process has the study, or it began with other settings.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    refusal = f"study {folder.name}: another sweep is at work on it"
    with files.locked(folder / "lock", refusal):
        study = optuna.create_study(
            storage=_storage(folder / "journal.log"),
            study_name=folder.name,
            direction="maximize" if better > 0 else "minimize",
            load_if_exists=True,
            pruner=MedianPruner(STARTUP, round(WARMUP * steps)),
        )
        yield Study(study, space, seed, _key(study, json.loads(json.dumps(settings))))


class Held:
    """In place of Optuna's lock, which a killed process would leave behind: ours is held."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


class Journal(JournalFileBackend):
    """Lines are added whole or not at all, also where the disk is full in the middle of one."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        size = os.path.getsize(self._file_path)
        try:
            super().append_logs(logs)
        except OSError:
            os.truncate(self._file_path, size)
            raise


def _storage(path: Path) -> JournalStorage:
    """The journal at `path`, without a last line that has no end."""
    with path.open("a+b") as file:
        file.seek(0)
        whole, end, _ = file.read().rpartition(b"\n")
        file.truncate(len(whole + end))
    try:
        return JournalStorage(Journal(str(path), Held()))
    except ValueError as error:
        problem = f"a line is damaged ({error})"
        raise EBMError(f"{path}: {problem}; without {path.parent} the study begins anew") from None


def _key(study: optuna.Study, settings: Mapping[str, Any]) -> str:
    """The key of a study, which is begun if it has none yet."""
    attributes = study.user_attrs
    if "key" not in attributes:
        study.set_user_attr("settings", settings)
        study.set_user_attr("key", uuid.uuid4().hex)
        return study.user_attrs["key"]
    begun = attributes["settings"]
    changed = [name for name in settings if settings[name] != begun.get(name)]
    if changed:
        raise EBMError(
            f"study {study.study_name} began with another {' and '.join(changed)}; --study NAME "
            f"begins a new one, and without .sweeps/{study.study_name} this one begins anew"
        )
    return attributes["key"]


def _suggest(trial: optuna.Trial, dimension: Any) -> str:
    if not isinstance(dimension, Range):
        return trial.suggest_categorical(dimension.key, dimension.options)
    suggest = trial.suggest_int if dimension.whole else trial.suggest_float
    number = suggest(dimension.key, dimension.low, dimension.high, log=dimension.log)
    return dimension.text(number)


def _text(dimension: Any, value: Any) -> str:
    return dimension.text(value) if isinstance(dimension, Range) else value
