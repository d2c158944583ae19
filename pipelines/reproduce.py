"""One stage, run as DVC runs it: in this clone, or in one of many that share a remote."""

import contextlib
import json
import logging
import resource
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from dvc import dvcfile
from dvc.exceptions import CheckoutError, DvcException
from dvc.repo import Repo
from dvc.stage import Stage

from ebm import EBMError
from pipelines import ROOT, ended
from pipelines.commands import uninterruptible
from pipelines.lockfile import Entry, entries, lent, modified
from pipelines.places import checkpoints
from pipelines.provenance import CODE
from pipelines.repository import opened, unmade, when_free

RESTORED = 64
"""The exit code of `reproduce` where the command did not run, because DVC had its outputs."""

INTERRUPTED = threading.Event()
"""Set by SIGINT before the command has begun: should the exception be lost in what DVC does with
exceptions, the command does not begin."""

WRITTEN_BY_DVC = {"dvc.lock", ".gitignore"}


def reproducer() -> Callable[[str, bool], int]:
    """`reproduce`, when all that DVC imports on its first use is imported (a second of work)."""
    with contextlib.suppress(DvcException), Repo() as repo:  # `reproduce` would report it
        _ = repo.index.graph
    return reproduce


def reproduce(name: str, force: bool) -> int:
    """Do in this process what `dvc --wait-for-lock repro --single-item` does; its exit code.

    It is RESTORED where DVC ran no command: the outputs were in its cache, or are as they have to
    be because what is upstream came out as it was, or another run has made them while this one
    waited. The root of the repository has to be the current directory. A process may call this
    once, in its main thread: DVC keeps its locks by process.
    """

    def work() -> None:
        with opened() as repo:
            repo.reproduce(name, single_item=True, force=force)
        _clear(name)

    _prepare_process()
    try:
        when_free(work)
    except EBMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0 if _command_has_ended() else RESTORED


def traveller() -> Callable[[str, bool, str], int]:
    """`travel`, when all that DVC imports on its first use is imported."""
    reproducer()
    return travel


def travel(name: str, force: bool, job: str) -> int:
    """`reproduce` in one of many clones: pull what the stage reads, push what it makes.

    `job` is a JSON file with the `commit` that the clone has to stand at and the `entries` of
    `dvc.lock` that it may lack: its own and those of what is upstream, which others made. They
    are lent: when the stage is done, the clone's `dvc.lock` is as it was. (None: the stage runs
    where the flow does, and `dvc.lock` is its.) The file is replaced by the answer: the `entry` of
    the stage.
    """
    file = Path(job)
    asked = json.loads(file.read_text(encoding="utf-8"))

    def work() -> Entry | None:
        with opened() as repo:
            _check_commit(repo, asked["commit"])
            with lent(repo, asked["entries"] or {}):
                _carry(repo, name, force)
                _clear(name)
                return entries([name], Path(repo.root_dir))[name]

    _prepare_process()
    try:
        answer = {"entry": when_free(work)}
    except EBMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    file.write_text(json.dumps(answer), encoding="utf-8")
    return 0 if _command_has_ended() else RESTORED


def _clear(name: str) -> None:
    """What a stage that DVC has recorded needs no more."""
    kind, _, experiment = name.rpartition(":")[2].partition("@")
    if kind == "train":
        ended.clear(checkpoints(experiment))


def _carry(repo: Repo, name: str, force: bool) -> None:
    """Pull, reproduce, push. What lies in the way of what is pulled is a left-over."""
    (stage,) = repo.stage.collect(name)
    if sources := [source.addressing for source in repo.index.graph.successors(stage)]:
        try:
            repo.pull(sources, force=True)
        except CheckoutError as error:
            lost = ", ".join(error.target_infos)
            raise EBMError(f"not in the remote: {lost}; `dvc push` where it was made") from error
    repo.reproduce(name, single_item=True, force=force, pull=True)
    repo.push(name, run_cache=True)


def commit(root: Path = ROOT) -> str:
    """The commit that this clone stands at, and workers' clones have to stand at too.

    Raises:
        EBMError: they could not work for it: something is changed and not committed, or there is
            no remote to exchange results through.
    """
    with opened(root) as repo:
        repo.cloud.get_remote()
        if edited := _edited(repo):
            raise EBMError(f"{edited} is changed and not committed: no other clone would have it")
        return repo.scm.get_rev()


def _check_commit(repo: Repo, expected: str) -> None:
    found = repo.scm.get_rev()
    if found != expected:
        raise EBMError(f"{repo.root_dir} is at commit {found[:10]}, the flow at {expected[:10]}")
    if edited := _edited(repo):
        raise EBMError(f"{repo.root_dir}: {edited} is changed and not committed")


def _edited(repo: Repo) -> str | None:
    """A tracked file that differs from the commit, and not because DVC or a stage wrote it, or a
    new one among the code or in what a stage reads."""
    staged, unstaged, untracked = repo.scm.status(untracked_files="all")
    read = [Path(repo.root_dir, name) for name in CODE]
    read += [Path(dep.fs_path) for dep in unmade(repo, repo.index.stages)]
    new = [name for name in untracked if any(map(Path(repo.root_dir, name).is_relative_to, read))]
    made = [Path(out.fs_path) for out in repo.index.outs]
    for name in sorted({*unstaged, *new, *(name for names in staged.values() for name in names)}):
        file = Path(repo.root_dir, name)
        if file.name not in WRITTEN_BY_DVC and not any(file.is_relative_to(out) for out in made):
            return name
    return None


def _prepare_process() -> None:
    """What `reproduce` and `travel` need of the process that they have for themselves."""
    for number in (signal.SIGINT, signal.SIGALRM):
        signal.signal(number, _give_up_unless_there_is_a_result)
    dvcfile.modify_yaml = modified
    _enter_what_was_read()
    for chatty in ("dvc.dvcfile", "dvc.repo.scm_context"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def _enter_what_was_read() -> None:
    """Have DVC enter into `dvc.lock` what a stage depends on as it was when its command began, and
    not as it is when that has ended. What is edited meanwhile then makes the stage stale, and no
    result is one of parameters that it never saw."""
    run, save = Stage._run_stage, Stage.save_deps

    def begun(stage: Stage, dry: bool, force: bool, **kwargs: Any) -> None:
        if INTERRUPTED.is_set():
            raise KeyboardInterrupt
        if force:  # else DVC itself looks at once, for the sake of its run cache
            stage.save_deps()
        run(stage, dry, force, **kwargs)

    def saved(stage: Stage, *args: Any, **kwargs: Any) -> None:
        if not _command_has_ended():
            save(stage, *args, **kwargs)

    Stage._run_stage, Stage.save_deps = begun, saved


def _command_has_ended() -> bool:
    """Whether the stage's command, the only child that DVC starts, has run in this process."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss > 0


def _give_up_unless_there_is_a_result(_: int, frame: FrameType | None) -> None:
    """Handle SIGINT while DVC itself is at work; while it waits for the command, it ignores it.

    When the command has ended, its result is recorded first, which takes a moment. Files of its
    own that DVC overwrites in place are written to the end, and where an exception would be lost
    none is raised.
    """
    if _command_has_ended():
        return
    INTERRUPTED.set()
    if uninterruptible(frame):
        signal.setitimer(signal.ITIMER_REAL, 0.001)  # SIGALRM: again in a moment
        return
    raise KeyboardInterrupt
