"""A small DVC repository with our `pipelines` in it, whose stages take fractions of a second.

What a stage does beyond writing its output is told by files that DVC does not see.
"""

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import httpx
import psutil
from ruamel.yaml import YAML

T = TypeVar("T")
CHECKOUT = Path(__file__).resolve().parents[1]

STAGE = """\
import json, os, pathlib, signal, subprocess, sys, time

name = "@".join(sys.argv[1:])
told = pathlib.Path("told", name)
told = json.loads(told.read_text()) if told.exists() else {}

def note(event, pid=os.getpid()):
    with open("events", "a") as file:
        file.write(json.dumps([event, name, time.monotonic(), pid]) + "\\n")

if told.get("stubborn"):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if told.get("child"):
    note("child", subprocess.Popen(["sleep", "600"]).pid)
note("start")
print(told.get("prints", ""))
if told.get("ends"):
    folder = pathlib.Path(".checkpoints", sys.argv[2], "0")
    folder.mkdir(parents=True, exist_ok=True)
    folder.joinpath("ended").touch()
if told.get("breaks_cache"):
    os.rename(".dvc/cache", ".dvc/away")
    pathlib.Path(".dvc/cache").touch()  # a file, which is no place to keep anything
time.sleep(told.get("seconds", 0))
if told.get("failures", 0) >= open("events").read().count(f'["start", "{name}"'):
    sys.exit("ValueError: the dog ate it")
pathlib.Path("out").mkdir(exist_ok=True)
pathlib.Path("out", name).write_text(pathlib.Path("params.yaml").read_text())
note("end")
"""

PARAMS = "seed: 0\nexperiments:\n"
EXPERIMENT = """\
  {name}:
    train: {{steps: 1}}
    evaluate: {{samples: 1}}
"""
GRAPH = """\
stages:
  prepare:
    cmd: python stage.py prepare
    params: [seed]
    outs: [out/prepare]
  train:
    foreach: ${experiments}
    do:
      cmd: python stage.py train ${key}
      deps: [out/prepare]
      params:
      - experiments.${key}.train
      outs:
      - out/train@${key}
      meta: {timeout: 60, retries: 0}
  evaluate:
    foreach: ${experiments}
    do:
      cmd: python stage.py evaluate ${key}
      deps:
      - out/train@${key}
      params:
      - experiments.${key}.evaluate
      outs:
      - out/evaluate@${key}
  report:
    cmd: python stage.py report
    outs: [out/report]
    deps:
"""
# The real one would refuse the parameters of this house.
VALIDATION = """

def load(path):
    if "seed" not in path.read_text():
        raise EBMError("params.yaml: seed: missing")
"""


class House:
    """One such repository."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def build(cls, root: Path, experiments: Sequence[str] = ("a", "b")) -> "House":
        """Make one in which no stage has run."""
        house = cls(root)
        for folder in ("src/ebm/variants", "told", ".dvc"):
            (root / folder).mkdir(parents=True)
        subprocess.run(["git", "init", "-q", root], check=True)
        ours = shutil.ignore_patterns("__pycache__")
        shutil.copytree(CHECKOUT / "pipelines", root / "pipelines", ignore=ours)
        core = CHECKOUT / "src" / "ebm"
        configs = [f"variants/{file.name}" for file in (core / "variants").glob("*_config.py")]
        settings = "params.py", "schema.py", "variants/__init__.py", *configs
        for name in ("__init__.py", "files.py", *settings):
            shutil.copy(core / name, root / "src" / "ebm" / name)
        with (root / "src" / "ebm" / "params.py").open("a") as params:
            params.write(VALIDATION)
        shutil.copy(CHECKOUT / "prefect.yaml", root)
        house.write(".dvc/config", "")
        house.write(".dvc/.gitignore", "/tmp\n/cache\n")
        house.write("stage.py", STAGE)
        house.write(
            "params.yaml", PARAMS + "".join(EXPERIMENT.format(name=e) for e in experiments)
        )
        house.write("dvc.yaml", GRAPH + "".join(f"    - out/evaluate@{e}\n" for e in experiments))
        return house

    def write(self, path: str, text: str) -> None:
        (self.root / path).write_text(text)

    def edit(self, path: str, old: str, new: str) -> None:
        """Replace the only `old` in a file."""
        text = (self.root / path).read_text()
        assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {path}"
        self.write(path, text.replace(old, new))

    def tell(self, stage: str, **told: object) -> None:
        """Tell a stage to: sleep `seconds`, `print` a text, fail the first `failures` times, start
        a `child`, be `stubborn` (ignore SIGINT and SIGTERM), leave the checkpoints of a training
        that `ends`, or have DVC's cache out of the way (`breaks_cache`)."""
        self.write(f"told/{stage}", json.dumps(told))

    def events(self, *kinds: str) -> list[tuple[str, str, float, int]]:
        """What stages have noted: (start | end | child, stage, monotonic time, process id)."""
        path = self.root / "events"
        events = path.read_text().splitlines() if path.exists() else []
        return [tuple(e) for e in map(json.loads, events) if not kinds or e[0] in kinds]

    def copy(self, root: Path) -> "House":
        """The same one at another place."""
        return House(shutil.copytree(self.root, root))

    def ran(self) -> list[str]:
        """The stages that have come to their end, in that order."""
        return [stage for _, stage, _, _ in self.events("end")]

    def commit(self, message: str = "Everything") -> None:
        """Commit what is not ignored; what stages are told, and their events, are."""
        self.write(".gitignore", "/events\n/told/\n/.checkpoints/\n/reports/\n__pycache__/\n")
        self.git("add", "-A")
        self.git("commit", "-q", "-m", message)

    def clone(self, root: Path) -> "House":
        """A clone of it, in which no stage has run."""
        subprocess.run(["git", "clone", "-q", self.root, root], check=True)
        (root / "told").mkdir()
        return House(root)

    def git(self, *arguments: str) -> str:
        """What git says."""
        command = ["git", "-c", "user.name=Ada", "-c", "user.email=ada@example.org", *arguments]
        return subprocess.run(command, cwd=self.root, check=True, stdout=-1, text=True).stdout

    def lock(self) -> dict[str, object]:
        """The entries of its `dvc.lock`, by stage."""
        return YAML(typ="safe").load(self.root / "dvc.lock")["stages"]

    def forget(self) -> None:
        """Forget the events so far."""
        (self.root / "events").unlink(missing_ok=True)

    @contextlib.contextmanager
    def start(
        self, *arguments: str, module: str = "run", **environment: str
    ) -> Iterator[subprocess.Popen]:
        """Start `python -m pipelines.<module>` as a user would, in a session of its own.

        If it still runs at the end of the context, because the test fails, it is killed with all
        that it started in this session, and what it printed is shown.
        """
        with subprocess.Popen(
            [sys.executable, "-m", f"pipelines.{module}", *arguments],
            cwd=self.root,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                yield process
            except BaseException:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                print(process.stdout.read())
                raise

    def run(self, *arguments: str, module: str = "run", **environment: str) -> tuple[int, str]:
        """Its exit code and what it printed."""
        with self.start(*arguments, module=module, **environment) as process:
            output, _ = process.communicate(timeout=300)
        return process.returncode, output

    def status(self) -> dict[str, object]:
        """What DVC itself says is changed."""
        from dvc.repo import Repo

        with contextlib.chdir(self.root), Repo() as repo:
            return repo.status()


@functools.cache
def built(folder: Path) -> tuple[House, str]:
    """A house in which every stage has run, made once, and what the runner said then."""
    house = House.build(folder / "built-house")
    house.tell("train@b", prints=" 1%\r 50%\r100%")
    code, output = house.run("-j2")
    assert code == 0, output
    house.forget()
    return house, output


def wait_for(condition: Callable[[], T], seconds: float) -> T:
    """The first true value of a condition; an AssertionError if it takes longer than `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)
    return value


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def free_port() -> int:
    """A port of the loopback that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def healthy(client):
    """Whether the server that an HTTP client talks to says that it is well."""
    try:
        return client.get("/health").is_success
    except httpx.TransportError:
        return False
