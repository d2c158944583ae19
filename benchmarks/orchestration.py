"""What orchestration costs and gains: `dvc repro`, the runner and the Prefect flow over one graph.

    python -m benchmarks.orchestration                  # all of it, about a quarter of an hour
    python -m benchmarks.orchestration overhead many    # parts of it

Each part makes a repository of its own in a temporary folder and has every contender do the same
work in turn, as commands, so that Python's start and all imports count. Before each turn a number
in `params.yaml` changes, which makes every stage stale. Medians over rounds, with their spread:

    overhead    stages that write one number: seconds for each of them, and for each that is up to
                date; what is up to date is the whole command divided by the stages
    parallel    independent stages that sleep: wall time of `dvc repro` over that of two workers,
                which cannot exceed 2
    trainings   the same of real trainings: RBMs of scikit-learn's digits, one thread each
    many        stages that all run at once: entries that dvc.lock has in the end, and what DVC
                says is changed
    default     nothing to do in this checkout, which has to be up to date
"""

import argparse
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

import httpx
from dvc.repo import Repo
from ruamel.yaml import YAML

CHECKOUT = Path(__file__).resolve().parents[1]
QUIET = {"DVC_NO_ANALYTICS": "1", "DO_NOT_TRACK": "true", "EBM_TRACKING": "0"}
CONTENDERS = {
    "dvc repro": "{dvc} repro {targets}",
    "runner -j 1": "{python} -m pipelines.run -j 1 {targets}",
    "runner -j 2": "{python} -m pipelines.run -j 2 {targets}",
    "flow -j 2": "{python} -m pipelines.flows -j 2 {targets}",
}
GRAPH = """\
stages:
  stage:
    foreach: ${names}
    do:
      cmd: sleep ${seconds}; echo ${item} ${value} > out/${item}
      params: [value]
      outs:
        - out/${item}
"""


class House:
    """A repository with our `pipelines` in it, of independent stages that sleep for `seconds`."""

    def __init__(self, root: Path, stages: int, seconds: float) -> None:
        self.root, self._value = root, 0
        self._settings = {"names": [f"s{k}" for k in range(stages)], "seconds": seconds}
        _checkout(root)
        (root / "out").mkdir()
        (root / "dvc.yaml").write_text(GRAPH)
        # The pipelines validate their parameters; those of this graph are none of theirs.
        (root / "src/ebm/params.py").write_text("def load(path):\n    return None\n")

    def stale(self) -> None:
        """Make every stage stale."""
        self._value += 1
        content = {**self._settings, "value": self._value}
        YAML().dump(content, self.root / "params.yaml")


class Trainings:
    """A repository of `count` trainings of RBMs."""

    def __init__(self, root: Path, count: int, steps: int) -> None:
        self.root, self._seed = root, 0
        self._count, self._steps = count, steps
        _checkout(root)
        shutil.copytree(CHECKOUT / "tables", root / "tables")
        shutil.copy(CHECKOUT / "dvc.yaml", root)

    def stale(self) -> None:
        """Make every training stale."""
        settings = YAML().load(CHECKOUT / "params.yaml")
        experiment = settings["experiments"]["rbm-digits"]
        experiment["train"]["steps"] = self._steps
        settings["datasets"] = {"digits": settings["datasets"][experiment["dataset"]]}
        experiment["dataset"] = "digits"
        self._seed += self._count
        settings["experiments"] = {
            f"rbm-{k}": {**experiment, "seed": self._seed + k} for k in range(self._count)
        }
        YAML().dump(settings, self.root / "params.yaml")


def _checkout(root: Path) -> None:
    root.mkdir()
    for folder in ("pipelines", "src"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(CHECKOUT / folder, root / folder, ignore=ignore)
    for command in (["git", "init", "-q"], [_program("dvc"), "init", "-q"]):
        subprocess.run(command, cwd=root, check=True)


def _program(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def seconds(root: Path, contender: str, targets: str = "") -> float:
    """How long a command takes; RuntimeError with what it printed if it fails."""
    command = CONTENDERS[contender].format(
        python=sys.executable, dvc=_program("dvc"), targets=targets
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    begun = time.perf_counter()
    done = subprocess.run(
        command.split(),
        cwd=root,
        env={**os.environ, **QUIET, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stdout}{done.stderr}")
    return time.perf_counter() - begun


def in_turn(
    rounds: int, contenders: Sequence[str], once: Callable[[str], float]
) -> dict[str, list[float]]:
    """What `once` says of each contender, in every round of all."""
    times: dict[str, list[float]] = {contender: [] for contender in contenders}
    for _ in range(rounds):
        for contender in contenders:
            times[contender].append(once(contender))
    return times


def told(times: Mapping[str, Sequence[float]], unit: str, scale: float = 1.0) -> None:
    """A line for each contender; ratios are of the first one to it, round by round."""
    peer = next(iter(times.values()))
    for name, all_rounds in times.items():
        ratios = [one / other for one, other in zip(peer, all_rounds, strict=True)]
        spread = f"{median(ratios):5.2f}x ({min(ratios):.2f} - {max(ratios):.2f})"
        print(f"  {name:12} {median(all_rounds) * scale:9.3f} {unit}   {spread}", flush=True)


def overhead(folder: Path, options: argparse.Namespace) -> None:
    stages = 10 if options.small else 30
    house = House(folder / "overhead", stages, 0)
    rested: dict[str, list[float]] = {name: [] for name in CONTENDERS}

    def once(contender: str) -> float:
        house.stale()
        busy = seconds(house.root, contender)
        rested[contender].append(seconds(house.root, contender))
        return busy - rested[contender][-1]

    times = in_turn(options.rounds, list(CONTENDERS), once)
    print(f"\n{stages} trivial stages: a stage, beyond what a run without work takes")
    told(times, "s", 1 / stages)
    print(f"{stages} stages that are up to date: a stage, of the whole command")
    told(rested, "s", 1 / stages)


def parallel(folder: Path, options: argparse.Namespace) -> None:
    stages, nap = (4, 0.5) if options.small else (16, 5.0)
    house = House(folder / "parallel", stages, nap)
    _race(house, options, f"{stages} stages of {nap:g} s")


def trainings(folder: Path, options: argparse.Namespace) -> None:
    count, steps = (2, 100) if options.small else (16, 5000)
    house = Trainings(folder / "trainings", count, steps)
    house.stale()
    seconds(house.root, "dvc repro", "prepare")
    _race(house, options, f"{count} trainings of {steps} steps", "train")


def _race(
    house: House | Trainings, options: argparse.Namespace, title: str, targets: str = ""
) -> None:
    def once(contender: str) -> float:
        house.stale()
        return seconds(house.root, contender, targets)

    times = in_turn(options.rounds, ["dvc repro", "runner -j 2", "flow -j 2"], once)
    print(f"\n{title}: wall time")
    told(times, "s")


def many(folder: Path, options: argparse.Namespace) -> None:
    stages = 20 if options.small else 200
    house = House(folder / "many", stages, 2.0)
    house.stale()
    CONTENDERS["many"] = f"{{python}} -m pipelines.run -j {stages}"
    taken = seconds(house.root, "many")
    entries = YAML(typ="safe").load(house.root / "dvc.lock")["stages"]
    with contextlib.chdir(house.root), Repo() as repo:
        changed = repo.status()
    print(
        f"\n{stages} stages at once, {taken:.0f} s: {len(entries)} entries in dvc.lock, ", end=""
    )
    print(f"changed: {changed or 'nothing'}")


def default(_: Path, options: argparse.Namespace) -> None:
    contenders = ["dvc repro", "runner -j 2", "flow -j 2"]
    times = in_turn(options.rounds, contenders, lambda name: seconds(CHECKOUT, name))
    print("\nthe default graph, up to date: wall time")
    told(times, "s")


PARTS = {
    "overhead": overhead,
    "parallel": parallel,
    "trainings": trainings,
    "many": many,
    "default": default,
}


@contextlib.contextmanager
def prefect(folder: Path) -> Iterator[None]:
    """A Prefect server on the loopback for the time of this context."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ |= {
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1"]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen([*command, "--port", port], stdout=log, stderr=log)
    try:
        _wait_for(f"{os.environ['PREFECT_API_URL']}/health")
        yield
    finally:
        server.terminate()
        server.wait()


def _wait_for(address: str) -> None:
    for _ in range(600):
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(address).is_success:
                return
        time.sleep(0.2)
    raise TimeoutError(address)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="few and short stages")
    options = parser.parse_args(argv)
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"no part is called {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as name, prefect(Path(name)):
        for part in options.parts or PARTS:
            PARTS[part](Path(name), options)


if __name__ == "__main__":
    main()
