"""The stage graph, and what of it is stale, as DVC sees it. The only module that imports DVC.

`dvc.yaml` is the one place where stages and their dependencies are written. It is read here by
DVC's Python interface (once imported, ten times faster than its command line) and becomes plain
objects, from which the runner and the Prefect flow schedule stages.
"""

import contextlib
import difflib
import fnmatch
import graphlib
import json
import logging
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from dvc.exceptions import DvcException
from dvc.repo import Repo, lock_repo

from ebm import EBMError
from pipelines import ROOT

IN_PLACE = {"dump", "_edit_rwlock"}
"""The functions in which DVC overwrites files of its own."""

DEAF = {"match"}
"""Compares the names of parameters for DVC (dpath), and swallows whatever is raised meanwhile."""

RESTORED = 64
"""The exit code of `reproduce` where the command did not run, because DVC had its outputs."""


@dataclass(frozen=True)
class Stage:
    """One command of the graph.

    Attributes:
        name: as `dvc repro` in the root of the repository wants it.
        cmd: its command line (or several, one a line).
        upstream: the names of the stages whose outputs it reads.
        stale: DVC finds it changed, or something upstream of it.
        timeout: seconds within which it has to end, if `meta: {timeout: ...}` limits it.
        retries: how often it is tried again when it fails, from `meta: {retries: ...}`.
        gpu: it uses a GPU where there is one, says `meta: {gpu: true}`.
        params: the keys of parameters that it depends on.
        outs: what it writes, as paths from the root.
    """

    name: str
    cmd: str
    upstream: tuple[str, ...]
    stale: bool
    timeout: float | None = None
    retries: int = 0
    gpu: bool = False
    params: tuple[str, ...] = ()
    outs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Stages in an order in which they can run: upstream first, level by level."""

    stages: tuple[Stage, ...]

    @property
    def stale(self) -> tuple[Stage, ...]:
        """Those that may have to run. A downstream stage among them whose inputs come out as
        they were is skipped by DVC when its turn comes."""
        return tuple(stage for stage in self.stages if stage.stale)


def plan(targets: Sequence[str] = (), root: Path = ROOT) -> Plan:
    """The stages that `targets` need, and which of them are stale.

    Args:
        targets: names of stages (`train@meg-rings`), of groups (`train`), patterns (`*@meg-*`, in
            which no `*` is a `/`) or paths of `dvc.yaml` files, from the root. None: the
            `dvc.yaml` of the root, as for DVC.
        root: the root of a DVC repository; the current directory does not matter.

    Raises:
        EBMError: DVC cannot read the graph, something else holds its files, or an unknown target.
    """
    with _plain_errors(), Repo(str(root), _wait_for_lock=True) as repo, lock_repo(repo):
        _mend(repo)
        graph = repo.index.graph
        found = {_name(stage): stage for stage in graph if stage.cmd}
        # A frozen stage is cut off from what it depends on, as in `dvc repro`.
        upstream = {
            name: [_name(dep) for dep in graph.successors(stage) if dep.cmd and not stage.frozen]
            for name, stage in found.items()
        }
        needed = _with_upstream(_matching(targets or ["dvc.yaml"], found), upstream)
        stages: dict[str, Stage] = {}
        for name in graphlib.TopologicalSorter(needed).static_order():
            stale = any(stages[dep].stale for dep in needed[name]) or bool(found[name].status())
            stages[name] = _stage(name, found[name], tuple(needed[name]), stale)
    return Plan(tuple(stages.values()))


def reproducer() -> Callable[[str, bool], int]:
    """`reproduce`, when all that DVC imports on its first use is imported (a second of work)."""
    with contextlib.suppress(DvcException), Repo() as repo:  # `reproduce` would report it
        _ = repo.index.graph
    return reproduce


def reproduce(name: str, force: bool) -> int:
    """Do in this process what `dvc --wait-for-lock repro --single-item` does; its exit code.

    It is RESTORED where DVC ran no command: the outputs were in its cache, or are as they have to
    be because what is upstream came out as it was. The root of the repository has to be the
    current directory. A process may call this once, in its main thread: DVC keeps its locks by
    process.
    """
    for number in (signal.SIGINT, signal.SIGALRM):
        signal.signal(number, _give_up_unless_there_is_a_result)
    for chatty in ("dvc.dvcfile", "dvc.repo.scm_context"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        with _plain_errors(), Repo(_wait_for_lock=True) as repo:
            repo.reproduce(name, single_item=True, force=force)
    except EBMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0 if _command_has_ended() else RESTORED


def _command_has_ended() -> bool:
    """Whether the stage's command, the only child that DVC starts, has run in this process."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss > 0


def _give_up_unless_there_is_a_result(_: int, frame: FrameType | None) -> None:
    """Handle SIGINT while DVC itself is at work; while it waits for the command, it ignores it.

    When the command has ended, its result is recorded first, which takes a moment. Files of its
    own that DVC overwrites in place (`dvc.lock`, its table of locks) are written to the end, and
    where an exception would be lost none is raised.
    """
    if _command_has_ended():
        return
    if (IN_PLACE | DEAF) & {caller.f_code.co_name for caller, _ in traceback.walk_stack(frame)}:
        signal.setitimer(signal.ITIMER_REAL, 0.001)  # SIGALRM: again in a moment
        return
    raise KeyboardInterrupt


def _mend(repo: Repo) -> None:
    """Remove DVC's table of locks if it is broken, with which DVC would do nothing ever again.

    A process that is killed while it overwrites it leaves it so. To be called by who holds the
    repository's lock: then nobody writes it, and those who did are gone.
    """
    table = Path(repo.tmp_dir, "rwlock")
    try:
        json.loads(table.read_text())
    except FileNotFoundError:
        return
    except ValueError:
        table.unlink()


def _name(stage: Any) -> str:
    """DVC's own `addressing` is relative to the current directory; this is to the root."""
    path, name = stage.path_in_repo, getattr(stage, "name", None)
    if name is None:
        return path
    return name if path == "dvc.yaml" else f"{path}:{name}"


def _matching(targets: Sequence[str], found: Mapping[str, Any]) -> list[str]:
    matching = []
    for target in targets:
        matched = [
            name
            for name, stage in found.items()
            if target in (name.partition("@")[0], stage.path_in_repo)
            or (name.count("/") == target.count("/") and fnmatch.fnmatchcase(name, target))
        ]
        if not matched:
            raise EBMError(f"no stage matches {target!r}{_suggestion(target, found)}")
        matching += matched
    return matching


def _suggestion(target: str, names: Mapping[str, Any]) -> str:
    groups = {name.partition("@")[0] for name in names}
    close = difflib.get_close_matches(target, sorted({*names, *groups}), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _with_upstream(
    names: Sequence[str], upstream: Mapping[str, list[str]]
) -> dict[str, list[str]]:
    """The part of `upstream` that `names` need, in the order of `upstream`."""
    needed, unseen = set(), list(names)
    while unseen:
        if (name := unseen.pop()) not in needed:
            needed.add(name)
            unseen += upstream[name]
    return {name: deps for name, deps in upstream.items() if name in needed}


def _stage(name: str, stage: Any, upstream: tuple[str, ...], stale: bool) -> Stage:
    cmd = stage.cmd if isinstance(stage.cmd, str) else "\n".join(stage.cmd)
    meta = stage.meta or {}
    timeout, retries, gpu = meta.get("timeout"), meta.get("retries", 0), meta.get("gpu", False)
    if not (timeout is None or (isinstance(timeout, int | float) and timeout > 0)):
        raise EBMError(f"dvc.yaml: {name}: meta.timeout: {timeout!r} is not a number of seconds")
    if not (isinstance(retries, int) and retries >= 0):
        raise EBMError(f"dvc.yaml: {name}: meta.retries: {retries!r} is not a number of times")
    if not isinstance(gpu, bool):
        raise EBMError(f"dvc.yaml: {name}: meta.gpu: {gpu!r} is neither true nor false")
    params = tuple(key for dep in stage.deps for key in getattr(dep, "params", ()))
    outs = tuple(os.path.relpath(out.fs_path, stage.repo.root_dir) for out in stage.outs)
    return Stage(name, cmd, upstream, stale, timeout, retries, gpu, params, outs)


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Turn DVC's errors, and the system's, into one line."""
    try:
        yield
    except (DvcException, OSError) as error:
        chain: list[str] = []
        cause: BaseException | None = error
        while cause:
            chain += [" ".join(str(cause).split())]
            cause = cause.__cause__
        if "dvc.lock'" in chain[0]:
            chain += ["remove it or `git checkout` it; results come back from DVC's cache"]
        raise EBMError(": ".join(chain)) from error
