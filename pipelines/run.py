"""`python -m pipelines.run -j 4`: what `dvc repro` would run, independent stages side by side.

DVC decides what is stale and records what was done. This module decides when a stage starts: as
soon as all that it depends on is done and one of the `-j` places is free. It needs no server. What
a stage prints is shown with its name in front, and kept in `.checkpoints/logs/`.
"""

import argparse
import os
import re
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ebm import EBMError
from pipelines import ROOT, dag, gpu, timeline
from pipelines.commands import LAST_LINES, cores, guarded, our_python, positive, show
from pipelines.dag import Plan, Stage
from pipelines.reproduce import RESTORED
from pipelines.supervise import Launcher
from pipelines.timeline import Result

KEPT_BYTES = str(1 << 30)  # more than any tensor takes here
BY = "python -m pipelines.run"
NOTHING_TO_DO = "nothing to do: every stage is up to date"


class StageFailed(EBMError):
    """A stage did not succeed. `lines` are the last ones that it wrote."""

    def __init__(self, reason: str, lines: Sequence[str] = ()) -> None:
        super().__init__(reason)
        self.lines = tuple(lines)


def schedule(
    stages: Sequence[Stage],
    work: Callable[[Stage], Result],
    pool: ThreadPoolExecutor,
    jobs: int,
    keep_going: bool = True,
    gpus: int = 0,
) -> Iterator[Result]:
    """Do the work of each stage once its upstream stages are done; yield results as they come.

    When several could start, the first in `stages` does. None ever waits inside the pool, where it
    would occupy a place.

    Args:
        stages: upstream before downstream. What is upstream but not among them counts as done.
        work: what is to be done for a stage, in a thread of the pool.
        pool: has at least `jobs` threads.
        jobs: how many stages may run at once.
        keep_going: after a failure, go on with what does not depend on the failed stage.
        gpus: how many of those that use a GPU may run at once; 0: as many as of the others,
            because there is no GPU to wait for.
    """

    def has_place(stage: Stage) -> bool:
        cards_taken = sum(other.gpu for other in running.values())
        return len(running) < jobs and not (stage.gpu and gpus and cards_taken >= gpus)

    waiting, unfinished = list(stages), {stage.name for stage in stages}
    running: dict[Future[Result], Stage] = {}
    blame: dict[str, str] = {}  # what will not be done -> the stage whose failure is the reason
    while waiting or running:
        for stage in tuple(waiting):
            culprits = [blame[name] for name in blame if name in stage.upstream or not keep_going]
            if culprits:
                waiting.remove(stage)
                blame[stage.name] = culprits[0]
                yield Result(stage.name, "skipped", reason=f"{culprits[0]} failed")
            elif has_place(stage) and unfinished.isdisjoint(stage.upstream):
                waiting.remove(stage)
                running[pool.submit(work, stage)] = stage
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            unfinished.remove(running.pop(future).name)
            result = future.result()
            if result.outcome != "done":
                blame[result.stage] = result.stage
            yield result


def reproduce(
    stage: Stage,
    launcher: Launcher,
    log: Path,
    show: Callable[[str], None],
    force: bool,
    *more: str,
) -> bool:
    """Let DVC run a stage, once; show and keep what it prints. True if DVC restored it instead.

    The launcher's target is given `more`.

    Raises:
        StageFailed: it failed, took too long or was cancelled.
    """
    tail: deque[str] = deque(maxlen=LAST_LINES)
    process = launcher.start(stage.name, force, *more, timeout=stage.timeout)
    keep = Log(log, show)
    keep.write(f"-- {time.strftime('%Y-%m-%d %H:%M:%S')}, process {os.getpid()}")
    for line in process.lines():
        tail.append(line)
        show(line)
        keep.write(line)
    ended = process.wait()
    if ended.code not in (0, RESTORED):
        raise StageFailed(str(ended), tail)
    return ended.code == RESTORED


@dataclass
class Log:
    """Lines at the end of a file, to which another run may be writing too, as long as that is
    possible: a full disk, of which it tells once, fails no stage."""

    path: Path
    tell: Callable[[str], None]
    broken: bool = False

    def write(self, line: str) -> None:
        if self.broken:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")
        except OSError as error:
            self.broken = True
            self.tell(f"the log ends here: {error}")


def log_path(stage: Stage, root: Path) -> Path:
    """Where the output of a stage is kept."""
    folder = root / ".checkpoints" / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{re.sub(r'[^a-zA-Z0-9@._-]', '_', stage.name)}.log"


def start_launcher(
    root: Path, target: str = "pipelines.reproduce:reproducer", **extra: str
) -> Launcher:
    """What starts stages in a DVC repository, and ends those that run when its context is left.

    In the stages' environment, `python` is the one that runs us, nothing phones home and glibc
    keeps the memory of large tensors for the next ones (anew from the system it comes a page at a
    time) unless something else was asked for, and `extra` is added.
    """
    quiet = {"DVC_NO_ANALYTICS": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    keeping = {"MALLOC_MMAP_THRESHOLD_": KEPT_BYTES, "MALLOC_TRIM_THRESHOLD_": KEPT_BYTES}
    changed = {**our_python(), "PYTHONUNBUFFERED": "1", **extra}
    return Launcher(target, root, {**quiet, **keeping, **os.environ, **changed})


def run(
    targets: Sequence[str] = (),
    jobs: int | None = None,
    force: bool = False,
    keep_going: bool = True,
    root: Path = ROOT,
) -> bool:
    """Run what is stale (with `force`: everything) of what `targets` need; True if all succeeded.

    Args:
        targets: as for `dag.plan`.
        jobs: how many stages may run at once; None: one for each core.
        force: run the stages even if DVC finds nothing changed.
        keep_going: after a failure, go on with what does not depend on the failed stage.
        root: the DVC repository.
    """
    jobs, started = jobs or cores(), time.time()
    plan = dag.plan_when_free(targets, root)
    stages = plan.stages if force else plan.stale
    if not stages:
        return nothing_to_do(BY, targets, plan, started, root)
    show(f"{len(stages)} of {len(plan.stages)} stages to run, {jobs} at a time")
    results: list[Result] = []
    with ThreadPoolExecutor(jobs) as pool, start_launcher(root) as launcher:

        def work(stage: Stage) -> Result:
            return attempt(stage, launcher, log_path(stage, root), force)

        for result in schedule(stages, work, pool, jobs, keep_going, gpu.count()):
            results.append(result)
            show(f"[{len(results)}/{len(stages)}] {result}")
    if failed := failures(results):
        show(failed)
    keep_timeline(timeline.rebuild(BY, targets, plan, results, started), root)
    show(tally(results, time.time() - started))
    return all(result.outcome == "done" for result in results)


def nothing_to_do(
    by: str, targets: Sequence[str], plan: Plan, started: float, root: Path = ROOT
) -> bool:
    """A run `by` a command of a plan of which nothing is stale; True, for it succeeds."""
    keep_timeline(timeline.rebuild(by, targets, plan, [], started), root)
    show(NOTHING_TO_DO)
    return True


def keep_timeline(last: timeline.Rebuild, root: Path) -> None:
    """Write down what a run did. That this is impossible, on a full disk, makes it no failure."""
    try:
        timeline.write(last, root)
    except OSError as error:
        show(f"no timeline: {error}")


def attempt(stage: Stage, launcher: Launcher, log: Path, force: bool) -> Result:
    """Run a stage, again if it fails as often as it allows, and say so."""
    begun = begin(stage)
    show(f"start {stage.name}")
    retries = stage.retries
    while True:
        try:
            restored = reproduce(
                stage, launcher, log, lambda line: show(f"{stage.name} | {line}"), force
            )
            return begun("done", restored=restored)
        except StageFailed as failure:
            if not retries or launcher.cancelled:
                return begun("failed", reason=str(failure), lines=failure.lines)
            retries -= 1
            show(f"retry {stage.name}: {failure}")


def begin(stage: Stage) -> Callable[..., Result]:
    """Start the clock of a stage; what is returned stops it, and makes its result."""
    started, clock, here = time.time(), time.monotonic(), socket.gethostname()

    def end(outcome: Literal["done", "failed"], worker: str = here, **fields: Any) -> Result:
        seconds = time.monotonic() - clock
        return Result(stage.name, outcome, started, seconds, worker, **fields)

    return end


def failures(results: Sequence[Result]) -> str:
    """What failed, with its last lines; they scrolled by long ago. Empty if nothing did."""
    return "\n".join(
        "\n".join([str(result), *(f"    {line}" for line in result.lines)])
        for result in results
        if result.outcome == "failed"
    )


def tally(results: Sequence[Result], seconds: float) -> str:
    """How many stages ended how."""
    counts = Counter(result.outcome for result in results)
    told = ", ".join(f"{counts[kind]} {kind}" for kind in ("done", "failed", "skipped"))
    return f"{told} in {seconds:.1f} s"


def main(
    execute: Callable[..., bool] = run, grammar: argparse.ArgumentParser | None = None
) -> int:
    """The command line, for this runner or another one with the same arguments, or more."""
    options = (grammar or parser()).parse_args()

    def validated() -> bool:
        from ebm import params

        for file in sorted(_params_of(options.targets, ROOT)):
            params.load(file)
        return execute(**vars(options))

    return guarded(validated, stages=True)


def _params_of(targets: Sequence[str], root: Path) -> set[Path]:
    """The `params.yaml` beside each `dvc.yaml` that the targets name; else that of the root."""
    graphs = [Path(target.partition(":")[0]) for target in targets]
    folders = [graph.parent if graph.name == "dvc.yaml" else Path() for graph in graphs]
    files = {root / folder / "params.yaml" for folder in folders or [Path()]}
    return {file for file in files if file.parent == root or file.exists()}


def parser() -> argparse.ArgumentParser:
    """The command line's grammar; the names are those of the arguments of `run`."""
    parser = argparse.ArgumentParser(description="Run the stale stages of dvc.yaml in parallel.")
    parser.add_argument(
        "targets",
        nargs="*",
        help="stages (train@NAME), groups (train), patterns ('*@meg-*'); with all they need",
    )
    parser.add_argument("-j", "--jobs", type=positive, help="stages at a time (default: cores)")
    parser.add_argument("-f", "--force", action="store_true", help="run them even if unchanged")
    parser.add_argument(
        "-k",
        "--keep-going",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="after a failure, go on with what does not depend on it (default: yes)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
