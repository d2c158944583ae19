"""The stage graph, and what of it is stale, as DVC sees it. The only module that imports DVC.

`dvc.yaml` is the one place where stages and their dependencies are written. It is read here by
DVC's Python interface (once imported, ten times faster than its command line) and becomes plain
objects, from which the runner and the Prefect flow schedule stages.
"""

import contextlib
import fnmatch
import gc
import graphlib
import json
import logging
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from dvc import dvcfile
from dvc.exceptions import CheckoutError, DvcException
from dvc.lock import LockError
from dvc.repo import Repo, lock_repo
from dvc.scm import map_scm_exception
from dvc.utils.serialize import dumps_yaml, load_yaml, modify_yaml, parse_yaml

from ebm import EBMError, did_you_mean, files
from pipelines import ROOT
from pipelines.stage import CODE
from pipelines.supervise import restart_clock

IN_PLACE = {"dump", "_edit_rwlock"}
"""The functions in which DVC overwrites files of its own."""

DEAF = {"match"}
"""Compares the names of parameters for DVC (dpath), and swallows whatever is raised meanwhile."""

RESTORED = 64
"""The exit code of `reproduce` where the command did not run, because DVC had its outputs."""

LOCK_HEAD = "schema: '2.0'\nstages:\n"
LOCK_ENTRY = re.compile(r"^(?=  \S)", re.MULTILINE)
"""A `dvc.lock` begins with the former, each of its entries where the latter matches."""

WRITTEN_BY_DVC = {"dvc.lock", ".gitignore"}
PATIENCE_SECONDS = 1.0
"""Between two looks at whether files are free that another run works on."""

T = TypeVar("T")

Entry = dict[str, Any]
"""What stands in `dvc.lock` of a stage: its command and the checksums of what it read and made."""


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
        portable: DVC's remote can carry what it makes, and what it reads, between machines.
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
    portable: bool = True


@dataclass(frozen=True)
class Plan:
    """Stages in an order in which they can run: upstream first, level by level."""

    stages: tuple[Stage, ...]

    @property
    def stale(self) -> tuple[Stage, ...]:
        """Stages that may have to run. DVC skips a downstream one when its turn comes, if its
        inputs have come out as they were."""
        return tuple(stage for stage in self.stages if stage.stale)


def plan_when_free(
    targets: Sequence[str] = (), root: Path = ROOT, made_elsewhere: bool = False
) -> Plan:
    """`plan`, once nobody else is at work on the files."""
    return _when_free(lambda: plan(targets, root, made_elsewhere))


def plan(targets: Sequence[str] = (), root: Path = ROOT, made_elsewhere: bool = False) -> Plan:
    """The stages that `targets` need, and which of them are stale.

    Args:
        targets: names of stages (`train@meg-rings`), of groups (`train`), patterns (`*@meg-*`, in
            which no `*` is a `/`) or paths of `dvc.yaml` files, from the root. None: the
            `dvc.yaml` of the root, as for DVC.
        root: the root of a DVC repository; the current directory does not matter.
        made_elsewhere: outputs are in the remote, and need not be here: what is stale is told by
            `dvc.lock` and by what no stage makes.

    Raises:
        EBMError: DVC cannot read the graph, something else holds its files, or an unknown target.
    """
    with (
        _uncollected(),
        _plain_errors(),
        Repo(str(root), _wait_for_lock=True) as repo,
        lock_repo(repo),
    ):
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
            above = [stages[dep] for dep in needed[name]]
            changed = _outdated(found[name], graph) if made_elsewhere else found[name].status()
            stale = any(stage.stale for stage in above) or bool(changed)
            portable = all(stage.portable for stage in above) and _is_portable(found[name])
            stages[name] = _stage(name, found[name], tuple(needed[name]), stale, portable)
    return Plan(tuple(stages.values()))


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
        with _plain_errors(), Repo(_wait_for_lock=True) as repo:
            repo.reproduce(name, single_item=True, force=force)

    _prepare_process()
    try:
        _when_free(work)
    except EBMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0 if _command_has_ended() else RESTORED


def _when_free(act: Callable[[], T]) -> T:
    """What `act` returns, tried again as long as another run is at work on the same files. DVC
    forgets runs that were killed."""
    told = False
    while True:
        try:
            return act()
        except EBMError as error:
            if (who := _blockers(error)) is None:
                raise
        if not told:
            print(f"waiting for another run at work on the same files: {who}", file=sys.stderr)
        told = True
        time.sleep(PATIENCE_SECONDS)
        restart_clock()


def _blockers(error: BaseException | None) -> str | None:
    """Who has the files, in DVC's words, if that is what an error comes from."""
    if isinstance(error, LockError):
        found = re.search(r"blocked by:(.*?)(\n\n|$)", str(error), re.DOTALL)
        return " ".join((found[1] if found else str(error)).split())
    return None if error is None else _blockers(error.__cause__)


def _command_has_ended() -> bool:
    """Whether the stage's command, the only child that DVC starts, has run in this process."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss > 0


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
        with _plain_errors(), Repo(_wait_for_lock=True) as repo:
            _check_commit(repo, asked["commit"])
            with _lent(repo, asked["entries"] or {}):
                _carry(repo, name, force)
                return _entries([name], Path(repo.root_dir))[name]

    _prepare_process()
    try:
        answer = {"entry": _when_free(work)}
    except EBMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    file.write_text(json.dumps(answer), encoding="utf-8")
    return 0 if _command_has_ended() else RESTORED


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


@contextlib.contextmanager
def _lent(repo: Repo, entries: Mapping[str, Entry | None]) -> Iterator[None]:
    """Within this context, `entries` stand in `dvc.lock` (None: nothing does for that stage)."""
    with lock_repo(repo):
        _mend(repo)
        before = _amend(entries, Path(repo.root_dir))
    try:
        yield
    finally:
        with lock_repo(repo):
            _amend(before, Path(repo.root_dir))


def commit(root: Path = ROOT) -> str:
    """The commit that this clone stands at, and workers' clones have to stand at too.

    Raises:
        EBMError: they could not work for it: something is changed and not committed, or there is
            no remote to exchange results through.
    """
    with _plain_errors(), Repo(str(root), _wait_for_lock=True) as repo:
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
    new one among the code."""
    staged, unstaged, untracked = repo.scm.status(untracked_files="all")
    new = [name for name in untracked if Path(name).parts[0] in CODE]
    made = [Path(out.fs_path) for out in repo.index.outs]
    for name in sorted({*unstaged, *new, *(name for names in staged.values() for name in names)}):
        file = Path(repo.root_dir, name)
        if file.name not in WRITTEN_BY_DVC and not any(file.is_relative_to(out) for out in made):
            return name
    return None


def entries(names: Sequence[str], root: Path = ROOT) -> dict[str, Entry | None]:
    """What stands in the `dvc.lock` files of these stages: plain data; None if nothing does."""
    with _plain_errors():
        return _entries(names, root)


def record(name: str, entry: Entry, root: Path = ROOT) -> None:
    """Put into `dvc.lock` what was made of a stage in another clone.

    Its outputs are in the remote. What lies of them here is as it was, until `dvc pull`.
    """
    with _plain_errors(), Repo(str(root), _wait_for_lock=True) as repo, lock_repo(repo):
        _amend({name: entry}, root)


def _entries(names: Sequence[str], root: Path) -> dict[str, Entry | None]:
    locks: dict[Path, Any] = {}
    found = {}
    for name in names:
        file, key = _place(name, root)
        if file not in locks:
            locks[file] = load_yaml(file).get("stages", {}) if file.exists() else {}
        found[name] = locks[file].get(key)
    return found


def _amend(entries: Mapping[str, Entry | None], root: Path) -> dict[str, Entry | None]:
    """Put entries into `dvc.lock`, or take them out; what stood there before. A reader sees the
    old file or the new one. To be called by who holds the repository's lock."""
    by_file: dict[Path, dict[str, str]] = defaultdict(dict)
    for name in entries:
        file, key = _place(name, root)
        by_file[file][key] = name
    before: dict[str, Entry | None] = {}
    for file, names in by_file.items():
        with _lock_opened(file) as lock:
            stages = lock.setdefault("stages", {})
            before |= {name: stages.get(key) for key, name in names.items()}
            for key, name in names.items():
                if entries[name] is None:
                    stages.pop(key, None)
                elif entries[name] != before[name]:
                    stages[key] = entries[name]
        if not stages:
            file.unlink(missing_ok=True)
    return before


@contextlib.contextmanager
def _modified(path: str, fs: Any = None) -> Iterator[Any]:
    """DVC's `modify_yaml`, which parses and writes all of a long `dvc.lock` in Python after every
    stage: seconds, to keep the layout of what did not change."""
    with _lock_opened(Path(path)) if path.endswith(".lock") else modify_yaml(path, fs) as content:
        yield content


@contextlib.contextmanager
def _lock_opened(file: Path) -> Iterator[dict[str, Any]]:
    """What stands in a `dvc.lock`; what is other when the context is left is written, as a whole
    or not at all. Entries that are the objects that they were keep their text."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    lock = parse_yaml(text, file) or {"schema": "2.0"}
    before = dict(lock.get("stages", {}))
    yield lock
    head, *texts = LOCK_ENTRY.split(text)
    whole = head == LOCK_HEAD and text.endswith("\n")  # no full disk has cut it off
    if not whole or list(lock) != ["schema", "stages"] or len(texts) != len(before):
        files.replace(file, dumps_yaml(lock).encode())
        return
    known = dict(zip(before, texts, strict=True))
    parts = [
        known[key] if entry is before.get(key) else _entry_text(key, entry)
        for key, entry in lock["stages"].items()
    ]
    files.replace(file, "".join([head, *parts]).encode())


def _entry_text(key: str, entry: Entry) -> str:
    return dumps_yaml({"stages": {key: entry}}).removeprefix("stages:\n")


def _place(name: str, root: Path) -> tuple[Path, str]:
    """The lock file that a stage's entry stands in, and its key there."""
    path, _, key = name.rpartition(":")
    return root / Path(path or "dvc.yaml").with_suffix(".lock"), key


def _outdated(stage: Any, graph: Any) -> bool:
    """Whether `dvc.lock` and what no stage makes say that a stage has to run.

    A dependency that is an output of another stage is judged by the entries of both. What is
    only a part of one, or holds several (`models`), is judged by what lies here, and counts as
    changed as long as that is not what the entries say.
    """
    if stage.changed_stage() or stage.is_callback or stage.always_changed:
        return True
    if not all(out.hash_info for out in stage.outs):
        return True  # it has never run, or not with this output
    made = {out.fs_path: out for source in graph.successors(stage) for out in source.outs}
    return not stage.frozen and any(_differs(dep, made) for dep in stage.deps)


def _differs(dep: Any, made: Mapping[str, Any]) -> bool:
    if dep.fs_path in made:
        return dep.hash_info != made[dep.fs_path].hash_info
    overlapping = [out for path, out in made.items() if _overlap(Path(path), Path(dep.fs_path))]
    return bool(dep.status()) or any(out.workspace_status() for out in overlapping)


def _overlap(one: Path, other: Path) -> bool:
    return one.is_relative_to(other) or other.is_relative_to(one)


def _is_portable(stage: Any) -> bool:
    """Whether all that a stage makes goes through DVC's cache into its remote."""
    return bool(stage.outs) and all(out.use_cache and out.can_push for out in stage.outs)


def _prepare_process() -> None:
    """What `reproduce` and `travel` need of the process that they have for themselves."""
    for number in (signal.SIGINT, signal.SIGALRM):
        signal.signal(number, _give_up_unless_there_is_a_result)
    dvcfile.modify_yaml = _modified
    for chatty in ("dvc.dvcfile", "dvc.repo.scm_context"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def _give_up_unless_there_is_a_result(_: int, frame: FrameType | None) -> None:
    """Handle SIGINT while DVC itself is at work; while it waits for the command, it ignores it.

    When the command has ended, its result is recorded first, which takes a moment. Files of its
    own that DVC overwrites in place (`dvc.lock`, its table of locks) are written to the end, and
    where an exception would be lost none is raised.
    """
    if _command_has_ended():
        return
    if uninterruptible(frame):
        signal.setitimer(signal.ITIMER_REAL, 0.001)  # SIGALRM: again in a moment
        return
    raise KeyboardInterrupt


def uninterruptible(frame: FrameType | None) -> bool:
    """Whether a signal found DVC where an exception would be lost, or leave half a file."""
    names = {caller.f_code.co_name for caller, _ in traceback.walk_stack(frame)}
    return not names.isdisjoint(IN_PLACE | DEAF)


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
            names = {*found, *(name.partition("@")[0] for name in found)}
            raise EBMError(f"no stage matches {target!r}{did_you_mean(target, names)}")
        matching += matched
    return matching


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


def _stage(name: str, stage: Any, upstream: tuple[str, ...], stale: bool, portable: bool) -> Stage:
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
    return Stage(
        name, cmd, upstream, stale, timeout, retries, gpu, params, outs, portable=portable
    )


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Spare Python the search for garbage within this context, a tenth of the time of a plan: of
    the many objects that DVC makes of a graph, all live as long as the graph."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Turn DVC's errors, git's and the system's into one line."""
    try:
        with map_scm_exception():
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
