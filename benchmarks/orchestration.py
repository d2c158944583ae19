"""What orchestration costs: `dvc repro`, the runner and the flow over the same stages, in turn.

    python -m benchmarks.orchestration

The stages are those of the toy repository of the tests, whose commands are Python scripts that do
nothing, or sleep for as long as they are told. Contenders take turns in every round; a ratio is
the time of `dvc repro` over that of the same round, so more is better. The flow has a server that
runs already. Measured are:

- a graph that is up to date, whole and by stage, that of the tests and the default one (if that
  is up to date here: nothing is trained for a benchmark);
- the same graph when every stage of it is stale and trivial, one at a time;
- independent trainings of known length, two at a time;
- as many single stages at once as one likes: `dvc.lock` has an entry for each of them afterwards,
  and DVC finds nothing to do.
"""

import argparse
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from pathlib import Path
from statistics import median

from ruamel.yaml import YAML

from benchmarks.timing import seconds
from pipelines import ROOT, dag, serve

sys.path.insert(0, str(ROOT / "tests"))

from toy_house import House

BIN = Path(sys.executable).parent
CONTENDERS = {
    "dvc repro": [str(BIN / "dvc"), "repro", "-q"],
    "runner": [sys.executable, "-m", "pipelines.run"],
    "flow": [sys.executable, "-m", "pipelines.flows"],
}


def timed(name: str, root: Path, *arguments: str) -> float:
    """Seconds of a command from start to end, which has to succeed."""
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    command = [*CONTENDERS[name], *(arguments if name != "dvc repro" else ())]

    def call(_: int) -> None:
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"{name} failed:\n{done.stdout}{done.stderr}")

    return seconds(call, 1)


def race(
    title: str, root: Path, stages: int, jobs: int, rounds: int, spoil: Callable[[], None]
) -> None:
    """Let the contenders do the same in turn, each time after `spoil`; print medians."""
    print(f"\n{title}", flush=True)
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name, taken in times.items():
            spoil()
            taken.append(timed(name, root, "-j", str(jobs)))
    for name, taken in times.items():
        ratios = [peer / own for peer, own in zip(times["dvc repro"], taken, strict=True)]
        each = f"{1000 * median(taken) / stages:6.0f} ms a stage"
        spread = f"{median(ratios):5.2f}x ({min(ratios):.2f} - {max(ratios):.2f})"
        print(f"  {name:10} {median(taken):7.2f} s {each}   {spread}", flush=True)


def up_to_date(house: House, rounds: int) -> None:
    """Nothing to do, in the toy's graph and in the default one."""
    stages = len(dag.plan(root=house.root).stages)
    race(f"Up to date, {stages} stages", house.root, stages, 1, rounds, lambda: None)
    plan = dag.plan()
    if plan.stale:
        print(f"\nThe default graph: {len(plan.stale)} stages are not up to date here, left out")
        return
    stages = len(plan.stages)
    race(f"Up to date, the default graph, {stages} stages", ROOT, stages, 1, rounds, lambda: None)


def trivial(house: House, rounds: int) -> None:
    """Every stage has to run, and does next to nothing."""
    stages = len(dag.plan(root=house.root).stages)
    title = f"Trivial, {stages} stages, one at a time"
    race(title, house.root, stages, 1, rounds, lambda: change(house, "seed"))


def side_by_side(house: House, trainings: int, length: float, rounds: int) -> None:
    """Trainings that do not depend on each other, two at a time."""
    for number in range(trainings):
        house.tell(f"train@e{number}", seconds=length)
    ideal = trainings * length
    title = (
        f"{trainings} trainings of {length:g} s, two at a time; the stages downstream of them are "
        f"trivial (one after another {ideal:g} s, at best {ideal / 2:g} s)"
    )
    race(title, house.root, trainings, 2, rounds, lambda: change(house, "steps"))


def at_once(house: House, count: int) -> None:
    """Single stages, all at the same time; what is lost of what they did."""
    print(f"\n{count} single-stage runs at once", flush=True)
    house.edit("dvc.yaml", "timeout: 60", "timeout: 3600")  # all but one wait for DVC's lock
    for number in range(count):
        house.tell(f"train@e{number}", seconds=1.0)
    taken = timed("runner", house.root, "-j", str(count), "train")
    lock = YAML(typ="safe").load(house.root / "dvc.lock")
    entries = sum(name.startswith("train@") for name in lock["stages"])
    changed = sum(name.startswith("train@") for name in house.status())
    print(
        f"  {taken:.1f} s, up to {busiest(house)} commands at the same moment; entries in "
        f"dvc.lock: {entries} of {count}; of these changed, says dvc status: {changed}"
    )


def busiest(house: House) -> int:
    """How many trainings ran at the same moment, at most."""
    steps = {"start": 1, "end": -1}
    events = sorted((when, steps[e]) for e, stage, when, _ in house.events("start", "end"))
    return max(accumulate(step for _, step in events))


def change(house: House, parameter: str) -> None:
    """Another value of a parameter, wherever it stands."""
    path = house.root / "params.yaml"
    text = re.sub(rf"{parameter}: \d+", f"{parameter}: {time.time_ns()}", path.read_text())
    path.write_text(text)


@contextmanager
def built(experiments: int) -> Iterator[House]:
    """A toy repository in which no stage has run."""
    with tempfile.TemporaryDirectory() as folder:
        yield House.build(Path(folder, "house"), [f"e{k}" for k in range(experiments)])


@contextmanager
def server() -> Iterator[None]:
    """Within this context, flows find a Prefect server of their own."""
    with ExitStack() as stack:
        stack.enter_context(serve.only_here())
        os.environ["PREFECT_HOME"] = stack.enter_context(tempfile.TemporaryDirectory())
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        url = os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
        stack.enter_context(serve.server("127.0.0.1", port, url, serve.Ends()))
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--trainings", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a training")
    parser.add_argument("--runs", type=int, default=200, help="single stages at once")
    options = parser.parse_args()
    with server(), built(options.trainings) as house:
        timed("runner", house.root)
        up_to_date(house, options.rounds)
        trivial(house, options.rounds)
        side_by_side(house, options.trainings, options.seconds, options.rounds)
    with built(options.runs) as house:
        at_once(house, options.runs)


if __name__ == "__main__":
    main()
