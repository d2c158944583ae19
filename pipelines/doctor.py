"""`python -m pipelines.doctor`: what is wrong with this machine, and what to do about it.

One line for each thing: `ok`, `note` (nothing that stops a run) or `wrong`, which makes the exit
code 1. A check looks, and changes nothing. It imports no heavy package, and whatever it needs only
when it is its turn, so that a machine on which little is installed is told what is missing.
"""

import configparser
import contextlib
import importlib.util
import json
import os
import platform
import re
import shutil
import sqlite3
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from ebm import files
from pipelines import ROOT, gpu
from pipelines.places import misread
from pipelines.spool import Spool

Environment = Mapping[str, str]

ENOUGH_GB = 2.0
INSTALL = "uv pip install --require-hashes -r requirements.lock"
MOVE_DATABASE = "stop what uses it and move it away; the next run makes a new one"
PARAMS = ("params.yaml", "paper/params.yaml")
TABLE = ".dvc/tmp/rwlock"
RESULTS = ("data", "metrics", "models", "reports", "dvc.lock")
WRITTEN = (
    *(".", ".checkpoints", ".dvc", ".dvc/tmp", ".tracking", "mlflow.db", "mlruns", "paper"),
    *(f"{folder}{name}" for folder in ("", "paper/") for name in RESULTS),
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@dataclass(frozen=True)
class Finding:
    """What a check has to say, and what to do about it."""

    kind: Literal["ok", "note", "wrong"]
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        words = [part for part in (self.text, self.remedy) if part]
        return f"{self.kind:5}  {' '.join('; '.join(words).split())}"


Check = Callable[[Path, Environment], Iterator[Finding]]


def ok(text: str) -> Finding:
    """A check that passed."""
    return Finding("ok", text)


def note(text: str, remedy: str = "") -> Finding:
    """Worth knowing; stops nothing."""
    return Finding("note", text, remedy)


def wrong(text: str, remedy: str) -> Finding:
    """Something will fail, or does not get where it belongs, until someone acts."""
    return Finding("wrong", text, remedy)


def python(root: Path, _: Environment) -> Iterator[Finding]:
    """Python is as new as pyproject.toml asks (read without tomllib, which an old one lacks)."""
    project = (root / "pyproject.toml").read_text(encoding="utf-8")
    needed = re.findall(r'^requires-python = ">=([\d.]+)"', project, re.MULTILINE)[0]
    have = platform.python_version()
    if _numbers(have) < _numbers(needed):
        remedy = f"`rm -r .venv`, then `make doctor PYTHON=python{needed}`"
        yield wrong(f"Python {have} is older than {needed}", remedy)
    else:
        yield ok(f"Python {have}")


def packages(root: Path, _: Environment) -> Iterator[Finding]:
    """What is installed lies in the ranges of pyproject.toml."""
    import tomllib

    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    faults = list(filter(None, map(_unfit, project["dependencies"])))
    yield from faults or [ok(f"{len(project['dependencies'])} packages, in their ranges")]


def _unfit(line: str) -> Finding | None:
    from packaging.requirements import Requirement

    needed = Requirement(line)
    if needed.marker and not needed.marker.evaluate():
        return None
    try:
        have = metadata.version(needed.name)
    except metadata.PackageNotFoundError:
        return wrong(f"{needed.name} is not installed", INSTALL)
    if needed.specifier.contains(have, prereleases=True):
        return None
    return wrong(f"{needed.name} {have} is not {needed.specifier}", INSTALL)


def params(root: Path, _: Environment) -> Iterator[Finding]:
    """Both files of parameters can be used."""
    from ebm import EBMError
    from ebm.params import load

    for name in PARAMS:
        try:
            load(root / name)
        except EBMError as error:
            yield wrong(f"{name} cannot be used: {error}", f"correct it, or `git diff {name}`")
        else:
            yield ok(name)


def database(root: Path, environment: Environment) -> Iterator[Finding]:
    """`mlflow.db` is whole and of the installed MLflow, which makes it where there is none."""
    path = root / "mlflow.db"
    if problem := misread(environment.get("MLFLOW_TRACKING_URI") or f"sqlite:///{path}"):
        yield wrong(*f"the database has {problem}".split("; "))
    if not path.exists() or not path.stat().st_size:
        yield ok("mlflow.db: none yet")
        return
    try:
        with contextlib.closing(sqlite3.connect(_untouched(path), uri=True)) as opened:
            yield _state(opened)
    except sqlite3.OperationalError as error:
        remedy = "see what holds it and who may read it: `fuser -v mlflow.db; ls -l mlflow.db*`"
        yield wrong(f"mlflow.db cannot be read: {error}", remedy)
    except sqlite3.DatabaseError as error:
        yield wrong(f"mlflow.db is damaged: {error}", MOVE_DATABASE)


def _untouched(path: Path) -> str:
    """How to open a database without a trace: one with a log (WAL) that nobody has open would get
    an empty log, which a reader cannot remove."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        logged = file.read(19)[18:] == b"\x02"
        if logged and not path.with_name(f"{path.name}-wal").exists():
            return f"{path.as_uri()}?immutable=1"
    return f"{path.as_uri()}?mode=ro"


def _state(opened: sqlite3.Connection) -> Finding:
    (first, *_) = opened.execute("PRAGMA integrity_check(1)").fetchone()
    if first != "ok":
        return wrong(f"mlflow.db is damaged: {first}", MOVE_DATABASE)
    if not opened.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchone():
        return wrong("mlflow.db is not a database of MLflow", MOVE_DATABASE)
    found = opened.execute("SELECT version_num FROM alembic_version").fetchone()
    return _schema(found[0] if found else "none")


def _schema(found: str) -> Finding:
    """Compare a database's revision with those that the installed MLflow knows."""
    known, replaced = migrations()
    if not known:
        return note("mlflow.db is whole; its version cannot be told without MLflow")
    have = metadata.version("mlflow")
    if found not in known:
        remedy = "install the version that wrote it, or move it away"
        return wrong(f"mlflow.db (schema {found}) is unknown to MLflow {have}", remedy)
    if found in replaced:
        remedy = "copy it, then `mlflow db upgrade sqlite:///mlflow.db`"
        return wrong(f"mlflow.db (schema {found}) is older than MLflow {have}", remedy)
    return ok(f"mlflow.db, whole and of MLflow {have}")


def migrations() -> tuple[set[str], set[str]]:
    """The schemas that the installed MLflow knows, and those of them that have a successor, read
    from its files: to import it takes seconds."""
    spec = importlib.util.find_spec("mlflow")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    pattern = "store/db_migrations/versions/*.py"
    found = [file for folder in folders for file in Path(folder).glob(pattern)]
    text = "\n".join(file.read_text(encoding="utf-8") for file in found)
    named = [
        {word for line in re.findall(rf"^{key}\s*=(.*)$", text, re.M) for word in _quoted(line)}
        for key in ("revision", "down_revision")
    ]
    return named[0], named[1]


def spools(root: Path, _: Environment) -> Iterator[Finding]:
    """What stages have written for MLflow has arrived there."""
    pending = [spool for spool in Spool.all(root) if spool.pending()]
    left = [spool for spool in pending if not spool.written()]
    if not pending:
        yield ok("tracking: everything is delivered")
    elif not left or files.held(root / ".tracking/lock"):
        yield note(f"tracking: runs that are being written or delivered: {len(pending)}")
    else:
        problems = [state.problem for spool in left if (state := spool.state()) and state.problem]
        why = f": {problems[0]}" if problems else ""
        text = f"tracking: runs that wait in .tracking: {len(left)}{why}"
        elsewhere = "`--to URI` if the address is wrong"
        yield wrong(text, f"`python -m pipelines.tracking` delivers them ({elsewhere})")


def checkpoints(root: Path, _: Environment) -> Iterator[Finding]:
    """No checkpoint is cut short (its end is looked at, not its checksum), none half written."""
    folder = root / ".checkpoints"
    faults = [
        wrong(f"{path.relative_to(root)} is damaged", "remove it; training takes an older one")
        for path in sorted(folder.rglob("step-*.ckpt"))
        if not zipfile.is_zipfile(path)
    ]
    rests = [
        note(f"{path.relative_to(root)} was left by a killed process", "remove it")
        for path in sorted(folder.rglob(".step-*.ckpt.*"))
        if not alive(int(path.suffix[1:]))
    ]
    yield from [*faults, *rests] or [ok("checkpoints, none damaged")]


def locks(root: Path, _: Environment) -> Iterator[Finding]:
    """Nothing that DVC was killed with keeps it from working.

    Its lock of the repository is one of the kernel, which ends with its holder: the file, and the
    number in it, always stay. Its table of who reads and writes what outlives who wrote it; DVC
    takes out processes that are gone, but stops at a table that it cannot read.
    """
    lock = root / ".dvc/tmp/lock"
    if files.held(lock):
        yield note(f"DVC is busy (process {lock.read_text().strip()})")
    try:
        entries = _entries(json.loads((root / TABLE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        entries = {}
    except (ValueError, TypeError, KeyError, AttributeError):
        yield _broken(root)
        return
    gone = [pid for pid in entries if not alive(pid)]
    yield from (_busy(pid, entries[pid]) for pid in entries if pid not in gone)
    if gone:
        text = f"{TABLE} is stale: it names processes that are gone: {', '.join(map(str, gone))}"
        yield note(text, f"DVC clears it when it has to; or `rm {TABLE}` while no DVC runs")
    else:
        yield ok("locks of DVC, none stale")


def _entries(table: Any) -> dict[int, str]:
    """The processes that DVC's table names, with their command lines."""
    readers = [info for infos in table.get("read", {}).values() for info in infos]
    named = [*readers, *table.get("write", {}).values()]
    return {int(info["pid"]): str(info["cmd"]) for info in named}


def _broken(root: Path) -> Finding:
    if files.held(root / f"{TABLE}.lock"):
        return note(f"{TABLE} is being written")
    return wrong(f"{TABLE} is broken, and DVC refuses to work", f"`rm {TABLE}` while no DVC runs")


def _busy(pid: int, command: str) -> Finding:
    remedy = f"if that number is another program's by now, `rm {TABLE}` while no DVC runs"
    return note(f"DVC is busy: process {pid} ({command})", remedy)


def device(_: Path, environment: Environment) -> Iterator[Finding]:
    """The GPU that EBM_DEVICE asks for is there."""
    name = environment.get("EBM_DEVICE", "")
    if name and not gpu.known_device(name):
        yield wrong(f"EBM_DEVICE is {name}", f"`unset EBM_DEVICE`, or set it to {gpu.DEVICES}")
        return
    there = gpu.count()
    if name.partition(":")[0] != "cuda" and (name or not there):
        yield ok(f"EBM_DEVICE {name or 'not set'}")
        return
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(name.partition(":")[2] or 0) < count:
        yield ok(f"EBM_DEVICE {name or 'not set'}, of {count}")
    elif name:
        text = f"EBM_DEVICE is {name}, and PyTorch {torch.__version__} sees GPUs: {count}"
        yield wrong(text, "`unset EBM_DEVICE`, or see to the driver: `nvidia-smi`")
    else:
        text = f"PyTorch {torch.__version__} cannot use the GPU that is here"
        aside = "or `EBM_DEVICE=cpu`, so that stages run side by side"
        yield wrong(text, f"see to the driver: `nvidia-smi`; {aside}")


def disk(root: Path, _: Environment) -> Iterator[Finding]:
    """There is room where results and DVC's copies of them go."""
    for what, folder in (("the project", root), ("DVC's cache", cache(root))):
        free = shutil.disk_usage(_existing(folder)).free / 1e9
        text = f"{free:.1f} GB free for {what} ({folder})"
        if free < ENOUGH_GB:
            unused = "`dvc gc -A --all-experiments` drops what no commit names"
            yield wrong(f"only {text}", f"make room; {unused}")
        else:
            yield ok(text)


def permissions(root: Path, _: Environment) -> Iterator[Finding]:
    """What runs write to may be written."""
    paths = [path for path in (*(root / name for name in WRITTEN), cache(root)) if path.exists()]
    shut = [path for path in paths if not os.access(path, os.W_OK)]
    for path in shut:
        yield wrong(f"{path} may not be written", f"`sudo chown -R $USER '{path}'`")
    if not shut:
        yield ok(f"{len(paths)} folders and files may be written")


def git(root: Path, environment: Environment) -> Iterator[Finding]:
    """The project is a git repository with a commit, to which results are traced."""
    program = shutil.which("git", path=environment.get("PATH"))
    if not program:
        yield wrong("git is not installed", "`apt-get install git`")
        return
    command = [program, "-C", str(root), "rev-parse", "--verify", "--short", "HEAD"]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    if asked.returncode:
        remedy = "work in a clone"
        if "dubious ownership" in asked.stderr:
            remedy = f"`git config --global --add safe.directory '{root}'`"
        yield wrong(f"no git repository: {asked.stderr}", remedy)
    else:
        yield ok(f"git, at commit {asked.stdout}")


def browser(_: Path, environment: Environment) -> Iterator[Finding]:
    """A Chromium, with which only tests of the report look at it."""
    path = environment.get("PATH")
    home = Path(environment.get("HOME", "/")) / ".cache/ms-playwright"
    own = Path(environment.get("PLAYWRIGHT_BROWSERS_PATH") or home)
    if any(shutil.which(name, path=path) for name in BROWSERS) or any(own.glob("chromium-*")):
        yield ok("Chromium")
    else:
        yield note("no Chromium: tests in a browser are skipped", "`playwright install chromium`")


def alive(pid: int) -> bool:
    """Whether there is a process of this number, whoever it belongs to."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def cache(root: Path) -> Path:
    """DVC's cache folder, as the repository's configuration has it."""
    config = configparser.ConfigParser(strict=False, interpolation=None)
    config.read([root / ".dvc/config", root / ".dvc/config.local"], encoding="utf-8")
    named = config.get("cache", "dir", fallback="cache")
    return (root / ".dvc" / Path(named).expanduser()).resolve()


def _existing(path: Path) -> Path:
    """The folder itself, or the closest one above it that is there."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def _quoted(line: str) -> list[str]:
    return re.findall(r"[\"'](\w+)[\"']", line)


CHECKS: Sequence[Check] = (
    *(python, packages, git, params, database, spools, checkpoints),
    *(locks, device, disk, permissions, browser),
)


def examine(
    root: Path, environment: Environment, checks: Iterable[Check] = CHECKS
) -> Iterator[Finding]:
    """What all checks find. A check that cannot be made is a finding, and not the end."""
    for check in checks:
        try:
            yield from check(root, environment)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            yield wrong(f"{check.__name__} cannot be checked: {reason}", "see to that first")


def main() -> int:
    """Print a line for each finding; 1 if anything is wrong."""
    code = 0
    for finding in examine(ROOT, os.environ):
        print(finding, flush=True)
        code |= finding.kind == "wrong"
    return code


if __name__ == "__main__":
    sys.exit(main())
