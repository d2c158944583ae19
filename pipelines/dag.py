"""The stage graph, and what of it is stale, as DVC sees it.

`dvc.yaml` is the one place where stages and their dependencies are written. It is read here by
DVC's Python interface (once imported, ten times faster than its command line) and becomes plain
objects, from which the runner and the Prefect flow schedule stages.
"""

import contextlib
import fnmatch
import gc
import graphlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvc.repo import lock_repo

from ebm import EBMError, did_you_mean
from pipelines import ROOT
from pipelines.repository import mend, opened, unmade, when_free


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
    return when_free(lambda: plan(targets, root, made_elsewhere))


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
    with _uncollected(), opened(root) as repo, lock_repo(repo):
        mend(repo)
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


def sources(names: Collection[str], root: Path = ROOT) -> dict[str, str]:
    """The checksums of what these stages read and no stage makes, their code, by path from the
    root; parameters are not among it."""
    with opened(root) as repo, lock_repo(repo):
        own = [stage for stage in repo.index.stages if stage.cmd and _name(stage) in names]
        deps = [dep for dep in unmade(repo, own) if not hasattr(dep, "params")]
        return {os.path.relpath(dep.fs_path, repo.root_dir): dep.get_hash().value for dep in deps}


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


def _name(stage: Any) -> str:
    """DVC's own `addressing` is relative to the current directory; this is to the root."""
    path, name = stage.path_in_repo, getattr(stage, "name", None)
    if name is None:
        return path
    return name if path == "dvc.yaml" else f"{path}:{name}"


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


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Spare Python the search for garbage within this context, a tenth of the time of a plan: of
    the many objects that DVC makes of a graph, all live as long as the graph."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
